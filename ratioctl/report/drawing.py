"""A drawing of text, lines, areas and pictures, written as SVG or PNG with the same contents."""

from __future__ import annotations

import base64
import dataclasses
import html
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ratioctl.report.pictures import font, png, png_of
from ratioctl.utils.text import safe_text

Point = tuple[float, float]
Color = tuple[int, int, int]
_Put = Callable[[ImageDraw.ImageDraw, Image.Image, int], None]
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}


@dataclasses.dataclass(kw_only=True)
class Drawing:
    """A sheet of `width` x `height` units, white; later items lie over earlier ones."""

    width: int
    height: int
    svg: list[str] = dataclasses.field(default_factory=list)
    puts: list[_Put] = dataclasses.field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 13,
        color: Color = (20, 24, 31),
        anchor: Literal["start", "middle", "end"] = "start",
        bold: bool = False,
    ) -> None:
        """One line with its baseline at y."""
        shown, weight = safe_text(text), ' font-weight="bold"' if bold else ""
        self.svg.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{_hex(color)}"{weight}>{html.escape(shown)}</text>'
        )
        self.puts.append(
            lambda draw, sheet, k: draw.text(
                (k * x, k * y), shown, fill=color, font=font(k * size, bold), anchor=_ANCHORS[anchor]
            )
        )

    def picture(self, x: int, y: int, side: int, image: np.ndarray) -> None:
        """uint8 (H, W, C), enlarged without smoothing to a height of `side`."""
        width = round(side * image.shape[1] / image.shape[0])
        data = base64.b64encode(png(image)).decode("ascii")
        self.svg.append(
            f'<image x="{x}" y="{y}" width="{width}" height="{side}" style="image-rendering:pixelated" '
            f'href="data:image/png;base64,{data}"/>'
        )

        def put(draw: ImageDraw.ImageDraw, sheet: Image.Image, k: int) -> None:
            small = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
            large = small.convert("RGB").resize((k * width, k * side), Image.Resampling.NEAREST)
            sheet.paste(large, (k * x, k * y))

        self.puts.append(put)

    def line(self, points: Sequence[Point], color: Color, *, width: float = 2, dashed: bool = False) -> None:
        """A line through the points."""
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.svg.append(
            f'<polyline points="{path}" fill="none" stroke="{_hex(color)}" stroke-width="{width:g}"{dash}/>'
        )

        def put(draw: ImageDraw.ImageDraw, sheet: Image.Image, k: int) -> None:
            for piece in _dashes(points) if dashed else [points]:
                draw.line([(k * x, k * y) for x, y in piece], fill=color, width=max(1, round(k * width)))

        self.puts.append(put)

    def area(self, points: Sequence[Point], color: Color) -> None:
        """A filled polygon."""
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        self.svg.append(f'<polygon points="{path}" fill="{_hex(color)}"/>')
        self.puts.append(lambda draw, sheet, k: draw.polygon([(k * x, k * y) for x, y in points], fill=color))

    def to_svg(self) -> bytes:
        """A file of its own: pictures are inside, no script, no requests."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="DejaVu Sans, sans-serif">'
            f'<rect width="100%" height="100%" fill="#ffffff"/>'
        )
        return "\n".join([head, *self.svg, "</svg>\n"]).encode()

    def to_png(self, scale: int = 2) -> bytes:
        """`scale` pixels per unit."""
        sheet = Image.new("RGB", (scale * self.width, scale * self.height), (255, 255, 255))
        draw = ImageDraw.Draw(sheet)
        for put in self.puts:
            put(draw, sheet, scale)
        return png_of(sheet)


def _hex(color: Color) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _dashes(points: Sequence[Point], on: float = 6, off: float = 4) -> list[list[Point]]:
    """Pieces of a line that are drawn, as of a stroke-dasharray."""
    pieces: list[list[Point]] = []
    at = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        length = float(np.hypot(x1 - x0, y1 - y0))
        t = 0.0
        while t < length:
            phase = at % (on + off)
            step = min((on if phase < on else on + off) - phase, length - t)
            if phase < on:
                ends = [(x0 + (x1 - x0) * s / length, y0 + (y1 - y0) * s / length) for s in (t, t + step)]
                pieces.append(ends)
            t, at = t + max(step, 1e-6), at + max(step, 1e-6)
    return pieces
