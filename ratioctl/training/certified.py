"""Training of a certified head: its loss, which of the weights it changes, and its start."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ratioctl.data.loader import Batch
from ratioctl.errors import UsageError
from ratioctl.models.certified import discriminator_bound, guaranteed_log_odds, head_of, upper_bound
from ratioctl.models.network import Classifier
from ratioctl.recipe import Certified, Recipe

_HEAD = "discriminator."
_BASE = "base."


def trained(model: Classifier) -> frozenset[str]:
    """Names of the parameters that training changes: those of the discriminator."""
    return frozenset(name for name, _ in model.network.named_parameters() if name.startswith(_HEAD))


def radius(spec: Certified, epoch: float) -> float:
    """The radius at a (fractional) epoch."""
    return spec.eps * (min(1.0, epoch / spec.ramp_epochs) if spec.ramp_epochs > 0 else 1.0)


def losses(model: Classifier, batch: Batch, spec: Certified, epoch: float) -> dict[str, Tensor]:
    """Losses of one update in fp32, means over images: "inside", "outside" and "total".

    "inside" is log(1 + exp(-g)) of ID images, "outside" log(1 + exp(max g)) of OOD images, max g the upper
    bound in the ball. The base network is not computed.
    """
    network = head_of(model)
    assert network is not None
    assert batch.x_out is not None
    g = network.discriminator((batch.x_in - model.mean) / model.std)
    upper = discriminator_bound(model, network, batch.x_out, radius(spec, epoch))
    inside, outside = F.softplus(-g).mean(), F.softplus(upper).mean()
    return {"inside": inside, "outside": outside, "total": inside + spec.weight * outside}


@torch.no_grad()
def guaranteed(model: Classifier, x: Tensor, eps: float) -> Tensor:
    """(N,) float64 confidence before temperature that the balls around x (N, C, H, W) cannot exceed."""
    network = head_of(model)
    assert network is not None
    return guaranteed_log_odds(upper_bound(model, x, eps), network.num_classes, 1.0).sigmoid()


def check_start(recipe: Recipe, has_start: bool) -> None:
    """Raises UsageError where a head has no network to be trained on."""
    if recipe.objective.certified is not None and not has_start:
        reason = "trains a certified head on a finished network, and none is given"
        raise UsageError("objective.certified", reason, "Name it with --init, for example cifar10-ratio.")


def weights_of(
    recipe: Recipe, start: Mapping[str, np.ndarray | Tensor], temperature: float, own: Mapping[str, Tensor]
) -> dict[str, np.ndarray | Tensor]:
    """The weights that a head's training starts from.

    Args:
        start: of a finished network without a head, or with one, which is trained further.
        temperature: of the finished network.
        own: fresh weights of the network with a head.
    """
    spec = recipe.objective.certified
    assert spec is not None
    found: dict[str, np.ndarray | Tensor] = dict(start)
    if not any(name.startswith(_HEAD) for name in start):
        found = {_BASE + name: value for name, value in start.items()}
        found |= {name: value for name, value in own.items() if name.startswith(_HEAD)}
        found["temperature"] = torch.full((1,), temperature)
    return found | {"shift": torch.full((1,), spec.shift)}
