"""From files to pixels as users meet it: formats, orientation, damage, folders, archives, sources."""

import contextlib
import hashlib
import inspect
import io
import os
import socket
import stat
import struct
import sys
import tarfile
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from ratioctl import images
from ratioctl.errors import ImageError, SourceError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")


def picture(width=48, height=32, mode="RGB", seed=0):
    """Smooth colours with some detail, different in every corner."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    rgb = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(6 * x * y)], axis=-1) + noise
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).convert(mode)


def encoded(im, kind="PNG", **options):
    buffer = io.BytesIO()
    im.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height, depth=8, colour=2):
    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
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


# --- one image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_an_image_of_the_models_size_passes_unchanged(kind):
    im = picture(32, 32)
    decoded = images.decode(encoded(im, kind, **({"lossless": True} if kind == "WEBP" else {})), 32)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(im))
    assert decoded.pixels.flags.writeable
    assert decoded.pixels.flags.c_contiguous
    assert decoded.notes == ()
    assert (decoded.width, decoded.height, decoded.mode) == (32, 32, "RGB")


def test_a_jpeg_of_the_models_size_equals_pillows_decoding():
    data = encoded(picture(32, 32), "JPEG", quality=95)
    np.testing.assert_array_equal(images.decode(data, 32).pixels, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(
    ("width", "height"), [(48, 32), (32, 49), (200, 101), (33, 32), (7, 5), (1, 1), (1, 90)]
)
def test_centre_square_then_bicubic(width, height):
    im = picture(width, height)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = im.crop((left, top, left + side, top + side))
    expected = square.resize((32, 32), Image.Resampling.BICUBIC)
    decoded = images.decode(encoded(im), 32)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(expected))
    assert (f"cut to the centre square of {width}x{height}" in decoded.notes) == (width != height)
    assert (f"resized from {side}x{side} to 32x32" in decoded.notes) == (side != 32)


def test_large_jpegs_are_decoded_at_reduced_scale_but_at_least_twice_the_size():
    data = encoded(picture(640, 480), "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as im:
        im.draft(None, (64, 64))
        assert im.size == (160, 120)  # a quarter: an eighth would be below 64
        square = im.convert("RGB").crop((20, 0, 140, 120))
    expected = square.resize((32, 32), Image.Resampling.BICUBIC)
    decoded = images.decode(data, 32)
    np.testing.assert_array_equal(decoded.pixels, np.asarray(expected))
    assert (decoded.width, decoded.height) == (640, 480)
    assert "cut to the centre square of 640x480" in decoded.notes
    assert "resized from 480x480 to 32x32" in decoded.notes
    full = images.decode(encoded(Image.open(io.BytesIO(data))), 32).pixels
    assert np.abs(full.astype(int) - decoded.pixels).mean() < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(picture(50, 41), kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as im:
        upright = ImageOps.exif_transpose(im).convert("RGB")
    decoded = images.decode(data, 32)
    np.testing.assert_array_equal(decoded.pixels, images.decode(encoded(upright), 32).pixels)
    assert any("orientation" in n for n in decoded.notes) == (turn != 1)
    seen = "41x50" if turn >= 5 else "50x41"
    assert f"cut to the centre square of {seen}" in decoded.notes


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_read_in_both_byte_orders(order):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 6, 0)
    block = mark + struct.pack(order + "IH", 8, 1) + entry
    assert images.orientation(block) == 6
    assert images.orientation(b"Exif\0\0" + block) == 6
    assert images.orientation(block[:-6]) == 1
    assert images.orientation(None) == 1


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_exif_block_has_an_orientation(block):
    for head in (b"", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08"):
        assert images.orientation(head + block) in range(1, 9)


def test_transparency_is_laid_over_white():
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:16, :, 3] = 255
    rgba[16:24, :, 3] = 51  # one fifth
    decoded = images.decode(encoded(Image.fromarray(rgba)), 32)
    np.testing.assert_array_equal(decoded.pixels[0, 0], [200, 0, 0])
    np.testing.assert_array_equal(decoded.pixels[20, 0], [244, 204, 204])
    np.testing.assert_array_equal(decoded.pixels[31, 0], [255, 255, 255])
    assert "transparency laid over white" in decoded.notes
    grey_alpha = Image.fromarray(rgba).convert("LA")
    assert images.decode(encoded(grey_alpha), 32).pixels[31, 0].tolist() == [255, 255, 255]


def test_palettes_and_key_colours_are_transparent_too():
    index = np.zeros((32, 32), np.uint8)
    index[:, 16:] = 1
    im = Image.fromarray(index, "P")
    im.putpalette([10, 20, 30, 40, 50, 60])
    for options in ({"transparency": 1}, {"transparency": b"\xff\x00"}):
        pixels = images.decode(encoded(im, **options), 32).pixels
        assert pixels[0, 0].tolist() == [10, 20, 30]
        assert pixels[0, 31].tolist() == [255, 255, 255]
    half = images.decode(encoded(im, transparency=b"\xff\x80"), 32).pixels[0, 31]
    np.testing.assert_allclose(half, [147, 152, 157], atol=1)
    gif = images.decode(encoded(im, "GIF", transparency=1), 32).pixels
    assert gif[0, 31].tolist() == [255, 255, 255]
    rgb = Image.fromarray(np.where(index[..., None] == 1, np.uint8(7), np.uint8(90)).repeat(3, 2))
    assert images.decode(encoded(rgb, transparency=(7, 7, 7)), 32).pixels[0, 31].tolist() == [255, 255, 255]
    assert images.decode(encoded(rgb.convert("L"), transparency=7), 32).pixels[0, 31].tolist() == [
        255,
        255,
        255,
    ]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    values = (np.arange(32 * 32, dtype=np.uint32) * 64 + 63).astype(np.uint16).reshape(32, 32)
    data = encoded(Image.fromarray(values), kind)
    decoded = images.decode(data, 32)
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(decoded.pixels, expected[..., None].repeat(3, 2))
    assert "scaled from 16 to 8 bits" in decoded.notes
    np.testing.assert_array_equal(images.decode(data, 32, 1).pixels[..., 0], expected)


def test_sixteen_bit_big_endian_and_key_colour():
    values = np.full((32, 32), 40000, ">u2")
    values[0] = 1234
    tiff = encoded(Image.frombytes("I;16B", (32, 32), values.tobytes()), "TIFF")
    assert images.decode(tiff, 32).pixels[5, 5].tolist() == [156, 156, 156]
    png = encoded(Image.fromarray(values.astype("<u2")), "PNG", transparency=1234)
    pixels = images.decode(png, 32).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[5, 5].tolist() == [156, 156, 156]


def test_floats_in_the_unit_range_are_scaled_and_others_refused():
    values = np.linspace(0, 1, 1024, dtype=np.float32).reshape(32, 32)
    expected = np.rint(values * 255).astype(np.uint8)
    pixels = images.decode(encoded(Image.fromarray(values), "TIFF"), 32).pixels
    np.testing.assert_array_equal(pixels[..., 0], expected)
    for bad in (np.nan, np.inf, -0.1, 255.0):
        values[3, 3] = bad
        assert "outside [0, 1]" in reason_of(encoded(Image.fromarray(values), "TIFF"))
    assert "unknown range" in reason_of(encoded(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_converted(kind):
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), kind)
    decoded = images.decode(data, 32)
    np.testing.assert_allclose(decoded.pixels[5, 5], [255, 0, 0], atol=3)
    assert decoded.notes == ("converted from CMYK",)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes_and_channels(mode, channels):
    data = encoded(picture(32, 32).convert(mode))
    decoded = images.decode(data, 32, channels)
    assert decoded.pixels.shape == (32, 32, channels)
    assert decoded.pixels.dtype == np.uint8
    expected = Image.open(io.BytesIO(data)).convert("RGB").convert("RGB" if channels == 3 else "L")
    np.testing.assert_array_equal(decoded.pixels, np.asarray(expected).reshape(32, 32, channels))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (32, 32), c) for c in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    decoded = images.decode(data, 32)
    np.testing.assert_allclose(decoded.pixels[5, 5], [200, 0, 0], atol=3)
    assert decoded.notes[0] == "first frame of several"


@pytest.mark.parametrize("kind", FORMATS)
def test_paths_bytes_and_streams_are_one_road(kind, tmp_path):
    data = encoded(picture(40, 40), kind)
    path = tmp_path / "x.anything"
    path.write_bytes(data)
    expected = images.decode(data, 32).pixels
    for source in (path, str(path), bytearray(data), memoryview(data), io.BytesIO(data)):
        np.testing.assert_array_equal(images.decode(source, 32).pixels, expected)


def test_impossible_sizes_are_a_programming_error():
    for size, channels in ((0, 3), (32, 2), (-1, 1)):
        with pytest.raises(ValueError, match="size must be positive"):
            images.decode(b"x", size, channels)


# --- bad files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20_000, 20_000), (100_000, 1_000), (2**31 - 1, 2**31 - 1), (9_460, 9_460)])
def test_enormous_images_are_refused_without_decoding(size):
    tracemalloc.start()
    reason = reason_of(png_header(*size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "pixels" in reason
    assert peak < 2**20


def enormous(kind):
    """A small file whose header claims 20,000 x 20,000 (WebP: 16,000 x 16,000)."""
    data = bytearray(encoded(picture(40, 40), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 20_000, 20_000)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", 20_000, 20_000)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", 20_000, 20_000)
    elif kind == "WEBP":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", 16_000, 16_000)
    elif kind == "PPM":
        data = bytearray(b"P6 20000 20000 255\n" + b"\0" * 100)
    else:
        for tag in (256, 257):
            at = data.index(struct.pack("<HHI", tag, 4, 1)) if struct.pack("<HHI", tag, 4, 1) in data else -1
            width = 4 if at >= 0 else 2
            at = at if at >= 0 else data.index(struct.pack("<HHI", tag, 3, 1))
            data[at + 8 : at + 8 + width] = (20_000).to_bytes(width, "little")
    return bytes(data)


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_enormous_images_of_every_format_are_refused(kind):
    assert "pixels" in reason_of(enormous(kind))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_images_say_so(kind, share):
    data = encoded(picture(64, 64), kind)
    reason = reason_of(data[: int(len(data) * share)])
    assert "cut short" in reason or "damaged" in reason


def test_what_is_not_an_image_is_named():
    assert reason_of(b"") == "is empty (0 bytes)"
    assert reason_of(b"this is no picture\n") == "is text, not an image"
    assert reason_of("Käse, größer\n".encode()) == "is text, not an image"
    assert reason_of(b"\0" * 1000) == "holds only zero bytes, not an image"
    assert reason_of(os.urandom(4) + b"\xff\xfe\0\1") == "is not an image of a known format"
    assert "AVIF" in reason_of(b"\0\0\0\x20ftypavif" + b"\0" * 20)
    assert "HEIC" in reason_of(b"\0\0\0\x20ftypheic" + b"\0" * 20)
    assert "SVG" in reason_of(b"<?xml version='1.0'?><svg></svg>")
    assert "PDF" in reason_of(b"%PDF-1.7 ...")
    with pytest.raises(ImageError, match="PNG, JPEG, WebP, BMP, GIF, TIFF"):
        images.decode(b"text", 32)


def test_text_with_a_png_name(tmp_path):
    path = tmp_path / "cat.png"
    path.write_text("not a cat")
    with pytest.raises(ImageError) as caught:
        images.decode(path, 32)
    assert caught.value.thing == str(path)
    assert caught.value.reason == "is text, not an image"


def test_files_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # socket names are short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
        expected = {
            "fifo.png": "is a FIFO",
            "folder.png": "is a folder",
            "socket.png": "is a socket",
            "zero.png": "is a device",
            "loop.png": "leads back to itself",
            "dangling.png": "does not exist",
            "nothing.png": "does not exist",
            "fifo.png/x": "does not exist",
            "x" * 300: "too long",
            "a\0b": "no possible file name",
        }
        for name, reason in expected.items():
            assert reason in reason_of(f"{tmp_path}/{name}"), name


def test_no_permission(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
    assert "no permission" in reason_of(path)


def test_files_over_the_limit_are_not_read(tmp_path):
    path = tmp_path / "huge.png"
    with open(path, "wb") as file:
        file.truncate(images.MAX_BYTES + 1)  # sparse
    tracemalloc.start()
    reason = reason_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "256 MiB" in reason
    assert peak < 2**20


def test_random_damage_gives_pixels_or_an_image_error(capfd):
    """Flipped bytes, cuts, swapped headers; warnings are errors here, so none escapes either."""
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    originals = [encoded(picture(40, 36), kind) for kind in FORMATS]
    originals += [encoded(picture(40, 36), kind, exif=exif) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    frames = [picture(40, 36, seed=s) for s in range(3)]
    originals += [
        encoded(frames[0], k, save_all=True, append_images=frames[1:]) for k in ("GIF", "PNG", "WEBP")
    ]
    originals += [encoded(picture(40, 36), "TIFF", compression=c) for c in ("tiff_lzw", "jpeg", "packbits")]
    outcomes, reasons = {"pixels": 0, "error": 0}, []
    for n in range(700):
        data = bytearray(originals[n % len(originals)])
        how = n // len(originals) % 4
        if how == 0:
            for at in rng.integers(0, len(data), 8):
                data[at] = rng.integers(256)
        elif how == 1:
            del data[rng.integers(1, len(data)) :]
        elif how == 2:
            data[: rng.integers(1, 200)] = originals[rng.integers(len(originals))][: rng.integers(1, 200)]
        else:
            for at in rng.integers(0, min(300, len(data)), 3):
                data[at] = rng.integers(256)
        try:
            assert images.decode(bytes(data), 32).pixels.shape == (32, 32, 3)
            outcomes["pixels"] += 1
        except ImageError as e:
            outcomes["error"] += 1
            reasons.append(e.reason)
    assert min(outcomes.values()) > 50, outcomes
    assert all(r and r.isprintable() for r in reasons)
    assert capfd.readouterr().err == "", "libtiff and others have their own words for damage"


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"P6", b"P1", b"Pf"]
    ),
    st.binary(max_size=120),
)
def test_any_bytes_behind_a_known_start(head, tail):
    try:
        pixels = images.decode(head + tail, 8).pixels
    except ImageError:
        return
    assert pixels.shape == (8, 8, 3)


def test_damaged_exif_neither_warns_nor_spoils_the_image():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\x7f" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + b"\xff" * 40
    data = encoded(picture(32, 32), "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decoded = images.decode(data, 32)
    assert caught == []
    assert decoded.notes == ("turned by its EXIF orientation 6",)


def test_global_state_is_left_alone():
    before = (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        list(warnings.filters),
        dict(Image.OPEN),
    )
    for kind in FORMATS:
        images.decode(encoded(picture(), kind), 32)
        reason_of(encoded(picture(), kind)[:60])
    reason_of(png_header(20_000, 20_000))
    assert before == (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        list(warnings.filters),
        dict(Image.OPEN),
    )


def test_threads_give_the_same_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    sources = [
        encoded(picture(70 + s, 60, seed=s), FORMATS[s % 7], exif=exif)
        for s in range(28)
        if s % 7 not in (3, 5, 6)
    ]
    sources += [encoded(picture(64, 64, seed=s), "GIF") for s in range(6)] + [b"broken"] * 4
    filters = list(warnings.filters)

    def work(data):
        try:
            return images.decode(data, 32).pixels.tobytes()
        except ImageError as e:
            return e.reason

    expected = [work(s) for s in sources]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, sources * 5)) == expected * 5
    assert list(warnings.filters) == filters


def test_large_images_take_turns(monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 100)
    inside, most = [], []
    whole = images._to_square

    def watched(*args):
        inside.append(threading.get_ident())
        most.append(len(inside))
        result = whole(*args)
        inside.remove(threading.get_ident())
        return result

    monkeypatch.setattr(images, "_to_square", watched)
    data = encoded(picture(400, 400), "JPEG")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: images.decode(data, 32), range(24)))
    assert max(most) == 1


# --- arrays ------------------------------------------------------------------------------------------------


def test_pixels_and_back_are_exact():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    pixels = images.to_pixels(values)
    assert pixels.dtype == np.float32
    assert pixels.shape == (1, 3, 16, 16)
    np.testing.assert_array_equal(pixels[0, 0].ravel(), np.arange(256, dtype=np.float32) / np.float32(255))
    np.testing.assert_array_equal(images.to_uint8(pixels), values)
    edge = np.array([-0.1, 0.49 / 255, 0.51 / 255, 1.2]).reshape(1, 1, 2, 2)
    assert images.to_uint8(edge).ravel().tolist() == [0, 0, 1, 255]


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        images.to_pixels(np.zeros((1, 2, 2, 3), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        images.to_uint8(np.full((1, 1, 2, 2), np.nan))
    with pytest.raises(ValueError, match="uint8"):
        images.pixels_sha256(np.zeros((2, 2, 3)))


def test_sha256_covers_shape_and_bytes():
    a = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert images.pixels_sha256(a) == hashlib.sha256(b"2x2x3\n" + bytes(range(12))).hexdigest()
    assert images.pixels_sha256(a) != images.pixels_sha256(a.reshape(2, 3, 2))
    assert images.pixels_sha256(a[::-1]) == images.pixels_sha256(a[::-1].copy())


# --- walk --------------------------------------------------------------------------------------------------


PNG = encoded(picture(8, 8))


def plant(root, *names, data=PNG):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def paths_of(*arguments, **options):
    return [item.path for item in images.walk(arguments, **options)]


def test_folders_are_walked_recursively_in_sorted_order(tmp_path):
    plant(
        tmp_path,
        "b/2.jpg",
        "b/10.JPG",
        "a/deep/x.webp",
        "c.png",
        "A.tiff",
        "notes.txt",
        ".hidden.png",
        ".git/x.png",
    )
    got = paths_of(str(tmp_path))
    assert got == [f"{tmp_path}/{n}" for n in ("A.tiff", "a/deep/x.webp", "b/10.JPG", "b/2.jpg", "c.png")]


def test_paths_are_the_argument_as_given_joined(tmp_path, monkeypatch):
    plant(tmp_path, "photos/a.png", "photos/sub/b.png")
    monkeypatch.chdir(tmp_path)
    assert paths_of("photos") == ["photos/a.png", "photos/sub/b.png"]
    assert paths_of("photos/") == ["photos/a.png", "photos/sub/b.png"]
    assert paths_of("./photos") == ["./photos/a.png", "./photos/sub/b.png"]
    assert paths_of(".") == ["./photos/a.png", "./photos/sub/b.png"]
    assert paths_of(Path("photos/a.png"), "photos/sub") == ["photos/a.png", "photos/sub/b.png"]


def test_a_file_given_by_name_is_always_an_item(tmp_path):
    plant(tmp_path, "scan.dat", "UPPER.PNG", ".hidden")
    names = [f"{tmp_path}/{n}" for n in ("scan.dat", ".hidden", "UPPER.PNG")]
    items = list(images.walk(names))
    assert [i.path for i in items] == names
    assert all(i.read() == PNG and i.open().read() == PNG for i in items)


def test_symbolic_links_are_followed_and_loops_end(tmp_path):
    plant(tmp_path, "set/a/1.png", "other/2.png")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/self").symlink_to(tmp_path / "set/self")
    (tmp_path / "set/more").symlink_to(tmp_path / "other")
    (tmp_path / "set/one.png").symlink_to(tmp_path / "other/2.png")
    (tmp_path / "other/back").symlink_to(tmp_path / "set")
    got = paths_of(str(tmp_path / "set"))
    assert got == [f"{tmp_path}/set/{n}" for n in ("a/1.png", "more/2.png", "one.png")]


def test_folders_linked_to_each_other_do_not_explode(tmp_path):
    for i in range(8):
        plant(tmp_path, f"d{i}/x.png")
    for i in range(8):
        for j in range(8):
            (tmp_path / f"d{i}" / f"to{j}").symlink_to(tmp_path / f"d{j}")
    assert 8 <= len(paths_of(str(tmp_path))) <= 64


def test_photographs_of_unsupported_kinds_are_not_passed_over(tmp_path):
    plant(tmp_path, "a.heic", "b.avif", data=b"\0\0\0\x20ftypheic" + b"\0" * 20)
    items = list(images.walk([tmp_path]))
    assert len(items) == 2
    assert "HEIC" in reason_of(items[0].read())


def test_missing_and_empty_arguments_fail_before_the_first_item(tmp_path):
    plant(tmp_path, "a.png", "empty/readme.txt", "empty/.x.png")
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.add(tmp_path / "empty/readme.txt", "readme.txt")
    for argument, reason in ((tmp_path / "nothing", "does not exist"), ("a\0b", "does not exist")):
        with pytest.raises(SourceError, match=reason) as caught:
            images.walk([tmp_path / "a.png", argument])
        assert caught.value.exit_code == 2
    for name in ("empty", "empty.tar"):
        with pytest.raises(SourceError, match="holds no images"):
            images.walk([tmp_path / "a.png", tmp_path / name])
    assert list(images.walk([])) == []


def test_paths_from_stdin(tmp_path, monkeypatch):
    plant(tmp_path, "a.png", "d/b.png", "d/c.png", "with\nnewline.png")
    os.mkdir(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    lines = b"a.png\r\n\nd\nmissing.png\nempty\na.png"
    items = list(images.walk(["-", "a.png"], stdin=io.BytesIO(lines)))
    assert [i.path for i in items] == [
        "a.png",
        "d/b.png",
        "d/c.png",
        "missing.png",
        "empty",
        "a.png",
        "a.png",
    ]
    for bad, reason in ((3, "does not exist"), (4, "holds no images")):
        with pytest.raises(ImageError, match=reason):
            items[bad].read()
    nul = b"with\nnewline.png\0d/b.png\0"
    assert paths_of("-", stdin=io.BytesIO(nul)) == ["with\nnewline.png", "d/b.png"]


def test_stdin_is_streamed():
    read, write = os.pipe()
    with open(read, "rb") as stdin, open(write, "wb", buffering=0) as feed:
        feed.write(b"/nothing/1\n")
        items = images.walk(["-"], stdin=stdin)
        assert next(items).path == "/nothing/1"  # the writer has not finished yet
        feed.write(b"/nothing/2\n")
        assert next(items).path == "/nothing/2"


def test_strange_names(tmp_path):
    raw = os.fsencode(str(tmp_path))
    for name in (b"new\nline.png", b"bad\xff.png", b"esc\x1b[31m.png", "Käse.png".encode()):
        with open(raw + b"/" + name, "wb") as file:
            file.write(PNG)
    items = list(images.walk([str(tmp_path)]))
    names = [i.path.removeprefix(f"{tmp_path}/") for i in items]
    assert names == ["Käse.png", "bad\\xff.png", "esc\x1b[31m.png", "new\nline.png"]
    assert all(i.read() == PNG for i in items)
    for item in items:
        item.path.encode("utf-8")
        assert images.shown(item.path).isprintable()
    assert images.shown("a\nb\x1b[0m") == "a\\nb\\x1b[0m"
    assert images.shown(b"\xff\xfe") == "\\xff\\xfe"


@settings(deadline=None)
@given(st.text(max_size=20))
def test_shown_is_always_printable(text):
    assert images.shown(text).isprintable()


def test_extended_headers_are_read_to_the_letter():
    for block, records in (
        (b"12 path=a b\n\0\0", {"path": "a b"}),
        (b"8 k=1\n2\n9 size=7\n", {"k": "1\n2", "size": "7"}),
        (b"\0" * 512, {}),
        (b"5 a=\n" * 200_000, {"a": ""}),
    ):
        assert images._pax_records(block) == records
    for block in (b"99 path=a\n", b"0 a=\n", b"-5 a=\n", b"x a=\n", b"9" * 10**6):
        with pytest.raises((images._DamagedError, ValueError)):
            images._pax_records(block)


def test_folders_deeper_than_pythons_stack(tmp_path):
    depth = 400
    folder = tmp_path.joinpath(*["d"] * depth)
    folder.mkdir(parents=True)
    (folder / "bottom.png").write_bytes(b"x")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 200)
    try:
        found = [item.path for item in images.walk([tmp_path])]
    finally:
        sys.setrecursionlimit(limit)
    assert found == [str(folder / "bottom.png")]


def test_special_files_in_folders_are_items_with_errors(tmp_path):
    plant(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("nowhere")
    items = list(images.walk([tmp_path]))
    assert [i.path.rsplit("/")[-1] for i in items] == ["a.png", "b.png", "c.png"]
    for item, reason in zip(items[1:], ("FIFO", "does not exist"), strict=True):
        with pytest.raises(ImageError, match=reason) as caught:
            item.read()
        assert caught.value.thing == item.path


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    plant(tmp_path, "a.png", "shut/b.png", "z.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    items = list(images.walk([str(tmp_path)]))
    assert [i.path for i in items] == [f"{tmp_path}/{n}" for n in ("a.png", "shut", "z.png")]
    with pytest.raises(ImageError, match="cannot be listed"):
        items[1].read()
    with pytest.raises(SourceError, match="cannot be listed"):
        images.load_source(str(tmp_path), 8)


def test_a_file_that_vanishes_is_an_error_of_its_own(tmp_path):
    plant(tmp_path, "a.png", "b.png")
    items = list(images.walk([tmp_path]))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match="does not exist"):
        items[0].read()
    assert items[1].read() == PNG


# --- archives ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip"])
def test_archives_are_read_in_place(tmp_path, suffix):
    members = {
        "dir/x.png": PNG,
        "dir/note.txt": b"no",
        "./b.jpg": b"B",
        ".hid.png": b"",
        "__MACOSX/c.png": b"",
    }
    path = pack(tmp_path / f"a{suffix}", members)
    items = list(images.walk([path]))
    order = ["dir/x.png", "b.jpg"] if suffix != ".zip" else ["b.jpg", "dir/x.png"]
    assert [i.path for i in items] == [f"{path}:{n}" for n in order]
    assert {i.path.rsplit(":")[1]: i.read() for i in items} == {"dir/x.png": PNG, "b.jpg": b"B"}
    assert paths_of(f"{path}:dir") == [f"{path}:dir/x.png"]
    assert paths_of(f"{path}:dir/x.png") == [f"{path}:dir/x.png"]
    with pytest.raises(SourceError, match="holds no images"):
        images.walk([f"{path}:other"])


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_dialects(tmp_path, kind):
    long = "d" * 90 + "/" + "e" * 60 + "/picture.png"
    names = [long, "Käse.png", "plain.png", "a/../b/up.png", "../../outside.png"]
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            info.mtime = 1.5
            tar.addfile(info, io.BytesIO(PNG))
    items = list(images.walk([tmp_path / "a.tar"]))
    assert [i.path.split(":", 1)[1] for i in items] == names
    assert all(i.read() == PNG for i in items)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]  # nothing was unpacked


def test_members_that_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("s.png", tarfile.SYMTYPE),
            ("h.png", tarfile.LNKTYPE),
            ("f.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("z.png")
        info.size = len(PNG)
        tar.addfile(info, io.BytesIO(PNG))
    items = list(images.walk([tmp_path / "a.tar"]))
    assert [i.path[-5:] for i in items] == ["s.png", "h.png", "f.png", "z.png"]
    for item, reason in zip(items[:3], ("link inside", "link inside", "not a regular file"), strict=True):
        with pytest.raises(ImageError, match=reason):
            item.read()
    assert items[3].read() == PNG
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("s.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ImageError, match="link inside"):
        next(images.walk([tmp_path / "a.zip"])).read()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
def test_members_over_the_limit_are_refused_and_the_rest_unharmed(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 100_000)
    path = pack(tmp_path / f"bomb{suffix}", {"a.png": PNG, "b.png": bytes(25_000_000), "c.png": PNG})
    tracemalloc.start()
    items = list(images.walk([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with pytest.raises(ImageError, match="larger than"):
        items[1].read()
    assert items[0].read() == items[2].read() == PNG
    assert peak < 16_000_000  # xz keeps a dictionary of 8 MiB


def test_a_zip_that_lies_about_sizes(tmp_path):
    path = pack(tmp_path / "a.zip", {"a.png": PNG * 50, "b.png": PNG})
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02") + 24  # the first member's size in the central directory
    raw[at : at + 4] = struct.pack("<I", 10)
    path.write_bytes(raw)
    items = list(images.walk([path]))
    with pytest.raises(ImageError, match="damaged inside the archive"):
        items[0].read()
    assert items[1].read() == PNG


def test_encrypted_members(tmp_path):
    path = pack(tmp_path / "a.zip", {"a.png": PNG})
    raw = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(mark) + offset] |= 1
    path.write_bytes(raw)
    with pytest.raises(ImageError, match="encrypted"):
        next(images.walk([path])).read()


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_tar_that_breaks_off_is_reported(tmp_path, suffix, share):
    noise = np.random.default_rng(0)
    members = {f"{i:03d}.png": noise.bytes(3000) for i in range(60)}
    path = pack(tmp_path / f"a{suffix}", members)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    items = list(images.walk([path]))
    assert items[-1].path == str(path)
    with pytest.raises(ImageError, match="damaged archive"):
        items[-1].read()
    assert [i.read() for i in items[:-1]] == list(members.values())[: len(items) - 1]
    with pytest.raises(SourceError, match="damaged archive"):
        images.load_source(str(path), 8)


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{i}.png": PNG for i in range(5)})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"3.png")] = ord("x")
    path.write_bytes(raw)
    items = list(images.walk([path]))
    assert len(items) == 4
    with pytest.raises(ImageError, match="checksum"):
        items[3].read()


def test_headers_that_claim_gigabytes(tmp_path):
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 2**33
        (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
        with pytest.raises(ImageError, match="header of 8,589,934,592 bytes"):
            next(images.walk([tmp_path / "a.tar"])).read()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_tar_is_reported_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tar")
    path = pack(folder / "a.tar", {"a.png": b"A" * 700, "b.png": b"B"})
    raw = bytearray(path.read_bytes()[:5120])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 2600))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        for item in images.walk([path]):
            with contextlib.suppress(ImageError):
                item.read()
    except SourceError:
        pass  # both names were damaged


def test_what_is_no_archive(tmp_path):
    for name, data in (("a.tar", b"not a tar"), ("a.zip", b"not a zip"), ("a.tar.xz", b"no"), ("b.tar", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError, match="damaged archive"):
            next(images.walk([tmp_path / name])).read()


def test_memory_does_not_grow_with_the_members_of_a_tar(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{i:05d}.png": b"x" * 100 for i in range(2000)})
    images.walk([path])
    tracemalloc.start()
    count = sum(1 for _ in images.walk([path]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 1_200_000


# --- sources -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))


def members_of(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def pets(tmp_path):
    """train: 3 cats, 2 dogs (one deeper); test: 1 cat, 1 dog."""
    root = tmp_path / "pets"
    names = ("train/cat/1.png", "train/cat/2.png", "train/cat/3.png", "train/dog/a/5.png", "train/dog/4.png")
    for i, name in enumerate((*names, "test/cat/6.png", "test/dog/7.png")):
        plant(root, name, data=encoded(picture(40, 40, seed=i)))
    plant(root, "README.txt", data=b"read me")
    return root


def test_a_folder_source(pets):
    loaded = images.load_source(f"{pets}:train", 16)
    assert loaded.images.shape == (5, 16, 16, 3)
    assert loaded.images.dtype == np.uint8
    assert loaded.label_names == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1]
    assert loaded.labels.dtype == np.int64
    assert [n.rsplit("train/")[1] for n in loaded.names] == [
        "cat/1.png",
        "cat/2.png",
        "cat/3.png",
        "dog/4.png",
        "dog/a/5.png",
    ]
    for pixels, name in zip(loaded.images, loaded.names, strict=True):
        np.testing.assert_array_equal(pixels, images.decode(pets / name, 16).pixels)
    assert images.load_source(f"{pets}:train", 16, 1).images.shape == (5, 16, 16, 1)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz", ".zip"])
@pytest.mark.parametrize("wrapper", ["", "./", "pets/"])
def test_packing_does_not_matter(pets, tmp_path, suffix, wrapper):
    members = members_of(pets)
    shuffled = {
        wrapper + n: members[n] for n in sorted(members, key=lambda n: hashlib.md5(n.encode()).hexdigest())
    }
    path = pack(tmp_path / f"packed{suffix}", shuffled)
    for split in ("train", "test"):
        folder = images.load_source(f"{pets}:{split}", 16, workers=1)
        packed = images.load_source(f"{path}:{split}", 16, workers=3)
        np.testing.assert_array_equal(packed.images, folder.images)
        np.testing.assert_array_equal(packed.labels, folder.labels)
        assert packed.label_names == folder.label_names
        assert packed.fingerprint == folder.fingerprint
        listed = images.list_source(f"{path}:{split}")
        assert listed.names == packed.names
        assert listed.labels.tolist() == packed.labels.tolist()


def test_splits_must_be_chosen(pets, tmp_path):
    path = pack(tmp_path / "pets.tar", members_of(pets))
    for source in (str(pets), str(path)):
        for ask in (images.load_source, lambda s, size: images.list_source(s)):
            with pytest.raises(SourceError, match="is divided into test, train"):
                ask(source, 16)
        with pytest.raises(SourceError, match="first-level folders are test, train") as caught:
            images.load_source(f"{source}:tests", 16)
        assert "Did you mean :test?" in str(caught.value)


def test_a_single_split_needs_no_choice(pets, tmp_path):
    only = {n: d for n, d in members_of(pets).items() if n.startswith("test/")}
    path = pack(tmp_path / "only.tar", only)
    assert images.load_source(str(path), 16).fingerprint == images.load_source(f"{pets}:test", 16).fingerprint


def test_a_class_may_be_called_train(tmp_path):
    plant(tmp_path / "vehicles", "bus/1.png", "train/2.png")
    path = pack(tmp_path / "v.tar", {"train/sub/2.png": PNG, "bus/1.png": PNG})
    for source in (tmp_path / "vehicles", path):
        assert images.load_source(str(source), 8).label_names == ("bus", "train")


def test_a_flat_source_has_no_labels(tmp_path):
    plant(tmp_path / "flat", "b.png", "a.png", "notes.txt")
    loaded = images.load_source(str(tmp_path / "flat"), 8)
    assert loaded.labels is None
    assert loaded.label_names == ()
    assert loaded.names == ("a.png", "b.png")
    with pytest.raises(SourceError, match="no classes"):
        images.load_source(str(tmp_path / "flat"), 8, exclude=["x"])


def test_excluded_classes(pets):
    loaded = images.load_source(f"{pets}:train", 16, exclude=["cat"])
    assert loaded.label_names == ("dog",)
    assert loaded.labels.tolist() == [0, 0]
    whole = images.load_source(f"{pets}:train", 16)
    np.testing.assert_array_equal(loaded.images, whole.images[3:])
    with pytest.raises(SourceError, match="The nearest is 'cat'"):
        images.load_source(f"{pets}:train", 16, exclude=["cot"])
    with pytest.raises(SourceError, match="no class left"):
        images.load_source(f"{pets}:train", 16, exclude=["cat", "dog"])


def test_an_empty_class_is_named(tmp_path):
    plant(tmp_path / "s", "cat/1.png", "cow/readme.txt")
    path = pack(tmp_path / "s.tar", {"cat/": b"", "cat/1.png": PNG, "cow/": b"", "cow/readme.txt": b"x"})
    for source in (str(tmp_path / "s"), str(path)):
        with pytest.raises(SourceError, match="has no images for class cow"):
            images.load_source(source, 8)
        assert images.load_source(source, 8, exclude=["cow"]).label_names == ("cat",)


def test_images_beside_classes_are_named(tmp_path):
    plant(tmp_path / "s", "cat/1.png", "dog/1.png", "preview.png")
    with pytest.raises(SourceError, match=r"beside its class folders, preview\.png"):
        images.load_source(str(tmp_path / "s"), 8)


def test_unreadable_images_are_left_out_and_listed(tmp_path):
    plant(tmp_path / "s", "a/1.png", "a/3.png", "b/1.png", "b/2.png")
    plant(tmp_path / "s", "a/2.png", data=b"text")
    plant(tmp_path / "s", "b/0.jpg", data=b"")
    path = pack(tmp_path / "s.tar", members_of(tmp_path / "s"))
    for source in (str(tmp_path / "s"), str(path)):
        loaded = images.load_source(source, 8)
        assert loaded.names == ("a/1.png", "a/3.png", "b/1.png", "b/2.png")
        assert loaded.labels.tolist() == [0, 0, 1, 1]
        assert loaded.errors == (("a/2.png", "is text, not an image"), ("b/0.jpg", "is empty (0 bytes)"))
    plant(tmp_path / "bad", "a/1.png", data=b"text")
    with pytest.raises(SourceError, match=r"no image that can be read; a/1\.png is text"):
        images.load_source(str(tmp_path / "bad"), 8)


def test_bad_sources(tmp_path):
    plant(tmp_path, "file.png", "none/readme.txt", "x/cat/1.png")
    expected = {
        tmp_path / "missing": "does not exist",
        f"{tmp_path}/missing:train": "does not exist",
        "": "does not exist",
        tmp_path / "file.png": "neither a folder nor an archive",
        tmp_path / "none": "holds no images",
        f"{tmp_path}/x:": "names no split",
        f"{tmp_path}/x:dog": "no split 'dog'",
    }
    for source, reason in expected.items():
        with pytest.raises(SourceError, match=reason):
            images.load_source(str(source), 8)


def test_colons_in_names(tmp_path):
    plant(tmp_path / "a:b", "cat/1.png")
    plant(tmp_path / "c:d", "train/cat/1.png", "test/cat/1.png")
    assert images.split_source(f"{tmp_path}/a:b") == (f"{tmp_path}/a:b", None)
    assert images.split_source(f"{tmp_path}/c:d:test") == (f"{tmp_path}/c:d", "test")
    assert images.load_source(f"{tmp_path}/c:d:test", 8).label_names == ("cat",)


def test_many_images_in_any_order(tmp_path):
    """More than one growth of the array and many decoding batches; the order comes from the names."""
    rng = np.random.default_rng(0)
    grey = {f"c{i % 7}/{i:05d}.png": i for i in rng.permutation(2500)}
    members = {n: encoded(Image.fromarray(np.full((4, 4), i % 251, np.uint8))) for n, i in grey.items()}
    loaded = images.load_source(str(pack(tmp_path / "many.tar", members)), 4, 1, workers=3)
    assert list(loaded.names) == sorted(grey)
    assert loaded.images[:, 0, 0, 0].tolist() == [grey[n] % 251 for n in loaded.names]
    assert loaded.labels.tolist() == [grey[n] % 7 for n in loaded.names]


@settings(deadline=None)
@given(st.integers(0, 40).flatmap(lambda n: st.permutations(range(n))), st.data())
def test_reordering_in_place(order, data):
    rows = np.arange(len(order) * 2, dtype=np.uint8).reshape(-1, 2)
    kept = data.draw(st.sampled_from([order, order[: len(order) // 2]]))
    expected = rows[list(kept)] if kept else rows[:0]
    np.testing.assert_array_equal(images._reordered(rows.copy(), list(kept)), expected)


# --- duplicates --------------------------------------------------------------------------------------------


def scenes(n, seed=0, size=32):
    """Pictures that differ in coarse and in fine structure."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray
    out = []
    for _ in range(n):
        blobs = coarse(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        fine = coarse(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((size, size))
        out.append(np.asarray(Image.blend(blobs, fine, 0.3)))
    return np.stack(out)


@pytest.mark.parametrize("size", [32, 28, 50])
def test_copies_are_found_and_strangers_are_not(size):
    first, second = scenes(300, 1, size), scenes(60, 2, size)
    second[5] = first[77]
    recoded = Image.fromarray(first[123])
    second[9] = np.asarray(Image.open(io.BytesIO(encoded(recoded, "JPEG", quality=60))))
    second[30] = np.asarray(
        recoded.resize((size * 3, size * 3), Image.Resampling.LANCZOS).resize((size, size))
    )
    second[41] = np.clip(first[200].astype(int) + 12, 0, 255)
    got = images.near_duplicates(first, second)
    assert {(d.second, d.first) for d in got} == {(5, 77), (9, 123), (30, 123), (41, 200)}
    assert [d.exact for d in got] == [True, False, False, False]
    assert got[0].distance == 0
    assert list(got) == sorted(got, key=lambda d: d.distance)
    assert all(0 < d.distance < 0.07 for d in got[1:])


def test_smooth_lookalikes_are_no_duplicates():
    """Skies that correlate to 0.97 and lie near each other, but whose details are their own."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 32).reshape(1, 32, 1, 1)
    noise = rng.normal(0, 10, (20, 16, 16, 1)).repeat(2, 1).repeat(2, 2)
    skies = np.clip(ramp + noise.repeat(3, 3), 0, 255).astype(np.uint8)
    assert images.near_duplicates(skies[:10], skies[10:]) == ()
    shapes, pooled = images._shapes(skies), images._pooled(skies)
    assert (shapes[:10] @ shapes[10:].T).max() > images.SAME_SHAPE
    assert np.sqrt(np.mean((pooled[0] - pooled[10]) ** 2)) / 255 < images.SAME_COLOUR


def test_flat_images_match_only_exactly():
    flat = np.zeros((5, 16, 16, 1), np.uint8) + np.arange(5, dtype=np.uint8).reshape(-1, 1, 1, 1) * 50
    got = images.near_duplicates(flat[:4], flat[2:])
    assert [(d.first, d.second, d.exact) for d in got] == [(2, 0, True), (3, 1, True)]


def test_each_image_has_at_most_one_duplicate_the_closest():
    first = scenes(1).repeat(500, 0)
    first[:499, 0, 0, 0] ^= 1
    got = images.near_duplicates(first, scenes(1).repeat(3, 0))
    assert [(d.first, d.second, d.exact) for d in got] == [(499, 0, True), (499, 1, True), (499, 2, True)]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_tiny_images_have_duplicates_too(size):
    first = np.random.default_rng(0).integers(0, 256, (20, size, size, 1), dtype=np.uint8)
    assert images.near_duplicates(first, first[7:8])[0] == images.Duplicate(
        first=7, second=0, distance=0.0, exact=True
    )


def test_duplicates_of_nothing_and_of_the_wrong_shape():
    assert images.near_duplicates(scenes(2), scenes(2)[:0]) == ()
    assert images.near_duplicates(scenes(2)[:0], scenes(2)) == ()
    with pytest.raises(ValueError, match="uint8"):
        images.near_duplicates(scenes(2), scenes(2, size=16))


# --- cache -------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_cache(monkeypatch):
    monkeypatch.setattr(images, "CACHE_FROM_BYTES", 0)


def decoded_count(monkeypatch):
    calls = []
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    return calls


@pytest.mark.usefixtures("eager_cache")
def test_the_second_load_comes_from_the_cache(pets, monkeypatch):
    calls = decoded_count(monkeypatch)
    first = images.load_source(f"{pets}:train", 16)
    assert len(calls) == 5
    second = images.load_source(f"{pets}:train", 16)
    assert len(calls) == 5
    np.testing.assert_array_equal(first.images, second.images)
    assert type(second.images) is np.ndarray
    assert (first.names, first.errors, first.fingerprint) == (second.names, second.errors, second.fingerprint)
    second.images[0] = 0  # private to this process
    np.testing.assert_array_equal(images.load_source(f"{pets}:train", 16).images, first.images)
    images.load_source(f"{pets}:train", 16, cache=False)
    assert len(calls) == 10


@pytest.mark.usefixtures("eager_cache")
def test_the_cache_notices_every_difference(pets, monkeypatch):
    calls = decoded_count(monkeypatch)
    variants = [
        lambda: images.load_source(f"{pets}:train", 16),
        lambda: images.load_source(f"{pets}:train", 17),
        lambda: images.load_source(f"{pets}:train", 16, 1),
        lambda: images.load_source(f"{pets}:train", 16, exclude=["cat"]),
        lambda: images.load_source(f"{pets}:test", 16),
    ]
    for variant in variants:
        before = len(calls)
        variant()
        assert len(calls) > before
        before = len(calls)
        variant()
        assert len(calls) == before
    plant(pets, "train/cat/1.png", data=encoded(picture(40, 40, seed=99)))
    before = len(calls)
    changed = variants[0]()
    assert len(calls) > before
    np.testing.assert_array_equal(changed.images[0], images.decode(pets / "train/cat/1.png", 16).pixels)


@pytest.mark.usefixtures("eager_cache")
@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "nested", "gone", "folder"])
def test_a_damaged_cache_is_done_without(pets, tmp_path, suffix, damage):
    first = images.load_source(f"{pets}:train", 16)
    (path,) = (tmp_path / "cache" / "decoded").glob(f"*{suffix}")
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 0x11
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        other = {
            "flip": bytes(raw),
            "cut": bytes(raw[: len(raw) // 2]),
            "nested": b"[" * 100_000,
            "empty": b"",
        }
        path.write_bytes(other[damage])
    again = images.load_source(f"{pets}:train", 16)
    np.testing.assert_array_equal(first.images, again.images)
    assert again.names == first.names
    assert not list((tmp_path / "cache" / "decoded").glob(".*.part"))


@pytest.mark.usefixtures("eager_cache")
def test_a_cache_that_cannot_be_written_is_done_without(pets, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "file"))
    assert len(images.load_source(f"{pets}:train", 16).images) == 5


def test_small_sources_are_not_cached(pets, tmp_path):
    images.load_source(f"{pets}:train", 16)
    assert not (tmp_path / "cache").exists()


def test_the_cache_folder(monkeypatch):
    assert images.cache_dir().name == "cache"
    monkeypatch.delenv("RATIOCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert images.cache_dir() == Path("/somewhere/ratioctl")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", "/home/nobody")
        assert images.cache_dir() == Path("/home/nobody/.cache/ratioctl")


def test_a_missing_field_is_told_in_words_of_images() -> None:
    with pytest.raises(ImageError) as error:
        images.decode(b"\x89PNG\r\n\x1a\nxx", 32)
    assert error.value.reason == "is a PNG image that is cut short or damaged"
