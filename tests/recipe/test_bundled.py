"""Every bundled recipe is sound and trains."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratioctl import recipe as recipes
from ratioctl.recipe import Ball, Recipe
from tests.recipe.helpers import FOLDER, NAMES, refusal

# Table 7 and appendix B.4: radius inside by the number in the name, radius outside by the data.
RADIUS_OUT = {"cifar10": 1.0, "cifar100": 1.0, "svhn": 1.0, "restricted-imagenet": 7.0}
OWN = [
    n for n in NAMES if n.endswith("-small") or n.partition("-")[0] in ("digits", "restricted64", "animals64")
]
OWN += ["cifar10-ratio", "cifar10-ratio-start"]
OWN += ["cifar10-jem", "cifar10-prood-head"]  # JEM has its own test; a head is trained on another model
HEADS = [n for n in NAMES if n.endswith("-prood-head")]
PUBLISHED = [n for n in NAMES if n not in OWN]


def test_the_published_experiments_are_all_there() -> None:
    grid = {
        "cifar10": ["plain", "oe", "acet", "at-0.5", "at-0.25", "trades-0.5", "ratio-0.5", "ratio-0.25"],
        "cifar100": ["plain", "oe", "at-0.5", "at-0.25", "ratio-0.5", "ratio-0.25"],
        "svhn": ["plain", "oe", "acet", "at-0.5", "at-0.25", "ratio-0.5", "ratio-0.25"],
        "restricted-imagenet": ["plain", "oe", "acet", "at-3.5", "at-1.75", "ratio-3.5", "ratio-1.75"],
        "digits": ["plain", "oe", "acet", "at", "ratio", "jem", "prood-head"],
    }
    expected = {f"{data}-{method}" for data, methods in grid.items() for method in methods}
    small = {f"cifar10-{method}-small" for method in grid["cifar10"]}
    small |= {f"svhn-{method}-small" for method in ("plain", "oe", "acet", "at-0.25", "ratio-0.25")}
    assert expected | small | {
        "cifar10-ratio-wrn",
        "cifar10-ratio",
        "cifar10-ratio-start",
        "cifar10-ratio-small",
    } <= set(NAMES)


@pytest.mark.parametrize(("data", "count"), [("cifar10", 8), ("svhn", 5)])
def test_the_rows_of_a_small_comparison_differ_in_their_objective_alone(data: str, count: int) -> None:
    """One network, one budget: what else a row changed would be taken for its method's merit."""
    small = [n for n in NAMES if n.startswith(data) and n.endswith("-small") and n != "cifar10-ratio-small"]
    rows = [recipes.load(name) for name in small]
    assert len(rows) == count

    def shared(recipe: Recipe) -> dict[str, object]:
        tree = recipe.model_dump(mode="json", exclude={"name", "description", "objective"})
        del tree["data"]["outside"]  # named only where the objective has an outside term
        return tree

    assert all(shared(row) == shared(rows[0]) for row in rows)
    assert len({row.objective.model_dump_json() for row in rows}) == count
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
    assert recipe.data.augment.cutout == (8 if name.startswith("cifar100") else 16)
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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Networks this small spend their time waiting for a second thread: ten times as long, measured."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_jem_is_the_published_experiment() -> None:
    """Grathwohl et al. 2020, appendix A, and the authors' public code."""
    recipe = recipes.load("cifar10-jem")
    assert recipe.model.architecture == "jem-wideresnet-28-10"
    assert (recipe.model.mean, recipe.model.std) == ((0.5,) * 3, (0.5,) * 3), "pixels from -1 to 1"
    assert recipe.objective.energy == recipes.Energy(), "the defaults are the published values"
    energy, optim, augment = recipes.Energy(), recipe.optim, recipe.data.augment
    assert (energy.steps, energy.step_size, energy.noise, energy.restart) == (20, 1.0, 0.01, 0.05)
    assert (energy.buffer, energy.batch_size, energy.data_noise) == (10_000, 64, 0.03)
    assert (optim.optimizer, optim.lr, optim.momentum, optim.weight_decay) == ("adam", 1e-4, 0.9, 0.0)
    assert (optim.epochs, optim.milestones, optim.gamma, optim.batch_size) == (200, (160, 180), 0.3, 64)
    assert (augment.crop, augment.flip, augment.autoaugment, augment.cutout) == (4, True, None, 0)
    assert not recipe.data.outside


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", HEADS)
def test_a_head_trains_a_step_on_the_network_it_names(name: str, tmp_path: Path) -> None:
    """Here a network of random weights."""
    from ratioctl.models import build, state_of
    from ratioctl.training.loop import fit
    from ratioctl.training.starts import Start

    settings = [
        "data.train=digits:train",
        "data.test=digits:test",
        "data.outside=noise:uniform",
        "data.size=8",
    ]
    settings += ["data.channels=1", "data.validation=0.05", "model.width=4", "optim.epochs=0.001"]
    settings += ["optim.validate_images=4", "data.outside_test=[]"]
    recipe = recipes.load(name, settings)
    assert recipe.objective.certified is not None
    assert recipe.objective.certified.eps == 0.01
    base = recipe.model.architecture.removeprefix("certified:")
    pixels = {"mean": (0.5,), "std": (0.5,)}
    start = Start(
        name="base",
        architecture=base,
        options={"width": 4},
        label_names=tuple("0123456789"),
        input_size=None,
        weights=state_of(build(base, num_classes=10, channels=1, width=4, **pixels)),
        digest="",
        **pixels,
    )
    package = fit(recipe, tmp_path, init=start, device="cpu", precision="fp32")
    assert package.certified == 0.01
    assert recipes.loads((package.path / "recipe.toml").read_text(encoding="utf-8")) == recipe


