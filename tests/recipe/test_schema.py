"""The values of a recipe: bounds, contradictions, digests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratioctl import recipe as recipes
from ratioctl.recipe import Term
from tests.recipe.helpers import MINIMAL, NAMES, refusal


@pytest.mark.parametrize(
    "setting",
    [
        "optim.batch_size=1000000000000",
        "optim.batch_size_out=1000000000000",
        "model.width=100000000000000000000",
        "optim.epochs=1e12",
        "optim.warmup_epochs=1e12",
        "calibration.temperatures=1000000000",
        "calibration.bins=1000000000",
        "objective.inside.attack.steps=1000000000",
        "data.augment.crop=1000000",
        "optim.lr=1e300",
    ],
)
def test_absurd_values_are_refused(setting: str) -> None:
    assert "must be at most" in refusal("digits-ratio", setting)


def test_a_ladder_has_a_limit(write: Callable[..., Path]) -> None:
    budgets = ", ".join(str(k) for k in range(1, 2001))
    assert "2,000 budgets, more than 1000" in refusal(
        write(MINIMAL + f"[evaluation.ladders]\n2 = [{budgets}]\n")
    )


OUTSIDE = 'outside = "noise:uniform"\n'


def test_ood_images_without_an_ood_term_are_refused(write: Callable[..., Path]) -> None:
    assert "no OOD term" in refusal(write(MINIMAL + OUTSIDE))
    assert "no OOD term" in refusal(write(MINIMAL + OUTSIDE + "[objective.inside]\nclean = 1.0\n"))
    assert "no OOD term" in refusal("digits-plain", "data.outside=noise:uniform")
    assert "no OOD term" in refusal("cifar10-plain", "data.outside=noise:uniform")
    legal = recipes.load(write(MINIMAL + OUTSIDE + "[objective.outside]\nclean = 1.0\n"))
    assert legal.objective.outside == Term(clean=1.0)


def test_a_base_may_supply_ood_images_to_recipes_that_do_not_use_them(write: Callable[..., Path]) -> None:
    assert recipes.load("digits-plain").data.outside
    write(MINIMAL + OUTSIDE, "base.toml")
    assert "no OOD term" in refusal(write('base = "base.toml"\n'))


def test_packages_with_unused_ood_images_stay_readable() -> None:
    assert recipes.loads(MINIMAL + OUTSIDE).data.outside == ("noise:uniform",)


def test_values_are_frozen_and_equal_by_content() -> None:
    recipe = recipes.load("digits-ratio")
    assert recipe == recipes.load("digits-ratio")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_every_single_change_has_its_own_digest() -> None:
    recipe = recipes.load("cifar10-ratio-0.25")
    changes = [
        "seed=1",
        "optim.epochs=219",
        "objective.outside.robust=0.5",
        "data.size=33",
        "model.stem_stride=2",
        'name="b"',
    ]
    digests = {recipe.digest, *(recipes.load("cifar10-ratio-0.25", [c]).digest for c in changes)}
    assert len(digests) == len(changes) + 1


text = st.text(st.characters(codec="utf-8"), max_size=20)
radius = st.floats(1e-6, 1e6)


@given(
    description=text,
    train=text,
    sources=st.lists(text, max_size=3),
    eps=radius,
    p=st.sampled_from([1.0, 2.0, math.inf]),
    ladder=st.lists(radius, min_size=1, max_size=4, unique=True).map(sorted),
    ema=st.none() | st.floats(0.01, 0.999),
)
def test_any_recipe_survives_writing(
    description: str,
    train: str,
    sources: list[str],
    eps: float,
    p: float,
    ladder: list[float],
    ema: float | None,
) -> None:
    recipe = recipes.parse(
        {
            "name": "a",
            "description": description,
            "data": {"train": train, "outside": sources},
            "objective": {"inside": {"robust": 1.0, "attack": {"ball": {"p": p, "eps": eps}}}},
            "optim": {"ema": ema},
            "evaluation": {"robust": [{"p": p, "eps": eps}], "ladders": {"1.5": ladder, "inf": ladder}},
        }
    )
    assert recipes.loads(recipes.dumps(recipe)) == recipe


def test_rows_of_the_objective_combine() -> None:
    """TRADES inside with an ACET outside is a recipe like any other."""
    recipe = recipes.load(
        "cifar10-trades-0.5",
        ["data.outside=x", "objective.outside.robust=1", "objective.outside.attack.ball.eps=1.0"],
    )
    assert recipe.objective.inside.against == "clean"
    assert isinstance(recipe.objective.outside, Term)
    assert recipe.objective.outside.attack is not None


def test_names_are_safe_and_distinct() -> None:
    assert len({name.casefold() for name in NAMES}) == len(NAMES)
    assert list(NAMES) == sorted(NAMES)
    assert all(a != b for a, b in itertools.pairwise(NAMES))


@pytest.mark.parametrize(
    "setting", ["optim.epochs=true", "optim.lr=true", "data.augment.crop=false", "seed=true"]
)
def test_true_and_false_are_no_numbers(setting: str) -> None:
    assert "true and false are not allowed here" in refusal("digits-plain", setting)
    assert recipes.load("digits-plain", ["optim.nesterov=false"]).optim.nesterov is False


def test_an_inherited_autoaugment_can_be_switched_off() -> None:
    assert recipes.load("cifar10-plain").data.augment.autoaugment == "cifar10"
    off = recipes.load("cifar10-plain", ["data.augment.autoaugment=none"])
    assert off.data.augment.autoaugment is None
    assert recipes.loads(recipes.dumps(off)) == off
