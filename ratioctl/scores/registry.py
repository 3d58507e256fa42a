"""The registry of out-of-distribution (OOD) scores, and what a score consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from ratioctl.errors import UsageError
from ratioctl.utils.registry import import_modules
from ratioctl.utils.suggest import one_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DEFAULT = "msp"
LogitsOf = Callable[["Tensor"], "Tensor"]  # pixels (B, C, H, W) in [0,1] -> logits (B, K)


class Threshold(float):
    """A threshold of an OOD score: a number, and where it was calibrated per class one number for each class.

    Attributes:
        classes: K thresholds in the order of the labels, of which that of the predicted class applies; None
            where the number itself holds for all classes.
    """

    classes: tuple[float, ...] | None

    def __new__(cls, value: float, classes: tuple[float, ...] | None = None) -> Threshold:
        made = super().__new__(cls, value)
        made.classes = classes
        return made

    def __eq__(self, other: object) -> bool:
        """Equal numbers, and equal thresholds of the classes: it is a key of what is scored together."""
        # Not `float(self) == other`: Python would ask `other` first, which then sees a plain number.
        return float.__eq__(self, other) is True and getattr(other, "classes", None) == self.classes

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(float(self)) if self.classes is None else hash((float(self), self.classes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OodScore:
    """An OOD score of logits f (N, K) at temperature T > 0. Larger means more outlying.

    The acceptance orders images exactly as the negated score does, also where the score itself is rounded
    to a constant. Images with `acceptance(f, T) < acceptance_bound(threshold)` are flagged; an exported graph
    computes the same in double precision.

    Attributes:
        name: on the command line and in Python.
        config_name: in a package's `config.json`.
        description: one line for `--help` and the documentation.
        source: the paper.
        from_logits: (N, K) array, temperature -> scores (N,) float64.
        from_tensor: the same in torch, (N, K) -> (N,); differentiable and exportable to ONNX.
        acceptance: (N, K) array, temperature -> (N,) float64, larger for more in-distribution.
        acceptance_tensor: the same in torch; a worst-case attack on OOD images maximizes it.
        acceptance_bound: from a stored threshold to the value that `acceptance` is compared with.
        acceptance_bound_tensor: the same for a float64 tensor, exportable to ONNX.
        threshold_of: (N, K) array, temperature -> (N,) the thresholds at which each image is just accepted.
        threshold_range: smallest and largest threshold that makes sense.
        near: for scores that look at the network near the image: (logits_of, pixels (B, C, H, W),
            temperature) -> (B, K), the logits that the functions above are given, differentiable in the
            pixels. Only `evaluate` has such a network; None for scores of the image's own logits.
        passes: of the network that the score takes, about.
    """

    name: str
    config_name: str
    description: str
    source: str
    from_logits: Callable[[np.ndarray, float], np.ndarray]
    from_tensor: Callable[[Tensor, float], Tensor]
    acceptance: Callable[[np.ndarray, float], np.ndarray]
    acceptance_tensor: Callable[[Tensor, float], Tensor]
    acceptance_bound: Callable[[float], float]
    acceptance_bound_tensor: Callable[[Tensor], Tensor]
    threshold_of: Callable[[np.ndarray, float], np.ndarray]
    threshold_range: tuple[float, float]
    near: Callable[[LogitsOf, Tensor, float], Tensor] | None = None
    passes: int = 1

    def bounds(self, threshold: float, predicted: np.ndarray) -> np.ndarray:
        """What the acceptance of each image is compared with, (N,), for predicted classes (N,)."""
        import numpy as np

        classes = getattr(threshold, "classes", None)
        if classes is None:
            return np.full(len(predicted), self.acceptance_bound(threshold))
        return np.array([self.acceptance_bound(value) for value in classes])[predicted]

    def is_ood(self, logits: np.ndarray, temperature: float, threshold: float) -> np.ndarray:
        """Flags (N,) of logits (N, K); a `Threshold` per class applies that of the predicted class."""
        return self.acceptance(logits, temperature) < self.bounds(threshold, logits.argmax(axis=-1))


_SCORES: dict[str, OodScore] = {}


def register_score(score: OodScore) -> OodScore:
    """Add a score under its name. A module in this folder that calls it is found without being listed."""
    taken = {other.config_name for other in _SCORES.values()}
    if score.name in _SCORES or score.config_name in taken:
        raise ValueError(f'there is already a score named "{score.name}" or "{score.config_name}"')
    _SCORES[score.name] = score
    return score


def register_from_score(
    *,
    name: str,
    description: str,
    source: str,
    from_logits: Callable[[np.ndarray, float], np.ndarray],
    from_tensor: Callable[[Tensor, float], Tensor],
    threshold_range: tuple[float, float],
) -> OodScore:
    """Register a score that is its own acceptance up to the sign; a threshold is a value of the score."""
    return register_score(
        OodScore(
            name=name,
            config_name=name,
            description=description,
            source=source,
            from_logits=from_logits,
            from_tensor=from_tensor,
            acceptance=lambda logits, temperature: -from_logits(logits, temperature),
            acceptance_tensor=lambda logits, temperature: -from_tensor(logits, temperature),
            acceptance_bound=_bound,
            acceptance_bound_tensor=lambda threshold: -threshold - 1e-13 * threshold.abs().clamp(min=1.0),
            threshold_of=from_logits,
            threshold_range=threshold_range,
        )
    )


def _bound(threshold: float) -> float:
    """Lower by rounding, so that the image at the threshold is accepted however its score is computed."""
    return -threshold - 1e-13 * max(1.0, abs(threshold))


def by_name(name: str, *, network: bool = False) -> OodScore:
    """The score of that name.

    Args:
        network: also scores that look at the network near the image.

    Raises:
        UsageError: an unknown one (the known names are listed), or one that needs the network.
    """
    scores = _all()
    if name not in scores:
        raise UsageError(f"score {name}", "unknown OOD score", one_of(name, names(network=network)))
    if scores[name].near is not None and not network:
        reason = "follows the network near the image, which only evaluate does"
        raise UsageError(f"score {name}", reason, f"Use one of {', '.join(names())}.")
    return scores[name]


def by_config_name(config_name: str) -> OodScore | None:
    """The score that a `config.json` names, or None."""
    scores = (score for score in _all().values() if score.near is None)
    return next((score for score in scores if score.config_name == config_name), None)


def names(*, network: bool = False) -> tuple[str, ...]:
    """Names of the scores of logits, the default one first; `network`: then those that follow the network."""
    found = [name for name, score in _all().items() if network or score.near is None]
    return tuple(sorted(found, key=lambda name: (_all()[name].near is not None, name != DEFAULT, name)))


@cache
def _all() -> dict[str, OodScore]:
    """The registry after every module of this folder has been imported."""
    import_modules("ratioctl.scores")
    return _SCORES
