"""Checks of an imported classifier on real images: its normalization, and the order of its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ratioctl.errors import UsageError
from ratioctl.models.network import Classifier

COMMON = {  # common normalizations
    "that changes nothing": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "of [-1,1]": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "of ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "of CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
RAW = "If it was trained on pixels in [0,1] as they are, say so: --mean 0 --std 1."


def check_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse a normalization that is missing or in other units, and say why.

    Raises:
        UsageError: not both given, a std that is not above 0, or numbers of pixels in 0..255.
    """
    if mean is None and std is None:
        reason = "is not given. A wrong one spoils a good model without any error"
        step = f"Give the values it was trained with, for pixels in [0,1]: --mean R,G,B --std R,G,B. {RAW}"
        raise UsageError("the normalization of the input", reason, step)
    if mean is None or std is None:
        missing, given = ("--mean", "--std") if mean is None else ("--std", "--mean")
        raise UsageError(given, f"is given without {missing}", "Give both.")
    if not all(np.isfinite([*mean, *std])):
        raise UsageError("--mean, --std", "must be finite numbers", "For example --mean 0.5 --std 0.25.")
    if min(std) <= 0:
        raise UsageError("--std", f"is {min(std):g}; pixels are divided by it", "Give numbers above 0.")
    if max(map(abs, mean)) > 2 or max(std) > 4:
        step = "Divide them by 255: normalization here is of pixels in [0,1]."
        raise UsageError("--mean, --std", "look like values for pixels in 0..255", step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """Accuracy with one normalization, None without labels, and the predictions behind it."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: float | None
    predicted: np.ndarray | None = dataclasses.field(default=None, repr=False)


@torch.inference_mode()
def measure(
    classifier: Classifier, pixels: np.ndarray, labels: np.ndarray | None
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], list[Trial]]:
    """The input statistics of real images, and its accuracy with common normalizations.

    Args:
        pixels: uint8 (N, H, W, C); labels: (N,), or None.

    Returns:
        (mean, std) per channel of the normalized input, and trials, the classifier's own first.
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
        accuracy = predicted = None
        if labels is not None:
            m, s = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
            # A quarter of the images tells the others apart.
            some, truth = (x, labels) if name == "as given" else (x[::4], labels[::4])
            found = [classifier.network((part.float() / 255 - m) / s).argmax(1) for part in some.split(64)]
            predicted = torch.cat(found).numpy()
            accuracy = float((predicted == truth).mean())
        trials.append(
            Trial(name=name, mean=tuple(mean), std=tuple(std), accuracy=accuracy, predicted=predicted)
        )
    return statistics, trials


def find_problems(statistics: tuple[Sequence[float], Sequence[float]], trials: Sequence[Trial]) -> list[str]:
    """What looks wrong about the normalization, in sentences; empty where nothing does.

    Another normalization is proposed only where it reaches a usable accuracy, of one half.
    """
    found = []
    given = trials[0]
    identity = np.allclose(given.mean, 0) and np.allclose(given.std, 1)
    off = max(map(abs, statistics[0])) > 1 or max(statistics[1]) > 3 or min(statistics[1]) < 1 / 3
    if not identity and off:
        found.append(
            "after normalization the images have mean "
            + ", ".join(f"{v:.2f}" for v in statistics[0])
            + " and std "
            + ", ".join(f"{v:.2f}" for v in statistics[1])
            + " where about 0 and 1 are usual"
        )
    if given.accuracy is not None:
        better = max(trials[1:], key=lambda t: t.accuracy or 0, default=given)
        if better.accuracy is not None and better.accuracy > max(given.accuracy + 0.05, 0.5):
            found.append(
                f"accuracy is {given.accuracy:.1%} as given, and {better.accuracy:.1%} with the one "
                f"{better.name}: --mean {_numbers(better.mean)} --std {_numbers(better.std)}"
            )
    return found


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{v:.4g}" for v in values)


def other_order(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str | None:
    """A sentence where the predictions are right under other names of the outputs, else None.

    Args:
        predicted, labels: (N,) indices into `names`, the labels in the order of the outputs as given.
    """
    counts = np.zeros((len(names), len(names)), int)
    np.add.at(counts, (predicted, labels), 1)
    order = counts.argmax(axis=1)  # the class that each output stands for
    given, renamed = np.trace(counts) / len(labels), counts.max(axis=1).sum() / len(labels)
    if len(set(order.tolist())) < len(names) or renamed < max(0.5, given + 0.2):
        return None
    found = [names[k] for k in order]
    how = ", the order of their text," if found == sorted(names) else ""
    listed = ",".join(found[:50]) + (",..." if len(found) > 50 else "")
    return (
        f"its labels are in another order: accuracy is {given:.1%} as given and {renamed:.1%} with "
        f"--labels {listed}{how} which names the outputs by what they predict"
    )


def near_chance(accuracy: float, classes: int, n: int) -> bool:
    """Whether an accuracy on n images is within two standard errors of 1/K, or below."""
    return accuracy <= 1 / classes + 2 * ((1 / classes) * (1 - 1 / classes) / n) ** 0.5
