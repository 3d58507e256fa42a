"""Classifiers trained elsewhere: their weights under our names, and the normalisation of their pixels."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.errors import PackageError, UsageError
from ratioctl.models.network import Classifier, build, load_weights
from ratioctl.models.registry import find_architecture
from ratioctl.package import ModelPackage

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Where training scripts keep the weights among other things, likeliest first.
NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "ema")
# One part of a name for another; both directions, as either may be ours.
ALIASES = (
    *(("shortcut", "downsample"), ("convShortcut", "shortcut.0"), ("fc", "classifier"), ("fc", "head")),
    *(("linear", "fc"), ("linear", "classifier"), ("linear", "head"), ("linear", "fc.1")),
)
MAX_NEST = 8  # tables in tables; a pickle may hold itself
MEANS, STDS = ("mean", "mu", "_mean"), ("std", "sigma", "_std")
COMMON = {  # normalisations that people train with, for `measure`
    "that changes nothing": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "of [-1,1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "of CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
RAW = "If it was trained on pixels in [0,1] as they are, say so: --mean 0 --std 1."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file of weights as it was read.

    Attributes:
        state: tensors by name, as stored.
        nest: the keys under which they lay, "" for none.
        sha256: of the file.
    """

    path: Path
    state: dict[str, Tensor]
    nest: str
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """A classifier with a checkpoint's weights.

    Attributes:
        classifier: in eval mode.
        options: architecture options that follow from the weights (the width).
        prefix: what was taken off the names; renamed: how many other names were changed.
        notes: what the user is told about it.
    """

    classifier: Classifier
    options: dict[str, int]
    prefix: str
    renamed: int
    notes: tuple[str, ...]


# --- reading ------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Checkpoint:
    """The tensors of a `.safetensors` file or a PyTorch state dict; no code in the file is ever run.

    Raises:
        UsageError: no such file, or another kind of file.
        PackageError: damaged, or it holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(path, "is a folder, not a file of weights", f"Name a {' or '.join(SUFFIXES[:3])}.")
    if not path.exists():
        raise UsageError(path, "does not exist", "Check the spelling of the path.")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(path, "is of an unknown kind", f"Weights are read from {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UsageError(path, "is not a plain file", "Copy the weights into one.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() == ".safetensors":
        arrays = packages.parse_weights(data, path)
        return Checkpoint(
            path=path, state={k: torch.from_numpy(v) for k, v in arrays.items()}, nest="", sha256=digest
        )
    try:
        with warnings.catch_warnings():  # that this is a TorchScript archive is said below
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if not re.search(r"GLOBAL|Unsupported class|instantiate|TorchScript", str(error)):
            raise _damaged(path, error) from None
        reason = "holds more than tensors: code that would run on loading, which is refused"
        step = "Save its state dict alone: torch.save(model.state_dict(), ...)."
        raise PackageError(path, reason, step) from None
    except (EOFError, ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from None
    except (AttributeError, IndexError, struct.error, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None
    state, nest = _state(loaded, path)
    for name, tensor in state.items():
        if not _plain(tensor):
            reason = f'holds "{name}" as {tensor.dtype} in another form than plain numbers'
            raise PackageError(path, reason, "Save float tensors: quantise and prune after the export.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PackageError(path, f'holds values that are not finite in "{name}"', "Use another epoch's.")
    return Checkpoint(path=path, state=state, nest=nest, sha256=digest)


def _plain(tensor: Tensor) -> bool:
    """Whether the file holds every one of its real numbers: neither sparse, quantised nor repeated views."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _damaged(path: Path, error: Exception) -> PackageError:
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return PackageError(path, f"is damaged or no PyTorch file ({detail})", "Get it again.")


def _state(loaded: object, path: Path) -> tuple[dict[str, Tensor], str]:
    """The table of tensors in what was loaded, and where it lay."""
    nest: list[str] = []
    while isinstance(loaded, Mapping) and len(nest) < MAX_NEST:
        tensors = {str(k): v.detach() for k, v in loaded.items() if isinstance(v, Tensor)}
        if len(tensors) > 1:
            return tensors, ".".join(nest)
        inner = next((k for k in NESTS if isinstance(loaded.get(k), Mapping)), None)
        if inner is None:
            keys = ", ".join(str(k) for k in list(loaded)[:8])
            reason = f"holds no table of weights; it has {keys}" if keys else "is empty"
            raise PackageError(path, reason, "Save model.state_dict().")
        nest.append(inner)
        loaded = loaded[inner]
    raise PackageError(path, f"holds a {type(loaded).__name__}, not a state dict", "Save model.state_dict().")


# --- fitting ------------------------------------------------------------------------------------------------


