"""From files, folders and archives to pixels: the one road every image takes.

`decode` is "From image to pixels" of the command line's contract: first frame, EXIF orientation, transparency
over white, RGB, centre square, Pillow bicubic, 8 bits. `walk` lists images to score, `load_source` decodes a
labelled data source into one uint8 array, `near_duplicates` compares two such arrays.

Nothing is ever unpacked to disk, no global state of Pillow is changed (but that libtiff no longer writes to
stderr), and every function may be called from several threads at once. Colour profiles are ignored: the
pixels are taken as sRGB, as data sets are made.
"""

from __future__ import annotations

import bz2
import contextlib
import ctypes
import errno
import functools
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import stat
import struct
import sys
import tempfile
import threading
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL import __version__ as pillow_version

from ratioctl.errors import ImageError, SourceError
from ratioctl.utils import resources
from ratioctl.utils.suggest import nearest

FORMATS = "PNG, JPEG, WebP, BMP, GIF, TIFF, PPM/PGM/PBM"
# fmt: off
SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".pfm",
))
# fmt: on
# Photographs all the same, though we cannot read them: they are reported rather than passed over in silence.
FOREIGN_SUFFIXES = frozenset((".heic", ".heif", ".avif", ".jxl", ".jp2"))
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")
SPLIT_NAMES = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout")
)

MAX_PIXELS = 89_478_485  # Pillow's own threshold: 256 MiB of RGB
MAX_BYTES = 256 * 2**20  # of one encoded image, in a file or in an archive
LARGE_PIXELS = 16_000_000  # above it images are decoded one at a time, so that threads do not multiply memory
MAX_TAR_HEADER = 2**20  # bytes of one extended header (a long name); honest ones stay below some kilobytes

_ONE_LARGE = threading.Lock()
_QUIET = threading.Lock()


# --- one image ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An image as the model sees it, and what was done to it on the way."""

    pixels: np.ndarray  # (size, size, channels) uint8
    format: str  # "PNG", "JPEG", ...
    mode: str  # Pillow's mode of the file: "RGB", "P", "CMYK", "I;16", ...
    width: int  # of the file, before orientation
    height: int
    notes: tuple[str, ...]  # "turned by its EXIF orientation 6", "resized from 480x480 to 32x32", ...


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Pillow parses the EXIF block for a resolution nobody asked for and warns where it is damaged."""


_PLUGINS: tuple[tuple[str, Callable[[bytes], bool], Callable[..., ImageFile.ImageFile]], ...] = (
    ("PNG", lambda b: b.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("JPEG", lambda b: b.startswith(b"\xff\xd8\xff"), _Jpeg),
    ("WebP", lambda b: b[:4] == b"RIFF" and b[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    ("GIF", lambda b: b[:6] in (b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    (
        "TIFF",
        lambda b: b[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*"),
        TiffImagePlugin.TiffImageFile,
    ),
    ("BMP", lambda b: b[:2] == b"BM", BmpImagePlugin.BmpImageFile),
    ("PPM", lambda b: b[:1] == b"P" and b[1:2] in b"123456fF" and b[1:2] != b"", PpmImagePlugin.PpmImageFile),
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def shown(name: str | bytes | os.PathLike[str]) -> str:
    r"""A file name that is safe in a message: invalid UTF-8 as `\xff`, control characters as `\n`, `\x1b`."""
    text = _readable(os.fspath(name))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _readable(name: str | bytes) -> str:
    r"""`name` as valid Unicode; bytes that are not UTF-8 become `\xff`. Nothing else changes."""
    raw = (
        name
        if isinstance(name, bytes)
        else name.encode("utf-8", "surrogateescape" if _escaped(name) else "replace")
    )
    return raw.decode("utf-8", "backslashreplace")


def _escaped(name: str) -> bool:
    return all(not 0xD800 <= ord(c) <= 0xDFFF or 0xDC80 <= ord(c) <= 0xDCFF for c in name)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES. Never waits for a FIFO or reads a device.

    Raises:
        ImageError: missing, not a regular file, not readable, empty or too large; the reason says which.
    """
    name = shown(os.fspath(path))
    try:
        _refuse_special(os.stat(path).st_mode, name)
        flags = (
            os.O_RDONLY
            | getattr(os, "O_NONBLOCK", 0)
            | getattr(os, "O_CLOEXEC", 0)
            | getattr(os, "O_BINARY", 0)
        )
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            _refuse_special(status.st_mode, name)  # it may have been exchanged between stat and open
            if status.st_size > MAX_BYTES:
                raise _too_long(name)
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise _unreadable(name, e) from e
    except ValueError as e:  # a NUL byte in the name
        raise ImageError(name, "is no possible file name") from e
    return _sized(data, name)


def _refuse_special(mode: int, name: str) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = (
        (stat.S_ISDIR, "is a folder, not an image"),
        (stat.S_ISFIFO, "is a FIFO, not a file"),
        (stat.S_ISSOCK, "is a socket, not a file"),
        (stat.S_ISCHR, "is a device, not a file"),
        (stat.S_ISBLK, "is a device, not a file"),
    )
    raise ImageError(name, next((text for test, text in kinds if test(mode)), "is not a regular file"))


def _unreadable(name: str, e: OSError) -> ImageError:
    known = {
        errno.ENOENT: ("does not exist", "Check the spelling of the path."),
        errno.ENOTDIR: ("does not exist", "Check the spelling of the path."),
        errno.EACCES: ("may not be read: no permission", "Change its permissions or run as its owner."),
        errno.EPERM: ("may not be read: no permission", "Change its permissions or run as its owner."),
        errno.ELOOP: ("is a symbolic link that leads back to itself", ""),
        errno.ENAMETOOLONG: ("does not exist: the name is too long", ""),
        errno.EMFILE: ("cannot be opened: too many open files", "Raise the limit with `ulimit -n`."),
    }
    reason, step = known.get(e.errno or 0, (f"cannot be read: {e.strerror or e}", ""))
    return ImageError(name, reason, step)


def _too_long(name: str) -> ImageError:
    return ImageError(name, f"is larger than {MAX_BYTES >> 20} MiB, the limit for one image file")


def _sized(data: bytes, name: str) -> bytes:
    if not data:
        raise ImageError(name, "is empty (0 bytes)")
    if len(data) > MAX_BYTES:
        raise _too_long(name)
    return data


