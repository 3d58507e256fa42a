"""Counterfactuals as pictures: PNGs, the grid of budgets, animations, and previews in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ratioctl.types import Explanation, Target
from ratioctl.utils.text import safe_text

if TYPE_CHECKING:
    from rich.console import Console

Animation = Literal["gif", "webp"]

_INK, _QUIET, _ACCENT, _RULE = (20, 24, 31), (92, 101, 115), (10, 110, 80), (208, 213, 221)
_WARNING = (150, 60, 10)
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


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Shown:
    """A picture with what stands beside it: its budget, p_target, and how the model sees it."""

    image: np.ndarray
    caption: str
    confidence: float
    predicted: str
    hit: bool


def _shown(explanation: Explanation, target: Target, labels: Sequence[str], norm: str) -> tuple[_Shown, ...]:
    """The original, then the picture of each budget."""
    original, name = explanation.original, target.target
    first = _Shown(
        image=explanation.input,
        caption="original",
        confidence=original.probabilities[list(labels).index(name)],
        predicted=original.label,
        hit=original.label == name,
    )
    rest = (
        _Shown(
            image=budget.image,
            caption=f"{norm_symbol(norm)} ≤ {budget.eps:g}",
            confidence=budget.confidence,
            predicted=budget.predicted,
            hit=budget.predicted == name,
        )
        for budget in target.budgets
    )
    return (first, *rest)


def grid(explanation: Explanation, target: Target, *, labels: Sequence[str], norm: str) -> Image.Image:
    """The original, then one column per budget, the confidence in the target over each.

    As Figure 2 of the RATIO paper; under each picture its budget and how the model sees it, in colour where
    that is the target, and under the original whether it is out of distribution.
    """
    name, cells = target.target, _shown(explanation, target, labels, norm)
    pictures = [enlarged(cell.image, _CELL) for cell in cells]
    outside = bool(explanation.original.is_ood)
    side, gap, head, foot, margin = pictures[0].width, 12, 30, 62 if outside else 44, 16
    columns = min(len(cells), _COLUMNS)
    rows = -(-len(cells) // columns)
    step_x, step_y = side + gap, head + side + foot
    sheet = Image.new(
        "RGB", (2 * margin + columns * step_x - gap, 2 * margin + rows * step_y - 8), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for n, (cell, shown) in enumerate(zip(cells, pictures, strict=True)):
        x, y = margin + n % columns * step_x, margin + n // columns * step_y
        title = f"{_short(name)} {two_digits(cell.confidence)}"
        _centred(draw, title, x, y, side, 17, _ACCENT if cell.hit else _INK, bold=True)
        sheet.paste(shown, (x, y + head))
        frame = (x - 1, y + head - 1, x + side, y + head + side)
        draw.rectangle(frame, outline=_ACCENT if cell.hit else _RULE, width=1)
        under = y + head + side
        _centred(draw, cell.caption, x, under + 6, side, 13, _INK)
        seen = f"seen as {_short(cell.predicted)}"
        _centred(draw, seen, x, under + 24, side, 13, _ACCENT if cell.hit else _QUIET)
        if outside and n == 0:
            _centred(draw, "out of distribution", x, under + 42, side, 13, _WARNING, bold=True)
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


def animated(
    explanation: Explanation, target: Target, kind: Animation, *, labels: Sequence[str], norm: str
) -> bytes:
    """From the original through the budgets and back, enlarged, forever; budget and confidence below."""
    cells = _shown(explanation, target, labels, norm)
    frames = []
    for cell in cells:
        shown = enlarged(cell.image, 256)
        frame = Image.new("RGB", (shown.width, shown.height + 30), (255, 255, 255))
        frame.paste(shown)
        draw, half, colour = ImageDraw.Draw(frame), shown.width // 2, _ACCENT if cell.hit else _INK
        title = f"{_short(target.target)} {two_digits(cell.confidence)}"
        _centred(draw, cell.caption, 4, shown.height + 6, half - 8, 15, _INK)
        _centred(draw, title, half + 4, shown.height + 6, half - 8, 15, colour, bold=True)
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
    """A confidence for people, never rounded to a certainty that is none: "<0.01", "0.42", ">0.99"."""
    if 0 < confidence < 0.005:
        return "<0.01"
    if 0.995 <= confidence < 1:
        return ">0.99"
    return f"{confidence:.2f}"


def _short(label: str, most: int = 18) -> str:
    text = safe_text(label)
    return text if len(text) <= most else text[: most - 1] + "…"


# --- in a terminal ------------------------------------------------------------------------------------------


def preview(
    console: Console, explanation: Explanation, target: Target, *, labels: Sequence[str], norm: str
) -> None:
    """Print the original and counterfactuals in a row, as many as fit, with budgets and confidences.

    By textual-image: sixel or Kitty's protocol where the terminal answers that it knows them, else half
    blocks. Nothing where there are no colours.
    """
    if console.color_system in (None, "windows") or not console.is_terminal:
        return
    from rich.text import Text

    cells = _shown(explanation, target, labels, norm)
    gap, room = 2, console.width - 1
    fit = max(1, (room + gap) // (_LEAST_COLUMNS + gap))
    if fit < len(cells):  # the original, and budgets evenly up to the last
        rest = [1 + round(k * (len(cells) - 2) / max(fit - 2, 1)) for k in range(fit - 1)]
        cells = (cells[0], *(cells[n] for n in dict.fromkeys(rest)))
    columns = min(_MOST_COLUMNS, (room + gap) // len(cells) - gap, room) // 2 * 2

    def line(words: Sequence[tuple[str, str]]) -> Text:
        text = Text(no_wrap=True, overflow="crop")
        for word, style in words:
            text.append(f"{word[:columns]:<{columns + gap}}", style=style)
        return text

    seen = f"{safe_text(explanation.path)}, seen as {_short(explanation.original.label)}"
    outside = " (out of distribution)" if explanation.original.is_ood else ""
    logging.getLogger("textual_image").setLevel(logging.ERROR)  # it tells of terminals that do not answer
    with _nobody_asked() as answers:
        try:
            from textual_image.renderable import HalfcellImage
            from textual_image.renderable import Image as BestImage
        except (ImportError, OSError, ValueError):  # a terminal whose answers nobody can read
            return
        if answers:  # some terminals print the question they do not know
            console.file.write("\r\x1b[2K")
        kind: Any = BestImage if answers else HalfcellImage
        pixels = columns if kind is HalfcellImage else 8 * columns
        strip = _strip([cell.image for cell in cells], pixels, gap * pixels // columns)
        console.print(Text(f"{seen}{outside}; towards {_short(target.target)}:", style="bold"))
        console.print(kind(strip, width=len(cells) * (columns + gap) - gap, height=columns // 2))
    console.print(line([(cell.caption, "") for cell in cells]))
    marks = [f"{two_digits(cell.confidence)}{' *' if cell.hit else ''}" for cell in cells]
    styles = ["bold green" if cell.hit else "" for cell in cells]
    console.print(line(list(zip(marks, styles, strict=True))))


_LEAST_COLUMNS, _MOST_COLUMNS = 18, 32  # of a picture in the terminal


def _strip(images: Sequence[np.ndarray], side: int, gap: int) -> Image.Image:
    """Pictures in a row, each `side` pixels wide and high."""
    strip = Image.new("RGB", (len(images) * (side + gap) - gap, side), (0, 0, 0))
    for n, image in enumerate(images):
        shown = picture(image).convert("RGB")
        how = Image.Resampling.NEAREST if side % shown.width == 0 else Image.Resampling.LANCZOS
        strip.paste(shown.resize((side, side), how), (n * (side + gap), 0))
    return strip


@contextlib.contextmanager
def _nobody_asked() -> Iterator[bool]:
    """Hides stdin from textual-image where it is no terminal, or not ours to read; yields whether it is.

    The library asks the terminal what it can by reading stdin, on import and when it draws.
    """
    stdin = sys.__stdin__
    answers = False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        answers = bool(stdin and stdin.isatty() and os.tcgetpgrp(stdin.fileno()) == os.getpgrp())
    if not answers:
        sys.__stdin__ = None  # type: ignore[misc]
    try:
        yield answers
    finally:
        sys.__stdin__ = stdin  # type: ignore[misc]
