"""One encoded image to the model's 8-bit input: the only implementation of the input pipeline.

No global state of Pillow is changed (except that libtiff no longer writes to stderr), and every function may
be called from several threads at once. Color profiles are ignored: pixels are taken as sRGB, as in data sets.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import os
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

from ratioctl.errors import ImageError
from ratioctl.images import dicom, files
from ratioctl.images.files import FORMATS, read_file, sized, unreadable
from ratioctl.utils.frame import Frame, Size, frame_of
from ratioctl.utils.text import shown

MAX_PIXELS = 89_478_485  # Pillow's own threshold: 256 MiB of RGB
NARROW = "its pixels fill only"  # how the note of 16-bit images that use fewer bits begins
LARGE_PIXELS = 16_000_000  # above it images are decoded one at a time, so that threads do not multiply memory
_ONE_LARGE = threading.Lock()
_QUIET = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An image as the model sees it, and the conversions that were applied."""

    pixels: np.ndarray  # (height, width, channels) uint8
    format: str  # "PNG", "JPEG", ...
    mode: str  # Pillow's mode of the file: "RGB", "P", "CMYK", "I;16", ...
    width: int  # of the file, before orientation
    height: int
    notes: tuple[str, ...]  # "turned by its EXIF orientation 6", "resized from 480x480 to 32x32", ...


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Pillow parses the EXIF block for a resolution, which is not used, and warns where it is damaged."""


class _Tiff(TiffImagePlugin.TiffImageFile):
    """Reads 16-bit grey with white as zero: Pillow ignores the tag, or refuses it in big-endian files."""

    white_is_zero = False

    def _setup(self) -> None:
        if self.tag_v2.get(262) == 0 and self.tag_v2.get(258) in ((12,), (16,)):
            self.white_is_zero = True
            self.tag_v2[262] = 1
        super()._setup()


_PLUGINS: tuple[tuple[str, Callable[[bytes], bool], Callable[..., ImageFile.ImageFile]], ...] = (
    ("PNG", lambda b: b.startswith(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("JPEG", lambda b: b.startswith(b"\xff\xd8\xff"), _Jpeg),
    ("WebP", lambda b: b[:4] == b"RIFF" and b[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile),
    ("GIF", lambda b: b[:6] in (b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    (
        "TIFF",
        lambda b: b[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"MM*\0", b"II\0*"),
        _Tiff,
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


def decode(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO,
    size: Size,
    channels: int = 3,
    *,
    name: str | None = None,
    bit_depth: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Decoded:
    """The model's 8-bit input of an encoded image, the same for every backend and command.

    First frame; EXIF orientation; transparency over white; RGB (16-bit scaled, CMYK converted) or, for one
    channel, ITU-R 601 grey; center square (or the frame's shape); Pillow bicubic to `size`; 8 bits.
    JPEGs are decoded at reduced scale down to twice `size`. An image of the model's size passes unchanged.

    Args:
        source: a path, the encoded bytes, or a binary stream.
        size: side of the square result, or its frame, which may be no square and may be padded to.
        channels: 3 or 1.
        name: what messages call the image; the path by default.
        bit_depth: bits in use, 9 to 16, of images with 16 bits per pixel; None takes those of the frame, and
            without these the file's range.
        max_pixels: an image with more is refused before it is decoded; at most MAX_PIXELS.
    Returns:
        `pixels` (height, width, channels) uint8, fresh and writable, and notes of what was done.
    Raises:
        ImageError: the image cannot be read; the reason says why.
        ValueError: an impossible `size`, `channels` or `bit_depth`.
    """
    frame = frame_of(size)
    bit_depth = frame.bit_depth if bit_depth is None else bit_depth
    if min(frame.height, frame.width) < 1 or channels not in (1, 3) or bit_depth not in (None, *range(9, 17)):
        given = f"{size}, {channels} and {bit_depth}"
        raise ValueError(f"size must be positive, channels 1 or 3 and bit_depth 9 to 16, not {given}")
    if isinstance(source, str | os.PathLike):
        name = shown(source) if name is None else name
        data = read_file(source)
    else:
        name = "image" if name is None else name
        data = sized(_drain(source, name) if hasattr(source, "read") else bytes(source), name)  # type: ignore[arg-type]
    if dicom.is_dicom(data):
        image, shape, notes = dicom.read(data, name, max_pixels)
        pixels, more = fit(image, image.size, frame, channels)
        return Decoded(pixels=pixels, format="DICOM", mode=image.mode, **shape, notes=(*notes, *more))
    plugin = next((p for p in _PLUGINS if p[1](data)), None)
    if plugin is None:
        raise ImageError(name, _what_is_it(data), f"Images may be {FORMATS}.")
    kind, _, opener = plugin
    # Pillow warns about damaged tags of these formats; the warning filter is global, hence a lock.
    noisy = kind in ("TIFF", "GIF") or (kind == "PNG" and b"acTL" in data)
    if kind == "TIFF":
        _hush_libtiff()
    try:
        with _no_pillow_warnings() if noisy else contextlib.nullcontext():
            return _decode(opener, data, frame, channels, kind, name, bit_depth, max_pixels)
    except ImageError:
        raise
    except MemoryError as e:
        raise ImageError(name, "does not fit into memory") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ImageError(name, f"has more than {MAX_PIXELS:,} pixels", "Make it smaller first.") from e
    except Exception as e:  # decoders raise many kinds of exceptions on damaged input
        raise ImageError(name, _damage(kind, e), "Save or fetch it again.") from e


def _drain(stream: BinaryIO, name: str) -> bytes:
    try:
        return stream.read(files.MAX_BYTES + 1)
    except OSError as e:
        raise unreadable(name, e) from e


@functools.cache
def _hush_libtiff() -> None:
    """Damage is reported by an ImageError; libtiff and Pillow's TIFF reader would write to stderr, too."""
    logging.getLogger(TiffImagePlugin.__name__).addHandler(logging.NullHandler())
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff, or linked statically
        # Symbols are looked up in a library's dependencies, too, wherever Pillow keeps libtiff.
        handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
        handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
        handler(None)


@contextlib.contextmanager
def _no_pillow_warnings() -> Iterator[None]:
    with _QUIET, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def _decode(
    opener: Callable[..., ImageFile.ImageFile],
    data: bytes,
    frame: Frame,
    channels: int,
    kind: str,
    name: str,
    bit_depth: int | None,
    max_pixels: int,
) -> Decoded:
    # Called directly because Image.open warns about large images, and warnings are global state.
    with opener(io.BytesIO(data)) as im:
        width, height = im.size
        if width < 1 or height < 1:
            raise ImageError(name, "has no pixels")
        if width * height > max_pixels:
            reason = f"has {width:,} x {height:,} pixels, more than the {max_pixels:,} that are decoded"
            raise ImageError(name, reason, "Make it smaller first.")
        with _ONE_LARGE if width * height > LARGE_PIXELS else contextlib.nullcontext():
            return _to_frame(im, frame, channels, kind, name, bit_depth)


def _to_frame(
    im: ImageFile.ImageFile, frame: Frame, channels: int, kind: str, name: str, bit_depth: int | None
) -> Decoded:
    width, height, mode = *im.size, im.mode
    notes: list[str] = []
    if kind == "TIFF":  # Pillow turns TIFFs itself while loading
        turn = im.tag_v2.get(274, 1)  # type: ignore[attr-defined]
        if turn in _TURNS:
            notes.append(f"turned by its orientation tag {turn}")
    if kind == "JPEG":
        im.draft(None, _draft_size(im.size, frame))
    im.load()
    picture: Image.Image = im
    if kind != "TIFF":
        turn = orientation(im.info.get("exif"))
        if turn in _TURNS:
            picture = picture.transpose(_TURNS[turn])
            notes.append(f"turned by its EXIF orientation {turn}")
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind in ("PNG", "PPM")):
        picture, note = _from_16_bits(picture, im, bit_depth)
    else:  # a transposed copy keeps `info`, which holds the transparency of a palette or of a key color
        picture, note = _to_rgb(picture, name)
    notes += note
    seen = (height, width) if turn in (5, 6, 7, 8) and kind != "TIFF" else (width, height)
    pixels, note = fit(picture, seen, frame, channels)
    notes += note
    if _has_more_frames(im, kind):
        notes.insert(0, "first frame of several")
    return Decoded(pixels=pixels, format=kind, mode=mode, width=width, height=height, notes=tuple(notes))