def decode(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO,
    size: int,
    channels: int = 3,
    *,
    name: str | None = None,
) -> Decoded:
    """The model's 8-bit input made from an encoded image, by the same steps on every road.

    First frame; EXIF orientation; transparency over white; RGB (16-bit scaled, CMYK converted) or, for one
    channel, ITU-R 601 grey; centre square; Pillow bicubic to `size`; 8 bits. JPEGs are decoded at reduced
    scale down to twice `size`. An image that has the model's size already passes unchanged.

    Args:
        source: a path, the encoded bytes, or a binary stream.
        size: height and width of the result.
        channels: 3 or 1.
        name: what messages call the image; the path by default.
    Returns:
        `pixels` (size, size, channels) uint8, fresh and writable, and notes of what was done.
    Raises:
        ImageError: the image cannot be read; the reason says why.
        ValueError: an impossible `size` or `channels`.
    """
    if size < 1 or channels not in (1, 3):
        raise ValueError(f"size must be positive and channels 1 or 3, not {size} and {channels}")
    if isinstance(source, str | os.PathLike):
        name = shown(source) if name is None else name
        data = read_file(source)
    else:
        name = "image" if name is None else name
        data = _sized(_drain(source, name) if hasattr(source, "read") else bytes(source), name)  # type: ignore[arg-type]
    plugin = next((p for p in _PLUGINS if p[1](data)), None)
    if plugin is None:
        raise ImageError(name, _what_is_it(data), f"Images may be {FORMATS}.")
    kind, _, opener = plugin
    # Pillow warns about damaged tags of these; the filter that silences it is global, so they take turns.
    noisy = kind in ("TIFF", "GIF") or (kind == "PNG" and b"acTL" in data)
    if kind == "TIFF":
        _hush_libtiff()
    try:
        with _no_pillow_warnings() if noisy else contextlib.nullcontext():
            return _decode(opener, data, size, channels, kind, name)
    except ImageError:
        raise
    except MemoryError as e:
        raise ImageError(name, "does not fit into memory") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ImageError(name, f"has more than {MAX_PIXELS:,} pixels", "Make it smaller first.") from e
    except Exception as e:  # decoders raise whatever their parsing stumbles over
        raise ImageError(name, _damage(kind, e), "Save or fetch it again.") from e


def _drain(stream: BinaryIO, name: str) -> bytes:
    try:
        return stream.read(MAX_BYTES + 1)
    except OSError as e:
        raise _unreadable(name, e) from e


@functools.cache
def _hush_libtiff() -> None:
    """Damage is reported in our words; libtiff and Pillow's reader of TIFFs also write theirs to stderr."""
    logging.getLogger(TiffImagePlugin.__name__).addHandler(logging.NullHandler())
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff, or with it sealed inside
        # Symbols of a library are looked up in those it depends on, too, wherever Pillow keeps its libtiff.
        handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
        handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        handler(None)


@contextlib.contextmanager
def _no_pillow_warnings() -> Iterator[None]:
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _decode(
    opener: Callable[..., ImageFile.ImageFile], data: bytes, size: int, channels: int, kind: str, name: str
) -> Decoded:
    # The plug-in is called directly: Image.open would warn about large images, and warnings are global state.
    with opener(io.BytesIO(data)) as im:
        width, height = im.size
        if width < 1 or height < 1:
            raise ImageError(name, "has no pixels")
        if width * height > MAX_PIXELS:
            reason = f"has {width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that are decoded"
            raise ImageError(name, reason, "Make it smaller first.")
        with _ONE_LARGE if width * height > LARGE_PIXELS else contextlib.nullcontext():
            return _to_square(im, size, channels, kind, name)


def _to_square(im: ImageFile.ImageFile, size: int, channels: int, kind: str, name: str) -> Decoded:
    width, height, mode = *im.size, im.mode
    notes: list[str] = []
    if kind == "TIFF":  # Pillow turns TIFFs itself while loading
        turn = im.tag_v2.get(274, 1)  # type: ignore[attr-defined]
        if turn in _TURNS:
            notes.append(f"turned by its orientation tag {turn}")
    if kind == "JPEG":
        im.draft(None, (2 * size, 2 * size))
    im.load()
    picture: Image.Image = im
    if kind != "TIFF":
        turn = orientation(im.info.get("exif"))
        if turn in _TURNS:
            picture = picture.transpose(_TURNS[turn])
            notes.append(f"turned by its EXIF orientation {turn}")
    # A transposed copy keeps `info`, where a palette's or a key colour's transparency stands.
    picture, note = _to_rgb(picture, kind, name)
    notes += note
    if channels == 1:
        picture = picture.convert("L")
    # Only now the size that a reader knows: a JPEG may have been decoded at a reduced scale.
    seen = (height, width) if turn in (5, 6, 7, 8) and kind != "TIFF" else (width, height)
    if seen[0] != seen[1]:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
        notes.append(f"cut to the centre square of {seen[0]}x{seen[1]}")
    if min(seen) != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        notes.append(f"resized from {min(seen)}x{min(seen)} to {size}x{size}")
    pixels = np.array(picture, dtype=np.uint8).reshape(size, size, channels)
    if _has_more_frames(im, kind):
        notes.insert(0, "first frame of several")
    return Decoded(pixels=pixels, format=kind, mode=mode, width=width, height=height, notes=tuple(notes))


