"""Schedules of the learning rate, attacks and validations."""

from __future__ import annotations

import math

import pytest

from ratioctl import recipe as recipes
from ratioctl.recipe import Recipe
from ratioctl.training.schedule import full_pace, learning_rate, schedule_attacks, total_updates, work


def tiny(*more: str) -> Recipe:
    return recipes.load("digits-ratio", ["optim.batch_size=32", "optim.epochs=0.25", *more])


def test_step_schedule_drops_where_it_says() -> None:
    recipe = recipes.load("cifar10-ratio-0.25")
    rates = [learning_rate(recipe, e) for e in (0, 99.9, 100, 149.9, 150, 200, 219)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.0001, 0.0001])


def test_cosine_and_onecycle_end_at_zero() -> None:
    for name in ("cosine", "onecycle"):
        recipe = tiny(f'optim.schedule="{name}"', "optim.epochs=10", "optim.lr=0.4", "optim.drops=[]")
        assert learning_rate(recipe, 10) == pytest.approx(0, abs=1e-12)
        peak = {"cosine": 0.0, "onecycle": 3.0}[name]
        assert learning_rate(recipe, peak) == pytest.approx(0.4)
        rates = [learning_rate(recipe, e / 10) for e in range(int(peak * 10), 101)]
        assert rates == sorted(rates, reverse=True)
    warm = tiny('optim.schedule="cosine"', "optim.epochs=10", "optim.warmup_epochs=2", "optim.lr=0.4")
    assert learning_rate(warm, 0) == 0
    assert learning_rate(warm, 1) == pytest.approx(0.5 * 0.4 * 0.5 * (1 + math.cos(math.pi / 10)))


def test_slow_start_rises_slowly_and_begins_after_the_head_phase() -> None:
    recipe = tiny("optim.schedule=slowstart", "optim.epochs=12", "optim.head_epochs=2", "optim.lr=0.4")
    assert learning_rate(recipe, 0) == learning_rate(recipe, 1.9) == 0.4
    assert learning_rate(recipe, 2) == pytest.approx(0.004)
    assert learning_rate(recipe, 5) == pytest.approx(0.1), "a quarter after half of the rise"
    assert learning_rate(recipe, 8) == pytest.approx(0.4)
    assert learning_rate(recipe, 10) == pytest.approx(0.1)
    assert learning_rate(recipe, 12) == pytest.approx(0)


def test_acet_attack_grows_at_every_drop() -> None:
    recipe = recipes.load("cifar10-acet")
    steps = []
    for epoch in (0, 49, *recipe.optim.milestones, 99):
        outside = schedule_attacks(recipe, epoch)[0].outside
        assert outside is not None
        assert outside.attack is not None
        steps.append(outside.attack.steps)
    assert steps[0] == 20
    assert steps == sorted(steps)
    assert steps[-1] == 20 + 5 * len(recipe.optim.milestones)
    assert steps[-1] <= 40


def test_ramp_grows_radius_and_steps() -> None:
    recipe = tiny(
        "objective.inside.ramp_epochs=2",
        "objective.inside.ramp_steps_from=1",
        "objective.inside.attack.steps=5",
    )
    found = []
    for epoch in (0.0, 0.5, 1.0, 2.0, 5.0):
        objective, (shrink, outside) = schedule_attacks(recipe, epoch)
        assert objective.inside.attack is not None
        assert outside == 1.0
        found.append((objective.inside.attack.steps, shrink))
    assert [s for s, _ in found] == [1, 2, 3, 5, 5]
    assert [f for _, f in found] == pytest.approx([0.05, 0.25, 0.5, 1, 1])


def test_number_of_updates() -> None:
    assert total_updates(tiny("optim.epochs=3"), 100) == math.ceil(3 * 100 / 32)
    assert total_updates(tiny("optim.epochs=0.001"), 100) == 1


def test_the_last_update_is_always_validated() -> None:
    def validated(recipe: Recipe, images: int) -> list[int]:
        pace = full_pace(recipe, images)
        return [update for update in range(1, pace.total + 1) if pace.validates(update)]

    assert validated(tiny("optim.epochs=2", "optim.validate_every=0.75"), 320) == [8, 15, 20]
    assert validated(tiny("optim.epochs=0.3", "optim.validate_every=0.1"), 960) == [3, 6, 9]
    assert validated(tiny("optim.epochs=2", "optim.validate_every=1e9"), 320) == [20]


def test_work_counts_the_passes_of_an_update() -> None:
    settings = [
        "optim.batch_size_out=8",
        "objective.inside.attack.steps=4",
        "objective.outside.attack.steps=7",
    ]
    recipe = tiny(*settings, "objective.inside.ramp_epochs=2", "objective.inside.ramp_steps_from=1")
    assert recipe.objective.outside is not None
    assert (recipe.objective.inside.clean, recipe.objective.outside.clean) == (0, 0)
    assert work(recipe, 2) == 32 * (2 * 4 + 1 + 3) + 8 * (2 * 7 + 1 + 3)
    assert work(recipe, 0) == 32 * (2 * 1 + 1 + 3) + 8 * (2 * 7 + 1 + 3)
    assert work(recipes.load("digits-plain", ["optim.batch_size=32"]), 0) == 32 * 3
