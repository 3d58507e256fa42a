"""Images and archives that several test modules make."""

import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from ratioctl import images
from ratioctl.errors import ImageError


def picture(width=48, height=32, mode="RGB", seed=0):
    """Smooth colors with some detail, different in every corner."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    rgb = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(6 * x * y)], axis=-1) + noise
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).convert(mode)


def encoded(im, kind="PNG", **options):
    buffer = io.BytesIO()
    im.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height, depth=8, color=2):
    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def reason_of(source, size=32, channels=3):
    with pytest.raises(ImageError) as caught:
        images.decode(source, size, channels)
    assert caught.value.exit_code == 3
    return caught.value.reason


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
PNG = encoded(picture(8, 8))


def plant(root, *names, data=PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def paths_of(*arguments, **options):
    return [item.path for item in images.walk(arguments, **options)]


def pack(path, members):
    """An archive of {name: bytes}, in the given order."""
    if str(path).endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path
    compression = next((c for c in ("gz", "xz", "bz2") if str(path).endswith((c, f"t{c}"))), "")
    with tarfile.open(path, f"w:{compression}") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def members_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