def _to_rgb(im: Image.Image, kind: str, name: str) -> tuple[Image.Image, list[str]]:
    """RGB or L picture of `im`, transparency over white."""
    if im.mode.startswith("I;16") or (im.mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(im).astype(np.uint32)
        grey = ((np.clip(values, 0, 65535) * 255 + 32767) // 65535).astype(np.uint8)
        key = im.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB"), ["scaled from 16 to 8 bits"]
    if im.mode == "F":
        real = np.asarray(im)
        if not (np.isfinite(real).all() and real.min() >= 0 and real.max() <= 1):
            raise ImageError(name, "has floating-point pixels outside [0, 1]", "Convert it to 8 or 16 bits.")
        return Image.fromarray(np.rint(real * 255).astype(np.uint8)).convert("RGB"), [
            "scaled from floats to 8 bits"
        ]
    if im.mode == "I":
        raise ImageError(name, "has 32-bit integer pixels of unknown range", "Convert it to 8 or 16 bits.")
    if im.mode in ("La", "RGBa"):
        im = im.convert("LA" if im.mode == "La" else "RGBA")
    if im.mode in ("LA", "PA", "RGBA") or "transparency" in im.info:
        coloured = im.convert("RGBA")
        alpha = coloured.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return coloured.convert("RGB"), []
        white = Image.new("RGB", im.size, (255, 255, 255))
        white.paste(coloured, mask=alpha)
        return white, ["transparency laid over white"]
    if im.mode == "RGB":
        return im, []
    return im.convert("RGB"), [] if im.mode in ("1", "L", "P") else [f"converted from {im.mode}"]


def _has_more_frames(im: ImageFile.ImageFile, kind: str) -> bool:
    if kind in ("PNG", "WebP"):
        return bool(getattr(im, "is_animated", False))
    if kind not in ("GIF", "TIFF"):
        return False
    try:
        im.seek(1)
    except Exception:  # no second frame, or a damaged one: the first one is all we use
        return False
    return True


def orientation(exif: object) -> int:
    """The orientation 1..8 that an EXIF block states, 1 where it is missing or damaged.

    Only tag 0x0112 of the first directory is looked at: Pillow's parser warns about damage elsewhere.
    """
    if not isinstance(exif, bytes):
        return 1
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "little", b"MM": "big"}.get(block[:2])
    if order is None:
        return 1

    def number(at: int, length: int) -> int:
        return int.from_bytes(block[at : at + length], order)  # type: ignore[arg-type]

    start = number(4, 4)
    for entry in range(start + 2, min(start + 2 + 12 * number(start, 2), len(block) - 11), 12):
        if number(entry, 2) == 0x0112:
            length = {3: 2, 4: 4}.get(number(entry + 2, 2), 0)
            value = number(entry + 8, length)
            return value if value in _TURNS else 1
    return 1


def _what_is_it(data: bytes) -> str:
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    known: tuple[tuple[bool, str], ...] = (
        (brand in (b"avif", b"avis"), "is an AVIF image, which is not supported"),
        (
            brand in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"),
            "is a HEIC image, which is not supported",
        ),
        (data[:2] == b"\xff\x0a" or data[4:8] == b"JXL ", "is a JPEG XL image, which is not supported"),
        (data[4:8] == b"jP  ", "is a JPEG 2000 image, which is not supported"),
        (data[:4] == b"\x00\x00\x01\x00", "is an icon, which is not supported"),
        (data[:4] == b"8BPS", "is a Photoshop file, which is not supported"),
        (data[:5] == b"%PDF-", "is a PDF document, not an image"),
        (data[:2] == b"PK", "is a zip archive, not an image"),
        (not any(data[:4096]), "holds only zero bytes, not an image"),
    )
    for found, text in known:
        if found:
            return text
    head = data[:1024]
    if b"<svg" in head:
        return "is an SVG drawing, which is not supported"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as e:
        text = head[: e.start].decode("utf-8") if len(head) - e.start < 4 else "\0"
    if all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text):
        return "is text, not an image"
    return "is not an image of a known format"


def _damage(kind: str, e: Exception) -> str:
    # A field that should be there is not, which Pillow tells in words of Python, at times in a SyntaxError.
    if isinstance(e.__cause__ or e, struct.error | IndexError):
        return f"is a {kind} image that is cut short or damaged"
    detail = shown(str(e) or type(e).__name__)[:200]
    if "truncated" in detail.lower() or "Truncated" in detail or isinstance(e, EOFError):
        return f"is a {kind} image that is cut short ({detail})"
    return f"is a damaged {kind} image ({detail})"


# --- arrays ------------------------------------------------------------------------------------------------


def to_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], contiguous: exactly value / 255."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 (N, H, W, C), got {images.dtype} {images.shape}")
    out = np.empty((images.shape[0], images.shape[3], *images.shape[1:3]), dtype=np.float32)
    np.divide(images.transpose(0, 3, 1, 2), np.float32(255), out=out)
    return out


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float (N, C, H, W) in [0, 1] -> uint8 (N, H, W, C), rounded to nearest, values outside clipped.

    Raises:
        ValueError: NaN, or not four axes.
    """
    if pixels.ndim != 4:
        raise ValueError(f"expected (N, C, H, W), got {pixels.shape}")
    if np.isnan(pixels).any():
        raise ValueError("pixels hold NaN")
    scaled = np.rint(np.clip(pixels, 0, 1) * 255)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1).astype(np.uint8))


def pixels_sha256(pixels: np.ndarray) -> str:
    """SHA-256 over shape and bytes of an image's 8-bit input: what seeds its random numbers."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8, got {pixels.dtype}")
    head = "x".join(str(n) for n in pixels.shape) + "\n"
    return hashlib.sha256(head.encode("ascii") + np.ascontiguousarray(pixels).tobytes()).hexdigest()


