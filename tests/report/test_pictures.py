"""The font of the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ratioctl.report import pictures

TEXTS = (
    "predicted AVATAR 0.98",
    "l₂ ≤ 0.5",
    "l₁.₅ ≤ 3",
    "l∞ ≤ 0.0314 >0.99 …",
    "Größe żółć ñ",
    "Собака",
    "σκύλος",
)


@pytest.mark.parametrize("bold", [False, True])
def test_the_shipped_font_draws_the_same_pixels_as_the_whole_one(bold: bool) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    whole = Path(matplotlib.__file__).parent / "mpl-data" / "fonts" / "ttf" / name

    def drawn(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray:
        sheet = Image.new("L", (400, 40), 255)
        ImageDraw.Draw(sheet).text((200, 5), text, fill=0, font=font, anchor="ma")
        return np.asarray(sheet)

    for size in (8, 13, 17):
        for text in TEXTS:
            shipped = drawn(pictures.font(size, bold), text)
            assert shipped.min() < 128
            assert np.array_equal(shipped, drawn(ImageFont.truetype(whole, size), text)), (size, text)


def test_the_font_files_are_small_and_have_their_license() -> None:
    sizes = [(pictures._FONTS / name).stat().st_size for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")]
    assert max(sizes) < 200_000
    license_text = (pictures._FONTS / "LICENSE_DEJAVU").read_text(encoding="utf-8")
    assert "Bitstream Vera" in license_text
