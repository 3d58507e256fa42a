"""`train --log`: what trackers record without a network, resuming, and what happens when one fails."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ratioctl import recipe as recipes
from ratioctl.errors import UsageError
from ratioctl.training import trackers
from ratioctl.training.trackers import Trackers

RECIPE = recipes.load("digits-ratio")
EVENTS: list[dict[str, Any]] = [
    {"event": "leaks", "held_out": 10, "train.exact": 0},
    {"event": "progress", "update": 3, "updates": 9, "images_per_s": 50.0, "remaining_s": 1.0, "total": 2.5},
    {"event": "validation", "update": 4, "updates": 9, "lr": 0.1, "validation.clean": 0.5, "total": 2.25},
]
EXPECTED = {
    ("progress/images_per_s", 3): 50.0,
    ("progress/total", 3): 2.5,
    ("lr", 4): 0.1,
    ("validation/clean", 4): 0.5,
    ("total", 4): 2.25,
}
LATER = {"event": "validation", "update": 6, "updates": 9, "validation.clean": 0.75}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    logging.disable(logging.NOTSET)


def recorded(name: str, folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value, as the tracker's own reader finds it."""
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        return {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    if name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=(folder / "mlruns").absolute().as_uri())
        experiment = client.get_experiment_by_name("ratioctl")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        assert run.data.params["optim.batch_size"] == "128"
        return {
            (tag, m.step): m.value
            for tag in run.data.metrics
            for m in client.get_metric_history(run.info.run_id, tag)
        }
    return dict(of_wandb(folder))


def of_wandb(folder: Path) -> Iterator[tuple[tuple[str, int], float]]:
    """From the files of offline runs."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            for key, value in items.items():
                if not key.startswith("_") and key != "update":
                    yield (key, items["update"]), value


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in the format of LevelDB: blocks of 32 KiB; a part has a CRC, length and type."""
    at, parts = 7, b""  # after the header of the file
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:  # the rest of a block is not used
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.parametrize("name", trackers.NAMES)
def test_what_is_recorded_can_be_read_back(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    seen: list[Any] = []
    with Trackers([name, name], tmp_path, RECIPE, seen.append) as events:
        for event in EVENTS:
            events(event)
    assert seen == EVENTS
    assert recorded(name, tmp_path) == pytest.approx(EXPECTED)
    if name == "wandb":  # a resumed run is another process of it; its record is one more file
        return
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.json").touch()
    with Trackers(name, tmp_path, RECIPE) as events:
        events(LATER)
    assert recorded(name, tmp_path) == pytest.approx(EXPECTED | {("validation/clean", 6): 0.75})


def test_a_new_run_in_the_folder_does_not_continue_an_old_record(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    (tmp_path / "trackers.json").write_text('{"mlflow": "gone"}')
    with Trackers("mlflow", tmp_path, RECIPE) as events:
        events(LATER)
    assert json.loads((tmp_path / "trackers.json").read_text())["mlflow"] != "gone"


def test_unknown_and_missing_trackers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no such tracker\. Use tensorboard, mlflow, wandb"):
        Trackers(["aim"], tmp_path, RECIPE)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r'needs wandb, .* pip install "ratioctl\[wandb\]"'):
        Trackers("wandb", tmp_path, RECIPE)


def test_one_that_cannot_be_opened_stops_the_run_and_one_that_fails_later_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        id = "1"
        broken = True

        def __init__(self, *args: object) -> None:
            if Failing.broken:
                raise RuntimeError("no route to host")

        def write(self, values: object, update: int) -> None:
            raise RuntimeError("connection lost")

        def close(self, *, finished: bool) -> None:
            raise AssertionError("was given up")

    monkeypatch.setitem(trackers._KINDS, "wandb", ("json", Failing))
    with Trackers("wandb", tmp_path, RECIPE) as events, pytest.raises(UsageError, match="no route to host"):
        events(LATER)
    Failing.broken = False
    with caplog.at_level("WARNING"), Trackers("wandb", tmp_path, RECIPE) as events:
        events(LATER)
        events(LATER)
    assert [r.getMessage() for r in caplog.records] == [
        "Warning: --log wandb is given up, training goes on: connection lost"
    ]
