"""Suites: which stages an evaluation runs with which budgets, and in which balls it attacks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ratioctl import recipe as recipes
from ratioctl.attacks.autoattack import (
    STANDARD,
    AttackBudget,
    Backend,
    ensemble_name,
    has_reference,
    standard_budget,
)
from ratioctl.errors import RecipeError
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """The stages of an evaluation and their budgets.

    Attributes:
        stages: names of `evaluation.stages`, in running order.
        inside: attacked ID images, a stratified subset; None attacks all. In "explanations", the number of
            ID images where no limit is given.
        balls: number of the model's robustness balls, the first ones; None uses all.
        extra: additional balls as (norm, radius at 32x32x3); radii grow with the input.
        fixed: balls of the robust accuracies instead of the model's; the first is that of attacked ID images.
        outside_ball: of the worst case on OOD images instead of the model's.
        attacks: of the robust accuracy, in order; each runs on the survivors of those before it.
        budget: of these attacks; None is AutoAttack's standard one for the norm.
        outside: attacked images per OOD set, and ID images attacked towards low confidence; None attacks all.
            In "explanations", the number of OOD images per set where no limit is given.
        outside_steps, outside_restarts, outside_targets, outside_method: of the search for the highest
            confidence; the method is a registered attack, None takes the norm's default.
        curve: images of the confidence-radius curves, ID and OOD each; curve_steps: per radius.
        probe: images per ball and set on which a longer search checks the attacks.
        exact: attacks run in fp32 unless bf16 is requested.
        backend: of the robust accuracy: "reference" is `pyautoattack`'s standard version, where it exists.
        scores: names of further OOD scores to measure.
        explanation_norm, explanation_steps: of the counterfactual searches.
    """

    name: str
    stages: tuple[str, ...] = ("clean", "ood", "robust", "worst_case", "radius")
    inside: int | None
    balls: int | None = None
    extra: tuple[tuple[float, float], ...] = ()
    fixed: tuple[Ball, ...] = ()
    outside_ball: Ball | None = None
    attacks: tuple[str, ...] = STANDARD
    budget: AttackBudget | None = None
    outside: int | None
    outside_steps: int = 100
    outside_restarts: int = 1
    outside_targets: int = 1
    outside_method: str | None = None
    curve: int = 256
    curve_steps: int = 50
    probe: int = 64
    exact: bool = True
    backend: Backend = "own"
    scores: tuple[str, ...] = ()
    explanation_norm: str = "2"
    explanation_steps: int = 100

    def __str__(self) -> str:
        """The protocol in words."""
        if self.explains:
            return (
                f"counterfactuals in l{self.explanation_norm} balls, {self.explanation_steps} steps, of ID "
                "images towards a random other class and of OOD images towards the predicted class"
            )
        if "robust" not in self.stages and not self.attacks_ood:
            return "accuracy, calibration and OOD detection on unchanged images, no attacks"
        inside = "all" if self.inside is None else str(self.inside)
        outside = "all" if self.outside is None else str(self.outside)
        ensemble = ensemble_name(self.attacks, self.budget or AttackBudget(), 2.0, 10**6, self.backend)
        by = " by pyautoattack" if self.backend == "reference" else ""
        where = f" in {self.outside_ball}" if self.outside_ball else ""
        parts = [f"{inside} ID images under {ensemble}{by}"] if "robust" in self.stages else []
        if self.attacks_ood:
            restarts = f"{self.outside_restarts} restart{'s' * (self.outside_restarts > 1)}"
            worst = f"worst case of {outside} images per OOD set{where}"
            parts.append(f"{worst}, {self.outside_steps} steps, {restarts}")
        return "; ".join(parts)

    def attacks_for(self, ball: Ball) -> tuple[str, ...]:
        """The attacks that exist for a ball: FAB-T and Square do not support l1.5."""
        return tuple(a for a in self.attacks if ball.p != 1.5 or a in ("apgd-ce", "apgd-t"))

    def budget_for(self, ball: Ball) -> AttackBudget:
        return self.budget or standard_budget(ball.p)

    def backend_for(self, ball: Ball, classes: int) -> Backend:
        """The reference where it is selected and exists, else "own"."""
        return self.backend if has_reference(ball.p, classes) else "own"

    @property
    def attacks_ood(self) -> bool:
        """Whether it attacks OOD images."""
        return "worst_case" in self.stages

    @property
    def explains(self) -> bool:
        """Whether it measures counterfactuals, which uses other images and options."""
        return "explanations" in self.stages

    @property
    def standard(self) -> bool:
        """Whether its ensemble is AutoAttack's standard one, which the reference backend runs."""
        return self.attacks == STANDARD and self.budget is None


