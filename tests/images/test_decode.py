"""Encoded images to pixels: formats, orientation, transparency, damage."""

import io
import os
import socket
import struct
import sys
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from ratioctl import images
from ratioctl.errors import ImageError
from ratioctl.images import files
from tests.images.helpers import FORMATS, encoded, picture, png_header, reason_of

decode_module = sys.modules["ratioctl.images.decode"]  # the package's attribute is the function


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
    assert (f"cut to the center square of {width}x{height}" in decoded.notes) == (width != height)
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
    assert "cut to the center square of 640x480" in decoded.notes
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
    assert f"cut to the center square of {seen}" in decoded.notes


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


def test_palettes_and_key_colors_are_transparent_too():
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


def test_sixteen_bit_big_endian_and_key_color():
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
def test_paths_bytes_and_streams_are_read_alike(kind, tmp_path):
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
            "a\0b": "not a valid file name",
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
        file.truncate(files.MAX_BYTES + 1)  # sparse
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
    monkeypatch.setattr(decode_module, "LARGE_PIXELS", 100)
    inside, most = [], []
    whole = decode_module._to_frame

    def watched(*args):
        inside.append(threading.get_ident())
        most.append(len(inside))
        result = whole(*args)
        inside.remove(threading.get_ident())
        return result

    monkeypatch.setattr(decode_module, "_to_frame", watched)
    data = encoded(picture(400, 400), "JPEG")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: images.decode(data, 32), range(24)))
    assert max(most) == 1


def test_a_missing_field_is_reported_in_words_of_images() -> None:
    with pytest.raises(ImageError) as error:
        images.decode(b"\x89PNG\r\n\x1a\nxx", 32)
    assert error.value.reason == "is a PNG image that is cut short or damaged"


# --- 16-bit grey of every kind -----------------------------------------------------------------------------


def tiff16(values, *, order="<", white_is_zero=False):
    """An uncompressed 16-bit grey TIFF, written tag by tag."""
    height, width = values.shape
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 16),
        (259, 3, 1),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, values.size * 2),
    ]
    data = values.astype(f"{order}u2").tobytes()
    ifd = struct.pack(f"{order}H", len(tags))
    for tag, kind, value in tags:
        shifted = struct.pack(f"{order}H2x", value) if kind == 3 else struct.pack(f"{order}I", value)
        ifd += struct.pack(f"{order}HHI", tag, kind, 1) + shifted
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + ifd + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_sixteen_bit_tiffs_of_either_order_and_polarity(order, white_is_zero):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    stored = 65535 - ramp if white_is_zero else ramp
    done = images.decode(tiff16(stored, order=order, white_is_zero=white_is_zero), 8, 1)
    np.testing.assert_array_equal(done.pixels[..., 0], np.rint(ramp / 65535 * 255))
    assert done.notes == ("scaled from 16 to 8 bits",)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_twelve_bits_in_sixteen_are_noted_and_scaled_on_request(kind):
    values = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    data = tiff16(values) if kind == "TIFF" else encoded(Image.fromarray(values))
    dark = images.decode(data, 8, 1)
    assert dark.pixels.max() == 16
    assert "its pixels fill only 12 of 16 bits" in dark.notes[1]
    assert "--bit-depth 12" in dark.notes[1]
    done = images.decode(data, 8, 1, bit_depth=12)
    np.testing.assert_array_equal(done.pixels[..., 0], np.floor(values / 4095 * 255 + 0.5))
    assert done.notes == ("scaled from 12 to 8 bits",)
    brighter = images.decode(encoded(Image.fromarray(values * 16)), 8, 1, bit_depth=12)
    assert brighter.pixels.max() == 255, "values above the range are white"


def test_bit_depth_leaves_eight_bits_alone_and_has_bounds():
    data = encoded(picture())
    plain, deep = images.decode(data, 32), images.decode(data, 32, bit_depth=12)
    np.testing.assert_array_equal(plain.pixels, deep.pixels)
    for wrong in (0, 8, 17):
        with pytest.raises(ValueError):
            images.decode(data, 32, bit_depth=wrong)
