"""The optimizer of a run, whose buffers are part of the run's state."""

from __future__ import annotations

from collections.abc import Set

import torch

from ratioctl.models.device import ComputeConfig
from ratioctl.recipe import Recipe
from ratioctl.training.checkpoint import State


def optimizer(
    recipe: Recipe, state: State, compute: ComputeConfig, only: Set[str] | None = None
) -> torch.optim.Optimizer:
    """SGD or Adam over the parameters of `state.model` (those named in `only`), its buffers in `state`."""
    optim = recipe.optim
    parameters = {
        name: p for name, p in state.model.network.named_parameters() if only is None or name in only
    }
    # Buffers are set here, in the parameter's own memory layout: one made by the optimizer takes its
    # gradient's layout, which selects another kernel, and a resumed run would differ in the last bit.
    for name, p in parameters.items():
        state.momentum.setdefault(name, torch.zeros_like(p, requires_grad=False))
    if optim.optimizer == "adam":
        betas = (optim.momentum, 0.999)
        adam = torch.optim.Adam(
            parameters.values(), lr=optim.lr, betas=betas, weight_decay=optim.weight_decay
        )
        for name, p in parameters.items():
            state.squares.setdefault(name, torch.zeros_like(p, requires_grad=False))
            adam.state[p]["step"] = torch.tensor(float(state.update))
            adam.state[p]["exp_avg"] = state.momentum[name]
            adam.state[p]["exp_avg_sq"] = state.squares[name]
        return adam
    sgd = torch.optim.SGD(
        parameters.values(),
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=compute.device.type == "cuda" or None,
    )
    for name, p in parameters.items():
        sgd.state[p]["momentum_buffer"] = state.momentum[name]
    return sgd