SUITES = {
    "clean": Suite(name="clean", stages=("clean", "ood"), inside=None, outside=None),
    "quick": Suite(
        name="quick",
        inside=256,
        balls=1,
        attacks=("apgd-ce", "apgd-t"),
        budget=AttackBudget(steps=50, targets=3),
        outside=128,
        outside_steps=50,
        curve=32,
        curve_steps=20,
        probe=16,
        exact=False,
    ),
    "paper": Suite(name="paper", inside=None, outside=1024, outside_restarts=5, backend="reference"),
    "full": Suite(
        name="full",
        inside=None,
        extra=((1.0, 12.0), (1.5, 2.5)),
        outside=None,
        outside_restarts=5,
        outside_targets=3,
        curve=1024,
        curve_steps=100,
        probe=256,
        backend="reference",
    ),
    "explanations": Suite(name="explanations", stages=("explanations",), inside=100, outside=50, exact=False),
}


def scale(p: float, size: tuple[int, int, int]) -> float:
    """Factor of a radius for 32x32x3 at input (C, H, W): (CHW / 3072)^(1/p); 1 for linf."""
    return 1.0 if math.isinf(p) else (math.prod(size) / 3072.0) ** (1 / p)


def robust_balls(package: ModelPackage, suite: Suite) -> tuple[Ball, ...]:
    """Balls of the robust accuracies: the recipe's, else the paper's (Table 3) scaled to the input."""
    if suite.fixed:
        return suite.fixed
    chosen = _evaluation(package).robust
    if not chosen:
        factor = scale(2.0, package.input_size)
        chosen = (
            Ball(p=2.0, eps=round(0.5 * factor, 6)),
            Ball(p=2.0, eps=round(1.0 * factor, 6)),
            Ball(p=math.inf, eps=8 / 255),
        )
    more = tuple(Ball(p=p, eps=round(eps * scale(p, package.input_size), 6)) for p, eps in suite.extra)
    return chosen[: suite.balls] + more


def outside_ball(package: ModelPackage, suite: Suite) -> Ball:
    """The ball of the worst case on OOD images: the suite's, else the recipe's l2 radius, else 1.0 (Table 5),
    scaled to the input.
    """
    if suite.outside_ball is not None:
        return suite.outside_ball
    eps = _evaluation(package).outside_eps
    return Ball(p=2.0, eps=eps if eps is not None else round(scale(2.0, package.input_size), 6))


def radii(package: ModelPackage) -> tuple[float, ...]:
    """Radii of the confidence-radius curves (Figure 5): the l2 ladder, and half its first radius."""
    channels, size = package.input_size[0], package.frame
    ladder = package.ladders.get("2") or recipes.default_ladder(2.0, size, channels)
    return (ladder[0] / 2, *ladder)


def calibration(package: ModelPackage) -> recipes.Calibration:
    """Bins and temperature grid of the package's calibration."""
    filed: Any = package.config["ratio"].get("calibration") or {}
    grid = filed.get("grid") or {}
    known = {"bins": filed.get("bins"), "report_bins": filed.get("report_bins"), **grid}
    return recipes.Calibration(**{key: value for key, value in known.items() if value is not None})


def _evaluation(package: ModelPackage) -> recipes.Evaluation:
    if package.recipe_text is None:
        return recipes.Evaluation()
    try:
        return recipes.loads(package.recipe_text, str(package.path)).evaluation
    except RecipeError:  # written by a version with other keys; the defaults apply
        return recipes.Evaluation()
