"""What an evaluation runs: suites as values, and the balls they attack in."""

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
    """How many images are attacked, and how hard.

    Attributes:
        inside: attacked in-images, a stratified subset; None attacks all.
        balls: how many of the model's robustness balls are attacked in, the first ones; None takes all.
        extra: balls attacked in besides, as (norm, radius at 32x32x3) that grow with the input.
        attacks: of the robust accuracy, in order; each meets the survivors of those before it.
        budget: of these attacks; None is AutoAttack's standard one for the norm.
        outside: attacked images of every out-distribution, and in-images whose confidence is attacked; None
            attacks all.
        outside_steps, outside_restarts, outside_targets: of the search for the largest confidence.
        curve: images of the confidence-radius curves, inside and outside; curve_steps of every radius.
        probe: images on which a longer search checks the attacks, of every ball and set.
        exact: attacks search in fp32 unless bf16 is asked for; quick looks may search in bf16.
        backend: of the robust accuracy: "reference" is `pyautoattack`'s standard version, where that exists.
    """

    name: str
    inside: int | None
    balls: int | None = None
    extra: tuple[tuple[float, float], ...] = ()
    attacks: tuple[str, ...] = STANDARD
    budget: AttackBudget | None = None
    outside: int | None
    outside_steps: int = 100
    outside_restarts: int = 1
    outside_targets: int = 1
    curve: int = 256
    curve_steps: int = 50
    probe: int = 64
    exact: bool = True
    backend: Backend = "own"

    def __str__(self) -> str:
        inside = "all" if self.inside is None else str(self.inside)
        outside = "all" if self.outside is None else str(self.outside)
        ensemble = ensemble_name(self.attacks, self.budget or AttackBudget(), 2.0, 10**6, self.backend)
        by = " by pyautoattack" if self.backend == "reference" else ""
        return (
            f"{inside} in-images under {ensemble}{by}; worst case of {outside} images an out-distribution, "
            f"{self.outside_steps} steps, {self.outside_restarts} restart{'s' * (self.outside_restarts > 1)}"
        )

    def attacks_for(self, ball: Ball) -> tuple[str, ...]:
        """The attacks that exist for a ball: FAB-T and Square do not for l1.5."""
        return tuple(a for a in self.attacks if ball.p != 1.5 or a in ("apgd-ce", "apgd-t"))

    def budget_for(self, ball: Ball) -> AttackBudget:
        return self.budget or standard_budget(ball.p)

    def backend_for(self, ball: Ball, classes: int) -> Backend:
        """The reference where it was chosen and exists, else our own."""
        return self.backend if has_reference(ball.p, classes) else "own"

    @property
    def standard(self) -> bool:
        """Whether its ensemble is AutoAttack's standard one, so that the reference can stand for it."""
        return self.attacks == STANDARD and self.budget is None


SUITES = {
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
}


def scale(p: float, size: tuple[int, int, int]) -> float:
    """How a radius for 32x32x3 grows with the input (C, H, W): d^(1/p), so linf stays."""
    return 1.0 if math.isinf(p) else (math.prod(size) / 3072.0) ** (1 / p)


def robust_balls(package: ModelPackage, suite: Suite) -> tuple[Ball, ...]:
    """The balls of the robust accuracies: the recipe's, else the paper's scaled to the input (Table 3)."""
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


def outside_ball(package: ModelPackage) -> Ball:
    """The l2 ball of the worst case on out-images: the recipe's, else 1.0 scaled to the input (Table 5)."""
    eps = _evaluation(package).outside_eps
    return Ball(p=2.0, eps=eps if eps is not None else round(scale(2.0, package.input_size), 6))


def radii(package: ModelPackage) -> tuple[float, ...]:
    """Radii of the confidence-radius curves (Figure 5): the l2 ladder, and half its first step."""
    channels, size, _ = package.input_size
    ladder = package.ladders.get("2") or recipes.default_ladder(2.0, size, channels)
    return (ladder[0] / 2, *ladder)


def calibration(package: ModelPackage) -> recipes.Calibration:
    """Bins and grid of the package's calibration."""
    filed: Any = package.config["ratio"].get("calibration") or {}
    grid = filed.get("grid") or {}
    known = {"bins": filed.get("bins"), "report_bins": filed.get("report_bins"), **grid}
    return recipes.Calibration(**{key: value for key, value in known.items() if value is not None})


def _evaluation(package: ModelPackage) -> recipes.Evaluation:
    if package.recipe_text is None:
        return recipes.Evaluation()
    try:
        return recipes.loads(package.recipe_text, str(package.path)).evaluation
    except RecipeError:  # written by a version with other keys: the defaults still fit the model
        return recipes.Evaluation()
