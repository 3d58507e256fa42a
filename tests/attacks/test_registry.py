"""Attack methods come from one registry: schema, messages and the worst case see a new one at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ratioctl import attacks
from ratioctl.attacks.problem import Problem
from ratioctl.attacks.registry import default_method, register_attack, strongest
from ratioctl.attacks.worst_case import worst_case_confidence
from ratioctl.recipe import ATTACKS, Attack, Ball

METHODS = {"afw", "apgd", "pgd"}


@pytest.fixture
def corner() -> Iterator[str]:
    """A method of one's own: one jump along the sign of the gradient."""

    @register_attack("corner", norms=("inf",))
    def corner(problem: Problem, x: Tensor, attack: Attack) -> tuple[Tensor, Tensor]:
        _, gradient = problem.gradient_of(x, 0)
        end = (problem.x0 + problem.radius.float()[:, None] * gradient.sign()).clamp(0, 1)
        return end, problem.value_of(end, 1)

    yield "corner"
    del ATTACKS._loaded["corner"], ATTACKS._options["corner"]


def test_names_are_known_without_importing_the_methods() -> None:
    assert set(ATTACKS.names()) == METHODS
    folder = Path(attacks.__file__).parent
    assert {name for name in METHODS if (folder / f"{name}.py").is_file()} == METHODS
    assert ATTACKS.options("pgd") == {"norms": ("1", "2", "inf"), "step_size": True}
    for name in METHODS:
        assert ATTACKS.get(name).__name__ == name


def test_the_default_method_of_a_norm() -> None:
    assert [default_method(p) for p in (1.0, 1.5, 2.0, math.inf)] == ["apgd", "afw", "apgd", "apgd"]
    assert strongest(Ball(p=1.5, eps=1), 9, restarts=3) == Attack(
        ball=Ball(p=1.5, eps=1), method="afw", steps=9, restarts=3
    )


def test_a_new_method_is_legal_at_once(corner: str) -> None:
    """On a linear two-class problem one jump to the corner of the linf ball is the optimum."""
    weight = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    x0 = torch.full((2, 3, 2, 2), 0.5)
    ball = Ball(p=math.inf, eps=0.1)

    def logits_of(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    found = worst_case_confidence(logits_of, x0, ball, steps=1, restarts=1, method=corner)
    strong = worst_case_confidence(logits_of, x0, ball, steps=20, restarts=1)
    torch.testing.assert_close(found.confidence, strong.confidence, atol=1e-5, rtol=0)
    assert (found.confidence > found.clean + 0.01).all()
    with pytest.raises(
        ValidationError, match=r'"corner" cannot search the l2 ball; use method = "afw" or "apgd" or "pgd"'
    ):
        Attack(ball=Ball(p=2, eps=1), method=corner)


def test_a_name_registered_twice_is_refused(corner: str) -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register_attack(corner, norms=("2",))(lambda problem, x, attack: (x, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"method": "apdg"},
            r'unknown attack method "apdg"; did you mean "apgd"\? \(known: "afw", "apgd", "pgd"\)',
        ),
        (
            {"method": "pgd", "ball": Ball(p=1.5, eps=1)},
            r'"pgd" cannot search the l1.5 ball; use method = "afw"',
        ),
        ({"method": "apgd", "step_size": 0.1}, r"adapts its step size"),
    ],
)
def test_illegal_attacks(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Attack.model_validate({"ball": Ball(p=2, eps=1), **change})


def test_the_worst_case_takes_any_method() -> None:
    x0 = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    ball = Ball(p=2, eps=0.5)
    found = {
        method: worst_case_confidence(
            lambda x: x.flatten(1) @ weight.T, x0, ball, steps=20, restarts=1, method=method
        ).confidence
        for method in (None, *sorted(METHODS))
    }
    assert torch.equal(found[None], found["apgd"])
    for method in METHODS:
        torch.testing.assert_close(found[method], found["apgd"], atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="unknown attack method"):
        worst_case_confidence(lambda x: x.flatten(1) @ weight.T, x0, ball, method="fgsm")
