"""Counterfactuals as pictures: PNGs, the grid of budgets, animations."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ratioctl.types import Explanation, Target
from ratioctl.utils.text import safe_text

_FONTS = Path(__file__).parent / "fonts"
Animation = Literal["gif", "webp"]

_INK, _QUIET, _ACCENT, _RULE = (20, 24, 31), (92, 101, 115), (10, 110, 80), (208, 213, 221)
_WARNING = (150, 60, 10)
_CELL, _COLUMNS = 160, 8  # minimum pixels of a picture in a grid, maximum columns


def picture(image: np.ndarray) -> Image.Image:
    """A Pillow image of uint8 (H, W, C), C 1 or 3."""
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))


def png(image: np.ndarray) -> bytes:
    """uint8 (H, W, C) as a lossless PNG."""
    return png_of(picture(image))


def png_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def enlarged(image: np.ndarray, least: int) -> Image.Image:
    """Enlarged by an integer factor to at least `least` pixels."""
    factor = max(1, -(-least // image.shape[1]))
    small = picture(image).convert("RGB")
    return small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """A picture with its caption (the budget), p_target, predicted label and whether it is flagged."""

    image: np.ndarray
    caption: str
    confidence: float
    predicted: str
    hit: bool
    is_ood: bool


def shown(explanation: Explanation, target: Target, labels: Sequence[str], norm: str) -> tuple[Shown, ...]:
    """The original, then the picture of each budget."""
    original, name = explanation.original, target.target
    first = Shown(
        image=explanation.input,
        caption="original",
        confidence=original.probabilities[list(labels).index(name)],
        predicted=original.label,
        hit=original.label == name,
        is_ood=bool(original.is_ood),
    )
    rest = (
        Shown(
            image=budget.image,
            caption=f"{norm_symbol(norm)} ≤ {budget.eps:g}",
            confidence=budget.confidence,
            predicted=budget.predicted,
            hit=budget.predicted == name,
            is_ood=bool(budget.is_ood),
        )
        for budget in target.budgets
    )
    return (first, *rest)


def grid(explanation: Explanation, target: Target, *, labels: Sequence[str], norm: str) -> Image.Image:
    """The original, then one column per budget, the confidence in the target over each.

    As Figure 2 of the RATIO paper. Under each picture its budget and predicted label, in color where that is
    the target, and whether it is out of distribution.
    """
    name, cells = target.target, shown(explanation, target, labels, norm)
    pictures = [enlarged(cell.image, _CELL) for cell in cells]
    outside = any(cell.is_ood for cell in cells)
    side, tall = pictures[0].size
    gap, head, foot, margin = 12, 30, 62 if outside else 44, 16
    columns = min(len(cells), _COLUMNS)
    rows = -(-len(cells) // columns)
    step_x, step_y = side + gap, head + tall + foot
    sheet = Image.new(
        "RGB", (2 * margin + columns * step_x - gap, 2 * margin + rows * step_y - 8), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for n, (cell, tile) in enumerate(zip(cells, pictures, strict=True)):
        x, y = margin + n % columns * step_x, margin + n // columns * step_y
        title = f"{short(name)} {two_digits(cell.confidence)}"
        _centered(draw, title, x, y, side, 17, _ACCENT if cell.hit else _INK, bold=True)
        sheet.paste(tile, (x, y + head))
        frame = (x - 1, y + head - 1, x + side, y + head + tall)
        draw.rectangle(frame, outline=_ACCENT if cell.hit else _RULE, width=1)
        under = y + head + tall
        _centered(draw, cell.caption, x, under + 6, side, 13, _INK)
        label = f"predicted {short(cell.predicted)}"
        _centered(draw, label, x, under + 24, side, 13, _ACCENT if cell.hit else _QUIET)
        if cell.is_ood:
            _centered(draw, "out of distribution", x, under + 42, side, 13, _WARNING, bold=True)
    return sheet


def _centered(
    draw: ImageDraw.ImageDraw,
    text: str,
    x: int,
    y: int,
    width: int,
    size: int,
    color: tuple[int, int, int],
    bold: bool = False,
) -> None:
    used = font(size, bold)
    while size > 8 and draw.textlength(text, font=used) > width:
        size -= 1
        used = font(size, bold)
    draw.text((x + width / 2, y), text, fill=color, font=used, anchor="ma")


@lru_cache(maxsize=64)
def font(size: int, bold: bool) -> Any:
    """DejaVu Sans, a subset of which is in the folder `fonts`."""
    return ImageFont.truetype(_FONTS / f"DejaVuSans{'-Bold' if bold else ''}.ttf", size)


def animated(
    explanation: Explanation, target: Target, kind: Animation, *, labels: Sequence[str], norm: str
) -> bytes:
    """Endless animation from the original through the budgets and back, with budget and confidence below."""
    cells = shown(explanation, target, labels, norm)
    frames = []
    for cell in cells:
        tile = enlarged(cell.image, 256)
        frame = Image.new("RGB", (tile.width, tile.height + 30), (255, 255, 255))
        frame.paste(tile)
        draw, half, color = ImageDraw.Draw(frame), tile.width // 2, _ACCENT if cell.hit else _INK
        title = f"{short(target.target)} {two_digits(cell.confidence)}"
        _centered(draw, cell.caption, 4, tile.height + 6, half - 8, 15, _INK)
        _centered(draw, title, half + 4, tile.height + 6, half - 8, 15, color, bold=True)
        frames.append(frame)
    times = [1200, *(450 for _ in frames[1:-1]), 1800] if len(frames) > 1 else [1200]  # milliseconds
    frames, times = frames + frames[-2:0:-1], times + times[-2:0:-1]
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {"optimize": False}
    frames[0].save(
        stream, kind.upper(), save_all=True, append_images=frames[1:], duration=times, loop=0, **options
    )
    return stream.getvalue()


def norm_symbol(norm: str) -> str:
    """ "l₂" of "2", "l∞" of "inf"."""
    return "l" + {"1": "₁", "1.5": "₁.₅", "2": "₂", "inf": "∞"}.get(norm, norm)


def two_digits(confidence: float) -> str:
    """A confidence with two digits, never rounded to 0 or 1: "<0.01", "0.42", ">0.99"."""
    if 0 < confidence < 0.005:
        return "<0.01"
    if 0.995 <= confidence < 1:
        return ">0.99"
    return f"{confidence:.2f}"


def short(label: str, most: int = 18) -> str:
    text = safe_text(label)
    return text if len(text) <= most else text[: most - 1] + "…"
