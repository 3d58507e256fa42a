"""What an attack maximizes: functions that build `goal(logits (B, K)) -> (B,)`.

Every goal is maximized (a goal to be minimized carries its minus sign here, and only here), works on one
value per example, and computes in fp32 whatever the precision of the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ratioctl.recipe import GoalName

Goal = Callable[[Tensor], Tensor]


def cross_entropy(y: Tensor) -> Goal:
    """-log p_y, with labels y (B,). The training loss of eq. 5."""

    def goal(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), y, reduction="none")

    return goal


def margin(y: Tensor) -> Goal:
    """max_{i != y} f_i - f_y (eq. 8): above 0 exactly where the decision is wrong."""

    def goal(logits: Tensor) -> Tensor:
        f = logits.float()
        other = f.scatter(1, y[:, None], -torch.inf).max(1).values
        return other - _at(f, y)

    return goal


def targeted_margin(y: Tensor, target: Tensor) -> Goal:
    """f_target - f_y: the margin towards one class, for any number of classes."""

    def goal(logits: Tensor) -> Tensor:
        f = logits.float()
        return _at(f, target) - _at(f, y)

    return goal


def dlr(y: Tensor) -> Goal:
    """Difference of logits ratio, -(f_y - max_{i != y} f_i) / (f_(1) - f_(3)), f sorted downwards.

    Croce and Hein 2020, eq. 6; unchanged when the logits are shifted or scaled. The call of the goal
    raises ValueError below 3 classes, where the third largest logit does not exist (use `margin`).
    """
    lead = margin(y)

    def goal(logits: Tensor) -> Tensor:
        if logits.shape[1] < 3:
            raise ValueError(f"the DLR loss needs 3 classes, not {logits.shape[1]}; use the margin")
        top = logits.float().topk(3, dim=1).values
        return lead(logits) / (top[:, 0] - top[:, 2] + 1e-12)

    return goal


def targeted_dlr(y: Tensor, target: Tensor) -> Goal:
    """-(f_y - f_target) / (f_(1) - (f_(3) + f_(4)) / 2), f sorted downwards.

    Croce and Hein 2020, eq. 7. Raises ValueError below 4 classes (use `targeted_margin`).
    """
    lead = targeted_margin(y, target)

    def goal(logits: Tensor) -> Tensor:
        if logits.shape[1] < 4:
            raise ValueError(f"the targeted DLR loss needs 4 classes, not {logits.shape[1]}; use the margin")
        top = logits.float().topk(4, dim=1).values
        return lead(logits) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)

    return goal


def uniform_cross_entropy() -> Goal:
    """-(1/K) sum_k log p_k: cross-entropy to the uniform distribution, least where p is uniform (eq. 6)."""

    def goal(logits: Tensor) -> Tensor:
        return -F.log_softmax(logits.float(), dim=1).mean(1)

    return goal


def kl(p_clean: Tensor) -> Goal:
    """KL(p_clean || p), with probabilities p_clean (B, K) of the clean images (TRADES, Zhang et al. 2019).

    Its gradient vanishes at the clean image itself, so its attack needs `start = "random"`.
    """
    p_clean = p_clean.detach().float()
    negative_entropy = torch.special.xlogy(p_clean, p_clean).sum(1)

    def goal(logits: Tensor) -> Tensor:
        return negative_entropy - (p_clean * F.log_softmax(logits.float(), dim=1)).sum(1)

    return goal


def log_confidence(temperature: float = 1.0) -> Goal:
    """max_k log p_k after the temperature: ranks points as `confidence` does, with a useful gradient."""

    def goal(logits: Tensor) -> Tensor:
        return F.log_softmax(logits.float() / temperature, dim=1).max(1).values

    return goal


def log_odds(temperature: float = 1.0) -> Goal:
    """log p_max / (1 - p_max) after the temperature: ranks points as `confidence` does, and goes on ranking
    them, with a gradient, where p_max has long been rounded to 1.
    """

    def goal(logits: Tensor) -> Tensor:
        f = logits.float() / temperature
        top = f.max(1)
        others = f.scatter(1, top.indices[:, None], -torch.inf)
        return top.values - others.logsumexp(1)

    return goal


def confidence(temperature: float = 1.0) -> Goal:
    """max_k p_k after the temperature. Its gradient vanishes where p is sharp; see `log_confidence`."""

    def goal(logits: Tensor) -> Tensor:
        return F.softmax(logits.float() / temperature, dim=1).max(1).values

    return goal


def log_probability(target: Tensor, temperature: float = 1.0) -> Goal:
    """log p_target after the temperature, with target classes (B,): what a counterfactual maximizes."""

    def goal(logits: Tensor) -> Tensor:
        return -F.cross_entropy(logits.float() / temperature, target, reduction="none")

    return goal


def by_name(name: GoalName, y: Tensor | None = None, clean_logits: Tensor | None = None) -> Goal:
    """The goal a recipe names. "confidence" is searched for through its logarithm.

    Args:
        y: labels (B,), for "cross-entropy", "margin" and "dlr".
        clean_logits: logits (B, K) of the unperturbed images, for "kl".

    Raises:
        ValueError: unknown name, or the values this goal needs are missing.
    """
    if name in ("cross-entropy", "margin", "dlr"):
        if y is None:
            raise ValueError(f'the goal "{name}" needs labels')
        return {"cross-entropy": cross_entropy, "margin": margin, "dlr": dlr}[name](y)
    if name == "kl":
        if clean_logits is None:
            raise ValueError('the goal "kl" needs the logits of the clean images')
        return kl(F.softmax(clean_logits.detach().float(), dim=1))
    if name == "uniform-cross-entropy":
        return uniform_cross_entropy()
    if name == "confidence":
        return log_confidence()
    raise ValueError(f'unknown goal "{name}"')


def _at(f: Tensor, k: Tensor) -> Tensor:
    return f.gather(1, k[:, None]).squeeze(1)
