"""Recipes: every bundled file is sound, and every mistake in a file of one's own is named."""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratioctl import recipe as recipes
from ratioctl.errors import RecipeError
from ratioctl.recipe import Ball, Recipe, Term
from ratioctl.utils import resources

FOLDER = resources.folder("recipes")
NAMES = recipes.available()
# Table 7 and appendix B.4: radius inside by the number in the name, radius outside by the data.
RADIUS_OUT = {"cifar10": 1.0, "cifar100": 1.0, "svhn": 1.0, "restricted-imagenet": 7.0}
OWN = [n for n in NAMES if n.endswith("-small") or n.partition("-")[0] in ("digits", "restricted64")]
OWN.append("cifar10-ratio")
PUBLISHED = [n for n in NAMES if n not in OWN]

MINIMAL = 'name = "a"\n[data]\ntrain = "digits:train"\n'


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "mine.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(path: Path | str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, settings)
    assert caught.value.exit_code == 2
    assert caught.value.next_step, "every refusal says what to do next"
    return str(caught.value)


# --- the bundled files ---------------------------------------------------------------------------------


def test_the_published_experiments_are_all_there() -> None:
    grid = {
        "cifar10": ["plain", "oe", "acet", "at-0.5", "at-0.25", "trades-0.5", "ratio-0.5", "ratio-0.25"],
        "cifar100": ["plain", "oe", "at-0.5", "at-0.25", "ratio-0.5", "ratio-0.25"],
        "svhn": ["plain", "oe", "acet", "at-0.5", "at-0.25", "ratio-0.5", "ratio-0.25"],
        "restricted-imagenet": ["plain", "oe", "acet", "at-3.5", "at-1.75", "ratio-3.5", "ratio-1.75"],
        "digits": ["plain", "oe", "acet", "at", "ratio"],
    }
    expected = {f"{data}-{method}" for data, methods in grid.items() for method in methods}
    small = {f"cifar10-{method}-small" for method in grid["cifar10"]}
    assert expected | small | {"cifar10-ratio-wrn", "cifar10-ratio"} <= set(NAMES)


def test_the_rows_of_the_small_comparison_differ_in_their_objective_alone() -> None:
    """One network, one budget: what else a row changed would be taken for its method's merit."""
    rows = [recipes.load(n) for n in NAMES if n.endswith("-small")]
    assert len(rows) == 8

    def shared(recipe: Recipe) -> dict[str, object]:
        tree = recipe.model_dump(mode="json", exclude={"name", "description", "objective"})
        del tree["data"]["outside"]  # named only where the objective has an outside term
        return tree

    assert all(shared(row) == shared(rows[0]) for row in rows)
    assert len({row.objective.model_dump_json() for row in rows}) == 8
    radii = {
        row.name: (row.objective.inside.attack, row.objective.outside and row.objective.outside.attack)
        for row in rows
    }
    for name, (inside, outside) in radii.items():
        assert outside is None or (outside.ball.eps, outside.steps) == (1.0, 3), name
        wanted = next((float(part) for part in name.split("-") if part[0] == "0"), None)
        assert (inside.ball.eps if inside else None) == wanted, name
        assert inside is None or inside.steps == 2, name


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_recipe_loads_and_survives_writing(name: str) -> None:
    recipe = recipes.load(name)
    assert recipe.name == name, "a run folder is called after the recipe"
    assert recipe.description
    again = recipes.loads(recipes.dumps(recipe))
    assert again == recipe
    assert again.digest == recipe.digest
    assert recipes.load(f"recipes/{name}.toml") == recipe


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda p: p.stem)
def test_a_file_opens_with_its_claim_and_names_no_key_twice_in_vain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the first line says which claim of the paper the file stands for"
    assert max(len(line) for line in text.splitlines()) <= 110
    tree = tomllib.loads(text)
    if path.name.startswith("_"):
        assert "name" not in tree
        return
    assert (FOLDER / tree["base"]).is_file()
    assert any(word in text.split("\n\n")[0] for word in ("Table", "Expected", "numbers"))


