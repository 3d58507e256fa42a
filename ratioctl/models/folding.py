"""Folding of batch norms into convolutions, for attacks and scoring."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ratioctl.models.network import Classifier


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
    """Update a folded copy in place with the current weights of the model it was made from."""
    state = model.state_dict()  # keeps its `_metadata`, by which MNASNet tells versions of its weights apart
    for conv_name, norm_name in _fold_pairs(model):
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        for key in norm.state_dict():
            del state[f"{norm_name}.{key}"]
        state[f"{conv_name}.weight"], state[f"{conv_name}.bias"] = _folded(conv, norm)
    twin.load_state_dict(state)


def fold_scales(model: Classifier) -> dict[str, Tensor]:
    """Names of the folded convolutions to the factors (D,) that their kernels are multiplied by."""
    scales = {}
    for conv_name, norm_name in _fold_pairs(model):
        norm = model.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm2d)
        scales[conv_name] = _scale(norm)
    return scales


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
    """(convolution, batch norm that follows it) pairs of a module whose forward pass is known."""
    own = getattr(module, "folds", None)
    if own is not None:
        return own
    if type(module).__module__ == "torchvision.models.resnet":
        return (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("downsample.0", "downsample.1"))
    return ()


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    scale = _scale(norm)
    shift = norm.bias - norm.running_mean * scale
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    return conv.weight * scale.view(-1, 1, 1, 1), shift


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    assert norm.running_var is not None
    return norm.weight / torch.sqrt(norm.running_var + norm.eps)
