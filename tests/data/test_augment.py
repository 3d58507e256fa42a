"""Augmentation of whole batches."""

from __future__ import annotations

import pytest
import torch

from ratioctl.data.augment import augment, crop, cutout, flip
from ratioctl.recipe import Augment
from tests.data.helpers import FILL, seeded, some


def test_crops_are_padded_with_the_mean_color_on_request() -> None:
    """The same windows as with black padding, and every pixel that is padding has the mean color."""
    x, mean = some(40, size=6).clamp(min=1), torch.tensor([10, 20, 30], dtype=torch.uint8)
    black, filled = crop(x, 2, seeded()), crop(x, 2, seeded(), mean)
    padding = (black == 0).all(1, keepdim=True).expand_as(black)
    assert 0.1 < padding.float().mean() < 0.5
    assert torch.equal(filled, torch.where(padding, mean.view(1, 3, 1, 1), black))
    spec = Augment(crop=2, crop_fill="mean")
    assert torch.equal(augment(x, spec, seeded(), mean), filled)


def test_every_crop_is_a_window_of_the_padded_image() -> None:
    x = some(40, size=6)
    moved = crop(x, 2, seeded())
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    shifts = set()
    for k in range(len(x)):
        matches = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(padded[k, :, i : i + 6, j : j + 6], moved[k])
        ]
        assert matches
        shifts.update(matches)
    assert len(shifts) > 12, "positions vary"


def test_flip_mirrors_about_half() -> None:
    x = some(400, size=4)
    flipped = flip(x, seeded())
    same = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize("side", [1, 4, 5, 16])
def test_cutout_paints_one_square(side: int) -> None:
    x = torch.full((200, 3, 16, 16), 7, dtype=torch.uint8)
    y = cutout(x, side, seeded(), FILL)
    painted = (y == FILL.view(1, 3, 1, 1)).all(1)
    assert ((y == 7).all(1) | painted).all()
    heights, widths = painted.any(2).sum(1), painted.any(1).sum(1)
    assert (painted.sum((1, 2)) == heights * widths).all(), "a rectangle"
    assert int(heights.max()) == min(side, 16)
    assert int(widths.max()) == min(side, 16)


def test_augmentation_leaves_its_input() -> None:
    x = some()
    copy = x.clone()
    spec = Augment(crop=2, flip=True, autoaugment="cifar10", cutout=4, color_jitter=0.3, lighting=0.1)
    y = augment(x, spec, seeded(), FILL)
    assert torch.equal(x, copy)
    assert y.shape == x.shape
    assert y.dtype == torch.uint8
    assert augment(x, Augment(resized_crop=0.3), seeded(), FILL).shape == x.shape