def test_bases_are_not_offered_as_recipes() -> None:
    assert NAMES
    assert not [name for name in NAMES if name.startswith("_")]
    assert "base for other recipes" in refusal("_cifar10-base")


@pytest.mark.parametrize("name", PUBLISHED)
def test_objective_is_the_row_its_name_says(name: str) -> None:
    recipe = recipes.load(name)
    data = next(d for d in sorted(RADIUS_OUT, key=len, reverse=True) if name.startswith(d + "-"))
    method, _, radius = name.removeprefix(data + "-").partition("-")
    inside, outside = recipe.objective.inside, recipe.objective.outside
    large = data == "restricted-imagenet"

    attacked = method in ("at", "ratio", "trades")
    weights = {"trades": (1.0, 6.0)}.get(method, (float(large or not attacked), float(attacked)))
    assert (inside.clean, inside.robust) == weights
    assert inside.against == ("clean" if method == "trades" else "target")
    assert {"oe": (1.0, 0.0), "acet": (0.0, 1.0), "ratio": (0.0, 1.0)}.get(method) == (
        None if outside is None else (outside.clean, outside.robust)
    )
    if attacked:
        assert inside.attack is not None
        assert inside.attack.ball == Ball(p=2, eps=float(radius) if radius != "wrn" else 0.5)
        assert inside.attack.steps == (10 if radius == "wrn" else 7)
        assert inside.attack.step_size == (0.7 if large else 0.1)
    if method in ("at", "ratio"):
        assert inside.goal == (None if radius == "wrn" else "margin"), "eq. 8"
    if method in ("acet", "ratio"):
        assert outside is not None
        assert outside.attack is not None
        assert outside.attack.ball == Ball(p=2, eps=RADIUS_OUT[data])
        assert outside.attack.steps == (10 if large else 20)
        growth = (0, None) if large or radius == "wrn" else (5, 40)
        assert (outside.more_steps_per_drop, outside.max_steps) == growth
    assert bool(recipe.data.outside) == (outside is not None), "nobody is asked for images that are not used"


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_and_evaluation_are_the_papers(name: str) -> None:
    recipe = recipes.load(name)
    optim = recipe.optim
    assert (optim.lr, optim.momentum, optim.nesterov) == (0.1, 0.9, True)
    assert (optim.batch_size, optim.batch_size_out, optim.gamma) == (128, 128, 0.1)
    assert recipe.calibration == recipes.Calibration()
    if name.startswith("restricted-imagenet"):
        assert (optim.epochs, optim.milestones, optim.weight_decay) == (75, (30, 60, 75), 1e-4)
        assert recipe.model.architecture == "torchvision:resnet50"
        assert recipe.evaluation.ladders["2"] == (3.5, 7, 10.5, 14, 17.5, 21)
        assert [str(b) for b in recipe.evaluation.robust] == ["l2 3.5", "l2 7", "linf 0.0313725"]
        return
    assert optim.weight_decay == 5e-4
    assert recipe.evaluation.ladders["2"] == (0.5, 1, 1.5, 2, 2.5, 3)
    assert [str(b) for b in recipe.evaluation.robust] == ["l2 0.5", "l2 1", "linf 0.0313725"]
    assert recipe.evaluation.outside_eps == 1.0
    assert recipe.data.augment.crop == 4
    assert recipe.data.augment.cutout == 16
    assert recipe.data.augment.flip == (not name.startswith("svhn"))
    if name.startswith("svhn") or name == "cifar10-acet":
        assert (optim.epochs, optim.milestones) == (100, (50, 75, 90))
        assert recipe.model.architecture == "resnet18"
    elif name == "cifar10-ratio-wrn":
        assert (optim.epochs, optim.schedule, optim.milestones, optim.ema) == (300, "cosine", (), 0.999)
        assert recipe.model.architecture == "wideresnet-34-10"
    else:
        assert (optim.epochs, optim.milestones) == (220, (100, 150, 200))
        assert recipe.model.architecture == "resnet50"


