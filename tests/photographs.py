"""A folder of photographs, cut from sample images of scikit-learn and scikit-image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("flower", "roof", "sky")
MORE = (*CLASSES, "coffee", "fur")  # the last two from scikit-image
SAMPLES = Path(__file__).resolve().parents[1] / "assets" / "samples"


def photographs(folder: Path, each: int = 24, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    """`folder`/CLASS/NNN.jpg: crops of different sizes and shapes; every crop is of another place."""
    from sklearn.datasets import load_sample_image

    china, flower = (Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower"))
    cup, cat = (Image.open(SAMPLES / f"{name}.jpg").convert("RGB") for name in ("coffee", "cat"))
    # (photograph, left, top, right, bottom) of the region in which a class lies
    regions = {
        "flower": (flower, 180, 60, 520, 380),
        "roof": (china, 60, 120, 620, 420),
        "sky": (china, 0, 0, 640, 110),
        "coffee": (cup, 100, 60, cup.width - 60, cup.height - 60),
        "fur": (cat, 60, 40, cat.width - 60, cat.height),
    }
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        photo, left, top, right, bottom = regions[name]
        for k in range(each):
            width, height = rng.integers(70, 110, 2)
            x = int(rng.integers(left, right - width + 1))
            y = int(rng.integers(top, max(top, bottom - height) + 1))
            crop = photo.crop((x, y, x + int(width), y + int(height)))
            crop.save(folder / name / f"{k:03}.jpg", quality=92)
    return folder
