"""Several attacks against one question: AutoAttack's robust accuracy, and the confidence in a ball.

AutoAttack (Croce and Hein 2020) runs APGD-CE, APGD-T, FAB-T and Square, each on the images that survived
those before it. The gradient attacks are ours; FAB-T and Square are those of `pyautoattack`, whose use of the
global random generator is undone and whose gradients never reach the parameters. Verdicts are always those of
`logits_of` on the point found, whatever network the search looked at. The whole of `pyautoattack` stands
beside as the reference: its standard version, as it is.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ratioctl.attacks import balls as geometry
from ratioctl.attacks import batch_parallel, goals
from ratioctl.attacks.engine import perturb
from ratioctl.attacks.goals import Goal
from ratioctl.recipe import Attack, Ball, norm_name
from ratioctl.utils.seeding import seed_from_bytes

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
LogitsOf = Callable[[Tensor], Tensor]
Backend = Literal["own", "reference"]

_PACKAGE_NORMS = {1.0: "L1", 2.0: "L2", math.inf: "Linf"}


@dataclass(frozen=True, kw_only=True)
class AttackBudget:
    """How hard each attack tries; the defaults are those of AutoAttack's standard version for l2 and linf.

    Attributes:
        steps: of every APGD and FAB run.
        restarts: of APGD-CE; `standard_budget` has 5 for l1.
        targets: classes APGD-T and FAB-T aim at, the likeliest wrong ones first; at most K - 1.
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
    """What an ensemble found on N images.

    Attributes:
        name: "AutoAttack (standard)" only where it was; else the attacks and their budget.
        attacks: in running order.
        broken_by: (N,) int64: -1 where the clean decision was wrong, 0 where every attack failed, else the
            number of the attack that succeeded, from 1.
        x_adv: (N, C, H, W) the point that broke it, the image itself where nothing did.
        attacked, broken, stuck: per attack the images it met, those it broke, and those where it never saw a
            gradient (0 for attacks of the package, which do not tell).
        stuck_images: (N,) bool, those that some attack was stuck on.
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
        """(N,) bool: right, and no attack changed it."""
        return self.broken_by == 0


def backend_name(backend: Backend) -> str:
    """ "own", or the package with its version."""
    return "own" if backend == "own" else f"pyautoattack {importlib.metadata.version('pyautoattack')}"


def has_reference(p: float, classes: int) -> bool:
    """Whether the package's standard version exists: not for l1.5, nor below 4 classes (targeted DLR)."""
    return p in _PACKAGE_NORMS and classes >= 4