def test_default_ladder_gives_the_papers_two_ladders() -> None:
    assert recipes.default_ladder(2.0, 32, 3) == (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    assert recipes.default_ladder(2.0, 224, 3) == (3.5, 7.0, 10.5, 14.0, 17.5, 21.0)


# --- inheritance ---------------------------------------------------------------------------------------


def test_a_base_gives_what_the_file_does_not_say(write: Callable[..., Path]) -> None:
    write('[data]\ntrain = "digits:train"\nsize = 8\n[optim]\nepochs = 3\nlr = 0.5\n', "far.toml")
    write('base = "far.toml"\n[optim]\nepochs = 4\nmilestones = [1, 2]\n', "near.toml")
    recipe = recipes.load(write('base = "near.toml"\nname = "mine"\n[optim]\nmilestones = [3]\n'))
    assert (recipe.data.size, recipe.optim.epochs, recipe.optim.lr) == (8, 4, 0.5)
    assert recipe.optim.milestones == (3,), "lists are replaced, not joined"


def test_a_base_is_looked_for_beside_its_file(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(MINIMAL, "base.toml")
    assert recipes.load(write('base = "../base.toml"\nname = "b"\n', "sub/mine.toml")).name == "b"
    message = refusal(write('base = "base.toml"\nname = "b"\n', "sub/lost.toml"))
    assert "base.toml" in message
    assert str(tmp_path / "sub") in message


def test_a_circle_of_bases_is_named_in_order(write: Callable[..., Path]) -> None:
    write('base = "two.toml"\n', "one.toml")
    write('base = "three.toml"\n', "two.toml")
    path = write('base = "one.toml"\n', "three.toml")
    assert "three.toml -> one.toml -> two.toml -> three.toml" in refusal(path)


def test_a_recipe_that_is_its_own_base(write: Callable[..., Path]) -> None:
    assert "circle" in refusal(write('base = "mine.toml"\n' + MINIMAL))


def test_base_must_be_a_name(write: Callable[..., Path]) -> None:
    assert "base must name" in refusal(write("base = 3\n" + MINIMAL))


# --- --set ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "read", "value"),
    [
        ("optim.epochs=7", lambda r: r.optim.epochs, 7.0),
        (" optim.epochs = 7", lambda r: r.optim.epochs, 7.0),
        ("optim.nesterov=false", lambda r: r.optim.nesterov, False),
        ("optim.milestones=[1, 2]", lambda r: r.optim.milestones, (1.0, 2.0)),
        ("optim.drops=[1, 2]", lambda r: r.optim.milestones, (1.0, 2.0)),
        ("optim.drop_factor=0.5", lambda r: r.optim.gamma, 0.5),
        ("data.train=a b.tar.xz:train", lambda r: r.data.train, "a b.tar.xz:train"),
        ('data.train="c:/x=y"', lambda r: r.data.train, "c:/x=y"),
        ("data.train=a=b", lambda r: r.data.train, "a=b"),
        ("data.outside=one:train", lambda r: r.data.outside, ("one:train",)),
        ('data.outside=["one", "two"]', lambda r: r.data.outside, ("one", "two")),
        ("data.exclude=cat", lambda r: r.data.exclude, ("cat",)),
        ("data.augment.crop=2", lambda r: r.data.augment.crop, 2),
        ("evaluation.ladders.inf=[0.1]", lambda r: r.evaluation.ladders["inf"], (0.1,)),
    ],
)
def test_set(
    write: Callable[..., Path], setting: str, read: Callable[[Recipe], object], value: object
) -> None:
    text = MINIMAL + 'outside = "noise:uniform"\n[objective.outside]\nclean = 1.0\n'
    assert read(recipes.load(write(text), [setting])) == value


def test_the_last_set_wins_and_changes_the_digest(write: Callable[..., Path]) -> None:
    path = write(MINIMAL)
    assert recipes.load(path, ["seed=1", "seed=2"]).seed == 2
    assert recipes.load(path, ["seed=1"]).digest != recipes.load(path).digest
    assert recipes.load(path, ["seed=0"]).digest == recipes.load(path).digest


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.epochs", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("optim..epochs=3", "KEY=VALUE"),
        ("name.first=3", '"name" is a value'),
        ("optim.epochz=3", 'did you mean "epochs"'),
        ("optimm.epochs=3", 'did you mean "optim"'),
        ("optim=3", "optim"),
        ("optim.epochs=ten", "'ten'"),
    ],
)
def test_a_wrong_set_is_explained(write: Callable[..., Path], setting: str, says: str) -> None:
    assert says in refusal(write(MINIMAL), setting)


