"""JEM: the objective's energy term, SGLD with its replay buffer, divergence, checkpoints and Adam."""

from __future__ import annotations

import json
import signal
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.data.loader import Batch
from ratioctl.errors import Interrupted, TrainingError, UsageError
from ratioctl.models import build
from ratioctl.recipe import Energy, Objective, Recipe, Term
from ratioctl.training import energy, loop
from ratioctl.training.loop import fit
from ratioctl.training.objective import losses
from ratioctl.training.schedule import work
from tests.training.test_loop import same, stop_after

TINY = [
    "optim.epochs=0.25",
    "optim.batch_size=32",
    "optim.validate_every=0.1",
    "optim.validate_images=24",
    "optim.ema=0.9",
    "objective.energy.steps=2",
    "objective.energy.batch_size=8",
    "objective.energy.buffer=16",
    "objective.energy.restart=0.3",
]


def tiny(*more: str) -> Recipe:
    return recipes.load("digits-jem", [*TINY, *more])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def quadratic(x: Tensor) -> Tensor:
    """One logit, so E(x) = |x - 0.5|^2 / 2."""
    return -((x - 0.5) ** 2).sum((1, 2, 3)).div(2)[:, None]


def test_the_loss_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    model = build("jem-wideresnet-10-1", num_classes=4, channels=1, mean=(0.5,), std=(0.5,))
    x, samples, y = torch.rand(6, 1, 8, 8), torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    objective = Objective(inside=Term(clean=1.0), energy=Energy(weight=0.7))
    named = losses(model, model, Batch(x_in=x, y_in=y, x_out=None), objective, samples=samples)
    gap = -model(x).logsumexp(1).mean() + model(samples).logsumexp(1).mean()  # E(x) - E(x~)
    assert torch.allclose(named["energy"], gap)
    assert torch.allclose(named["total"], F.cross_entropy(model(x), y) + 0.7 * gap)
    with pytest.raises(ValueError, match="no samples"):
        losses(model, model, Batch(x_in=x, y_in=y, x_out=None), objective)


def test_langevin_takes_the_published_steps_in_pixels_from_minus_one_to_one() -> None:
    x = torch.rand(4, 1, 2, 2)
    found = energy.langevin(quadratic, x, Energy(steps=1, step_size=0.8, noise=0.0), generator())
    u = (2 * x - 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(quadratic((u + 1) / 2).logsumexp(1).sum(), u)
    assert torch.allclose(found, (u.detach() + 0.8 * gradient + 1) / 2, atol=1e-6)
    with_noise = energy.langevin(quadratic, x, Energy(steps=1, step_size=0.8, noise=0.5), generator())
    expected = found + 0.25 * torch.randn(x.shape, generator=generator())
    assert torch.allclose(with_noise, expected, atol=1e-6)


def test_langevin_samples_the_density() -> None:
    """For E = |x - 0.5|^2 / 2, step t and noise sqrt(2 t) the stationary variance is 1 / (1 - t / 2)."""
    step = 0.2
    spec = Energy(steps=200, step_size=4 * step, noise=2 * (2 * step) ** 0.5)  # our lengths are half
    found = energy.langevin(quadratic, torch.zeros(4000, 1, 1, 1), spec, generator())
    assert float(found.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(found.var()) == pytest.approx(1 / (1 - step / 2), rel=0.08)


def test_chains_continue_in_the_buffer_and_some_start_anew() -> None:
    spec = Energy(steps=1, step_size=1e-9, noise=0.0, batch_size=400, restart=0.25, buffer=5000)
    buffer = torch.full((5000, 1, 2, 2), 7.0)
    found = energy.sample(buffer, quadratic, spec, generator())
    anew = (found < 1.01).flatten(1).all(1)
    assert (found[~anew] == 7).all()
    assert 0.17 < float(anew.float().mean()) < 0.33
    changed = (buffer != 7).flatten(1).any(1)
    assert 0 < int(changed.sum()) <= int(anew.sum())
    kept = energy.sample(buffer.clone(), quadratic, spec.model_copy(update={"restart": 0.0}), generator())
    nearest = torch.cdist(kept.flatten(1), buffer.flatten(1)).amin(1)
    assert float(nearest.max()) < 1e-3


def test_noise_on_images_has_the_published_size() -> None:
    batch = Batch(x_in=torch.full((64, 1, 8, 8), 0.5), y_in=torch.zeros(64, dtype=torch.int64), x_out=None)
    noisy = energy.with_noise(batch, Energy(data_noise=0.03), generator())
    assert float((noisy.x_in - batch.x_in).std()) == pytest.approx(0.015, rel=0.05)
    assert energy.with_noise(batch, Energy(data_noise=0.0), generator()) is batch


def test_a_resumed_run_keeps_its_buffer_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = fit(tiny(), tmp_path / "whole")
    out = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        fit(tiny(), out, callback=stop_after(4, signal.SIGINT))
    (path,) = (out / "checkpoint").glob("state-*.safetensors")
    tensors = packages.parse_weights(path.read_bytes(), path)
    assert tensors["replay.buffer"].shape == (16, 1, 8, 8)
    assert any(name.startswith("squares.") for name in tensors), "Adam's second moment"
    assert same(whole, fit(tiny(), out, resume=True))


def test_divergence_stops_the_run_and_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        fit(tiny("objective.energy.limit=1e-9"), tmp_path)
    text = str(caught.value)
    assert "JEM training has diverged" in text
    assert "optim.lr" in text
    assert "objective.energy.data_noise" in text
    for value in (float("nan"), float("inf"), -1001.0):
        with pytest.raises(TrainingError, match="diverged"):
            energy.check(torch.tensor(value), Energy(), 3, tmp_path)
    energy.check(torch.tensor(-999.0), Energy(), 3, tmp_path)


def test_a_diverging_learning_rate_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        fit(tiny("optim.lr=100.0", "optim.epochs=2", "optim.schedule=step"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"inside": {"robust": 1, "attack": {"ball": {"eps": 1}}}, "energy": {}}}, "clean > 0"),
        ({"optim": {"optimizer": "adam", "head_epochs": 1}}, "head_epochs needs"),
        ({"objective": {"energy": {"restart": 2}}}, "less than or equal to 1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"name": "a", "data": {"train": "digits:train"}, **change})


def test_earlier_digests_stay_and_the_new_keys_count() -> None:
    assert recipes.load("digits-ratio").digest.startswith("9a438f1f")
    one, other = tiny(), tiny("objective.energy.noise=0.02")
    assert one.digest != other.digest
    assert json.loads(one.model_dump_json())["optim"]["optimizer"] == "adam"


def test_sampling_counts_as_work() -> None:
    recipe = tiny("objective.energy.steps=20")
    assert work(recipe, 0.0) == 3 * 32 + 8 * (3 + 2 * 20)


def test_several_processes_are_refused() -> None:
    """Each would have a buffer of its own."""
    recipe = tiny()
    splits: Any = types.SimpleNamespace(train=types.SimpleNamespace(label_names=("0", "1")))
    compute: Any = types.SimpleNamespace(device=torch.device("cpu"), bf16=False)
    processes: Any = types.SimpleNamespace(world=2, local_world=2, everywhere=lambda work: work())
    with pytest.raises(UsageError, match="one replay buffer, and 2 processes"):
        loop._check_resources(recipe, splits, compute, processes)
