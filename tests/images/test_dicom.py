"""DICOM images: polarity, rescaling, windows."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest

from ratioctl import images
from ratioctl.errors import ImageError

pydicom = pytest.importorskip("pydicom")

RAMP = np.arange(64).reshape(8, 8) * 65  # 12 bits: 0 to 4095


def dicom(values: np.ndarray = RAMP, **tags: Any) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    data.PhotometricInterpretation = "MONOCHROME2"
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 1 if values.ndim == 2 else 3
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    if values.ndim == 3:
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PlanarConfiguration = 8, 8, 7, 0
    data.PixelData = values.astype("<u2" if values.ndim == 2 else "u1").tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream)
    return stream.getvalue()


def grey(data: bytes) -> np.ndarray:
    return images.decode(data, 8, 1).pixels[..., 0]


def test_the_window_is_applied() -> None:
    done = images.decode(dicom(WindowCenter=2048, WindowWidth=1025), 8, 1)
    expected = np.clip((RAMP - 2047.5) / 1024 + 0.5, 0, 1) * 255
    np.testing.assert_array_equal(done.pixels[..., 0], np.rint(expected))
    assert done.notes == ("DICOM window of center 2048, width 1025",)
    assert (done.format, done.width, done.height) == ("DICOM", 8, 8)


def test_the_window_is_in_rescaled_units() -> None:
    """Hounsfield units: value - 1024."""
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": [1024, 0], "WindowWidth": [1025, 1]}
    np.testing.assert_array_equal(grey(dicom(**tags)), grey(dicom(WindowCenter=2048, WindowWidth=1025)))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR_EXACT", lambda x: np.clip((x - 2048) / 1024 + 0.5, 0, 1)),
        ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 2048) / 1024))),
    ],
)
def test_other_functions(function: str, expected: Any) -> None:
    done = grey(dicom(WindowCenter=2048, WindowWidth=1024, VOILUTFunction=function))
    np.testing.assert_array_equal(done, np.rint(expected(RAMP) * 255))


def test_without_a_window_the_own_range_is_used() -> None:
    done = images.decode(dicom(RAMP[:, ::-1] + 0), 8, 1)
    np.testing.assert_array_equal(done.pixels[..., 0], np.rint(RAMP[:, ::-1] / 4095 * 255))
    assert done.notes == ("no DICOM window: scaled from 0 to 4095",)
    inverted = grey(dicom(PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(inverted, 255 - grey(dicom()))


def test_color_and_frames() -> None:
    color = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    done = images.decode(dicom(color, PhotometricInterpretation="RGB"), 8)
    np.testing.assert_array_equal(done.pixels, color)
    frames = dicom(
        WindowCenter=2048,
        WindowWidth=1025,
        NumberOfFrames=2,
        PixelData=np.stack([RAMP, RAMP * 0]).astype("<u2").tobytes(),
    )
    first = images.decode(frames, 8, 1)
    np.testing.assert_array_equal(first.pixels[..., 0], grey(dicom(WindowCenter=2048, WindowWidth=1025)))
    assert first.notes[0] == "first frame of several"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-20], "cannot be decoded"),
        (lambda data: data[:200], "DICOM file"),
        (lambda data: dicom(Rows=60000, Columns=60000), "pixels"),
    ],
)
def test_damage_is_an_image_error(damage: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        images.decode(damage(dicom()), 8)


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dicom()
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydicom"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImageError, match="needs pydicom") as caught:
        images.decode(data, 8)
    assert caught.value.next_step == 'Run: pip install "ratioctl[medical]"'
