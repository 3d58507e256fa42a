"""The classifier everyone else sees: pixels in [0,1] to logits, normalisation inside, built from a spec."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ratioctl.errors import PackageError, UsageError
from ratioctl.models.resnet import DEPTHS, resnet
from ratioctl.models.wideresnet import WideResNet
from ratioctl.package import ModelPackage, read_weights
from ratioctl.utils.suggest import did_you_mean


class Classifier(nn.Module):
    """Pixels (N, C, H, W) float32 in [0,1] -> logits (N, K) before temperature.

    `config` is the package's config where the classifier came from one, else {}.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.config: dict[str, Any] = {}
        # Not in the state dict: normalisation is config, weights are weights.
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mean) / self.std)


def architectures() -> list[str]:
    """Names of our own architectures, for messages."""
    return [*DEPTHS, "wideresnet-28-10", "wideresnet-34-10"]


def build(
    architecture: str,
    *,
    num_classes: int,
    channels: int = 3,
    width: int | None = None,
    stem_stride: int | None = None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Classifier:
    """A classifier with fresh weights, drawn from the global torch generator as torch's layers do.

    Args:
        architecture: "resnet18|34|50" (CIFAR style, `width` 64 and `stem_stride` 1 by default),
            "wideresnet-D-K", "torchvision:NAME" or "timm:NAME".

    Raises:
        UsageError: unknown architecture (the nearest is named), or an option it does not have.
    """
    options = {"width": width, "stem_stride": stem_stride}
    given = {name: value for name, value in options.items() if value is not None}
    network = _network(architecture, num_classes, channels, given)
    return Classifier(network, mean, std)


def _network(architecture: str, num_classes: int, channels: int, options: dict[str, int]) -> nn.Module:
    if architecture in DEPTHS:
        return resnet(architecture, num_classes=num_classes, channels=channels, **options)
    if options:
        raise UsageError(
            architecture, f"has no {next(iter(options))} option", f"For {', '.join(DEPTHS)} only."
        )
    wide = re.fullmatch(r"wideresnet-(\d+)-(\d+)", architecture)
    if wide:
        depth, widen = int(wide[1]), int(wide[2])
        if (depth - 4) % 6 or not 10 <= depth <= 1000 or not 1 <= widen <= 32:
            raise UsageError(architecture, "a WideResNet's depth is 6n + 4", "For example wideresnet-28-10.")
        return WideResNet(depth, widen, num_classes, channels)
    library, _, name = architecture.partition(":")
    if library == "torchvision" and name:
        return _torchvision(name, num_classes, channels)
    if library == "timm" and name:
        return _timm(name, num_classes, channels)
    hint = did_you_mean(architecture, architectures())
    known = ", ".join([*architectures(), "torchvision:NAME", "timm:NAME"])
    raise UsageError(architecture, "unknown architecture", f"{hint} Known: {known}.".lstrip())


def _torchvision(name: str, num_classes: int, channels: int) -> nn.Module:
    import torchvision.models as models

    if name not in models.list_models(module=models):
        hint = did_you_mean(name, models.list_models(module=models), prefix="torchvision:")
        hint = hint or "See torchvision.models.list_models()."
        raise UsageError(f"torchvision:{name}", "torchvision has no such classification model", hint)
    network = models.get_model(name, weights=None, num_classes=num_classes)
    if channels != 3:
        raise UsageError(f"torchvision:{name}", "takes 3 channels", "Set data.channels = 3.")
    return network


def _timm(name: str, num_classes: int, channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UsageError(f"timm:{name}", "timm is not installed", "Install it: pip install timm.") from None
    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), prefix="timm:") or "See timm.list_models()."
        raise UsageError(f"timm:{name}", "timm has no such model", hint)
    return timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=channels)


def from_package(package: ModelPackage, device: torch.device | str = "cpu") -> Classifier:
    """The package's classifier in eval mode, weights in fp32.

    Raises:
        PackageError: weights that do not fit the architecture (missing and unexpected keys named).
    """
    config = package.config
    cfg = config["pretrained_cfg"]
    options = dict(config.get("architecture_options") or {})
    weights = read_weights(package)
    try:
        # Ours first without memory: a config may ask for more than there is. Libraries' have no options.
        for kind in ("cpu",) if ":" in package.architecture else ("meta", "cpu"):
            # A layer's initial values are overwritten below: build without touching the global generator.
            with torch.random.fork_rng(devices=[]), torch.device(kind):
                model = build(
                    config["architecture"],
                    num_classes=len(package.label_names),
                    channels=package.input_size[0],
                    mean=cfg["mean"],
                    std=cfg["std"],
                    **options,
                )
            _insist_on_fit(model, weights, where=str(package.weights_path))
    except (UsageError, TypeError, ValueError, RuntimeError) as error:
        reason = f"its architecture cannot be built: {' '.join(str(error).split())[:200]}"
        raise PackageError(package.path, reason) from None
    load_weights(model, weights, where=str(package.weights_path))
    model.config = config
    return model.eval().to(device)


def load_weights(model: Classifier, weights: Mapping[str, np.ndarray | Tensor], *, where: str) -> None:
    """Copy arrays into the network's state, floating ones converted to its dtype.

    Raises:
        PackageError: a missing, unexpected or wrongly shaped key; up to five are named.
    """
    needed = _insist_on_fit(model, weights, where=where)
    state = model.network.state_dict()
    with torch.no_grad():
        for key in needed:
            value = weights[key]
            tensor = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            state[key].copy_(tensor)


def _insist_on_fit(model: Classifier, weights: Mapping[str, np.ndarray | Tensor], *, where: str) -> set[str]:
    """The keys to fill; raises as `load_weights`."""
    state = model.network.state_dict()
    # Whole numbers (counters of seen batches, index tables) follow from the architecture and are not stored.
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


def fold_batchnorm(model: Classifier) -> Classifier:
    """An independent eval-mode copy for attacks: no parameter gradients, batch norms folded.

    The same function as `model.eval()` up to rounding (1e-5 of the logits' scale, tested), at about two
    thirds of the cost of a forward and input-gradient pass on narrow networks.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for conv_name, norm_name in _fold_pairs(model):
        conv = twin.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d)
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        twin.set_submodule(norm_name, nn.Identity())
    sync_folded(twin, model)
    return twin


@torch.no_grad()
def sync_folded(twin: Classifier, model: Classifier) -> None:
    """Bring a `frozen` copy up to date with the model it was made from, without building it anew."""
    state = dict(model.state_dict())
    for conv_name, norm_name in _fold_pairs(model):
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        for key in norm.state_dict():
            del state[f"{norm_name}.{key}"]
        state[f"{conv_name}.weight"], state[f"{conv_name}.bias"] = _folded(conv, norm)
    twin.load_state_dict(state)


def _fold_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Full names of every convolution and the batch norm that directly follows it."""
    pairs = []
    for prefix, module in model.named_modules():
        for conv, norm in _folds(module):
            names = (f"{prefix}.{conv}".lstrip("."), f"{prefix}.{norm}".lstrip("."))
            found = [_find(model, name) for name in names]
            if isinstance(found[0], nn.Conv2d) and isinstance(found[1], nn.BatchNorm2d):
                pairs.append(names)
    return pairs


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _folds(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """(convolution, batch norm behind it) pairs of a module whose forward is known to us."""
    own = getattr(module, "folds", None)
    if own is not None:
        return own
    if type(module).__module__ == "torchvision.models.resnet":
        return (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("downsample.0", "downsample.1"))
    return ()


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), shift


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(math.prod(p.shape) for p in model.parameters())
