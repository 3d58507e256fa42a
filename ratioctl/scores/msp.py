"""Maximum softmax probability (MSP), the score of the RATIO paper and the default."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ratioctl.scores.registry import OodScore, register_score

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def _score(logits: np.ndarray, temperature: float) -> np.ndarray:
    return 1.0 - _confidence(logits, temperature)


def _tensor(logits: Tensor, temperature: float) -> Tensor:
    return 1 - (logits / temperature).softmax(dim=1).amax(dim=1)


def _log_odds(logits: np.ndarray, temperature: float) -> np.ndarray:
    from ratioctl import metrics

    return metrics.log_odds(logits, temperature)


def log_odds_tensor(logits: Tensor, temperature: float) -> Tensor:
    """log p_max - log(1 - p_max), without forming either probability."""
    f = (logits / temperature).sort(dim=1, descending=True).values
    return f[:, 0] - f[:, 1:].logsumexp(dim=1)


def _logit(confidence: float) -> float:
    """Log-odds of a confidence, lower by what double precision rounds away.

    So the image whose own confidence is the threshold is accepted however its log-odds are computed, and so
    are images whose confidence is 1 in double precision at a threshold of 1.
    """
    if confidence <= 0:
        return -math.inf
    return math.log(confidence) - math.log(1 - confidence + 1.5 * 2**-53) - 1e-12


def _confidence(logits: np.ndarray, temperature: float) -> np.ndarray:
    from ratioctl import metrics

    return metrics.confidence(logits, temperature)


def _logit_tensor(confidence: Tensor) -> Tensor:
    return confidence.log() - (1 - confidence + 1.5 * 2**-53).log() - 1e-12


MSP = register_score(
    OodScore(
        name="msp",
        config_name="max-softmax",
        description="1 - max_k p_k, after temperature",
        source="Hendrycks and Gimpel 2017; Augustin, Meinke and Hein 2020, section 4.3",
        from_logits=_score,
        from_tensor=_tensor,
        acceptance=_log_odds,
        acceptance_tensor=log_odds_tensor,
        acceptance_bound=_logit,  # a threshold of this score is a confidence
        acceptance_bound_tensor=_logit_tensor,
        threshold_of=_confidence,
        threshold_range=(0.0, 1.0),
    )
)
