"""Images and folders that several test modules make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

FILL = torch.tensor([120, 110, 100], dtype=torch.uint8)


def some(n: int = 16, channels: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def folder(root: Path, classes: dict[str, int], size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root