def fit(
    checkpoint: Checkpoint,
    architecture: str,
    *,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Fitted:
    """Build `architecture` and give it the checkpoint's weights.

    Prefixes of wrappers ("module.", "model.") and the usual other names of CIFAR ResNets are recognised; the
    width of ours follows from the first convolution.

    Args:
        mean, std: one number per channel, or a single one for all.

    Raises:
        UsageError: unknown architecture, another number of classes, or names and shapes that do not fit:
            missing and unexpected ones are named.
    """
    state = {k: v for k, v in checkpoint.state.items() if not k.endswith("num_batches_tracked")}
    first = next((v for k, v in state.items() if v.ndim == 4), None)
    grey = first is not None and first.shape[1] == 1 and ":" not in architecture
    channels = 1 if grey else 3
    options = find_architecture(architecture).infer(state)
    per_channel = [list(v) * channels if len(v) == 1 else list(v) for v in (mean, std)]
    for name, values in zip(("--mean", "--std"), per_channel, strict=True):
        if len(values) != channels:
            raise UsageError(name, f"has {len(values)} numbers for {channels} channel(s)", "Give one each.")
    with torch.random.fork_rng(devices=[]):
        classifier = build(
            architecture,
            num_classes=num_classes,
            channels=channels,
            mean=per_channel[0],
            std=per_channel[1],
            **options,
        )
    target = {
        k: tuple(v.shape)
        for k, v in classifier.network.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    prefix, names = _matched(state, target)
    notes = []
    inside = normalisation_inside(checkpoint)
    extra = [k for k in state if k not in names and not _is_normalisation(k)]
    missing = [k for k in target if k not in names.values()]
    _insist_on_fit(checkpoint.path, architecture, missing, extra, state, target, names, num_classes)
    if inside is not None:
        stored = tuple(np.allclose(a, b, atol=1e-3) for a, b in zip(inside, per_channel, strict=True))
        if stored != (True, True):
            shown = " and ".join(", ".join(f"{v:.4g}" for v in part) for part in inside)
            notes.append(f"the checkpoint itself holds another normalisation, mean and std {shown}")
    load_weights(classifier, {names[k]: state[k].float() for k in names}, where=str(checkpoint.path))
    if prefix:
        notes.append(f'took the prefix "{prefix}" off its names')
    renamed = sum(k.removeprefix(prefix) != ours for k, ours in names.items())
    if renamed:
        notes.append(f"translated {renamed} of its names")
    return Fitted(
        classifier=classifier.eval(), options=options, prefix=prefix, renamed=renamed, notes=tuple(notes)
    )


def normalisation_inside(checkpoint: Checkpoint) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) that the checkpoint keeps as buffers of its own, where it does."""
    found: dict[str, tuple[float, ...]] = {}
    for key, tensor in checkpoint.state.items():
        last = key.rsplit(".", 1)[-1]
        for kind, names in (("mean", MEANS), ("std", STDS)):
            if last in names and tensor.numel() in (1, 3) and _is_normalisation(key):
                found.setdefault(kind, tuple(float(v) for v in tensor.flatten()))
    return (found["mean"], found["std"]) if len(found) == 2 else None


def _is_normalisation(key: str) -> bool:
    """Whether a name is that of a normalisation's buffer rather than of a layer's."""
    *above, last = key.split(".")
    return last in (*MEANS, *STDS) and len(above) <= 3


def _matched(
    state: Mapping[str, Tensor], target: Mapping[str, tuple[int, ...]]
) -> tuple[str, dict[str, str]]:
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


def _insist_on_fit(
    path: Path,
    architecture: str,
    missing: list[str],
    extra: list[str],
    state: Mapping[str, Tensor],
    target: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    num_classes: int,
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
    parts = [f"missing {_some(missing)}"] if missing else []
    parts += [f"unexpected {_some(extra)}"] if extra else []
    parts += (
        ["of another shape " + _some([f"{k} {list(a)} instead of {list(b)}" for k, a, b in shapes])]
        if shapes
        else []
    )
    raise UsageError(path, f"does not fit {architecture}: {'; '.join(parts)}", "Try another --arch.")


def _some(names: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: " * (len(names) > 1) + ", ".join(f"{name:.100}" for name in names[:most]) + rest


# --- normalisation ------------------------------------------------------------------------------------------


def checked_normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, inside: object = None
) -> None:
    """Refuse a normalisation that is missing or in other units, and say why.

    Raises:
        UsageError: not both given, a std that is not above 0, or numbers of pixels in 0..255.
    """
    if mean is None and std is None:
        reason = "is not given. A wrong normalisation makes a good model a bad one without any error"
        step = f"Give the values it was trained with, for pixels in [0,1]: --mean R,G,B --std R,G,B. {RAW}"
        raise UsageError("the normalisation of the input", reason, step)
    if mean is None or std is None:
        lacking, given = ("--mean", "--std") if mean is None else ("--std", "--mean")
        raise UsageError(given, f"is given without {lacking}", "Give both.")
    if not all(np.isfinite([*mean, *std])):
        raise UsageError("--mean, --std", "must be finite numbers", "For example --mean 0.5 --std 0.25.")
    if min(std) <= 0:
        raise UsageError("--std", f"is {min(std):g}; pixels are divided by it", "Give numbers above 0.")
    if max(map(abs, mean)) > 2 or max(std) > 4:
        step = "Divide them by 255: normalisation here is of pixels in [0,1]."
        raise UsageError("--mean, --std", "look like values for pixels in 0..255", step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """What `measure` found with one normalisation; `accuracy` is None without labels."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: float | None


@torch.inference_mode()
def measure(
    classifier: Classifier, pixels: np.ndarray, labels: np.ndarray | None
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], list[Trial]]:
    """The input statistics of real images, and how the classifier does with normalisations people use.

    Args:
        pixels: uint8 (N, H, W, C); labels: (N,), or None.

    Returns:
        (mean, std) per channel of the normalised input, and trials, the classifier's own first.
    """
    channels = pixels.shape[-1]
    own = tuple(tuple(getattr(classifier, name).flatten().tolist()) for name in ("mean", "std"))
    flat = pixels.reshape(-1, channels).astype(np.float64) / 255
    data = tuple(flat.mean(0)), tuple(np.maximum(flat.std(0), 1e-3))
    centred = (data[0] - np.array(own[0])) / own[1], data[1] / np.array(own[1])
    statistics = (tuple(map(float, centred[0])), tuple(map(float, centred[1])))
    candidates = {"as given": own}
    if labels is not None:
        candidates |= {name: (m[:channels], s[:channels]) for name, (m, s) in COMMON.items()}
        candidates["of these images"] = data
    trials: list[Trial] = []
    x = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
    for name, (mean, std) in candidates.items():
        if any(np.allclose(t.mean, mean, atol=1e-3) and np.allclose(t.std, std, atol=1e-3) for t in trials):
            continue
        accuracy = None
        if labels is not None:
            m, s = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
            # Others only have to be told apart: a quarter of the images will do.
            some, truth = (x, labels) if name == "as given" else (x[::4], labels[::4])
            found = [classifier.network((part.float() / 255 - m) / s).argmax(1) for part in some.split(64)]
            accuracy = float((torch.cat(found).numpy() == truth).mean())
        trials.append(Trial(name=name, mean=tuple(mean), std=tuple(std), accuracy=accuracy))
    return statistics, trials


