"""Files, bases, --set, and the explanation of mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ratioctl import recipe as recipes
from ratioctl.errors import RecipeError
from ratioctl.recipe import Recipe
from tests.recipe.helpers import INSIDE, MINIMAL, refusal


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
    assert "cycle" in refusal(write('base = "mine.toml"\n' + MINIMAL))


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


@pytest.mark.parametrize(
    ("text", "settings", "blamed"),
    [
        (MINIMAL, ["optim.epochs=ten", "seed=1"], "--set optim.epochs=ten"),
        (MINIMAL, ["seed=1", "optimm.epochs=3"], "--set optimm.epochs=3"),
        (MINIMAL, ["data.outside=noise:uniform"], "--set data.outside=noise:uniform"),
        (MINIMAL + "[optim]\nepochs = 0\n", ["seed=1"], None),
        (MINIMAL + "[optim]\nepochs = 0\n", ["seed=ten"], None),
        (MINIMAL, [], None),
    ],
)
def test_the_option_or_the_file_is_blamed(
    write: Callable[..., Path], text: str, settings: list[str], blamed: str | None
) -> None:
    path = write(text + ("" if settings else "nmae = 1\n"))
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, settings)
    assert caught.value.thing == (str(path) if blamed is None else blamed)


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


def test_unknown_keys_name_their_documentation() -> None:
    message = refusal("digits-plain", "optim.zzzz=1")
    assert "python -m pydoc ratioctl.recipe.Optim" in message
    assert "schedule: " in (recipes.Optim.__doc__ or "")


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


def test_a_base_with_earlier_names_is_overridden_by_current_ones(write: Callable[..., Path]) -> None:
    write(MINIMAL + "[optim]\ndrops = [1, 2]\n", "base.toml")
    inherit = 'base = "base.toml"\n[optim]\n'
    assert recipes.load(write(inherit + "milestones = [3]\n")).optim.milestones == (3,)
    assert recipes.load(write(inherit), ["optim.drops=[4]", "optim.milestones=[5]"]).optim.milestones == (5,)
    assert "both are given" in refusal(write(MINIMAL + "[optim]\ndrops = [1]\nmilestones = [1]\n"))


def test_several_mistakes_are_reported_at_once(write: Callable[..., Path]) -> None:
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