def tiny(recipe: Recipe, *, own_depth: bool) -> list[str]:
    """Settings that leave a recipe its objective, schedule and augmentation, and make the rest tiny."""
    settings = [
        *("data.train=digits:train", "data.test=digits:test", "data.outside_test=[]"),
        *("data.size=8", "data.channels=3", "data.validation=0.05"),
        *("optim.batch_size=2", "optim.batch_size_out=2", "optim.epochs=0.001", "optim.validate_images=4"),
    ]
    if recipe.optim.head_epochs:
        settings.append("optim.head_epochs=0")  # needs a start
    if recipe.objective.outside:
        settings.append("data.outside=noise:uniform")
    if recipe.objective.energy:
        settings += ["objective.energy.buffer=8", "objective.energy.batch_size=2"]
    if recipe.model.mean is not None:
        settings += ["model.mean=[0.5, 0.5, 0.5]", "model.std=[0.5, 0.5, 0.5]"]
    architecture = recipe.model.architecture.removeprefix("torchvision:")  # those have no width, ours do
    if "wideresnet" in architecture:
        settings.append(f"model.architecture={architecture.rpartition('wideresnet')[0]}wideresnet-10-1")
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
    assert row["total"] > 0 or recipe.objective.energy
    assert ("validation.attacked" in row) == (recipe.objective.inside.robust > 0)
    assert recipes.loads((package.path / "recipe.toml").read_text(encoding="utf-8")) == recipe


# The same terms in the same order, with other radii or other data of the same size.
ALIKE = re.compile(r"^(digits|cifar10|cifar100|svhn)-|-[\d.]+|-small")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", {ALIKE.sub("", n): n for n in NAMES if n not in HEADS}.values())
def test_a_bundled_recipe_trains_a_step(name: str, tmp_path: Path) -> None:
    """One of each kind; the slow test below trains every recipe."""
    train_a_step(name, tmp_path / "run", own_depth=False)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in HEADS])
def test_a_bundled_recipe_trains_a_step_at_its_own_depth_and_steps(name: str, tmp_path: Path) -> None:
    train_a_step(name, tmp_path / "run", own_depth=True)
