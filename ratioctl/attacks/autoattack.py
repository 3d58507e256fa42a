"""AutoAttack's robust accuracy (Croce and Hein 2020).

APGD-CE, APGD-T, FAB-T and Square run in turn, each on the images that survived those before it. The gradient
attacks are ours, FAB-T and Square those of `pyautoattack`. Verdicts are those of `logits_of` on the point
found, whatever network the search queried, for instance one in bf16. The backend "reference" is the
package's own standard version.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks import goals
from ratioctl.attacks.goals import Goal
from ratioctl.attacks.pyautoattack_backend import PACKAGE_NORMS, fab_or_square, standard_attack
from ratioctl.attacks.registry import default_method, strongest
from ratioctl.attacks.visited import LogitsOf, batched_logits, best_visited, image_generators
from ratioctl.recipe import Ball, norm_name

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
Backend = Literal["own", "reference"]


@dataclass(frozen=True, kw_only=True)
class AttackBudget:
    """Budget of each attack; the defaults are those of AutoAttack's standard version for l2 and linf.

    Attributes:
        steps: of every APGD and FAB run.
        restarts: of APGD-CE; `standard_budget` has 5 for l1.
        targets: classes of APGD-T and FAB-T, the likeliest wrong ones first; at most K - 1.
        queries: of Square.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 9
    queries: int = 5000


def standard_budget(p: float) -> AttackBudget:
    """AutoAttack's standard budget for a norm: l1 has 5 restarts and 5 targets (FAB-T's there are 9)."""
    return AttackBudget(restarts=5, targets=5) if p == 1 else AttackBudget()


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdicts:
    """Results of an ensemble on N images.

    Attributes:
        name: "AutoAttack (standard)" only if it was that; else the attacks and their budget.
        attacks: in running order.
        broken_by: (N,) int64: -1 where the clean decision was wrong, 0 where every attack failed, else the
            number of the attack that succeeded, from 1.
        x_adv: (N, C, H, W) the adversarial point, the image itself where no attack succeeded.
        attacked, broken, stuck: per attack the number of images it ran on, that it broke, and where every
            gradient was zero (0 for attacks of the package, which do not report it).
        stuck_images: (N,) bool, true where some attack was stuck.
        batch_size, seed: the results of Square, and of all attacks of the reference, depend on them.
        backend: "own", or "pyautoattack" and its version.
    """

    name: str
    attacks: tuple[str, ...]
    broken_by: Tensor
    x_adv: Tensor
    attacked: tuple[int, ...]
    broken: tuple[int, ...]
    stuck: tuple[int, ...]
    stuck_images: Tensor
    batch_size: int
    seed: int
    backend: str

    @property
    def correct(self) -> Tensor:
        """(N,) bool: the clean decision was right."""
        return self.broken_by >= 0

    @property
    def robust(self) -> Tensor:
        """(N,) bool: the clean decision was right and no attack changed it."""
        return self.broken_by == 0


def backend_name(backend: Backend) -> str:
    """ "own", or the package with its version."""
    return "own" if backend == "own" else f"pyautoattack {importlib.metadata.version('pyautoattack')}"


def has_reference(p: float, classes: int) -> bool:
    """Whether the package's standard version exists: not for l1.5, nor below 4 classes (targeted DLR)."""
    return p in PACKAGE_NORMS and classes >= 4


def ensemble_name(
    attacks: Sequence[str], budget: AttackBudget, p: float, classes: int, backend: Backend = "own"
) -> str:
    """The name of an ensemble: "AutoAttack (standard)" only if all four attacks run with the full budget.

    Never for l1 with our own attacks: the standard version searches larger balls first there, and its FAB-T
    has 9 targets.
    """
    if backend == "reference":
        if set(STANDARD) <= set(attacks):
            return "AutoAttack (standard)"
        return " + ".join(f"{name.upper()} of AutoAttack" for name in attacks)
    full = standard_budget(p) if p in (2.0, math.inf) else None
    targets = min(budget.targets, classes - 1)
    if (
        full is not None
        and set(STANDARD) <= set(attacks)
        and budget.steps >= full.steps
        and budget.restarts >= full.restarts
        and budget.queries >= full.queries
        and targets >= min(full.targets, classes - 1)
    ):
        return "AutoAttack (standard)"
    details = {
        "apgd-ce": f"APGD-CE {budget.steps} steps"
        + (f" x {budget.restarts} restarts" if budget.restarts > 1 else ""),
        "apgd-t": f"APGD-T {budget.steps} steps x {targets} target(s)",
        "fab-t": f"FAB-T {budget.steps} steps x {targets} target(s)",
        "square": f"Square {budget.queries} queries",
    }
    names = " + ".join(details[attack] for attack in attacks)
    return names.replace("APGD", default_method(p).upper())