def _draft_size(shape: tuple[int, int], frame: Frame) -> tuple[int, int]:
    """The smallest size at which a JPEG may be decoded: twice the frame in both directions, or, for padding,
    in the direction that fills the frame."""
    if frame.height == frame.width and not frame.pad:
        return 2 * frame.width, 2 * frame.height
    # The orientation is not known yet: the larger side of the frame for both.
    side = 2 * max(frame.height, frame.width)
    if frame.pad:
        scale = side / max(shape)
        return max(1, round(scale * shape[0])), max(1, round(scale * shape[1]))
    return side, side


def fit(
    picture: Image.Image, shape: tuple[int, int], size: Size, channels: int
) -> tuple[np.ndarray, list[str]]:
    """An L or RGB picture in a frame, as (height, width, channels) uint8, and notes of what was done.

    The center part with the frame's shape is resized; or, where the frame pads, the whole picture, centered
    on black.

    Args:
        shape: (width, height) of the file after orientation; a JPEG may have been decoded at reduced scale.
    """
    frame = frame_of(size)
    notes = []
    mode = "L" if channels == 1 else "RGB"
    picture = picture if picture.mode == mode else picture.convert(mode)
    to = (frame.width, frame.height)
    if frame.pad and shape[0] * frame.height != shape[1] * frame.width:
        scale = min(frame.width / shape[0], frame.height / shape[1])
        inner = max(1, round(scale * shape[0])), max(1, round(scale * shape[1]))
        picture = picture if picture.size == inner else picture.resize(inner, Image.Resampling.BICUBIC)
        canvas = Image.new(mode, to)
        canvas.paste(picture, ((to[0] - inner[0]) // 2, (to[1] - inner[1]) // 2))
        notes.append(
            f"resized from {shape[0]}x{shape[1]} to {inner[0]}x{inner[1]}, padded to {to[0]}x{to[1]}"
        )
        return np.array(canvas, dtype=np.uint8).reshape(frame.height, frame.width, channels), notes
    cut = shape
    if shape[0] * frame.height != shape[1] * frame.width:
        cut = _cut(shape, frame)
        width, height = _cut(picture.size, frame)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
        what = "square" if frame.height == frame.width else f"{cut[0]}x{cut[1]}"
        notes.append(f"cut to the center {what} of {shape[0]}x{shape[1]}")
    if cut != to:
        picture = picture.resize(to, Image.Resampling.BICUBIC)
        notes.append(f"resized from {cut[0]}x{cut[1]} to {to[0]}x{to[1]}")
    return np.array(picture, dtype=np.uint8).reshape(frame.height, frame.width, channels), notes


def _cut(shape: tuple[int, int], frame: Frame) -> tuple[int, int]:
    """(width, height) of the largest part of a picture that has the frame's shape."""
    scale = min(shape[0] / frame.width, shape[1] / frame.height)
    return max(1, round(scale * frame.width)), max(1, round(scale * frame.height))


def _from_16_bits(
    picture: Image.Image, im: ImageFile.ImageFile, bit_depth: int | None
) -> tuple[Image.Image, list[str]]:
    """8-bit grey of 16-bit grey. Many devices fill fewer bits, which no field of PNG or TIFF states.

    Args:
        im: the file that `picture` was made of.
    """
    values = np.clip(np.asarray(picture), 0, 65535).astype(np.uint32)
    packed = isinstance(im, _Tiff) and im.tag_v2.get(258) == (12,)
    bits = bit_depth or (12 if packed else 16)
    full = 2**bits - 1
    grey = ((np.minimum(values, full) * 255 + full // 2) // full).astype(np.uint8)
    if isinstance(im, _Tiff) and im.white_is_zero:
        grey = 255 - grey
    key = picture.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    notes = [f"scaled from {bits} to 8 bits"]
    highest = int(values.max())
    if bit_depth is None and not packed and 255 < highest < 2**14:
        used = highest.bit_length()
        notes.append(f"{NARROW} {used} of 16 bits and may look black; --bit-depth {used} uses that range")
    return Image.fromarray(grey), notes


def _to_rgb(im: Image.Image, name: str) -> tuple[Image.Image, list[str]]:
    """RGB or L picture of `im`, transparency over white."""
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
        colored = im.convert("RGBA")
        alpha = colored.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return colored.convert("RGB"), []
        white = Image.new("RGB", im.size, (255, 255, 255))
        white.paste(colored, mask=alpha)
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
    except Exception:  # no second frame, or a damaged one; only the first one is used
        return False
    return True


def orientation(exif: object) -> int:
    """The orientation 1..8 that an EXIF block states, 1 where it is missing or damaged.

    Only tag 0x0112 of the first directory is read: Pillow's parser warns about damage elsewhere.
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
    # Pillow reports a missing field as an internal error, sometimes wrapped in a SyntaxError.
    if isinstance(e.__cause__ or e, struct.error | IndexError):
        return f"is a {kind} image that is cut short or damaged"
    detail = shown(str(e) or type(e).__name__)[:200]
    if "truncated" in detail.lower() or "Truncated" in detail or isinstance(e, EOFError):
        return f"is a {kind} image that is cut short ({detail})"
    return f"is a damaged {kind} image ({detail})"
