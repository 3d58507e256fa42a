"""The attack methods: one module of this folder each, declared with `@register_attack`.

A method searches the maximum of a goal over the balls of a batch. It is a function
`method(problem, x, attack) -> (best points (B, n), their values (B,))` that starts at the points `x` and
takes `attack.steps` gradients and one more value. `norms` names the balls it can search; `step_size=True`
means that it reads `attack.step_size`. The recipe schema, messages and `worst_case_confidence` take the names
from this registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from ratioctl.recipe import ATTACKS, Attack, Ball, norm_name

if TYPE_CHECKING:
    from torch import Tensor

    from ratioctl.attacks.problem import Problem

    Method: TypeAlias = Callable[[Problem, Tensor, Attack], tuple[Tensor, Tensor]]

M = TypeVar("M", bound=Callable[..., Any])


def register_attack(name: str, *, norms: tuple[str, ...], step_size: bool = False) -> Callable[[M], M]:
    """Add an attack method; see the module's docstring. The arguments must be literals."""
    return ATTACKS.register(name, norms=norms, step_size=step_size)


def default_method(p: float) -> str:
    """The strongest method for a norm: Auto-PGD, Auto-Frank-Wolfe where the ball has no projection."""
    return "apgd" if norm_name(p) in ATTACKS.options("apgd")["norms"] else "afw"


def strongest(
    ball: Ball,
    steps: int,
    *,
    restarts: int = 1,
    start: Literal["centre", "random"] = "centre",
    method: str | None = None,
) -> Attack:
    """An attack with the default method for the ball, or with `method`."""
    method = method or default_method(ball.p)
    return Attack(ball=ball, method=method, steps=steps, restarts=restarts, start=start)
