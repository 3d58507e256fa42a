"""Pictures of house numbers, drawn: for figures of models of SVHN whose images may be shown.

    python -m experiments.drawn_digits --out drawn-digits [--per-class 20] [--seed 0]

writes DIGIT/NUMBER.png, 32x32 pixels: a digit in the middle, parts of its neighbors at the sides, two colors,
a gradient, a slight rotation, blur and noise. They are neither SVHN's images nor of its distribution.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_SIZE, _SCALE = 32, 4  # drawn four times as large


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--per-class", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for digit in range(10):
        folder = options.out / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(options.per_class):
            rng = np.random.default_rng([options.seed, digit, number])
            drawn(digit, rng).save(folder / f"{number:03d}.png")


def drawn(digit: int, rng: np.random.Generator) -> Image.Image:
    """One picture, RGB."""
    side = _SIZE * _SCALE
    ground, ink = _colors(rng)
    picture = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=side * rng.uniform(0.75, 0.95))
    middle, step = side / 2 + rng.normal(0, side / 40), side * rng.uniform(0.55, 0.75)
    for place in (-1, 0, 1):
        shown = digit if place == 0 else int(rng.integers(10))
        if place == 0 or rng.random() < 0.6:
            draw.text((middle + place * step, side / 2), str(shown), fill=ink, font=font, anchor="mm")
    picture = picture.rotate(rng.uniform(-8, 8), Image.Resampling.BICUBIC, fillcolor=ground)
    picture = picture.filter(ImageFilter.GaussianBlur(_SCALE * rng.uniform(0.4, 0.9)))
    pixels = np.asarray(picture.resize((_SIZE, _SIZE), Image.Resampling.BOX), dtype=np.float64)
    slope = np.linspace(-1, 1, _SIZE) * rng.uniform(-25, 25)
    pixels = pixels + slope[:, None, None] + rng.normal(0, 3, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _colors(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ground and ink, at least 90 levels of gray apart."""
    while True:
        ground, ink = rng.integers(20, 236, (2, 3))
        if abs(float(ground.mean()) - float(ink.mean())) >= 90:
            return tuple(map(int, ground)), tuple(map(int, ink))  # type: ignore[return-value]


if __name__ == "__main__":
    main()
