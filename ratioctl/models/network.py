"""The classifier: pixels in [0,1] to logits, normalization inside, built by name or from a package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ratioctl.errors import PackageError, UsageError
from ratioctl.models.registry import InputSize, build_network
from ratioctl.package import ModelPackage, Stored, read_weights, to_half


class Classifier(nn.Module):
    """Pixels (N, C, H, W) float32 in [0,1] -> logits (N, K) before temperature.

    `config` is the config of its package, {} without one.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.config: dict[str, Any] = {}
        # Not in the state dict: normalization is config, weights are weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def build(
    architecture: str,
    *,
    num_classes: int,
    channels: int = 3,
    input_size: InputSize = None,
    mean: Sequence[float],
    std: Sequence[float],
    **options: Any,
) -> Classifier:
    """A classifier with fresh weights, drawn from the global torch generator as torch's layers do.

    Args:
        architecture: a name of `registry.architectures`.
        input_size: side of the images, or (height, width), for networks that are built for one size (vision
            transformers).
        options: of the architecture, such as `width`; None keeps the default.

    Raises:
        UsageError: unknown architecture (the nearest is named), or an option it does not have.
    """
    network = build_network(
        architecture, num_classes=num_classes, channels=channels, input_size=input_size, **options
    )
    return Classifier(network, mean, std)


def from_package(
    package: ModelPackage, device: torch.device | str = "cpu", *, weights_as: Stored = "fp32"
) -> Classifier:
    """The package's classifier in eval mode, computing in fp32.

    Args:
        weights_as: "fp16" rounds the weights to what a file with fp16 weights holds.

    Raises:
        PackageError: weights that do not fit the architecture (missing and unexpected keys named).
    """
    weights = read_weights(package)
    if weights_as == "fp16":
        weights = to_half(weights, package.weights_path)
    labels = len(package.label_names)
    if not any(labels in array.shape for array in weights.values()):
        reason = f"there are {labels} labels, and no weight has a side of that length"
        raise PackageError(package.path, reason, "Package it again from its checkpoint.")
    # First without memory, as a config may ask for more than there is.
    _empty(package, "meta", weights)
    model = _empty(package, "cpu", weights)
    assert model is not None
    load_weights(model, weights, where=str(package.weights_path))
    model.config = package.config
    return model.eval().to(device)


def _empty(package: ModelPackage, device: str, weights: Mapping[str, np.ndarray]) -> Classifier | None:
    """The package's classifier before its weights are copied, its names and shapes checked.

    None where a library's network computes with values while it is built, which the device "meta" lacks.
    """
    try:
        # Initial values are overwritten, so the global generator stays as it is.
        with torch.random.fork_rng(devices=[]), torch.device(device):
            model = build(
                package.architecture,
                num_classes=len(package.label_names),
                channels=package.input_size[0],
                input_size=package.frame.built_for,
                mean=package.mean,
                std=package.std,
                **package.architecture_options,
            )
    except (UsageError, TypeError, ValueError, RuntimeError) as error:
        if device == "meta" and ":" in package.architecture and not isinstance(error, UsageError):
            return None
        reason = f"its architecture cannot be built: {' '.join(str(error).split())[:200]}"
        raise PackageError(package.path, reason) from None
    _check_fit(model, weights, where=str(package.weights_path))
    return model


def state_of(model: Classifier) -> dict[str, Tensor]:
    """The floating-point tensors of the network: its weights. Counters follow from the architecture."""
    return {k: v for k, v in model.network.state_dict().items() if v.is_floating_point()}


def head_keys(
    architecture: str, *, channels: int = 3, input_size: InputSize = None, **options: Any
) -> frozenset[str]:
    """Names of the tensors whose shape depends on the number of classes: the classification head."""

    def shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
        network = build_network(
            architecture, num_classes=num_classes, channels=channels, input_size=input_size, **options
        )
        return {key: tuple(value.shape) for key, value in network.state_dict().items()}

    with torch.random.fork_rng(devices=[]):
        two, three = shapes(2), shapes(3)
    return frozenset(key for key in two if two[key] != three[key])


def load_weights(model: Classifier, weights: Mapping[str, np.ndarray | Tensor], *, where: str) -> None:
    """Copy arrays into the network's state, floating-point ones converted to its dtype.

    Raises:
        PackageError: a missing, unexpected or wrongly shaped key; up to five are named.
    """
    needed = _check_fit(model, weights, where=where)
    state = model.network.state_dict()
    with torch.no_grad():
        for key in needed:
            value = weights[key]
            tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            state[key].copy_(tensor)


def _check_fit(model: Classifier, weights: Mapping[str, np.ndarray | Tensor], *, where: str) -> set[str]:
    """The keys to fill; raises as `load_weights`."""
    state = model.network.state_dict()
    # Integers (batch counters, index tables) follow from the architecture and are not stored.
    whole = {k for k, v in state.items() if not v.is_floating_point()}
    needed = state.keys() - whole
    given = {k for k in weights if k not in whole and not k.endswith("num_batches_tracked")}
    problems = [f"missing {k}" for k in sorted(needed - given)]
    problems += [f"unexpected {k}" for k in sorted(given - needed)]
    problems += [
        f"{k} has shape {tuple(weights[k].shape)} instead of {tuple(state[k].shape)}"
        for k in sorted(needed & given)
        if tuple(weights[k].shape) != tuple(state[k].shape)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise PackageError(where, f"the weights do not fit the architecture: {shown}")
    return needed
