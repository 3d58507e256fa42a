"""Classifiers trained elsewhere: their weights under our names, and a package of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.errors import LogitsError, UsageError
from ratioctl.models.checkpoint_file import MAX_NEST, Checkpoint
from ratioctl.models.libraries import published_size
from ratioctl.models.network import Classifier, build, load_weights
from ratioctl.models.registry import InputSize, build_network, find_architecture
from ratioctl.package import ModelPackage
from ratioctl.utils.frame import Frame

# One part of a name for another; both directions, as either may be ours.
ALIASES = (
    *(("shortcut", "downsample"), ("convShortcut", "shortcut.0"), ("fc", "classifier"), ("fc", "head")),
    *(("linear", "fc"), ("linear", "classifier"), ("linear", "head"), ("linear", "fc.1")),
)
MEANS, STDS = ("mean", "mu", "_mean", "new_mean"), ("std", "sigma", "_std", "new_std")
COUNTERS = ("num_batches_tracked", "n_averaged")  # of batch norm, and of torch's AveragedModel
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 288, 299, 320, 384, 448, 512)
OWN_SIZE = 32  # of our architectures, which are those of CIFAR


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """A classifier with a checkpoint's weights.

    Attributes:
        classifier: in eval mode.
        options: architecture options, as given and as inferred from the weights (the width).
        prefix: what was removed from the names; renamed: how many other names were changed.
        notes: messages for the user.
    """

    classifier: Classifier
    options: dict[str, Any]
    prefix: str
    renamed: int
    notes: tuple[str, ...]


def fit(
    checkpoint: Checkpoint,
    architecture: str,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    input_size: InputSize = None,
    options: Mapping[str, Any] | None = None,
) -> Fitted:
    """Build `architecture` and give it the checkpoint's weights.

    Prefixes of wrappers ("module.", "model.") and the usual other names of CIFAR ResNets are recognized. The
    width of ours, one input channel and auxiliary heads follow from the weights.

    Args:
        mean, std: one number per channel, or a single one for all.
        input_size: side of the images, for networks that are built for one size.
        options: of the architecture; needed for what the weights do not determine.

    Raises:
        UsageError: unknown architecture, another number of classes, an undetermined option, or names and
            shapes that do not fit: missing and unexpected ones are named.
    """
    state = {k: v for k, v in checkpoint.state.items() if not k.endswith(COUNTERS)}
    chosen = {**find_architecture(architecture).infer(state), **(options or {})}
    _check_determined(architecture, chosen, input_size)
    channels = channels_of(state)
    per_channel = [list(v) * channels if len(v) == 1 else list(v) for v in (mean, std)]
    for name, values in zip(("--mean", "--std"), per_channel, strict=True):
        if len(values) != channels:
            raise UsageError(name, f"has {len(values)} numbers for {channels} channel(s)", "Give one each.")
    with torch.random.fork_rng(devices=[]):
        classifier = build(
            architecture,
            num_classes=num_classes,
            channels=channels,
            input_size=input_size,
            mean=per_channel[0],
            std=per_channel[1],
            **chosen,
        )
    target = shapes_of(classifier.network)
    prefix, names = matched(state, target)
    notes = list(checkpoint.notes)
    extra = [k for k in state if k not in names and not _is_normalization(k)]
    missing = [k for k in target if k not in names.values()]
    unused: tuple[str, ...] = getattr(classifier.network, "unused", ())  # of published checkpoints
    extra = [k for k in extra if not k.removeprefix(prefix).startswith(unused)]
    if not missing and (left := _left_out(extra, prefix, state, names)):
        extra = [k for k in extra if k not in left]
        notes.append(f"left out {some(left)}, which the network does not use")
    size = (input_size, lambda: possible_sizes(checkpoint, architecture, num_classes, chosen))
    _check_fit(checkpoint.path, architecture, missing, extra, state, target, names, num_classes, size)
    inside = stored_normalization(checkpoint)
    if inside is not None and not find_architecture(architecture).normalizes:
        stored = tuple(np.allclose(a, b, atol=1e-3) for a, b in zip(inside, per_channel, strict=True))
        if stored != (True, True):
            shown = " and ".join(", ".join(f"{v:.4g}" for v in part) for part in inside)
            notes.append(f"the checkpoint itself holds another normalization, mean and std {shown}")
    load_weights(classifier, {names[k]: state[k].float() for k in names}, where=str(checkpoint.path))
    if prefix:
        notes.append(f'removed the prefix "{prefix}" from its names')
    renamed = sum(k.removeprefix(prefix) != ours for k, ours in names.items())
    if renamed:
        notes.append(f"renamed {renamed} of its tensors")
    return Fitted(
        classifier=classifier.eval(), options=chosen, prefix=prefix, renamed=renamed, notes=tuple(notes)
    )


def channels_of(state: Mapping[str, Tensor]) -> int:
    """Input channels, 1 or 3: depthwise convolutions take 1 as well, but only a color stem takes 3."""
    taken = {v.shape[1] for v in state.values() if v.ndim == 4}
    return 1 if 1 in taken and 3 not in taken else 3


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.endswith(COUNTERS)}


def _check_determined(architecture: str, options: Mapping[str, Any], input_size: InputSize) -> None:
    """Refuse to guess an option that leaves no trace in the weights and has no safe default."""
    entry = find_architecture(architecture)
    for option in entry.undetermined:
        reason = None if option in options else entry.ambiguous(option, input_size)
        if reason is not None:
            example = f"--arch-option {option}={str(entry.defaults[option]).lower()}"
            step = f"Say how the network was built, for example {example}."
            raise UsageError(f"--arch-option {option}", f"is needed for {architecture}: {reason}", step)


def _left_out(
    extra: Sequence[str], prefix: str, state: Mapping[str, Tensor], names: Mapping[str, str]
) -> list[str]:
    """Tensors outside of the network's prefix: of losses and metrics, and copies of the network's own."""
    copies = {k: state[k] for k in names}
    left = []
    for key in extra:
        same = (k for k in copies if key.endswith("." + k.removeprefix(prefix)))
        copied = any(copies[k].shape == state[key].shape and torch.equal(copies[k], state[key]) for k in same)
        if copied or (prefix and not key.startswith(prefix)):
            left.append(key)
    return left


def stored_normalization(checkpoint: Checkpoint) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) that the checkpoint holds as buffers, where it does."""
    found: dict[str, tuple[float, ...]] = {}
    for key, tensor in checkpoint.state.items():
        last = key.rsplit(".", 1)[-1]
        for kind, names in (("mean", MEANS), ("std", STDS)):
            if last in names and tensor.numel() in (1, 3) and _is_normalization(key):
                found.setdefault(kind, tuple(float(v) for v in tensor.flatten()))
    return (found["mean"], found["std"]) if len(found) == 2 else None