# --- files, folders, archives ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Member:
    """One entry below a folder or archive. `name` is its POSIX path in there."""

    name: str
    kind: str = "image"  # or "folder", "other", "closed" (a folder that cannot be listed)
    file: str | None = None  # where it lies on disk
    data: bytes | None = field(default=None, repr=False)
    error: str = ""  # why it cannot be read, known already

    def read(self, name: str) -> bytes:
        if self.error:
            raise ImageError(name, self.error)
        if self.data is not None:
            return _sized(self.data, name)
        assert self.file is not None, "an entry that was only listed"
        try:
            return read_file(self.file)
        except ImageError as e:
            raise ImageError(name, e.reason, e.next_step) from e


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image to be read: what rows call it, and how to get its bytes (from any thread, repeatedly)."""

    path: str  # the argument as given, joined with the POSIX relative path; valid Unicode
    member: _Member = field(repr=False)

    def read(self) -> bytes:
        """The encoded bytes. Raises ImageError where they cannot be read."""
        return self.member.read(self.path)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.read())


def _suffix_kind(name: str) -> str:
    base = name.rsplit("/", 1)[-1].lower()
    suffix = base[base.rfind(".") :] if "." in base else ""
    return "image" if suffix in SUFFIXES or suffix in FOREIGN_SUFFIXES else "other"


def _is_hidden(name: str) -> bool:
    return any((p.startswith(".") and p not in (".", "..")) or p == "__MACOSX" for p in name.split("/"))


def is_archive(path: str | os.PathLike[str]) -> bool:
    """True for the name of a .tar, .tar.gz, .tar.xz, .tar.bz2 (or .tgz, .txz, .tbz2) or .zip file."""
    return os.fspath(path).lower().endswith(ARCHIVE_SUFFIXES)


def _folder_members(root: str) -> Iterator[_Member]:
    """Entries below `root`, sorted by name within each folder, files and folders in one order.

    Symbolic links to folders are followed, each target once and never into a folder that is being walked, so
    loops end. A folder that cannot be listed is an entry with an error.
    """
    linked: set[tuple[int, int]] = set()

    def visit(
        folder: str, prefix: str, above: frozenset[tuple[int, int]]
    ) -> Iterator[tuple[_Member, tuple[str, str, frozenset[tuple[int, int]]] | None]]:
        """Each entry, and for a folder the arguments of the visit to it."""
        unlisted = "is a folder that cannot be listed: "
        names: list[str] = []
        others: dict[str, os.DirEntry[str]] = {}  # what is no plain file; of a million those are only names
        try:
            with os.scandir(folder) as scan:
                for entry in scan:
                    if _is_hidden(entry.name):
                        continue
                    names.append(entry.name)
                    if not entry.is_file(follow_symlinks=False):
                        others[entry.name] = entry
        except OSError as e:
            name = prefix.rstrip("/") or "."
            yield _Member(name=name, kind="closed", error=f"{unlisted}{e.strerror}"), None
            return
        names.sort()
        for name in names:
            found, path = others.get(name), os.path.join(folder, name)
            try:
                is_folder = found is not None and found.is_dir()
            except OSError:
                is_folder = False
            if found is None or not is_folder:
                yield _Member(name=prefix + name, kind=_suffix_kind(name), file=path), None
                continue
            here = above
            try:
                status = os.stat(path)
                identity = (status.st_dev, status.st_ino)
                if found.is_symlink():
                    if identity in above or identity in linked:
                        continue
                    linked.add(identity)
                here = above | {identity}
            except OSError as e:
                yield _Member(name=prefix + name, kind="closed", error=f"{unlisted}{e.strerror}"), None
                continue
            yield _Member(name=prefix + name, kind="folder"), (path, prefix + name + "/", here)

    status = os.stat(root)
    # Not recursive: paths may be deeper than Python's stack.
    stack = [visit(root, "", frozenset({(status.st_dev, status.st_ino)}))]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
            continue
        member, inner = found
        yield member
        if inner is not None:
            stack.append(visit(*inner))


def _opened_tar(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:2] == b"\x1f\x8b":
        return _buffered(gzip.open(path, "rb"))
    if magic == b"\xfd7zXZ\0":
        return _buffered(lzma.open(path, "rb"))
    if magic[:3] == b"BZh":
        return _buffered(bz2.open(path, "rb"))
    return open(path, "rb", buffering=2**18)


def _buffered(raw: io.BufferedIOBase) -> BinaryIO:
    # The decompressors' own reads cost more than a header's parsing.
    return io.BufferedReader(raw, 2**18)  # type: ignore


class _DamagedError(Exception):
    """An archive that cannot be read to its end; the text says why."""


def _tar_members(path: str, wanted: Callable[[str], bool]) -> Iterator[_Member]:
    """Entries of a tar in the order of the archive, streamed: memory does not grow with their number.

    Unless `wanted(name)`, a member is only listed. Raises _DamagedError where the archive breaks off: the
    standard library's `tarfile` takes a damaged header for the end. It also keeps every member in memory,
    reads extended headers of any size whole, and costs more than decoding a small image does.
    """
    try:
        with _opened_tar(path) as raw:
            long_name, long_size = "", -1  # from extended headers, for the member that follows
            while any(block := _exactly(raw, 512)):
                name, size, kind = _tar_header(block)
                if kind in b"LKxXg":
                    if size > MAX_TAR_HEADER:
                        raise _DamagedError(f"it has a header of {size:,} bytes")
                    extended = _exactly(raw, size)
                    _skip(raw, -size % 512)
                    if kind == b"L":
                        long_name = _tar_text(extended)
                    elif kind in b"xX":
                        records = _pax_records(extended)
                        long_name = records.get("path", long_name)
                        long_size = int(records.get("size", long_size))
                        if any(key.startswith("GNU.sparse.") for key in records):
                            raise _DamagedError("it holds sparse files; pack it without --sparse")
                    continue
                size = size if long_size < 0 else long_size
                name, long_name, long_size = _member_name(long_name or name), "", -1
                size = 0 if kind in b"123456" else size  # links, devices and folders have no data
                image = bool(name) and not _is_hidden(name) and _suffix_kind(name) == "image"
                data = None
                if image and kind in b"07\0" and size <= MAX_BYTES and wanted(name):
                    data = _exactly(raw, size)
                    _skip(raw, -size % 512)
                else:
                    _skip(raw, size + -size % 512)
                if not name or _is_hidden(name):
                    continue
                if kind == b"5":
                    yield _Member(name=name, kind="folder")
                elif not image:
                    yield _Member(name=name, kind="other")
                elif kind in b"12":
                    yield _Member(
                        name=name, error="is a link inside the archive, and links are not followed there"
                    )
                elif kind not in b"07\0":
                    yield _Member(name=name, error="is not a regular file")
                elif size > MAX_BYTES:
                    yield _Member(name=name, error=_too_long(name).reason)
                else:
                    yield _Member(name=name, data=data)
    except (_DamagedError, GeneratorExit, MemoryError):
        raise
    except OSError as e:
        raise _DamagedError(shown(e.strerror or str(e))) from e
    except Exception as e:  # zlib, lzma and number parsing raise many kinds on damaged input
        raise _DamagedError(shown(str(e) or type(e).__name__)) from e


def _tar_header(block: bytes) -> tuple[str, int, bytes]:
    """(name, size, type) of a 512-byte header in the ustar, GNU or old format. Raises where it is damaged."""
    if sum(block) - sum(block[148:156]) + 8 * 32 != int(block[148:156].strip(b"\0 ") or b"0", 8):
        raise _DamagedError("a header does not match its checksum")
    if block[124] & 0x80:  # sizes of 8 GiB and more are binary
        size = int.from_bytes(block[125:136], "big") if block[124] == 0x80 else -1
    else:
        size = int(block[124:136].split(b"\0", 1)[0].strip() or b"0", 8)
    if size < 0:
        raise _DamagedError("a header states a negative size")
    name, kind = _tar_text(block[:100]), block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = _tar_text(block[345:500]) + "/" + name
    if kind in b"0\0" and name.endswith("/"):
        kind = b"5"  # how the oldest format marks a folder
    return name, size, kind


def _tar_text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _exactly(raw: BinaryIO, size: int) -> bytes:
    data = raw.read(size)
    if len(data) < size:
        raise _DamagedError("it breaks off before its end")
    return data


def _skip(raw: BinaryIO, size: int) -> None:
    while size > 0:
        size -= len(_exactly(raw, min(size, 2**20)))


def _pax_records(block: bytes) -> dict[str, str]:
    """The `LENGTH KEY=VALUE` lines of an extended header."""
    records = {}
    block = block.rstrip(b"\0")
    at = 0
    while at < len(block):
        space = block.index(b" ", at, at + 20)
        end = at + int(block[at:space])
        if not space < end <= len(block):
            raise _DamagedError("an extended header is damaged")
        key, _, value = block[space + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        at = end
    return records


def _zip_members(path: str, wanted: Callable[[str], bool]) -> Iterator[_Member]:
    """Entries of a zip, sorted by name; otherwise like `_tar_members`."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in sorted(archive.infolist(), key=lambda i: i.filename):
                name = _member_name(info.filename.replace("\\", "/"))
                if not name or _is_hidden(name):
                    continue
                if info.is_dir():
                    yield _Member(name=name, kind="folder")
                    continue
                kind = _suffix_kind(name)
                if kind != "image" or not wanted(name):
                    yield _Member(name=name, kind=kind)
                else:
                    yield _zip_member(archive, info, name)
    except GeneratorExit:
        raise
    except OSError as e:
        raise _DamagedError(shown(e.strerror or str(e))) from e
    except MemoryError:
        raise
    except Exception as e:
        raise _DamagedError(shown(str(e) or type(e).__name__)) from e


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> _Member:
    if info.flag_bits & 0x1:
        return _Member(name=name, error="is encrypted")
    if stat.S_ISLNK(info.external_attr >> 16):
        return _Member(name=name, error="is a link inside the archive, and links are not followed there")
    if info.file_size > MAX_BYTES:
        return _Member(name=name, error=_too_long(name).reason)
    try:
        with archive.open(info) as file:
            return _Member(name=name, data=file.read(MAX_BYTES + 1))
    except MemoryError:
        raise
    except Exception as e:
        return _Member(
            name=name, error=f"is damaged inside the archive ({shown(str(e) or type(e).__name__)[:200]})"
        )


