"""JEM's samples: stochastic gradient Langevin dynamics (SGLD) with a replay buffer, arXiv 1912.03263."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ratioctl.data.loader import Batch
from ratioctl.errors import TrainingError
from ratioctl.recipe import Energy, Recipe
from ratioctl.utils.seeding import seed_from_key

# Published sizes are for pixels in [-1, 1]; ours are in [0, 1]: lengths halve, gradients double.
_LENGTH = 0.5


def new_buffer(recipe: Recipe, spec: Energy, device: torch.device) -> Tensor:
    """The replay buffer at the start: uniform noise (spec.buffer, C, H, W), by the recipe's seed."""
    generator = torch.Generator().manual_seed(seed_from_key(recipe.seed, 7))
    frame = recipe.data.frame
    shape = (spec.buffer, recipe.data.channels, frame.height, frame.width)
    return torch.rand(shape, generator=generator).to(device)


def langevin(
    logits_of: Callable[[Tensor], Tensor], x: Tensor, spec: Energy, generator: torch.Generator
) -> Tensor:
    """`spec.steps` steps of SGLD on E(x) = -log sum_k exp f_k(x) from `x` (B, C, H, W), not clipped."""
    x = x.detach().clone()
    for _ in range(spec.steps):
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(logits_of(x).float().logsumexp(1).sum(), x)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        x = x.detach() + _LENGTH**2 * spec.step_size * gradient + _LENGTH * spec.noise * noise
    return x.detach()


def sample(
    buffer: Tensor, logits_of: Callable[[Tensor], Tensor], spec: Energy, generator: torch.Generator
) -> Tensor:
    """(B, C, H, W) samples of the model's density; their chains are continued in `buffer`, in place.

    Each chain continues a random image of the buffer, or with probability `spec.restart` uniform noise.
    """
    device = buffer.device
    picked = torch.randint(len(buffer), (spec.batch_size,), generator=generator, device=device)
    begun = torch.rand((spec.batch_size, 1, 1, 1), generator=generator, device=device) < spec.restart
    fresh = torch.rand((spec.batch_size, *buffer.shape[1:]), generator=generator, device=device)
    start = torch.where(begun, fresh, buffer[picked]).contiguous(memory_format=torch.channels_last)
    found = langevin(logits_of, start, spec, generator)
    buffer[picked] = found  # an image that was picked twice keeps one of its two chains
    return found


def with_noise(batch: Batch, spec: Energy, generator: torch.Generator) -> Batch:
    """The batch with Gaussian noise on its ID images, as JEM is trained."""
    if spec.data_noise == 0:
        return batch
    x = batch.x_in
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return dataclasses.replace(batch, x_in=x + _LENGTH * spec.data_noise * noise)


def check(gap: Tensor, spec: Energy, update: int, folder: Path) -> None:
    """Raise TrainingError where E(x) - E(x~) shows that training has diverged, as JEM's may do suddenly."""
    value = float(gap.detach())
    if math.isfinite(value) and abs(value) <= spec.limit:
        return
    raise TrainingError(
        f"update {update}",
        f"the energies of images and samples are {value:,.4g} apart (objective.energy.limit is "
        f"{spec.limit:g}): JEM training has diverged",
        f"The last checkpoint is kept in {folder}. Train again with a lower optim.lr, more "
        "objective.energy.data_noise (0.1 is more stable) or more objective.energy.steps.",
    )
