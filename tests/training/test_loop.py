"""Training: schedules, resuming to the same weights, selection, and what stops it."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ratioctl import models
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, loader
from ratioctl.errors import Interrupted, OutputError, RecipeError, SourceError, TrainingError, UsageError
from ratioctl.recipe import Recipe
from ratioctl.training import loop as train
from ratioctl.training.checkpoint import MetricsLog
from ratioctl.training.loop import fit
from tests.signals import deliver

TINY = [
    "model.architecture=wideresnet-10-1",
    "model.width=",
    "optim.epochs=0.25",
    "optim.batch_size=32",
    "optim.batch_size_out=16",
    "optim.validate_every=0.1",
    "optim.validate_images=24",
    "optim.ema=0.9",
    'data.outside="noise:uniform"',
    'data.outside_test="noise:smooth"',
    "objective.inside.attack.steps=2",
    "objective.outside.attack.steps=2",
]


def tiny(*more: str) -> Recipe:
    return recipes.load("digits-ratio", [*TINY, *more])


def weights(package: packages.ModelPackage) -> dict[str, Any]:
    return packages.read_weights(package)


def same(a: packages.ModelPackage, b: packages.ModelPackage) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all((left[k] == right[k]).all() for k in left)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> packages.ModelPackage:
    """The package of a run that nothing stopped."""
    return fit(tiny(), tmp_path_factory.mktemp("whole"))


def stop_after(updates: int, signum: int) -> Any:
    """A watcher that signals this process once `updates` are done (validations come every 4 updates)."""

    def callback(event: dict[str, Any]) -> None:
        if event["event"] == "validation" and event["update"] >= updates:
            deliver(signum)

    return callback


def test_resumed_run_ends_with_the_same_weights(whole: packages.ModelPackage, tmp_path: Path) -> None:
    recipe = tiny()
    for signum in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / f"stopped-{signum}"
        with pytest.raises(Interrupted) as caught:
            fit(recipe, out, callback=stop_after(4, signum))
        assert caught.value.exit_code == 128 + signum
        assert "--resume" in str(caught.value)
        assert not (out / "package").exists()
        with pytest.raises(UsageError, match="--resume"):
            fit(recipe, out)
        resumed = fit(recipe, out, resume=True)
        assert same(whole, resumed)
        assert resumed.digest == whole.digest
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        other = (whole.path.parent / "metrics.jsonl").read_text()
        expected = [json.loads(line) for line in other.splitlines()]
        drop = ("seconds",)
        assert [{k: v for k, v in a.items() if k not in drop} for a in lines] == [
            {k: v for k, v in a.items() if k not in drop} for a in expected
        ]


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    a = fit(tiny("optim.epochs=0.05"), tmp_path / "a")
    b = fit(tiny("optim.epochs=0.05", "seed=1"), tmp_path / "b")
    assert not same(a, b)


def test_resume_with_another_recipe_names_what_changed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(tiny(), tmp_path, callback=stop_after(4, signal.SIGINT))
    with pytest.raises(RecipeError) as caught:
        fit(tiny("optim.lr=0.3"), tmp_path, resume=True)
    assert "optim.lr" in str(caught.value)


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(tiny(), tmp_path, callback=stop_after(4, signal.SIGINT))
    (tensors,) = (tmp_path / "checkpoint").glob("state-*.safetensors")
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(UsageError, match="SHA-256"):
        fit(tiny(), tmp_path, resume=True)
    (tmp_path / "checkpoint/state.json").write_bytes(b'{"files":' * 100_000)
    with pytest.raises(UsageError, match="cannot be read"):
        fit(tiny(), tmp_path, resume=True)


def test_damaged_lines_of_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"update": 3}\n'
    path.write_bytes(good + b"[" * 100_000 + b'\n{"update"\n3\n\xff\n{"update": 9}\n')
    MetricsLog(path, 3)
    assert path.read_bytes() == good


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    whole: packages.ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.losses
    calls = 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        named = original(*args, **kwargs)
        if calls > 4:
            named["total"] = named["total"] * float("nan")
        return named

    monkeypatch.setattr(train, "losses", poisoned)
    with pytest.raises(TrainingError, match="nan"):
        fit(tiny(), tmp_path)
    state = json.loads((tmp_path / "checkpoint/state.json").read_text())
    assert state["update"] == 4
    monkeypatch.setattr(train, "losses", original)
    assert same(fit(tiny(), tmp_path, resume=True), whole)


def test_a_checkpoint_between_validations_is_never_one_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = train.losses
    calls = 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        named = original(*args, **kwargs)
        if calls == 2:
            named["total"] = named["total"] * float("nan")
        return named

    monkeypatch.setattr(train, "losses", poisoned)
    monkeypatch.setattr(train, "_SAVE_EVERY_S", -1.0)
    with pytest.raises(TrainingError, match="not finite"):
        fit(tiny(), tmp_path)
    folder = tmp_path / "checkpoint"
    assert json.loads((folder / "state.json").read_text())["update"] == 1
    saved = load_file(folder / "state-1.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in saved.values())


def test_weights_are_selected_on_held_out_images_and_not_on_the_calibration_data() -> None:
    splits = loader.load(tiny('data.calibration="digits:test"'))
    without = loader.load(tiny())
    assert splits.held_out.fingerprint == without.held_out.fingerprint
    assert splits.train.fingerprint == without.train.fingerprint
    with pytest.raises(SourceError, match="nowhere"):
        loader.load(tiny('data.calibration="nowhere.tar"'))


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    from ratioctl.utils import atomic_files as files

    (tmp_path / "checkpoint").mkdir()
    with files.lock(tmp_path), pytest.raises(OutputError, match="is being written by"):
        fit(tiny(), tmp_path)


def test_package_says_where_it_comes_from(tmp_path: Path) -> None:
    recipe = tiny("optim.epochs=0.05", "model.architecture=resnet18", "model.width=2", "model.stem_stride=2")
    package = fit(recipe, tmp_path)
    assert package.architecture_options["stem_stride"] == 2
    assert models.from_package(package).network.conv1.stride == (2, 2)
    provenance = package.config["ratio"]["provenance"]
    assert provenance["recipe_digest"] == recipe.digest
    assert set(provenance["data"]) == {"train_source", "train", "held_out", "outside", "outside_test"}
    assert provenance["data"]["train_source"] == in_distribution.load("digits:train", 8, 1).fingerprint
    assert not package.calibrated
    assert package.temperature == 1
    assert package.recipe_text is not None
    assert recipes.loads(package.recipe_text) == recipe
    assert package.ladders["2"] == (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)


def test_fine_tuning_starts_from_the_given_weights(tmp_path: Path) -> None:
    start = fit(tiny("optim.epochs=0.05"), tmp_path / "start")
    still = tiny("optim.epochs=0.01", "optim.lr=1e-12", "optim.weight_decay=0.0", "optim.ema=0.999")
    tuned = fit(still, tmp_path / "tuned", init=start)
    a, b = weights(start), weights(tuned)
    key = "block3.0.conv2.weight"
    assert abs(a[key] - b[key]).max() < 1e-6
    assert tuned.config["ratio"]["provenance"]["init"]["digest"] == start.digest
    again = fit(still, tmp_path / "tuned", resume=True)
    assert again.config["ratio"]["provenance"]["init"]["digest"] == start.digest, "the checkpoint knows it"


def test_a_resumed_run_keeps_the_start_s_normalization_and_head_phase(tmp_path: Path) -> None:
    """Also where `--init` is not repeated; the phases of fine-tuning follow the number of the update."""
    start = fit(tiny("optim.epochs=0.05", "model.mean=[0.4]", "model.std=[0.2]"), tmp_path / "start")
    recipe = tiny("optim.head_epochs=0.1", "optim.schedule=slowstart", "objective.inside.ramp_epochs=0.2")
    whole = fit(recipe, tmp_path / "whole", init=start)
    with pytest.raises(Interrupted):
        fit(recipe, tmp_path / "stopped", init=start, callback=stop_after(4, signal.SIGINT))
    resumed = fit(recipe, tmp_path / "stopped", resume=True)
    assert (resumed.mean, resumed.digest) == ((0.4,), whole.digest)
    assert same(whole, resumed)


def test_the_head_is_trained_first(tmp_path: Path) -> None:
    start = fit(tiny("optim.epochs=0.05"), tmp_path / "start")
    probe = tiny("optim.epochs=0.1", "optim.head_epochs=0.099", "optim.select=last", "optim.ema=")
    tuned = weights(fit(probe, tmp_path / "probe", init=start))
    before = weights(start)
    moved = {key for key in tuned if (tuned[key] != before[key]).any()}
    assert moved == {"fc.weight", "fc.bias"}, "no other weight and no batch statistics"
    with pytest.raises(UsageError, match="head_epochs"):
        fit(probe, tmp_path / "none")


def test_the_start_s_normalization_is_kept(tmp_path: Path) -> None:
    start = fit(tiny("optim.epochs=0.05", "model.mean=[0.4]", "model.std=[0.2]"), tmp_path / "start")
    tuned = fit(tiny("optim.epochs=0.05"), tmp_path / "tuned", init=start)
    assert (tuned.mean, tuned.std) == ((0.4,), (0.2,))
    same_stated = tiny("optim.epochs=0.05", "model.mean=[0.4]", "model.std=[0.2]")
    assert fit(same_stated, tmp_path / "stated", init=start).mean == (0.4,)
    with pytest.raises(UsageError, match=r"expect mean \(0.4,\) .* the recipe states mean \(0.5,\)"):
        fit(tiny("model.mean=[0.5]", "model.std=[0.2]"), tmp_path / "other", init=start)


def test_a_start_that_was_trained_on_the_held_out_images_is_reported(tmp_path: Path) -> None:
    """Another seed holds out other images: those of the second run were trained on in the first."""
    start = fit(tiny("optim.epochs=0.05"), tmp_path / "start")
    found: list[dict[str, Any]] = []

    def callback(event: dict[str, Any]) -> None:
        if event["event"] == "leaks":
            found.append(event)

    fit(tiny("optim.epochs=0.05"), tmp_path / "same", init=start, callback=callback)
    other = fit(tiny("optim.epochs=0.05", "seed=1"), tmp_path / "other", init=start, callback=callback)
    assert found[0]["init"] == 0
    assert found[1]["init"] == found[1]["held_out"] > 0
    assert other.config["ratio"]["provenance"]["leaks"]["init"] == found[1]["held_out"]


def test_select_best_keeps_the_best_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.2, 0.9, 0.1, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3])
    monkeypatch.setattr(train, "validate", lambda *args: {"validation.clean": 0.5, "score": next(scores)})
    package = fit(tiny(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert package.config["ratio"]["provenance"]["selected_update"] == rows[1]["update"]


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    fit(tiny("optim.epochs=0.05"), tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(fit(tiny("optim.epochs=0.05"), tmp_path)))
    thread.start()
    thread.join()
    assert len(found) == 1


def test_resuming_a_finished_run_leaves_its_package_alone(tmp_path: Path) -> None:
    recipe = tiny("optim.epochs=0.05")
    first = fit(recipe, tmp_path)
    packages.update(first, config_changes={"ratio": {"metrics": {"note": "measured"}}})
    again = fit(recipe, tmp_path, resume=True)
    assert again.config["ratio"]["metrics"] == {"note": "measured"}


def test_a_foreign_folder_in_the_way_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a package"):
        fit(tiny(), tmp_path)
    assert not (tmp_path / "checkpoint").exists()