def _is_normalization(key: str) -> bool:
    """Whether a name is that of a normalization's buffer rather than of a layer's."""
    *above, last = key.split(".")
    return last in (*MEANS, *STDS) and len(above) <= 3


def matched(state: Mapping[str, Tensor], target: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, str]]:
    """(prefix, {their name: ours}) for the prefix under which the most names fit."""
    prefixes = {""} | {
        ".".join(k.split(".")[:n]) + "." for k in state for n in range(1, min(k.count("."), MAX_NEST) + 1)
    }
    best: tuple[str, dict[str, str]] = ("", {})
    for prefix in sorted(prefixes, key=lambda p: (len(p), p)):
        names: dict[str, str] = {}
        for key in state:
            ours = _ours(key.removeprefix(prefix), target) if key.startswith(prefix) else None
            if ours is not None and ours not in names.values():
                names[key] = ours
        if len(names) > len(best[1]):
            best = (prefix, names)
    return best


def _ours(name: str, target: Iterable[str]) -> str | None:
    if name in target:
        return name
    for a, b in ALIASES:
        for theirs, ours in ((a, b), (b, a)):
            changed = re.sub(rf"(?<![^.]){re.escape(theirs)}(?![^.])", ours, name)
            if changed in target:
                return changed
    return None


def _check_fit(
    path: Path,
    architecture: str,
    missing: list[str],
    extra: list[str],
    state: Mapping[str, Tensor],
    target: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    num_classes: int,
    size: tuple[InputSize, Callable[[], list[int]]],
) -> None:
    shapes = [
        (theirs, tuple(state[theirs].shape), target[ours])
        for theirs, ours in names.items()
        if tuple(state[theirs].shape) != target[ours]
    ]
    if not (missing or extra or shapes):
        return
    last = [s for s in shapes if s[1][1:] == s[2][1:] and s[2][0] == num_classes]
    if last and len(last) == len(shapes) and not missing and not extra:
        count = last[0][1][0]
        reason = f"has {count} classes, and {num_classes} labels were given"
        raise UsageError(path, reason, "Name one label per output, in the order of the outputs.")
    if shapes and ":" in architecture and (sizes := size[1]()) and size[0] not in sizes:
        taken = ", ".join(map(str, sizes))
        reason = f"the weights are those of {architecture} for images of {taken} pixels"
        raise UsageError(f"--input-size {size[0]}", reason, f"Give --input-size {sizes[0]}.")
    parts = [f"missing {some(missing)}"] if missing else []
    parts += [f"unexpected {some(extra)}"] if extra else []
    parts += (
        ["of another shape " + some([f"{k} {list(a)} instead of {list(b)}" for k, a, b in shapes])]
        if shapes
        else []
    )
    step = "Try another --arch." if missing or shapes else "Save the network's own state dict, without them."
    raise UsageError(path, f"does not fit {architecture}: {'; '.join(parts)}", step)