# --- mistakes ------------------------------------------------------------------------------------------

INSIDE = "[objective.inside]\nrobust = 1.0\n[objective.inside.attack]\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nmae = 1\n" + MINIMAL, 'did you mean "name"'),
        (MINIMAL + "[optim]\nwieght_decay = 0\n", 'did you mean "weight_decay"'),
        (MINIMAL + INSIDE + 'metod = "pgd"\nball = { eps = 1 }\n', 'did you mean "method"'),
        (MINIMAL + INSIDE + "ball = { epss = 1 }\n", '"objective.inside.attack.ball.eps" is missing'),
        (MINIMAL + "[data.augment]\nzzzz = 1\n", "known here: autoaugment"),
        ('name = "a"\n', '"data" is missing'),
        ('[data]\ntrain = "x"\n', '"name" is missing'),
        ('name = "../a"\n[data]\ntrain = "x"\n', '"name"'),
        (MINIMAL + INSIDE + "ball = { p = 1.5, eps = 1 }\n", 'use method = "afw"'),
        (MINIMAL + INSIDE + 'method = "apgd"\nball = { p = 1.5, eps = 1 }\n', 'use method = "afw"'),
        (MINIMAL + INSIDE + 'method = "apgd"\nstep_size = 1\nball = { eps = 1 }\n', "step_size"),
        (MINIMAL + INSIDE + "ball = { p = 3, eps = 1 }\n", "1, 1.5, 2, inf"),
        (MINIMAL + INSIDE + "ball = { p = nan, eps = 1 }\n", "1, 1.5, 2, inf"),
        (MINIMAL + INSIDE + "ball = { eps = 0 }\n", "must be above 0 (given: 0)"),
        (MINIMAL + INSIDE + "ball = { eps = inf }\n", "finite"),
        (MINIMAL + INSIDE + "steps = 0\nball = { eps = 1 }\n", "attack.steps"),
        (MINIMAL + "[objective.inside]\nrobust = 1.0\n", "[attack]"),
        (MINIMAL + "[objective.inside]\nclean = 0\n", "no effect"),
        (MINIMAL + '[objective.inside]\nclean = 1\nagainst = "clean"\n', "no effect"),
        (MINIMAL + "[objective.outside]\nclean = 1.0\n", "data.outside"),
        (MINIMAL + '[objective.outside]\nclean = 1.0\ngoal = "margin"\n', "needs labels"),
        (MINIMAL + '[objective.inside]\nclean = 1.0\ngoal = "kl"\n', 'against = "clean"'),
        (
            MINIMAL + INSIDE.replace("1.0", '1.0\nagainst = "clean"') + "ball = { eps = 1 }\n",
            'start = "random"',
        ),
        (MINIMAL + '[optim]\nschedule = "cosine"\nmilestones = [1]\n', 'schedule = "step"'),
        (MINIMAL + "[optim]\nmilestones = [3, 2]\n", "ascending"),
        (MINIMAL + "[optim]\nmomentum = 0.0\n", "nesterov"),
        (MINIMAL + "[optim]\nlr = inf\n", "finite"),
        (MINIMAL + "[optim]\nepochs = 0\n", "must be above 0"),
        (MINIMAL + "[optim]\nbatch_size = 1.5\n", "is not a whole number (given: 1.5)"),
        (MINIMAL + "validation = 1.5\n", "whole number"),
        (MINIMAL + "channels = 2\n", "1 or 3"),
        (MINIMAL + "[model]\nmean = [0.5, 0.5]\nstd = [1, 1]\n", "2 values for 3 channel"),
        (MINIMAL + "[model]\nmean = [0.5, 0.5, 0.5]\n", "both or neither"),
        (MINIMAL + "[calibration]\nlow = 3.0\n", "below high"),
        (MINIMAL + "[evaluation.ladders]\n3 = [1.0]\n", "'inf'"),
        (MINIMAL + "[evaluation.ladders]\n2 = []\n", "above 0"),
        (MINIMAL + "[evaluation.ladders]\n2 = [1.0, 0.5]\n", "ascending"),
        ("name = \n", "not valid TOML"),
        ("x = " + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_mistake_is_named(write: Callable[..., Path], text: str, says: str) -> None:
    path = write(text)
    message = refusal(path)
    assert says in message
    assert str(path) in message


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


def test_unknown_keys_name_their_documentation() -> None:
    message = refusal("digits-plain", "optim.zzzz=1")
    assert "python -m pydoc ratioctl.recipe.Optim" in message
    assert "schedule: " in (recipes.Optim.__doc__ or "")


# --- contradictions --------------------------------------------------------------------------------------

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


# --- bases and unset values ------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["digits-ratio", "digits-ratio.toml", "recipes/digits-ratio.toml"])
def test_a_base_is_found_by_name(write: Callable[..., Path], base: str) -> None:
    derived = recipes.load(write(f'base = "{base}"\nname = "mine"\n'))
    assert derived.model_copy(update={"name": "digits-ratio"}) == recipes.load("digits-ratio")


def test_a_base_beside_the_file_wins(write: Callable[..., Path]) -> None:
    write(MINIMAL + "seed = 5\n".replace("seed", "size"), "digits-ratio.toml")
    assert recipes.load(write('base = "digits-ratio"\nname = "mine"\n')).data.size == 5


def test_a_missing_base_suggests_the_nearest(write: Callable[..., Path]) -> None:
    assert 'Did you mean "digits-ratio"?' in refusal(write('base = "digits-rato"\nname = "mine"\n'))


def test_inherited_values_can_be_unset(write: Callable[..., Path]) -> None:
    write(MINIMAL + 'test = "digits:test"\n[optim]\ngrad_clip = 1.0\ndrops = [1]\n', "base.toml")
    inherit = 'base = "base.toml"\nname = "mine"\n'
    assert recipes.load(write(inherit)).optim.grad_clip == 1.0
    cleared = recipes.load(write(inherit + 'unset = ["optim.grad_clip", "data.test", "optim.drops"]\n'))
    assert (cleared.optim.grad_clip, cleared.data.test, cleared.optim.milestones) == (None, None, ())
    assert recipes.load(write(inherit), ["optim.grad_clip=", "data.test="]).optim.grad_clip is None
    without_outside = recipes.load("digits-ratio", ["objective.outside=", "data.outside="])
    assert (without_outside.objective.outside, without_outside.data.outside) == (None, ())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('base = "base.toml"\nunset = ["optim.ema"]\n', "which its base does not set"),
        ('base = "base.toml"\nunset = "optim.ema"\n', "must be a list of keys"),
        (MINIMAL.replace("[data]", 'unset = ["seed"]\n[data]'), "no effect without a base"),
        ('base = ""\n', "must name a recipe"),
    ],
)
def test_a_wrong_unset_is_explained(write: Callable[..., Path], text: str, says: str) -> None:
    write(MINIMAL, "base.toml")
    assert says in refusal(write(text))