def ensemble_name(
    attacks: Sequence[str], budget: AttackBudget, p: float, classes: int, backend: Backend = "own"
) -> str:
    """The honest name of an ensemble: "AutoAttack (standard)" only if all four attacks ran in full.

    Never for l1 by our own: there the standard version searches in larger balls first, and FAB-T has 9
    targets.
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
    return names.replace("APGD", "AFW") if p == 1.5 else names


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
    """Which images keep their right decision under an ensemble, each attack on the survivors.

    APGD-CE starts at random and maximises the cross-entropy; APGD-T the targeted DLR towards each of the
    likeliest wrong classes (the targeted margin below 4 classes, where DLR does not exist). Any point on the
    way whose decision is wrong counts, not only the best one. Survivors are packed into full batches before
    every target. Our attacks' random numbers come from (seed, attack, pixels), so their result does not
    depend on the batch; Square's does.

    Args:
        logits_of: images (B, C, H, W) in [0,1] to logits (B, K), in eval mode; K from 2. It decides.
        x0, y: all images (N, C, H, W) and labels (N,), on the device of the network.
        attacks: some of `STANDARD`, in running order.
        budget: the standard one for the norm where None.
        backend: "reference" runs `pyautoattack`'s standard version: the same points as one call of its
            `run_standard_evaluation` on all images with this batch size and seed.
        search_logits_of: what APGD differentiates, a bf16 version say; every point it finds is decided by
            `logits_of`.
        progress: called as progress(attack, images) after every batch of each search.

    Raises:
        ValueError: an unknown attack, or FAB-T or Square for p = 1.5, for which they do not exist; for the
            reference a budget of one's own, p = 1.5, or fewer than 4 classes.
    """
    unknown = [name for name in attacks if name not in STANDARD]
    if unknown:
        raise ValueError(f"unknown attack {unknown[0]!r}; known: {', '.join(STANDARD)}")
    if ball.p not in _PACKAGE_NORMS and {"fab-t", "square"} & set(attacks):
        raise ValueError(f"FAB-T and Square do not exist for the l{norm_name(ball.p)} ball")
    budget = budget or standard_budget(ball.p)
    clean = _logits(logits_of, x0, batch_size)
    classes = clean.shape[1]
    if backend == "reference" and (not has_reference(ball.p, classes) or budget != standard_budget(ball.p)):
        raise ValueError("the reference has its own budget, and needs 4 classes and l1, l2 or linf")
    own = backend == "own"
    order = clean.argsort(dim=1, descending=True, stable=True)
    broken_by = torch.where(order[:, 0] == y, 0, -1)
    x_adv = x0.detach().float().clone()
    attacked, broken, stuck = ([0] * len(attacks) for _ in range(3))
    stuck_images = torch.zeros_like(broken_by, dtype=torch.bool)
    hidden = search_logits_of or logits_of
    for number, name in enumerate(attacks):
        attacked[number] = int((broken_by == 0).sum())
        seen_stuck = torch.zeros_like(broken_by, dtype=torch.bool)
        for target in range(1, min(budget.targets, classes - 1) + 1) if own and name == "apgd-t" else (0,):
            for rows in (broken_by == 0).nonzero().squeeze(1).split(batch_size):
                if not len(rows):
                    continue
                x, label = x0[rows], y[rows]
                if not own:
                    found = _reference(name, logits_of, x, label, ball, classes, seed)
                elif name in ("fab-t", "square"):
                    found = _packaged(name, logits_of, x, label, ball, budget, classes, seed)
                else:
                    goal = _robust_goal(label, order[rows, target] if target else None, classes)
                    attack = _attack(
                        ball, budget.steps, budget.restarts if name == "apgd-ce" else 1, "random"
                    )
                    generators = _generators(x, f"{seed}/{name}/{target}/{ball}")
                    found, lost = _best_seen(hidden, x, goal, attack, goals.margin(label), generators)
                    seen_stuck[rows] |= lost
                wrong = _logits(logits_of, found, batch_size).argmax(1) != label
                wrong &= geometry.distance(found, x, ball.p) <= ball.eps * (1 + 1e-5)
                broken_by[rows[wrong]] = number + 1
                x_adv[rows[wrong]] = found[wrong]
                if progress is not None:
                    progress(name, len(rows))
        broken[number] = int((broken_by == number + 1).sum())
        stuck[number] = int(seen_stuck.sum())
        stuck_images |= seen_stuck
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


@dataclass(frozen=True, kw_only=True, eq=False)
class WorstCase:
    """The most confident points found around N images.

    Attributes:
        confidence: (N,) the largest max_k p_k found, at least `clean`.
        clean: (N,) that of the images themselves.
        x: (N, C, H, W) where it was found.
        by: (N,) int64: 0 the image itself, else the number of the search in `searches`, from 1.
        searches: their names.
        stuck: (N,) bool: no search saw a gradient.
    """

    confidence: Tensor
    clean: Tensor
    x: Tensor
    by: Tensor
    searches: tuple[str, ...]
    stuck: Tensor


def worst_case_confidence(
    logits_of: LogitsOf,
    x0: Tensor,
    ball: Ball,
    *,
    temperature: float = 1.0,
    steps: int = 100,
    restarts: int = 5,
    targets: int = 1,
    batch_size: int = 250,
    seed: int = 0,
    search_logits_of: LogitsOf | None = None,
) -> WorstCase:
    """The largest confidence in the ball around each image, over several searches and the image itself.

    A single search on the maximal probability under-reports, because its gradient vanishes where the model is
    sharp. So: Auto-PGD on the log-odds of the likeliest class, on the logit margin of the predicted class,
    and on the log-probability of each of the next `targets` classes; of every point on the way, the most
    confident one counts, scored by `logits_of` (by log-odds: confidences round to 1). The paper's budget
    (section 4.3) is 100 steps, 5 restarts.

    Args:
        logits_of, search_logits_of, batch_size, seed: as in `robust_verdicts`.
        temperature: of the softmax whose confidence is searched and reported.
        targets: how many classes besides the predicted one are tried; at most K - 1.
    """
    hidden = search_logits_of or logits_of
    score = goals.log_odds(temperature)  # the order of confidences, without their ties at 1
    best = x0.detach().float().clone()
    logits = _logits(logits_of, x0, batch_size)
    order = logits.argsort(dim=1, descending=True, stable=True)
    clean = goals.confidence(temperature)(logits)
    top, by = score(logits), torch.zeros_like(order[:, 0])
    stuck = torch.ones_like(by, dtype=torch.bool)
    attack = _attack(ball, steps, restarts, "centre")
    names = ["log-confidence", "margin"]
    names += [f"target {k + 1}" for k in range(1, min(targets, logits.shape[1] - 1) + 1)]
    for number, name in enumerate(names):
        for rows in torch.arange(len(x0), device=x0.device).split(batch_size):
            x, ranked = x0[rows], order[rows]
            goal = (
                score
                if number == 0
                else _negative(goals.margin(ranked[:, 0]))
                if number == 1
                else goals.log_probability(ranked[:, number - 1], temperature)
            )
            generators = _generators(x, f"{seed}/worst/{name}/{ball}")
            found, lost = _best_seen(hidden, x, goal, attack, score, generators)
            reached = score(_logits(logits_of, found, batch_size))
            higher = reached > top[rows]
            top[rows[higher]] = reached[higher]
            by[rows[higher]] = number + 1
            best[rows[higher]] = found[higher]
            stuck[rows] &= lost
    confidence = torch.maximum(goals.confidence(temperature)(_logits(logits_of, best, batch_size)), clean)
    return WorstCase(confidence=confidence, clean=clean, x=best, by=by, searches=tuple(names), stuck=stuck)


def _negative(goal: Goal) -> Goal:
    return lambda logits: -goal(logits)


def _robust_goal(y: Tensor, target: Tensor | None, classes: int) -> Goal:
    if target is None:
        return goals.cross_entropy(y)
    return goals.targeted_dlr(y, target) if classes >= 4 else goals.targeted_margin(y, target)


def _attack(ball: Ball, steps: int, restarts: int, start: str) -> Attack:
    method = "afw" if ball.p == 1.5 else "apgd"
    return Attack.model_validate(
        {"ball": ball, "method": method, "steps": steps, "restarts": restarts, "start": start}
    )


def _best_seen(
    logits_of: LogitsOf,
    x0: Tensor,
    goal: Goal,
    attack: Attack,
    score: Goal,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor]:
    """Of all points a search for `goal` visits, the one with the largest `score`; and `stuck`."""
    best = x0.detach().float().clone()
    top = torch.full((len(x0),), -torch.inf, device=x0.device)
    latest = top

    def scored(logits: Tensor) -> Tensor:
        nonlocal latest
        latest = score(logits.detach())
        return goal(logits)

    def keep(step: int, x: Tensor, value: Tensor) -> None:
        nonlocal best, top
        better = latest > top
        best = torch.where(better.view(-1, *(1,) * (x.dim() - 1)), x, best)
        top = torch.where(better, latest, top)

    ended = perturb(logits_of, x0, scored, attack, generator=generators, callback=keep)
    return best, ended.stuck


def _generators(x: Tensor, purpose: str) -> list[torch.Generator]:
    """One generator an image, seeded by the purpose and its pixels alone."""
    pixels = x.detach().float().cpu().contiguous().numpy()
    seeds = (seed_from_bytes(purpose.encode(), b"/", image.tobytes(), bits=56) for image in pixels)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def _logits(logits_of: LogitsOf, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([logits_of(part).float() for part in x.split(batch_size)])


class _InputOnly(torch.autograd.Function):
    """logits_of as a function of the pixels alone: `backward()` on it leaves the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_of: LogitsOf) -> Tensor:
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.logits = logits_of(ctx.leaf).float()
        return ctx.logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = torch.autograd.grad(ctx.logits, ctx.leaf, gradients[0])
        return gradient, None