def some(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: " * (len(names) > 1) + ", ".join(f"{name:.100}" for name in names[:most]) + rest


# --- input sizes --------------------------------------------------------------------------------------------


def resolve_size(
    checkpoint: Checkpoint, architecture: str, num_classes: int, options: Mapping[str, Any]
) -> tuple[int, str]:
    """The input size where none is given, and a note about it.

    Raises:
        UsageError: a library's network whose weights fit images of several sizes, or an undetermined option.
    """
    _check_determined(architecture, options, None)
    if ":" not in architecture:
        return OWN_SIZE, f"Input size: {OWN_SIZE}, the default of {architecture}; --input-size sets another."
    published = published_size(architecture)
    sizes = possible_sizes(checkpoint, architecture, num_classes, options)
    if len(sizes) == 1:
        return sizes[0], f"Input size: {sizes[0]}, the only one that the weights fit."
    usual = "" if published is None else f" Its published weights take {published}."
    reason = (
        f"is needed: {architecture} takes images of several sizes and is accurate near that of its training"
    )
    raise UsageError("--input-size", reason, f"Give the size it was trained at: --input-size N.{usual}")


def possible_sizes(
    checkpoint: Checkpoint, architecture: str, num_classes: int, options: Mapping[str, Any]
) -> list[int]:
    """Which of SIZES the architecture can be built for with the shapes of these weights, and takes."""
    state = {k: v for k, v in checkpoint.state.items() if not k.endswith(COUNTERS)}
    chosen = {**find_architecture(architecture).infer(state), **options}
    channels = channels_of(state)
    build_network(architecture, num_classes=num_classes, channels=channels, **chosen)  # names unknown ones
    found = []
    for size in SIZES:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.inference_mode():
                network = build_network(
                    architecture, num_classes=num_classes, channels=channels, input_size=size, **chosen
                ).eval()
                target = shapes_of(network)
                _, names = matched(state, target)
                fits = all(tuple(state[theirs].shape) == target[ours] for theirs, ours in names.items())
                if fits and network(torch.zeros(2, channels, size, size)).shape == (2, num_classes):
                    found.append(size)
        except (UsageError, RuntimeError, AssertionError, ValueError, TypeError, IndexError):
            continue
    return found


@torch.inference_mode()
def check_forward(
    fitted: Fitted, checkpoint: Checkpoint, architecture: str, num_classes: int, input_size: Frame
) -> None:
    """One forward pass at the input size, before anything is written.

    Raises:
        UsageError: the network cannot take this size; those that it can take are named.
        LogitsError: its logits are not finite.
    """
    classifier = fitted.classifier
    try:
        logits = classifier(
            torch.full((2, classifier.mean.numel(), input_size.height, input_size.width), 0.5)
        )
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        sizes = possible_sizes(checkpoint, architecture, num_classes, fitted.options)
        step = f"It takes, for example, {', '.join(map(str, sizes))}." if sizes else "Try a larger size."
        reason = f"{architecture} cannot take it: {detail}"
        raise UsageError(f"--input-size {input_size}", reason, step) from None
    if logits.shape[-1] != num_classes:
        reason = f"names {num_classes} classes, and {architecture} has {logits.shape[-1]} outputs"
        raise UsageError("--labels", reason, "Name one label per output, in the order of the outputs.")
    if not torch.isfinite(logits).all():
        reason = f"computes logits that are not finite with {architecture}"
        raise LogitsError(checkpoint.path, reason, "Use another epoch, or check --arch and --mean.")


# --- packaging ----------------------------------------------------------------------------------------------


def write(
    fitted: Fitted,
    checkpoint: Checkpoint,
    architecture: str,
    labels: Sequence[str],
    out: str | Path,
    *,
    input_size: Frame,
) -> ModelPackage:
    """A package of the classifier, not calibrated."""
    import torchvision

    from ratioctl._version import __version__

    network, entry = fitted.classifier, find_architecture(architecture)
    undetermined = {option: entry.defaults[option] for option in entry.undetermined}
    mean, std = (getattr(network, name).flatten().tolist() for name in ("mean", "std"))
    weights = {
        name: value.numpy()
        for name, value in network.network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    config = {
        "architecture": architecture,
        "architecture_options": {**undetermined, **fitted.options},
        "num_classes": len(labels),
        "label_names": list(labels),
        "pretrained_cfg": {
            "input_size": [len(mean), input_size.height, input_size.width],
            "mean": [round(v, 7) for v in mean],
            "std": [round(v, 7) for v in std],
            "interpolation": "bicubic",
            **({"crop_mode": "border"} if input_size.pad else {}),
        },
        "ratio": {
            "temperature": 1.0,
            "thresholds": {},
            "ladders": {
                recipes.norm_name(p): list(recipes.default_ladder(p, input_size, len(mean)))
                for p in recipes.NORMS
            },
            "metrics": {},
            "provenance": {
                "weights": checkpoint.path.name,
                "weights_sha256": checkpoint.sha256,
                "trained": "elsewhere",
                "versions": {
                    "ratioctl": __version__,
                    "torch": torch.__version__,
                    "torchvision": torchvision.__version__,
                },
            },
        },
    }
    return packages.write(out, config=config, weights=weights)
