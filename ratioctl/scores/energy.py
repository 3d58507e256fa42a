"""Free energy: -T log sum_k exp(f_k / T), with the temperature of the package."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ratioctl.scores.registry import register_from_score

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def _score(logits: np.ndarray, temperature: float) -> np.ndarray:
    import numpy as np

    from ratioctl import metrics

    z = metrics.finite_logits(logits) / temperature
    top = z.max(axis=-1, keepdims=True)
    return -temperature * (top[..., 0] + np.log(np.exp(z - top).sum(axis=-1)))


def _tensor(logits: Tensor, temperature: float) -> Tensor:
    return -temperature * (logits / temperature).logsumexp(dim=1)


register_from_score(
    name="energy",
    description="-T log sum_k exp(f_k / T), T the calibrated temperature",
    source="Liu et al. 2020, 'Energy-based Out-of-distribution Detection', eq. 4",
    from_logits=_score,
    from_tensor=_tensor,
    threshold_range=(-math.inf, math.inf),
)
