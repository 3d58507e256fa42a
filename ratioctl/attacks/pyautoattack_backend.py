"""FAB-T, Square and the whole standard version of `pyautoattack`.

The package reseeds the global random generators, which is undone, and calls `backward()`, which is kept away
from the network's parameters.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ratioctl.attacks import batch_parallel
from ratioctl.attacks.visited import LogitsOf
from ratioctl.recipe import Ball

PACKAGE_NORMS = {1.0: "L1", 2.0: "L2", math.inf: "Linf"}


class _InputOnly(torch.autograd.Function):
    """logits_of as a function of the pixels alone: `backward()` on it leaves the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_of: LogitsOf) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.logits = logits_of(ctx.leaf).float()
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.leaf, gradients[0])
        return gradient, None


def fab_or_square(
    name: str,
    logits_of: LogitsOf,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    steps: int,
    targets: int,
    queries: int,
    seed: int,
) -> Tensor:
    """FAB-T (`steps`, `targets`) or Square (`queries`) on one batch of correct images: (B, C, H, W)."""
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    norm = PACKAGE_NORMS[ball.p]
    inputs = x.detach().float().contiguous()
    with _own_randomness(x.device), batch_parallel.one_each(x.device) as count:
        predict = _input_only(batch_parallel.in_parts(logits_of, count))
        if name == "fab-t":
            fab = FABAttack_PT(
                predict,
                norm=norm,
                n_restarts=1,
                n_iter=steps,
                eps=ball.eps,
                seed=seed,
                targeted=True,
                device=x.device,
                n_target_classes=targets,
            )
            return fab.perturb(inputs, y).detach()
        square = SquareAttack(
            predict,
            norm=norm,
            n_queries=queries,
            eps=ball.eps,
            p_init=0.8,
            n_restarts=1,
            seed=seed,
            resc_schedule=False,
            device=x.device,
        )
        with torch.no_grad():
            return square.perturb(inputs, y).detach()


def standard_attack(
    name: str, logits_of: LogitsOf, x: Tensor, y: Tensor, ball: Ball, classes: int, seed: int
) -> Tensor:
    """One attack of the package's standard version on one batch: points (B, C, H, W).

    The package itself takes its attacks one after the other, each on batches of the survivors, and reseeds
    for every batch; so attack by attack and batch by batch is what it does.
    """
    from pyautoattack.autoattack import AutoAttack

    logging.getLogger("auto-attack").addHandler(_SILENT)  # evaluation.sanity_checks reports the same
    with _own_randomness(x.device), _own_trace():
        attack = AutoAttack(
            _input_only(logits_of),
            device=x.device,
            eps=ball.eps,
            norm=PACKAGE_NORMS[ball.p],
            seed=seed,
            version="standard",
        )
        attack.attacks_to_run = [name]
        for targeted in (attack.apgd_targeted, attack.fab):  # the package names 9 whatever the classes
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        found, _ = attack.run_standard_evaluation(x.detach().float().contiguous(), y, batch_size=len(x))
    return found.detach()


_SILENT = logging.NullHandler()


def _input_only(logits_of: LogitsOf) -> LogitsOf:
    """`logits_of` for attacks that call `backward()`."""

    def predict(images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _InputOnly.apply(images, logits_of)
        return logits_of(images).float()

    return predict


def _own_randomness(device: torch.device) -> Any:
    """A context after which the global generators are as before; the package reseeds them."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


@contextlib.contextmanager
def _own_trace() -> Iterator[None]:
    """A context after which debuggers and coverage still trace; the package switches them off."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)