def _member_name(name: str) -> str:
    """A member's name as a relative POSIX path. It only ever names: nothing is written or opened under it."""
    return _readable("/".join(p for p in name.split("/") if p not in ("", ".")))


def _archive_members(path: str, wanted: Callable[[str], bool]) -> Iterator[_Member]:
    reader = _zip_members if path.lower().endswith(".zip") else _tar_members
    return reader(path, wanted)


def walk(paths: Iterable[str | os.PathLike[str]], *, stdin: BinaryIO | None = None) -> Iterator[Item]:
    """The images that files, folders, archives and `-` (a list of paths on stdin) name, streamed.

    A file given by name is always an item. Folders are walked recursively in sorted order, for names with an
    image suffix, hidden ones left out; tars are streamed in the archive's order, zips sorted; `a.tar:dir`
    takes a part of an archive. What cannot be read (a folder without permission, the rest of a damaged
    archive) is an item whose `read()` raises ImageError. Lists on stdin are separated by newlines, or
    by NUL bytes.

    Args:
        paths: the arguments; checked at once, before the first item.
        stdin: where `-` reads from; the process's standard input by default.
    Raises:
        SourceError: an argument does not exist, or is a folder or archive without images.
    """
    arguments = [os.fspath(p) for p in paths]
    for argument in arguments:
        if argument == "-":
            continue
        if _locate(argument) is None:
            raise SourceError(shown(argument), "does not exist", "Check the spelling of the path.")
        with contextlib.closing(_expand(argument)) as items:
            if next(items, None) is None:
                raise SourceError(shown(argument), "holds no images", f"Images may be {FORMATS}.")
    return _walk(arguments, stdin)


def _walk(arguments: list[str], stdin: BinaryIO | None) -> Iterator[Item]:
    for argument in arguments:
        if argument != "-":
            yield from _expand(argument)
            continue
        for line in _lines(stdin if stdin is not None else sys.stdin.buffer):
            listed = os.fsdecode(line)
            if listed.endswith("\r") and not os.path.lexists(listed):
                listed = listed[:-1]
            found = False
            for item in _expand(listed):
                found = True
                yield item
            if not found:
                yield _broken(listed, "holds no images")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The entries of a list of paths, separated by NUL bytes where there are any, else by newlines."""
    read = getattr(stream, "read1", stream.read)
    rest, mark = b"", b""
    while chunk := read(2**16):
        rest += chunk
        mark = mark or (b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b"")
        if mark:
            *whole, rest = rest.split(mark)
            yield from (entry for entry in whole if entry)
    if rest:
        yield rest


def _locate(argument: str) -> tuple[str, str] | None:
    """(existing path, part of it) for `path` or `archive:part`; None where nothing exists."""
    try:
        if os.path.lexists(argument):
            return argument, ""
        left, colon, right = argument.rpartition(":")
        while colon:
            if is_archive(left) and os.path.isfile(left) and right.strip("/"):
                return left, argument[len(left) + 1 :].strip("/")
            left, colon, right = left.rpartition(":")
    except ValueError:  # a NUL byte
        pass
    return None


def _broken(path: str, reason: str) -> Item:
    return Item(path=_readable(path), member=_Member(name="", error=reason))


def _expand(argument: str) -> Generator[Item, None, None]:
    located = _locate(argument)
    if located is None:
        yield _broken(argument, "does not exist")
        return
    path, part = located
    if os.path.isdir(path):
        joint = path if path.endswith("/") else path + "/"
        for member in _folder_members(path):
            if member.kind in ("image", "closed"):
                yield Item(path=_readable(joint + member.name), member=member)
    elif is_archive(path) and os.path.isfile(path):
        inside = (lambda n: n == part or n.startswith(part + "/")) if part else (lambda n: True)
        try:
            for member in _archive_members(path, inside):
                if member.kind == "image" and inside(member.name):
                    yield Item(path=f"{_readable(path)}:{member.name}", member=member)
        except _DamagedError as e:
            yield _broken(path, f"is a damaged archive, not read to its end: {e}")
    else:
        yield Item(path=_readable(path), member=_Member(name=path, file=path))


# --- labelled sources --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SourceIndex:
    """What a labelled SOURCE holds, without its pixels. `names`, sorted by class, then name."""

    path: str
    split: str | None
    names: tuple[str, ...]  # POSIX paths inside the source
    labels: np.ndarray | None  # (N,) int64 into label_names; None for a flat source
    label_names: tuple[str, ...]  # sorted; empty for a flat source


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A SOURCE in memory. Images that could not be read are left out and stand in `errors`."""

    images: np.ndarray  # (N, H, W, C) uint8; may be a private (copy-on-write) memory map
    labels: np.ndarray | None  # (N,) int64; None for a flat source
    label_names: tuple[str, ...]
    names: tuple[str, ...]  # (N,) POSIX paths inside the source
    errors: tuple[tuple[str, str], ...]  # (name, reason)
    fingerprint: str  # SHA-256 of pixels, labels and label names: the same however the images are packed


def split_source(source: str) -> tuple[str, str | None]:
    """(path, split) of `PATH` or `PATH:SPLIT`. A colon belongs to the path where such a path exists.

    Raises:
        SourceError: nothing of that name exists.
    """
    if source and os.path.exists(source):
        return source, None
    left, colon, right = source.rpartition(":")
    if colon and left and os.path.exists(left):
        if not right.strip("/"):
            raise SourceError(shown(source), "names no split after the colon", "Write for example :test.")
        return left, right.strip("/")
    raise SourceError(shown(source), "does not exist", "Check the spelling of the path.")


