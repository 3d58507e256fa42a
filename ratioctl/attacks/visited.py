"""Searches whose result is the best point visited under another score, and their random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ratioctl.attacks.engine import perturb
from ratioctl.attacks.goals import Goal
from ratioctl.recipe import Attack
from ratioctl.utils.seeding import seed_from_bytes

LogitsOf = Callable[[Tensor], Tensor]


def best_visited(
    logits_of: LogitsOf,
    x0: Tensor,
    goal: Goal,
    attack: Attack,
    score: Goal,
    generators: Sequence[torch.Generator],
    init: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of all points a search for `goal` visits, the one with the largest `score`; and `stuck`."""
    best = x0.detach().float().clone()
    top = torch.full((len(x0),), -torch.inf, device=x0.device)
    latest = top

    def scored(logits: Tensor) -> Tensor:
        nonlocal latest
        latest = score(logits.detach())
        return goal(logits)

    def keep(step: int, x: Tensor, value: Tensor) -> None:
        nonlocal best, top
        better = latest > top
        best = torch.where(better.view(-1, *(1,) * (x.dim() - 1)), x, best)
        top = torch.where(better, latest, top)

    ended = perturb(logits_of, x0, scored, attack, generator=generators, init=init, callback=keep)
    return best, ended.stuck


def image_generators(x: Tensor, purpose: str) -> list[torch.Generator]:
    """One generator an image, seeded by the purpose and its pixels alone."""
    pixels = x.detach().float().cpu().contiguous().numpy()
    seeds = (seed_from_bytes(purpose.encode(), b"/", image.tobytes(), bits=56) for image in pixels)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def batched_logits(logits_of: LogitsOf, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([logits_of(part).float() for part in x.split(batch_size)])