def robust_verdicts(
    logits_of: LogitsOf,
    x0: Tensor,
    y: Tensor,
    ball: Ball,
    *,
    attacks: Sequence[str] = STANDARD,
    budget: AttackBudget | None = None,
    batch_size: int = 250,
    seed: int = 0,
    backend: Backend = "own",
    search_logits_of: LogitsOf | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Verdicts:
    """Which images keep their correct decision under an ensemble, each attack on the survivors.

    APGD-CE starts at random and maximizes the cross-entropy; APGD-T the targeted DLR towards each of the
    likeliest wrong classes (the targeted margin below 4 classes, where DLR does not exist). Any point visited
    whose decision is wrong counts, not only the best one. Survivors are packed into full batches before
    every target. Random numbers of our attacks come from (seed, attack, pixels), so their result does not
    depend on the batch; Square's does.

    Args:
        logits_of: images (B, C, H, W) in [0,1] to logits (B, K >= 2), in eval mode; decides every verdict.
        x0, y: all images (N, C, H, W) and labels (N,), on the device of the network.
        attacks: some of `STANDARD`, in running order.
        budget: the standard one for the norm where None.
        backend: "reference" runs `pyautoattack`'s standard version: the same points as one call of its
            `run_standard_evaluation` on all images with this batch size and seed.
        search_logits_of: what our attacks, FAB-T and Square query, for instance a bf16 version; None takes
            `logits_of`. Where it takes the point found for wrong and `logits_of` does not, the search is
            repeated with `logits_of`. The reference does not use it.
        progress: called as progress(attack, images) after every batch of each search.

    Raises:
        ValueError: an unknown attack; FAB-T or Square for p = 1.5, where they do not exist; for the reference
            another budget, p = 1.5, or fewer than 4 classes.
    """
    _check(attacks, ball.p)
    budget = budget or standard_budget(ball.p)
    clean = batched_logits(logits_of, x0, batch_size)
    classes = clean.shape[1]
    order = clean.argsort(dim=1, descending=True, stable=True)
    ensemble = _Ensemble(logits_of, search_logits_of, ball, budget, order, seed, backend)
    broken_by = torch.where(order[:, 0] == y, 0, -1)
    x_adv = x0.detach().float().clone()
    attacked, broken, stuck = ([0] * len(attacks) for _ in range(3))
    stuck_images = torch.zeros_like(broken_by, dtype=torch.bool)
    for number, name in enumerate(attacks):
        attacked[number] = int((broken_by == 0).sum())
        stuck_here = torch.zeros_like(stuck_images)
        for target in ensemble.targets_of(name):
            for rows in (broken_by == 0).nonzero().squeeze(1).split(batch_size):
                if not len(rows):
                    continue
                x, label = x0[rows], y[rows]
                found, wrong, blind = ensemble.attack(name, x, label, rows, target)
                stuck_here[rows] |= blind
                broken_by[rows[wrong]] = number + 1
                x_adv[rows[wrong]] = found[wrong]
                if progress is not None:
                    progress(name, len(rows))
        broken[number] = int((broken_by == number + 1).sum())
        stuck[number] = int(stuck_here.sum())
        stuck_images |= stuck_here
    return Verdicts(
        name=ensemble_name(attacks, budget, ball.p, classes, backend),
        attacks=tuple(attacks),
        broken_by=broken_by,
        x_adv=x_adv,
        attacked=tuple(attacked),
        broken=tuple(broken),
        stuck=tuple(stuck),
        stuck_images=stuck_images,
        batch_size=batch_size,
        seed=seed,
        backend=backend_name(backend),
    )


def _check(attacks: Sequence[str], p: float) -> None:
    unknown = [name for name in attacks if name not in STANDARD]
    if unknown:
        raise ValueError(f"unknown attack {unknown[0]!r}; known: {', '.join(STANDARD)}")
    if p not in PACKAGE_NORMS and {"fab-t", "square"} & set(attacks):
        raise ValueError(f"FAB-T and Square do not exist for the l{norm_name(p)} ball")


@dataclass(frozen=True, eq=False)
class _Ensemble:
    """The attacks of `robust_verdicts`. `order` is (N, K): the classes of all images, likeliest first."""

    logits_of: LogitsOf
    search_logits_of: LogitsOf | None
    ball: Ball
    budget: AttackBudget
    order: Tensor
    seed: int
    backend: Backend

    def __post_init__(self) -> None:
        standard = has_reference(self.ball.p, self.classes) and self.budget == standard_budget(self.ball.p)
        if self.backend == "reference" and not standard:
            raise ValueError("the reference has its own budget, and needs 4 classes and l1, l2 or linf")

    @property
    def classes(self) -> int:
        return self.order.shape[1]

    @property
    def targets(self) -> int:
        return min(self.budget.targets, self.classes - 1)

    def targets_of(self, name: str) -> Sequence[int]:
        """Columns of `order` that an attack runs towards, one search each; (0,) for one untargeted search."""
        return range(1, self.targets + 1) if self.backend == "own" and name == "apgd-t" else (0,)

    def attack(
        self, name: str, x: Tensor, y: Tensor, rows: Tensor, target: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Search with the search network and judge with `logits_of`; repeat where only the former is wrong.

        Returns:
            Points (B, C, H, W) found for the images `rows`; (B,) bool: `logits_of` is wrong there; (B,) bool:
            every gradient was zero.
        """
        if self.search_logits_of is None or self.backend == "reference":
            found, blind = self.search(name, self.logits_of, x, y, rows, target)
            return found, self._wrong(self.logits_of, found, x, y), blind
        found, blind = self.search(name, self.search_logits_of, x, y, rows, target)
        wrong = self._wrong(self.logits_of, found, x, y)
        repeat = (self._wrong(self.search_logits_of, found, x, y) & ~wrong).nonzero().squeeze(1)
        if len(repeat):
            x, y = x[repeat], y[repeat]
            found[repeat], blind[repeat] = self.search(name, self.logits_of, x, y, rows[repeat], target)
            wrong[repeat] = self._wrong(self.logits_of, found[repeat], x, y)
        return found, wrong, blind

    def _wrong(self, logits_of: LogitsOf, found: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(B,) bool: the point found lies in the ball around x, and `logits_of` does not predict y there."""
        inside = geometry.distance(found, x, self.ball.p) <= self.ball.eps * (1 + 1e-5)
        return inside & (batched_logits(logits_of, found, len(found)).argmax(1) != y)

    def search(
        self, name: str, logits_of: LogitsOf, x: Tensor, y: Tensor, rows: Tensor, target: int
    ) -> tuple[Tensor, Tensor]:
        """Points (B, C, H, W) found for the images `rows`, and (B,) bool: every gradient was zero."""
        blind = torch.zeros_like(y, dtype=torch.bool)
        if self.backend == "reference":
            found = standard_attack(name, logits_of, x, y, self.ball, self.classes, self.seed)
            return found, blind
        if name in ("fab-t", "square"):
            found = fab_or_square(
                name,
                logits_of,
                x,
                y,
                self.ball,
                steps=self.budget.steps,
                targets=self.targets,
                queries=self.budget.queries,
                seed=self.seed,
            )
            return found, blind
        goal = _goal(y, self.order[rows, target] if target else None, self.classes)
        restarts = self.budget.restarts if name == "apgd-ce" else 1
        attack = strongest(self.ball, self.budget.steps, restarts=restarts, start="random")
        generators = image_generators(x, f"{self.seed}/{name}/{target}/{self.ball}")
        return best_visited(logits_of, x, goal, attack, goals.margin(y), generators)


def _goal(y: Tensor, target: Tensor | None, classes: int) -> Goal:
    if target is None:
        return goals.cross_entropy(y)
    return goals.targeted_dlr(y, target) if classes >= 4 else goals.targeted_margin(y, target)