def _packaged(
    name: str,
    logits_of: LogitsOf,
    x: Tensor,
    y: Tensor,
    ball: Ball,
    budget: AttackBudget,
    classes: int,
    seed: int,
) -> Tensor:
    """FAB-T or Square of the package on one batch of rightly decided images: points (B, C, H, W)."""
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    norm = _PACKAGE_NORMS[ball.p]
    inputs = x.detach().float().contiguous()
    with _own_randomness(x.device), batch_parallel.one_each(x.device) as count:
        predict = _input_only(batch_parallel.in_parts(logits_of, count))
        if name == "fab-t":
            fab = FABAttack_PT(
                predict,
                norm=norm,
                n_restarts=1,
                n_iter=budget.steps,
                eps=ball.eps,
                seed=seed,
                targeted=True,
                device=x.device,
                n_target_classes=min(budget.targets, classes - 1),
            )
            return fab.perturb(inputs, y).detach()
        square = SquareAttack(
            predict,
            norm=norm,
            n_queries=budget.queries,
            eps=ball.eps,
            p_init=0.8,
            n_restarts=1,
            seed=seed,
            resc_schedule=False,
            device=x.device,
        )
        with torch.no_grad():
            return square.perturb(inputs, y).detach()


def _reference(
    name: str, logits_of: LogitsOf, x: Tensor, y: Tensor, ball: Ball, classes: int, seed: int
) -> Tensor:
    """One attack of the package's standard version on one batch: points (B, C, H, W).

    The package itself takes its attacks one after the other, each on batches of the survivors, and reseeds
    for every batch; so attack by attack and batch by batch is what it does.
    """
    from pyautoattack.autoattack import AutoAttack

    logging.getLogger("auto-attack").addHandler(_SILENT)  # its doubts are ours too, see evaluate.doubts
    with _own_randomness(x.device), _own_trace():
        attack = AutoAttack(
            _input_only(logits_of),
            device=x.device,
            eps=ball.eps,
            norm=_PACKAGE_NORMS[ball.p],
            seed=seed,
            version="standard",
        )
        attack.attacks_to_run = [name]
        for targeted in (attack.apgd_targeted, attack.fab):  # the package names 9 whatever the classes
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        found, _ = attack.run_standard_evaluation(x.detach().float().contiguous(), y, batch_size=len(x))
    return found.detach()


_SILENT = logging.NullHandler()


def _input_only(logits_of: LogitsOf) -> LogitsOf:
    """`logits_of` for attacks that call `backward()`."""

    def predict(images: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _InputOnly.apply(images, logits_of)
        return logits_of(images).float()

    return predict


def _own_randomness(device: torch.device) -> Any:
    """A context after which the global generators are as before; the package reseeds them."""
    devices = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


@contextlib.contextmanager
def _own_trace() -> Iterator[None]:
    """A context after which debuggers and coverage still trace; the package switches them off."""
    trace = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(trace)