def _source_members(path: str, wanted: Callable[[str], bool]) -> Iterator[_Member]:
    if os.path.isdir(path):
        return _listable_members(path)
    if is_archive(path) and os.path.isfile(path):
        return _archive_members(path, wanted)
    kinds = ", ".join(ARCHIVE_SUFFIXES)
    raise SourceError(shown(path), "is neither a folder nor an archive", f"Archives end in {kinds}.")


def _listable_members(path: str) -> Iterator[_Member]:
    for member in _folder_members(path):
        if member.kind == "closed":
            raise SourceError(shown(f"{path}/{member.name}"), member.error, "Change its permissions.")
        yield member


def list_source(source: str, *, exclude: Sequence[str] = ()) -> SourceIndex:
    """The names and labels of a SOURCE, nothing decoded; archives are read once.

    Raises:
        SourceError: as `load_source`.
    """
    path, split = split_source(source)
    names, folders = _listing(source, path)
    layout = _layout(source, names, folders, split, exclude)
    order = layout.order
    return SourceIndex(
        path=path,
        split=split,
        names=tuple(names[i] for i in order),
        labels=layout.labels,
        label_names=layout.label_names,
    )


def _listing(source: str, path: str) -> tuple[list[str], list[str]]:
    names: list[str] = []
    folders: list[str] = []
    try:
        for member in _source_members(path, lambda name: False):
            if member.kind == "image":
                names.append(_readable(member.name))
            elif member.kind == "folder":
                folders.append(_readable(member.name))
    except _DamagedError as e:
        raise _damaged_source(source, e) from e
    return names, folders


def _damaged_source(source: str, e: _DamagedError) -> SourceError:
    return SourceError(shown(source), f"is a damaged archive: {e}", "Fetch or pack it again.")


@dataclass(frozen=True, kw_only=True)
class _Layout:
    order: list[int]  # which of the names belong to the source, in their final order
    labels: np.ndarray | None
    label_names: tuple[str, ...]


def _layout(
    source: str, names: Sequence[str], folders: Iterable[str], split: str | None, exclude: Sequence[str]
) -> _Layout:
    """Classes of the image paths `names`; a folder that wraps all (`tar cf pets.tar pets`) is taken off."""
    shown_source = shown(source)
    if not names:
        raise SourceError(shown_source, "holds no images", f"Images may be {FORMATS}.")
    prefix = _prefix(shown_source, names, split)
    inside = [(i, n[len(prefix) :]) for i, n in enumerate(names) if n.startswith(prefix)]
    loose = [n for _, n in inside if "/" not in n]
    known = tuple(sorted({n.split("/", 1)[0] for _, n in inside if "/" in n}))
    if not known:
        if exclude:
            raise SourceError(shown_source, "has no classes, so none can be left out", "Drop the exclusion.")
        order = [i for i, _ in sorted(inside, key=lambda pair: pair[1])]
        return _Layout(order=order, labels=None, label_names=())
    if loose:
        reason = f"holds images beside its class folders, {shown(loose[0])} for one"
        raise SourceError(shown_source, reason, "Move them into a class folder or out of the source.")
    if len(known) > 1 and {k.lower() for k in known} <= SPLIT_NAMES:
        reason = f"is divided into {', '.join(known)}"
        raise SourceError(shown_source, reason, f"Say which, for example {shown_source}:{known[-1]}.")
    present = {
        f[len(prefix) :].split("/", 1)[0] for f in folders if f.startswith(prefix) and len(f) > len(prefix)
    }
    empty = sorted(present - set(known))
    for name in exclude:
        if name not in known and name not in empty:
            raise SourceError(
                f"class {shown(name)!r}",
                f"is not in {shown_source}",
                f"The nearest is {nearest(name, known, cutoff=0)!r}.",
            )
    empty = [e for e in empty if e not in exclude]
    if empty:
        reason = f"has no images for class {', '.join(shown(e) for e in empty)}"
        raise SourceError(shown_source, reason, "Add images, remove the folder, or leave the class out.")
    label_names = tuple(k for k in known if k not in set(exclude))
    if not label_names:
        raise SourceError(shown_source, "has no class left after the exclusion", "Leave out fewer classes.")
    number = {k: k_i for k_i, k in enumerate(label_names)}
    kept = sorted((number[n.split("/", 1)[0]], n, i) for i, n in inside if n.split("/", 1)[0] in number)
    labels = np.array([k for k, _, _ in kept], dtype=np.int64)
    return _Layout(order=[i for _, _, i in kept], labels=labels, label_names=label_names)


def _prefix(shown_source: str, names: Sequence[str], split: str | None) -> str:
    """What to take off the names: wrapping folders, then the split."""

    def tops(prefix: str) -> set[str]:
        return {n[len(prefix) :].split("/", 1)[0] for n in names}

    def wrapper(prefix: str, depth: int) -> str:
        first = tops(prefix)
        alone = len(first) == 1 and all(n.count("/", len(prefix)) >= depth for n in names)
        return prefix + first.pop() + "/" if alone else ""

    if split is None:
        # At most two: the folder that was packed, and a single split in it.
        outer = wrapper("", 2)
        return wrapper(outer, 2) or outer if outer else ""
    for prefix in ("", wrapper("", 1)):
        if any(n.startswith(f"{prefix}{split}/") for n in names):
            return f"{prefix}{split}/"
    outer = wrapper("", 2)
    there = sorted({n[len(outer) :].split("/", 1)[0] for n in names if "/" in n[len(outer) :]})
    has = (
        f"its first-level folders are {', '.join(shown(t) for t in there[:12])}"
        if there
        else "it has no folders"
    )
    if len(there) > 12:
        has += f" and {len(there) - 12} more"
    near = nearest(split, there)
    step = f"Did you mean :{shown(near)}?" if near else "Name one of them after the colon, or none."
    raise SourceError(shown_source, f"has no split {shown(split)!r}; {has}", step)


