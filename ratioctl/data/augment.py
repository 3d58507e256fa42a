"""Training augmentation of whole batches on their device, the same for ID and OOD images.

Everything works on uint8 (N, C, H, W) and draws from one generator, so a batch is a function of its images
and its seed. With a `PartOfBatch`, images are some rows of a batch and get the views that they have in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ratioctl.data.draws import Draws, Numbers
from ratioctl.recipe import Augment


def augment(x: Tensor, spec: Augment, generator: Numbers, fill: Tensor) -> Tensor:
    """A random view of each image.

    Args:
        x: (N, C, H, W) uint8.
        generator: on the device of `x`.
        fill: (C,) uint8, the mean color of the training images: that of Cutout and, by `spec.crop_fill`, of
            the padding of crops.

    Returns:
        (N, C, H, W) uint8, a new tensor.
    """
    if spec.resized_crop > 0:
        x = resized_crop(x, spec.resized_crop, generator)
    if spec.crop > 0:
        x = crop(x, spec.crop, generator, fill if spec.crop_fill == "mean" else None)
    if spec.flip:
        x = flip(x, generator)
    if spec.autoaugment is not None:
        from ratioctl.data.autoaugment import autoaugment

        x = autoaugment(x, spec.autoaugment, generator, fill)
    if spec.color_jitter > 0:
        x = color_jitter(x, spec.color_jitter, generator)
    if spec.lighting > 0:
        x = lighting(x, spec.lighting, generator)
    if spec.cutout > 0:
        x = cutout(x, spec.cutout, generator, fill)
    return x


def crop(x: Tensor, padding: int, generator: Numbers, fill: Tensor | None = None) -> Tensor:
    """Pad by `padding` on every side with `fill` (C,), black by default, and crop at a uniform position."""
    n, c, h, w = x.shape
    device = x.device
    padded = F.pad(x, (padding,) * 4)
    if fill is not None:
        inside = F.pad(torch.ones(h, w, dtype=torch.bool, device=device), (padding,) * 4)
        padded = torch.where(inside, padded, fill.to(device).view(1, -1, 1, 1))
    draws = Draws(generator, n)
    top, left = draws.integers(2 * padding + 1, 1), draws.integers(2 * padding + 1, 1)
    rows = (top + torch.arange(h, device=device))[:, None, :, None]
    columns = (left + torch.arange(w, device=device))[:, None, None, :]
    image = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(c, device=device)[None, :, None, None]
    return padded[image, channel, rows, columns]


def flip(x: Tensor, generator: Numbers) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = Draws(generator, len(x)).uniform() < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def cutout(x: Tensor, side: int, generator: Numbers, fill: Tensor) -> Tensor:
    """Paint a square of `side` pixels around a uniform center; it may extend over the border."""
    n, _, h, w = x.shape
    device = x.device
    draws = Draws(generator, n)
    row, column = draws.integers(h, 1), draws.integers(w, 1)
    rows = (torch.arange(h, device=device) - row + side // 2).clamp(-1, side)
    columns = (torch.arange(w, device=device) - column + side // 2).clamp(-1, side)
    inside = ((rows >= 0) & (rows < side))[:, None, :, None] & ((columns >= 0) & (columns < side))[
        :, None, None
    ]
    return torch.where(inside, fill.to(device).view(1, -1, 1, 1), x)


def resized_crop(x: Tensor, smallest: float, generator: Numbers) -> Tensor:
    """A crop of `smallest` to 1 of the area, aspect 3/4 to 4/3, resized back (bilinear)."""
    n, _, h, w = x.shape
    draws = Draws(generator, n)
    area = smallest + (1 - smallest) * draws.uniform()
    log_ratio = (draws.uniform() * 2 - 1) * 0.28768  # log(4/3)
    high = (area.sqrt() * torch.exp(-log_ratio / 2)).clamp(max=1)
    wide = (area.sqrt() * torch.exp(log_ratio / 2)).clamp(max=1)
    shift_y = (draws.uniform() * 2 - 1) * (1 - high)
    shift_x = (draws.uniform() * 2 - 1) * (1 - wide)
    zero = torch.zeros_like(high)
    theta = torch.stack([wide, zero, shift_x, zero, high, shift_y], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, [n, x.shape[1], h, w], align_corners=False)
    view = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return view.round().clamp(0, 255).to(torch.uint8)


def color_jitter(x: Tensor, strength: float, generator: Numbers) -> Tensor:
    """Brightness, contrast and saturation, each times a factor uniform in [1 - strength, 1 + strength]."""
    n = x.shape[0]
    draws = Draws(generator, n)
    factors = torch.stack([1 + strength * (draws.uniform(1, 1, 1) * 2 - 1) for _ in range(3)])
    brightness, contrast, saturation = factors.clamp(min=0)
    y = x.float() * brightness
    y = (y - _grey(y).mean((2, 3), keepdim=True)) * contrast + _grey(y).mean((2, 3), keepdim=True)
    y = (y - _grey(y)) * saturation + _grey(y)
    return y.round().clamp(0, 255).to(torch.uint8)


def lighting(x: Tensor, std: float, generator: Numbers) -> Tensor:
    """AlexNet's PCA noise: colors moved along ImageNet's principal axes (Krizhevsky et al. 2012)."""
    if x.shape[1] != 3:
        return x
    values = torch.tensor([0.2175, 0.0188, 0.0045], device=x.device)
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]], device=x.device
    )
    alpha = Draws(generator, len(x)).normal(3) * std
    shift = (alpha * values) @ vectors.T * 255
    return (x.float() + shift[:, :, None, None]).round().clamp(0, 255).to(torch.uint8)


def _grey(y: Tensor) -> Tensor:
    """(N, 1, H, W) luma of (N, 3, H, W); one channel is returned as it is."""
    if y.shape[1] == 1:
        return y
    return (y * torch.tensor([0.299, 0.587, 0.114], device=y.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
