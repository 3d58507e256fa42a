"""What changes over a run: learning rate, attack steps and radii, and when the model is validated."""

from __future__ import annotations

import dataclasses
import math

from ratioctl.data import loader
from ratioctl.recipe import Objective, Recipe, Term


def total_updates(recipe: Recipe, train_images: int) -> int:
    """Number of updates in `optim.epochs` passes over the ID images, at least 1."""
    return max(
        1, math.ceil(recipe.optim.epochs * loader.updates_per_epoch(train_images, recipe.optim.batch_size))
    )


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The learning rate at a (fractional) epoch: warm-up times the schedule.

    It is `optim.lr` while the head alone is trained; warm-up and schedule begin after that.
    """
    optim = recipe.optim
    if epoch < optim.head_epochs:
        return optim.lr
    epoch_of_all = epoch - optim.head_epochs
    warm = min(1.0, epoch_of_all / optim.warmup_epochs) if optim.warmup_epochs > 0 else 1.0
    part = min(1.0, epoch_of_all / (optim.epochs - optim.head_epochs))
    if optim.schedule == "step":
        factor = optim.gamma ** _drops(recipe, epoch)
    elif optim.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * part))
    elif optim.schedule == "slowstart":
        top = 0.6
        factor = max(0.01, (part / top) ** 2) if part < top else ((1 - part) / (1 - top)) ** 2
    else:
        rise = 0.3
        if part < rise:
            factor = 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * part / rise))
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (part - rise) / (1 - rise)))
    return optim.lr * warm * factor


def _drops(recipe: Recipe, epoch: float) -> int:
    return sum(epoch >= drop for drop in recipe.optim.milestones)


def schedule_attacks(recipe: Recipe, epoch: float) -> tuple[Objective, tuple[float, float]]:
    """The objective with this epoch's attack steps, and the factors on the radii of its two attacks."""
    inside, shrink_in = _term_at(recipe.objective.inside, epoch, _drops(recipe, epoch))
    outside, shrink_out = recipe.objective.outside, 1.0
    if outside is not None:
        outside, shrink_out = _term_at(outside, epoch, _drops(recipe, epoch))
    changed = {"inside": inside, "outside": outside}
    return recipe.objective.model_copy(update=changed), (shrink_in, shrink_out)


def _term_at(term: Term, epoch: float, drops: int) -> tuple[Term, float]:
    if term.attack is None:
        return term, 1.0
    steps = term.attack.steps + term.more_steps_per_drop * drops
    if term.max_steps is not None:
        steps = min(steps, max(term.max_steps, term.attack.steps))
    shrink = 1.0
    if epoch < term.ramp_epochs:
        part = epoch / term.ramp_epochs
        # At least 0.05: with a radius of 0 the attack's passes would be wasted.
        shrink = max(part, 0.05)
        if term.ramp_steps_from is not None:
            steps = round(term.ramp_steps_from + part * (steps - term.ramp_steps_from))
    if steps == term.attack.steps:
        return term, shrink
    attack = term.attack.model_copy(update={"steps": steps})
    return term.model_copy(update={"attack": attack}), shrink


def work(recipe: Recipe, epoch: float) -> float:
    """Cost of an update in forward passes of one image; a pass for the input's gradient costs one more, one
    for all gradients two more.
    """
    if recipe.objective.certified is not None:  # passes of the head, not of the network
        return 0.2 * (recipe.optim.batch_size + recipe.optim.batch_size_out)
    objective, _ = schedule_attacks(recipe, epoch)
    sides = (objective.inside, recipe.optim.batch_size), (objective.outside, recipe.optim.batch_size_out)
    update = 1.0 if epoch < recipe.optim.head_epochs else 3.0  # the head's gradient costs next to nothing
    total = 0.0
    for term, images in sides:
        if term is None:
            continue
        total += update * images * ((term.clean > 0 or term.against == "clean") + (term.robust > 0))
        if term.robust > 0 and term.attack is not None:
            total += images * term.attack.restarts * (2 * term.attack.steps + 1)
    if objective.energy is not None:
        total += objective.energy.batch_size * (update + 2 * objective.energy.steps)
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """Which (fractional) epoch of the recipe every update belongs to.

    A run that has too little time for the recipe goes through its epochs faster than through the images:
    learning rate, milestones, ramps and validations keep their place in the schedule.

    Attributes:
        update, epoch: where this pace begins.
        per_epoch: updates for an epoch of the recipe.
        total: number of updates of the whole run.
        validate_every: epochs of the recipe between validations.
    """

    update: int = 0
    epoch: float = 0.0
    per_epoch: float
    total: int
    validate_every: float

    def at(self, update: int) -> float:
        """The epoch of the recipe before update number `update`, counted from 0."""
        return self.epoch + (update - self.update) / self.per_epoch

    def validates(self, update: int) -> bool:
        """Whether the model is validated when `update` updates are done: every `validate_every` epochs, and
        at the end.
        """
        now, before = (math.floor(self.at(u) / self.validate_every + 1e-9) for u in (update, update - 1))
        return now > before or update >= self.total


def full_pace(recipe: Recipe, train_images: int) -> Pace:
    """The pace of a run that has time for the whole recipe."""
    return Pace(
        per_epoch=loader.updates_per_epoch(train_images, recipe.optim.batch_size),
        total=total_updates(recipe, train_images),
        validate_every=recipe.optim.validate_every,
    )