def load_source(
    source: str,
    size: int,
    channels: int = 3,
    *,
    exclude: Sequence[str] = (),
    workers: int | None = None,
    cache: bool = True,
) -> Loaded:
    """A labelled SOURCE decoded into one uint8 array, in an order that does not depend on how it is packed.

    SOURCE is a folder or a .tar, .tar.gz, .tar.xz, .tar.bz2 or .zip of one, either followed by `:SPLIT` for a
    first-level folder. Its first-level folders are the classes, images may lie deeper; images without any
    folder make an unlabelled source. Archives are streamed once; beside the array a few megabytes are used.

    Args:
        source: see above.
        size, channels: as for `decode`.
        exclude: classes to leave out.
        workers: decoding threads; the number of processors by default.
        cache: keep large results in `cache_dir()` and take them from there.
    Raises:
        SourceError: missing, damaged, without images, an empty class, splits but none chosen, an unknown
            class in `exclude`, or no image that can be read.
    """
    path, split = split_source(source)
    key = _cache_key(path, split, size, channels, exclude) if cache else None
    if key is not None and (cached := _cache_read(key)) is not None:
        return cached
    names, folders, images, failed = _decode_all(source, path, split, size, channels, workers)
    layout = _layout(source, names, folders, split, exclude)
    at = {name_index: row for row, name_index in enumerate(i for i in range(len(names)) if i not in failed)}
    good = [(place, i) for place, i in enumerate(layout.order) if i not in failed]
    errors = tuple((names[i], failed[i]) for i in layout.order if i in failed)
    if not good:
        name, reason = errors[0]
        raise SourceError(shown(source), f"has no image that can be read; {shown(name)} {reason}")
    images = _reordered(images, [at[i] for _, i in good])
    labels = None if layout.labels is None else layout.labels[[place for place, _ in good]]
    loaded = Loaded(
        images=images,
        labels=labels,
        label_names=layout.label_names,
        names=tuple(names[i] for _, i in good),
        errors=errors,
        fingerprint=_fingerprint(images, labels, layout.label_names),
    )
    if key is not None and images.nbytes >= CACHE_FROM_BYTES:
        _cache_write(key, loaded)
    return loaded


def _decode_all(
    source: str, path: str, split: str | None, size: int, channels: int, workers: int | None
) -> tuple[list[str], list[str], np.ndarray, dict[int, str]]:
    """(image names, folders, images of those that could be read in the order of names, {index: reason})."""
    names: list[str] = []
    folders: list[str] = []
    failed: dict[int, str] = {}
    images = np.empty((0, size, size, channels), dtype=np.uint8)
    rows = 0
    threads = workers or resources.processors()

    def wanted(name: str) -> bool:
        return split is None or split in name.split("/", 2)[:2]

    def work(members: list[_Member]) -> list[np.ndarray | str]:
        done: list[np.ndarray | str] = []
        for member in members:
            try:
                done.append(decode(member.read(member.name), size, channels, name=member.name).pixels)
            except ImageError as e:
                done.append(e.reason)
        return done

    pending: deque[tuple[int, Future[list[np.ndarray | str]]]] = deque()

    def collect() -> None:
        nonlocal rows
        start, future = pending.popleft()
        for i, result in enumerate(future.result(), start):
            if isinstance(result, str):
                failed[chosen[i]] = result
                continue
            if rows == len(images):
                # realloc moves the pages of a large block, so growing copies nothing and doubles no memory
                images.resize((max(1024, rows + rows // 8), size, size, channels), refcheck=False)
            images[rows] = result
            rows += 1

    chosen: list[int] = []  # index into names of each member that is decoded
    batch: list[_Member] = []
    batch_bytes = 0
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:

            def send() -> None:
                nonlocal batch, batch_bytes
                if batch:
                    pending.append((len(chosen) - len(batch), pool.submit(work, batch)))
                batch, batch_bytes = [], 0

            for member in _source_members(path, wanted):
                if member.kind == "folder":
                    folders.append(_readable(member.name))
                if member.kind != "image":
                    continue
                name = _readable(member.name)
                if not names and split is None and name.split("/", 1)[0].lower() in SPLIT_NAMES:
                    list_source(source)  # says so at once where splits stand unchosen
                names.append(name)
                if not wanted(name):
                    failed[len(names) - 1] = ""
                    continue
                chosen.append(len(names) - 1)
                batch.append(member)
                batch_bytes += len(member.data or b"")
                if len(batch) == 64 or batch_bytes > 2**22:
                    send()
                    while len(pending) > 2 * threads:
                        collect()
            send()
            while pending:
                collect()
    except _DamagedError as e:
        raise _damaged_source(source, e) from e
    images.resize((rows, size, size, channels), refcheck=False)
    return names, folders, images, failed


def _reordered(images: np.ndarray, order: list[int]) -> np.ndarray:
    """`images[order]` in the same memory: rows move along the cycles of the permutation."""
    if order == list(range(len(images))):
        return images
    if len(order) < len(images):
        return images[order]
    done = np.zeros(len(order), dtype=bool)
    for start in range(len(order)):
        if done[start] or order[start] == start:
            continue
        first = images[start].copy()
        here = start
        while order[here] != start:
            images[here] = images[order[here]]
            done[here] = True
            here = order[here]
        images[here] = first
        done[here] = True
    return images


def _fingerprint(images: np.ndarray, labels: np.ndarray | None, label_names: tuple[str, ...]) -> str:
    head = {"shape": images.shape, "label_names": label_names, "labelled": labels is not None}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode("utf-8"))
    if labels is not None:
        digest.update(labels.astype("<i8").tobytes())
    for start in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[start : start + 4096]).data)
    return digest.hexdigest()


# --- duplicates --------------------------------------------------------------------------------------------

# Measured on 86,000 Tiny ImageNet training images against 10,000 of CIFAR-100 and 3,440 held-out
# ones. Three pictures are known to stand on both sides: correlation 0.968 to 1, detail 0.858 to 1, distance 0
# to 0.049. All three are found and nothing else; the nearest stranger, one of many bridges that correlate as
# well, is at distance 0.086.
SAME_SHAPE = 0.95  # correlation of the grey pictures at 16x16
SAME_DETAIL = 0.85  # correlation of what 4x4 blocks do not explain of them
SAME_COLOUR = 0.07  # root mean square difference of the RGB pictures at 16x16, in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Duplicate:
    """Image `second` of the second array looks like image `first` of the first one."""

    first: int
    second: int
    distance: float  # root mean square difference at 16x16, in [0, 1]
    exact: bool  # every pixel is equal


def near_duplicates(first: np.ndarray, second: np.ndarray) -> tuple[Duplicate, ...]:
    """The closest copy in `first` of each image of `second` that has one, exact or resized or recoded.

    Mirrored copies and other crops are not found. Memory stays at a kilobyte for each image of `first`.

    Args:
        first, second: (N, H, W, C) and (M, H, W, C) uint8.
    Returns:
        At most one pair for each image of `second`, nearest first.
    """
    for array in (first, second):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != first.shape[1:]:
            raise ValueError(f"expected two uint8 (N, H, W, C) arrays, got {first.shape} and {second.shape}")
    if not len(first) or not len(second):
        return ()
    found: dict[int, Duplicate] = {}
    hashes: dict[bytes, int] = {}
    for i, image in enumerate(first):
        hashes.setdefault(hashlib.sha256(image.tobytes()).digest(), i)
    for j, image in enumerate(second):
        match = hashes.get(hashlib.sha256(image.tobytes()).digest())
        if match is not None:
            found[j] = Duplicate(first=match, second=j, distance=0.0, exact=True)
    shapes = _shapes(first)
    for start in range(0, len(second), 1024):
        rows = _shapes(second[start : start + 1024])
        for column in range(0, len(first), 4096):
            alike = np.argwhere(rows @ shapes[column : column + 4096].T >= SAME_SHAPE)
            step = _at_a_time(first)
            for at in range(0, len(alike), step):
                seconds, firsts = alike[at : at + step].T
                _closer(found, first, second, firsts + column, seconds + start)
    return tuple(sorted(found.values(), key=lambda d: (d.distance, d.second)))


