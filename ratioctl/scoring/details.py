"""What rows say beside the score: why an image is flagged, and checks of the input."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ratioctl import scores as registry
from ratioctl.images import Decoded
from ratioctl.package import Spec
from ratioctl.utils.text import threshold_text

if TYPE_CHECKING:
    from ratioctl.package.records import AcceptanceQuantiles

BLANK = 8  # of 255: a channel's range up to which an image is blank
SATURATED = 0.5  # share of pixels that are 0 or 255 in every channel, from which an image is saturated
CLOSE = 0.5  # share of the highest probability from which the runner-up is named


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explainer:
    """Explains rows of one model at one threshold."""

    spec: Spec
    score: registry.OodScore
    threshold: float
    calibration: AcceptanceQuantiles | None

    @classmethod
    def of(cls, spec: Spec, threshold: float, score: str) -> Explainer:
        """Raises PackageError where the package's stored quantiles are damaged."""
        from ratioctl.package.records import acceptances  # pydantic is imported for explanations alone

        stored = acceptances(spec, score)
        kind = registry.by_name(score)
        return cls(spec=spec, score=kind, threshold=threshold, calibration=stored.id if stored else None)

    def fields(
        self, logits: np.ndarray, probabilities: np.ndarray, scores: np.ndarray, is_ood: np.ndarray
    ) -> list[dict[str, Any]]:
        """Fields of `ScoreRow` for logits (N, K), probabilities (N, K), OOD scores (N,) and flags (N,)."""
        predicted = logits.argmax(axis=1)
        acceptance = self.score.acceptance(logits, self.spec.temperature)
        margins = acceptance - self.score.bounds(self.threshold, predicted)
        runners = np.where(np.arange(logits.shape[1]) == predicted[:, None], -np.inf, logits).argmax(axis=1)
        found: list[dict[str, Any]] = []
        for k, margin in enumerate(margins.tolist()):
            percentile = None
            if self.calibration is not None:
                percentile = 100 * self.calibration.share_below(float(acceptance[k]))
            label, runner = int(predicted[k]), int(runners[k])
            fields: dict[str, Any] = {
                "margin": margin if math.isfinite(margin) else None,
                "runner_up": self.spec.label_names[runner],
                "percentile": percentile,
            }
            if is_ood[k]:
                p, second = float(probabilities[k, label]), float(probabilities[k, runner])
                fields["reason"] = self._reason(label, runner, p, second, float(scores[k]), percentile)
            found.append(fields)
        return found

    def _reason(
        self, label: int, runner: int, p: float, second: float, score: float, percentile: float | None
    ) -> str:
        classes = getattr(self.threshold, "classes", None)
        limit = float(self.threshold if classes is None else classes[label])
        names = self.spec.label_names
        if self.score.name == registry.DEFAULT:
            parts = [f"confidence {p:.4g} in {names[label]} is below {threshold_text(limit)}"]
        else:
            parts = [f"{self.score.name} {score:.4g} is above {limit:.4g}"]
        if second > CLOSE * p:
            parts.append(f"the next is {names[runner]} ({second:.2g})")
        if percentile is not None:
            parts.append(f"{percentile:.1f} % of the calibration images score lower")
        return "; ".join(parts)


def input_checks(decoded: Decoded) -> dict[str, Any]:
    """Fields of `ScoreRow` that describe an input: size of the file, look of its 8-bit version."""
    pixels = decoded.pixels
    flat = pixels.reshape(-1, pixels.shape[-1])
    extreme = np.isin(flat, (0, 255)).all(axis=1)
    return {
        "width": decoded.width,
        "height": decoded.height,
        "blank": bool((flat.max(axis=0).astype(int) - flat.min(axis=0) <= BLANK).all()),
        "saturated": bool(extreme.mean() >= SATURATED),
        "notes": "; ".join(decoded.notes),
        "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }


def with_duplicates(rows: Sequence[Any], previous: str | None) -> tuple[list[Any], str | None]:
    """The rows with `duplicate`: whether the pixels are those of the image before; and the last digest.

    Args:
        previous: digest of the last image that could be read before these rows.
    """
    found = []
    for row in rows:
        if row.pixels_sha256 is not None:
            row = dataclasses.replace(row, duplicate=row.pixels_sha256 == previous)
            previous = row.pixels_sha256
        found.append(row)
    return found, previous
