"""DICOM images through pydicom (the extra `medical`): first frame, modality transformation, window."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from ratioctl.errors import ImageError
from ratioctl.utils.optional import install_command
from ratioctl.utils.text import shown


def is_dicom(data: bytes) -> bool:
    """Whether encoded bytes are a DICOM file with its preamble."""
    return data[128:132] == b"DICM"


def read(data: bytes, name: str, max_pixels: int) -> tuple[Image.Image, dict[str, int], list[str]]:
    """(8-bit L or RGB picture, {"width", "height"}, notes) of the first frame.

    Grey values pass the rescale slope and intercept and the file's first window or VOI table (DICOM PS3.3
    C.11.1, C.11.2), or are stretched from their own minimum to their maximum without one. MONOCHROME1 is
    inverted.

    Raises:
        ImageError: pydicom is not installed, no image, too many pixels, or compressed in a way that needs
            another package.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, convert_color_space, pixel_array
    except ImportError as e:
        step = f"Run: {install_command('pydicom')}"
        raise ImageError(name, "is a DICOM file, which needs pydicom", step) from e
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        if "PixelData" not in dataset:
            raise ImageError(name, "is a DICOM file without an image")
        height, width = int(dataset.Rows), int(dataset.Columns)
        if width * height > max_pixels:
            raise ImageError(name, f"has more than {max_pixels:,} pixels", "Make it smaller first.")
        array = pixel_array(dataset, index=0)
        color = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
        notes = ["first frame of several"] if int(dataset.get("NumberOfFrames") or 1) > 1 else []
        if array.ndim == 3:
            array = array if color == "RGB" else convert_color_space(array, color, "RGB")
            return Image.fromarray(array.astype(np.uint8)), {"width": width, "height": height}, notes
        unit, note = _windowed(apply_modality_lut(array, dataset), dataset)
        grey = np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)
        grey = 255 - grey if color == "MONOCHROME1" else grey
        return Image.fromarray(grey), {"width": width, "height": height}, [*notes, note]
    except ImageError:
        raise
    except MemoryError as e:
        raise ImageError(name, "does not fit into memory") from e
    except Exception as e:  # pydicom raises many kinds on damaged input
        reason = f"is a DICOM file that cannot be decoded ({shown(str(e) or type(e).__name__)[:200]})"
        raise ImageError(name, reason) from e


def _windowed(values: np.ndarray, dataset: Any) -> tuple[np.ndarray, str]:
    """Grey values through the first window as [0, 1] (PS3.3 C.11.2.1.2 and .3), and a note."""
    from pydicom.pixels import apply_voi

    if "VOILUTSequence" in dataset:
        table = dataset.VOILUTSequence[0]
        top = 2 ** int(table.LUTDescriptor[2]) - 1
        return apply_voi(values.astype(np.int64), dataset) / top, "DICOM VOI table applied"
    if "WindowCenter" not in dataset or "WindowWidth" not in dataset:
        low, high = float(values.min()), float(values.max())
        unit = (values - low) / max(high - low, 1e-12)
        return unit, f"no DICOM window: scaled from {low:g} to {high:g}"
    center, width = _first(dataset.WindowCenter), _first(dataset.WindowWidth)
    function = str(dataset.get("VOILUTFunction", "LINEAR"))
    note = f"DICOM window of center {center:g}, width {width:g}"
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / max(width, 1e-12))), note
    if function == "LINEAR_EXACT":
        return (values - center) / max(width, 1e-12) + 0.5, note
    return (values - (center - 0.5)) / max(width - 1, 1e-12) + 0.5, note


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float | str) else value[0])