def _closer(
    found: dict[int, Duplicate], first: np.ndarray, second: np.ndarray, i: np.ndarray, j: np.ndarray
) -> None:
    """Puts the pairs (i, j) that are duplicates and nearer than what is known into `found`."""
    a, b = _pooled(first[i]), _pooled(second[j])
    distance = np.sqrt(np.mean((a - b) ** 2, axis=(1, 2, 3))) / 255
    detail = np.sum(_unit(_detail(a)) * _unit(_detail(b)), axis=1)
    for n in np.flatnonzero((distance <= SAME_COLOUR) & (detail >= SAME_DETAIL)):
        known = found.get(int(j[n]))
        if known is None or (not known.exact and distance[n] < known.distance):
            found[int(j[n])] = Duplicate(
                first=int(i[n]), second=int(j[n]), distance=float(distance[n]), exact=False
            )


def _pooled(images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 -> (N, k, k, C) float32 means over areas; k is 16, less where images are smaller."""
    side = min(images.shape[1:3])
    k = next((k for k in (16, 8, 4) if side >= k), 1)
    x = images.astype(np.float32)
    return np.einsum(
        "rh,nhwc,sw->nrsc", _areas(k, images.shape[1]), x, _areas(k, images.shape[2]), optimize=True
    )


def _at_a_time(images: np.ndarray) -> int:
    """How many images to work on as floats at once: 16 MiB of them."""
    return max(1, 2**22 // max(1, int(np.prod(images.shape[1:]))))


def _areas(k: int, length: int) -> np.ndarray:
    """(k, length) float32: row r averages the pixels that lie in the r-th of k equal parts."""
    edges = np.arange(k + 1) * (length / k)
    left, right = edges[:-1, None], edges[1:, None]
    pixel = np.arange(length)
    overlap = np.minimum(right, pixel + 1) - np.maximum(left, pixel)
    return (np.clip(overlap, 0, 1) * (k / length)).astype(np.float32)


def _detail(pooled: np.ndarray) -> np.ndarray:
    """(N, k * k): grey picture without its means over 4x4 blocks."""
    grey = pooled.mean(axis=3)
    coarse = max(1, grey.shape[1] // 4)
    up = np.kron(np.eye(grey.shape[1] // coarse, dtype=np.float32), np.full((coarse, coarse), 1 / coarse))
    return (grey - up @ grey @ up).reshape(len(grey), -1)


def _shapes(images: np.ndarray) -> np.ndarray:
    """(N, k * k) float32 unit vectors of the grey pictures without their mean; zero for flat ones."""
    step = _at_a_time(images)
    parts = [images[n : n + step] for n in range(0, len(images), step)]
    grey = np.concatenate([_pooled(p).mean(axis=3).reshape(len(p), -1) for p in parts])
    return _unit(grey - grey.mean(axis=1, keepdims=True))


def _unit(rows: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(length > 1e-3, rows / np.maximum(length, 1e-3), 0).astype(np.float32)


# --- cache -------------------------------------------------------------------------------------------------

CACHE_FROM_BYTES = 8 * 2**20  # smaller sources are decoded faster than a cache is worth
_CACHE_FORMAT = 1


def cache_dir() -> Path:
    """Where downloads and decoded data lie: $RATIOCTL_CACHE, else ratioctl in the user's cache folder."""
    if own := os.environ.get("RATIOCTL_CACHE"):
        return Path(own).expanduser()
    if os.name == "nt" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "ratioctl" / "cache"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "ratioctl"


def _cache_key(path: str, split: str | None, size: int, channels: int, exclude: Sequence[str]) -> str | None:
    """Names the decoded result; changes with the source's files. None where they cannot be looked at."""
    try:
        state: list[object] = [_CACHE_FORMAT, pillow_version, os.path.realpath(path), split, size, channels]
        state += [sorted(exclude)]
        if os.path.isdir(path):
            digest = hashlib.sha256()
            for member in _folder_members(path):
                status = os.stat(member.file) if member.file and os.path.exists(member.file) else None
                seen = (member.name, status.st_size, status.st_mtime_ns) if status else (member.name,)
                digest.update(repr(seen).encode("utf-8", "backslashreplace"))
            state.append(digest.hexdigest())
        else:
            status = os.stat(path)
            state += [status.st_size, status.st_mtime_ns]
    except OSError:
        return None
    return hashlib.sha256(json.dumps(state).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def _cache_read(key: str) -> Loaded | None:
    """The cached result, checked against its fingerprint; None where there is none or it is damaged."""
    try:
        folder = cache_dir() / "decoded"
        meta = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        # Copy-on-write: writable for the caller, and the file stays as it is.
        images = np.asarray(np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False))
        labels = None if meta["labels"] is None else np.array(meta["labels"], dtype=np.int64)
        label_names = tuple(str(k) for k in meta["label_names"])
        fits = images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(meta["names"])
        if not fits or _fingerprint(images, labels, label_names) != meta["fingerprint"]:
            return None
        return Loaded(
            images=images,
            labels=labels,
            label_names=label_names,
            names=tuple(str(n) for n in meta["names"]),
            errors=tuple((str(n), str(r)) for n, r in meta["errors"]),
            fingerprint=meta["fingerprint"],
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None


def _cache_write(key: str, loaded: Loaded) -> None:
    """Keeps the result for the next run; a cache that cannot be written is done without."""
    folder = cache_dir() / "decoded"
    meta = {
        "labels": None if loaded.labels is None else loaded.labels.tolist(),
        "label_names": loaded.label_names,
        "names": loaded.names,
        "errors": loaded.errors,
        "fingerprint": loaded.fingerprint,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / f"{key}.npy", lambda file: np.save(file, loaded.images, allow_pickle=False))
        _replace(folder / f"{key}.json", lambda file: file.write(json.dumps(meta).encode("utf-8")))
    except OSError:
        return


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with open(handle, "wb") as file:
            write(file)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
