"""Counterfactuals as pictures: PNGs, the grid of budgets, animations, and previews in a terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ratioctl.results import Explanation, Target
from ratioctl.text import safe_text

Animation = Literal["gif", "webp"]

_INK, _QUIET, _ACCENT, _RULE = (20, 24, 31), (92, 101, 115), (10, 110, 80), (208, 213, 221)
_CELL, _COLUMNS = 160, 8  # pixels of a picture in a grid at least, columns at most


def picture(image: np.ndarray) -> Image.Image:
    """A Pillow image of uint8 (H, W, C), C 1 or 3."""
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))


def png(image: np.ndarray) -> bytes:
    """uint8 (H, W, C) as a PNG without loss."""
    return png_of(picture(image))


def png_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def enlarged(image: np.ndarray, least: int) -> Image.Image:
    """At least `least` pixels wide, every pixel a square."""
    factor = max(1, -(-least // image.shape[1]))
    shown = picture(image).convert("RGB")
    return shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)


def grid(explanation: Explanation, target: Target, *, labels: Sequence[str], norm: str) -> Image.Image:
    """The original, then one column per budget, the confidence in the target over each.

    As Figure 2 of the RATIO paper; under each picture its budget and how the model sees it, in colour where
    that is the target.
    """
    original, name = explanation.original, target.target
    confidence = original.probabilities[list(labels).index(name)]
    cells = [(confidence, explanation.input, "original", original.label)]
    cells += [
        (budget.confidence, budget.image, f"{norm_symbol(norm)} ≤ {budget.eps:g}", budget.predicted)
        for budget in target.budgets
    ]
    pictures = [enlarged(cell[1], _CELL) for cell in cells]
    side, gap, head, foot, margin = pictures[0].width, 12, 30, 44, 16
    columns = min(len(cells), _COLUMNS)
    rows = -(-len(cells) // columns)
    step_x, step_y = side + gap, head + side + foot
    sheet = Image.new(
        "RGB", (2 * margin + columns * step_x - gap, 2 * margin + rows * step_y - 8), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for n, (cell, shown) in enumerate(zip(cells, pictures, strict=True)):
        x, y = margin + n % columns * step_x, margin + n // columns * step_y
        shown_confidence, _, caption, predicted = cell
        hit = predicted == name
        title = f"{_short(name)} {two_digits(shown_confidence)}"
        _centred(draw, title, x, y, side, 17, _ACCENT if hit else _INK, bold=True)
        sheet.paste(shown, (x, y + head))
        frame = (x - 1, y + head - 1, x + side, y + head + side)
        draw.rectangle(frame, outline=_ACCENT if hit else _RULE, width=1)
        _centred(draw, caption, x, y + head + side + 6, side, 13, _INK)
        seen = f"seen as {_short(predicted)}"
        _centred(draw, seen, x, y + head + side + 24, side, 13, _ACCENT if hit else _QUIET)
    return sheet


def _centred(
    draw: ImageDraw.ImageDraw,
    text: str,
    x: int,
    y: int,
    width: int,
    size: int,
    colour: tuple[int, int, int],
    bold: bool = False,
) -> None:
    font = _font(size, bold)
    while size > 8 and draw.textlength(text, font=font) > width:
        size -= 1
        font = _font(size, bold)
    draw.text((x + width / 2, y), text, fill=colour, font=font, anchor="ma")


@lru_cache(maxsize=64)
def _font(size: int, bold: bool) -> Any:
    """DejaVu Sans as matplotlib brings it along, found without importing that; else Pillow's own."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        with contextlib.suppress(OSError):
            return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name, size)
    return ImageFont.load_default(size)


def animated(explanation: Explanation, target: Target, kind: Animation) -> bytes:
    """From the original through the budgets and back, enlarged, forever."""
    images = [explanation.input, *(budget.image for budget in target.budgets)]
    frames = [enlarged(image, 256) for image in images]
    times = [900, *(350 for _ in frames[1:-1]), 1400] if len(frames) > 1 else [900]
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
    """A confidence for people, never rounded to a certainty that is none: "<0.01", "0.42", ">0.99"."""
    if 0 < confidence < 0.005:
        return "<0.01"
    if 0.995 <= confidence < 1:
        return ">0.99"
    return f"{confidence:.2f}"


def _short(label: str, most: int = 18) -> str:
    text = safe_text(label)
    return text if len(text) <= most else text[: most - 1] + "…"