def doubts(statistics: tuple[Sequence[float], Sequence[float]], trials: Sequence[Trial]) -> list[str]:
    """What looks wrong about the normalisation, in sentences; empty where nothing does."""
    found = []
    given = trials[0]
    identity = np.allclose(given.mean, 0) and np.allclose(given.std, 1)
    off = max(map(abs, statistics[0])) > 1 or max(statistics[1]) > 3 or min(statistics[1]) < 1 / 3
    if not identity and off:
        found.append(
            "after normalisation the images have mean "
            + ", ".join(f"{v:.2f}" for v in statistics[0])
            + " and std "
            + ", ".join(f"{v:.2f}" for v in statistics[1])
            + " where about 0 and 1 are usual"
        )
    if given.accuracy is not None:
        better = max(trials[1:], key=lambda t: t.accuracy or 0, default=given)
        if better.accuracy is not None and better.accuracy > given.accuracy + 0.05:
            found.append(
                f"accuracy is {given.accuracy:.1%} as given, and {better.accuracy:.1%} with the one "
                f"{better.name}: --mean {_numbers(better.mean)} --std {_numbers(better.std)}"
            )
    return found


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{v:.4g}" for v in values)


# --- packaging ----------------------------------------------------------------------------------------------


def write(
    fitted: Fitted,
    checkpoint: Checkpoint,
    architecture: str,
    labels: Sequence[str],
    out: str | Path,
    *,
    input_size: int,
) -> ModelPackage:
    """A package of the classifier, not calibrated."""
    import torchvision

    from ratioctl._version import __version__

    network = fitted.classifier
    mean, std = (getattr(network, name).flatten().tolist() for name in ("mean", "std"))
    weights = {
        name: value.numpy()
        for name, value in network.network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    config = {
        "architecture": architecture,
        "architecture_options": fitted.options,
        "num_classes": len(labels),
        "label_names": list(labels),
        "pretrained_cfg": {
            "input_size": [len(mean), input_size, input_size],
            "mean": [round(v, 7) for v in mean],
            "std": [round(v, 7) for v in std],
            "interpolation": "bicubic",
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
