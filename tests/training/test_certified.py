"""Training of a certified head: its loss, what stays, what it guarantees, resuming, and what is refused."""

from __future__ import annotations

import math
import re
import signal
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.attacks.worst_case import worst_case_confidence
from ratioctl.calibration.calibrate import calibrate
from ratioctl.data import in_distribution, out_distribution
from ratioctl.data.loader import Batch, to_float
from ratioctl.errors import Interrupted, RecipeError, UsageError
from ratioctl.models import build
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball, Certified, Recipe
from ratioctl.training import certified, loop, starts
from ratioctl.training.loop import fit
from ratioctl.training.schedule import work
from tests.compat.test_schemas import check
from tests.training.test_loop import same, stop_after

EPS = 0.01


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    """A model of the digits that knows something, with a temperature of its own."""
    settings = ["model.width=4", "optim.epochs=3", "optim.validate_every=3", "data.outside=[]"]
    package = fit(recipes.load("digits-plain", settings), tmp_path_factory.mktemp("base"))
    return packages.update(package, config_changes={"ratio": {"temperature": 0.5}})


def head(*more: str) -> Recipe:
    return recipes.load(
        "digits-prood-head", ["model.width=4", "optim.epochs=8", "objective.certified.ramp_epochs=2", *more]
    )