# --- renamed keys ----------------------------------------------------------------------------------------


def test_earlier_names_mean_the_same_and_keep_the_digest(write: Callable[..., Path]) -> None:
    old = recipes.load(write(MINIMAL + "[optim]\ndrops = [1, 2]\ndrop_factor = 0.5\n"))
    new = recipes.load(write(MINIMAL + "[optim]\nmilestones = [1, 2]\ngamma = 0.5\n"))
    assert old == new
    assert old.optim.milestones == (1, 2)
    # Of the last version that wrote `drops` and `drop_factor`.
    assert recipes.load("cifar10-acet-small").digest.startswith("76910b20")
    assert recipes.load("cifar10-ratio").digest.startswith("8135f78c")


def test_augmentation_follows_the_authors_code() -> None:
    """See docs/decisions/0015. With the earlier values the digest is the earlier one, too."""
    plain, hundred = recipes.load("cifar10-plain"), recipes.load("cifar100-plain")
    assert (plain.data.augment.crop_fill, plain.data.augment.cutout) == ("mean", 16)
    assert (hundred.data.augment.crop_fill, hundred.data.augment.cutout) == ("mean", 8)
    assert recipes.load("svhn-plain").data.augment.crop_fill == "mean"
    assert recipes.load("digits-ratio").data.augment.crop_fill == "black"
    earlier = ["data.augment.crop_fill=black", "data.augment.cutout=16"]
    assert recipes.load("cifar10-plain", earlier).digest.startswith("140386ee")
    assert recipes.load("cifar100-plain", earlier).digest.startswith("3fe17bf0")
    assert recipes.load("svhn-plain", earlier).digest.startswith("d30e440f")


