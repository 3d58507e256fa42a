"""Entropy of the predicted probabilities in nats, after temperature."""

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

    z = metrics.log_softmax(logits, temperature)
    return -(np.exp(z) * z).sum(axis=-1)


def _tensor(logits: Tensor, temperature: float) -> Tensor:
    z = (logits / temperature).log_softmax(dim=1)
    return -(z.exp() * z).sum(dim=1)


register_from_score(
    name="entropy",
    description="-sum_k p_k log p_k in nats, after temperature",
    source="Steinhardt and Liang 2016; Malinin and Gales 2018",
    from_logits=_score,
    from_tensor=_tensor,
    threshold_range=(0.0, math.inf),
)