@pytest.fixture(scope="module")
def trained(base: ModelPackage, tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    return fit(head(), tmp_path_factory.mktemp("head"), init=base)


def outside() -> np.ndarray:
    return out_distribution.load(["noise:uniform"], 8, 1, count=64).pixels


def test_the_loss_is_the_papers() -> None:
    torch.manual_seed(0)
    model = build("certified:resnet18", num_classes=3, channels=1, width=2, mean=(0.4,), std=(0.3,))
    model.network.shift.fill_(5.0)  # takes no part
    x_in, x_out = torch.rand(5, 1, 8, 8), torch.rand(7, 1, 8, 8)
    batch = Batch(x_in=x_in, y_in=torch.zeros(5, dtype=torch.int64), x_out=x_out)
    spec = Certified(eps=0.1, weight=0.5, ramp_epochs=4)
    named = certified.losses(model, batch, spec, epoch=0.0)

    def g(x: torch.Tensor) -> torch.Tensor:
        return model.network.discriminator((x - 0.4) / 0.3).squeeze(1)

    inside, clean = -g(x_in).sigmoid().log().mean(), -(1 - g(x_out).sigmoid()).log().mean()
    assert torch.allclose(named["inside"], inside, atol=1e-6)
    assert clean < named["outside"] < clean + 0.01, "at the start of the ramp the radius is 0"
    assert torch.allclose(named["total"], named["inside"] + 0.5 * named["outside"])
    halfway, whole = (certified.losses(model, batch, spec, epoch=e)["outside"] for e in (2.0, 9.0))
    assert named["outside"] < halfway < whole
    assert certified.radius(spec, 2.0) == pytest.approx(0.05)
    assert certified.radius(Certified(eps=0.1), 0.0) == 0.1


def test_the_base_stays_and_its_temperature_is_kept(base: ModelPackage, trained: ModelPackage) -> None:
    before, after = packages.read_weights(base), packages.read_weights(trained)
    for name, value in before.items():
        assert (after[f"base.{name}"] == value).all(), name
    assert after["temperature"] == [0.5]
    assert after["shift"] == [0.0]
    assert trained.architecture == "certified:resnet18"
    assert trained.architecture_options == {"width": 4, "head_width": 8}
    stated = trained.config["ratio"]["certified"]
    assert (stated["norm"], stated["eps"]) == ("inf", EPS)
    assert "|z - x|_inf <= 0.01" in stated["statement"]
    assert set(trained.config["ratio"]["objective"]) == {"certified"}
    card = (trained.path / "README.md").read_text(encoding="utf-8")
    assert "a certified head on a finished network, linf radius 0.01" in card
    assert "## Guarantee" in card
    check("config.json", trained.config)


def test_accuracy_stays_ood_images_are_bounded_and_no_attack_exceeds_the_bound(
    base: ModelPackage, trained: ModelPackage, tmp_path: Path
) -> None:
    """At the temperature of the calibration and others."""
    test = in_distribution.load_labelled("digits:test", 8, 1, base.label_names)
    calibrated = calibrate(trained, out=tmp_path / "calibrated").package
    own, bare = predictor(calibrated), predictor(base)
    inside = own.predict(test.pixels)
    assert (inside.argmax(1) == bare.predict(test.pixels).argmax(1)).all()
    x = to_float(outside(), torch.device("cpu"))
    for temperature in {calibrated.temperature, 0.5, 2.0}:
        bound = own.guaranteed_log_odds(x, EPS, temperature)
        found = worst_case_confidence(
            own.exact, x, Ball(p=math.inf, eps=EPS), temperature=temperature, steps=30, restarts=1
        )
        reached = metrics.log_odds(own.exact(found.x).detach().numpy(), temperature)
        assert (reached <= bound).all()
        assert (reached >= metrics.log_odds(own.predict(outside()), temperature) - 1e-6).all()
    confidence, before = metrics.confidence(inside, 1.0), metrics.confidence(bare.predict(test.pixels), 0.5)
    guaranteed = 1 / (1 + np.exp(-own.guaranteed_log_odds(x, EPS, 1.0)))
    assert confidence.mean() > 0.9 * before.mean()
    assert guaranteed.mean() < 0.3
    assert metrics.auroc(-confidence, -guaranteed) > 0.95
    clear = build(
        "certified:resnet18", num_classes=10, channels=1, width=4, head_width=8, mean=(0.5,), std=(0.5,)
    )
    assert predictor(clear).guaranteed_log_odds(x, EPS, 1.0).mean() > np.log(0.3 / 0.7), "learnt"


def test_a_resumed_run_ends_with_the_same_weights(
    base: ModelPackage, trained: ModelPackage, tmp_path: Path
) -> None:
    recipe = head("optim.validate_every=2")
    whole = fit(recipe, tmp_path / "whole", init=base)
    with pytest.raises(Interrupted):
        fit(recipe, tmp_path / "stopped", init=base, callback=stop_after(8, signal.SIGINT))
    assert same(whole, fit(recipe, tmp_path / "stopped", resume=True)), "the base comes from the checkpoint"
    assert same(whole, trained), "validations change nothing"


def test_a_head_is_trained_further_and_shifted(trained: ModelPackage, tmp_path: Path) -> None:
    start = starts.resolve(trained)
    recipe = head("objective.certified.shift=2.5", "optim.epochs=0.1")
    again = packages.read_weights(fit(recipe, tmp_path, init=start))
    before = packages.read_weights(trained)
    assert again["shift"] == [2.5]
    assert again["temperature"] == [0.5], "of the base, not of the package"
    assert not (again["discriminator.0.weight"] == before["discriminator.0.weight"]).all()
    assert np.abs(again["discriminator.0.weight"] - before["discriminator.0.weight"]).max() < 0.1


def test_validation_tells_what_is_guaranteed(base: ModelPackage, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    fit(head("optim.epochs=1", "optim.validate_every=1"), tmp_path, init=base, callback=seen.append)
    (row,) = [event for event in seen if event["event"] == "validation"]
    assert 0.1 < row["validation.out_confidence"] <= row["validation.out_guaranteed"] < 1
    (note,) = [event["text"] for event in seen if event["event"] == "start"]
    assert note.endswith("its weights stay, the certified head is trained")


def test_starts_that_do_not_fit_are_refused(base: ModelPackage, small_package: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none is given.*--init"):
        fit(head(), tmp_path / "none")
    with pytest.raises(UsageError, match=r"model.width=4\."):
        fit(head("model.width=8"), tmp_path / "width", init=base)
    with pytest.raises(UsageError, match=r"model\.architecture=certified:resnet18"):
        fit(head("model.architecture=certified:resnet50"), tmp_path / "arch", init=base)
    other = packages.write(
        tmp_path / "other",
        config={**packages.portable_config(base), "label_names": [f"class {k}" for k in range(10)]},
        weights=base.weights_path.read_bytes(),
    )
    with pytest.raises(UsageError, match="a certified head keeps its classes, but 10 classes of the start"):
        fit(head(), tmp_path / "labels", init=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.inside.clean=0.5"], "leave the other terms out"),
        (["objective.outside.clean=1.0"], "leave the other terms out"),
        (["model.architecture=resnet18"], 'has no certified head; use "certified:resnet18"'),
        (["optim.select=best"], 'needs optim.select = "last"'),
        (["data.outside=[]"], "objective.certified needs OOD images"),
        (["objective.certified.eps=2"], "must be at most 1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        head(*settings)


def test_an_architecture_with_a_head_needs_its_objective() -> None:
    tree = {"name": "a", "data": {"train": "digits:train"}, "model": {"architecture": "certified:resnet18"}}
    with pytest.raises(ValidationError, match=r"a head that \[objective.certified\] trains"):
        Recipe.model_validate(tree)


def test_the_new_key_counts_in_the_digest_and_the_work_is_small() -> None:
    assert head().digest != head("objective.certified.weight=2").digest
    assert work(head(), 0.0) < 0.2 * work(recipes.load("digits-plain"), 0.0)


def test_several_processes_are_refused() -> None:
    splits: Any = types.SimpleNamespace(train=types.SimpleNamespace(label_names=("0", "1")))
    compute: Any = types.SimpleNamespace(device=torch.device("cpu"), bf16=False)
    processes: Any = types.SimpleNamespace(world=2, local_world=2, everywhere=lambda work: work())
    with pytest.raises(UsageError, match="takes minutes, and 2 processes"):
        loop._check_resources(head(), splits, compute, processes)