def test_a_base_with_earlier_names_is_overridden_by_current_ones(write: Callable[..., Path]) -> None:
    write(MINIMAL + "[optim]\ndrops = [1, 2]\n", "base.toml")
    inherit = 'base = "base.toml"\n[optim]\n'
    assert recipes.load(write(inherit + "milestones = [3]\n")).optim.milestones == (3,)
    assert recipes.load(write(inherit), ["optim.drops=[4]", "optim.milestones=[5]"]).optim.milestones == (5,)
    assert "both are given" in refusal(write(MINIMAL + "[optim]\ndrops = [1]\nmilestones = [1]\n"))


def test_several_mistakes_are_told_at_once(write: Callable[..., Path]) -> None:
    message = refusal(write(MINIMAL + "[optim]\nepochs = -1\nlrr = 1\n"))
    assert '"optim.epochs"' in message
    assert 'did you mean "lr"' in message


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    message = refusal("cifar10-rato-0.25")
    assert 'Did you mean "cifar10-ratio-0.25"?' in message
    assert "digits-ratio" in message


def test_files_that_are_no_recipes(write: Callable[..., Path], tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    assert "no such recipe" in refusal(tmp_path / "missing.toml")
    binary = write("", "binary.toml")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(binary)


# --- values --------------------------------------------------------------------------------------------


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


# --- one step of training ------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small spend their time waiting for a second thread: ten times as long, measured."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(recipe: Recipe, *, own_depth: bool) -> list[str]:
    """Settings that leave a recipe its objective, schedule and augmentation, and make the rest tiny."""
    settings = [
        *("data.train=digits:train", "data.test=digits:test", "data.outside_test=[]"),
        *("data.size=8", "data.channels=3", "data.validation=0.05"),
        *("optim.batch_size=2", "optim.batch_size_out=2", "optim.epochs=0.001", "optim.validate_images=4"),
    ]
    if recipe.objective.outside:
        settings.append("data.outside=noise:uniform")
    architecture = recipe.model.architecture.removeprefix("torchvision:")  # those have no width, ours do
    if architecture.startswith("wideresnet"):
        settings.append("model.architecture=wideresnet-10-1")
    else:
        settings += [f"model.architecture={architecture if own_depth else 'resnet18'}", "model.width=4"]
    if not own_depth:
        for side in ("inside", "outside"):
            term = getattr(recipe.objective, side)
            if term is not None and term.attack is not None:
                settings.append(f"objective.{side}.attack.steps=2")
    return settings


def train_a_step(name: str, out: Path, *, own_depth: bool) -> None:
    from ratioctl.training.loop import fit

    recipe = recipes.load(name, tiny(recipes.load(name), own_depth=own_depth))
    seen: list[dict[str, float]] = []
    package = fit(recipe, out, device="cpu", precision="fp32", callback=seen.append)
    row = next(event for event in seen if "validation.clean" in event)
    assert row["update"] == row["updates"] == 1
    assert math.isfinite(row["total"])
    assert row["total"] > 0
    assert ("validation.attacked" in row) == (recipe.objective.inside.robust > 0)
    assert recipes.loads((package.path / "recipe.toml").read_text(encoding="utf-8")) == recipe


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_recipe_trains_a_step(name: str, tmp_path: Path) -> None:
    train_a_step(name, tmp_path / "run", own_depth=False)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_recipe_trains_a_step_at_its_own_depth_and_steps(name: str, tmp_path: Path) -> None:
    train_a_step(name, tmp_path / "run", own_depth=True)


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
