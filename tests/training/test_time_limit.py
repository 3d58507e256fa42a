"""`train --max-time`: the schedule fitted to the time, on a fake clock and in real runs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ratioctl
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.cli import main
from ratioctl.errors import Interrupted, UsageError
from ratioctl.recipe import Recipe
from ratioctl.training import loop
from ratioctl.training.loop import fit
from ratioctl.training.schedule import Pace, full_pace, learning_rate, work
from ratioctl.training.time_limit import TimeLimit
from ratioctl.utils.durations import seconds_of
from tests.signals import deliver

IMAGES = 6400
TINY = [
    "model.architecture=wideresnet-10-1",
    "model.width=",
    "optim.batch_size=32",
    "optim.batch_size_out=8",
    "optim.validate_images=16",
]
TINY += [
    'data.outside="noise:uniform"',
    "objective.inside.attack.steps=1",
    "objective.outside.attack.steps=1",
]


def recipe_of(*more: str) -> Recipe:
    """200 updates an epoch, 10 epochs."""
    base = ["optim.epochs=10", "optim.batch_size=32", "optim.validate_every=1"]
    return recipes.load("digits-ratio", [*base, *more])


class Simulated:
    """A run on a fake clock: `seconds(update, work)` for each update, the end of the run, validations."""

    def __init__(
        self,
        recipe: Recipe,
        max_time: float,
        seconds: Callable[[int], float],
        *,
        validation_s: float = 1.0,
        ending_s: float = 2.0,
    ) -> None:
        self.recipe, self.seconds, self.validation_s, self.ending_s = recipe, seconds, validation_s, ending_s
        self.now = 20.0  # loading took this long
        self.max_time = max_time
        self.rates: list[float] = []
        self.epochs: list[float] = []
        self.validations: list[int] = []

    def run(self, update: int = 0, pace: Pace | None = None, stop: int | None = None) -> tuple[int, Pace]:
        pace = pace or full_pace(self.recipe, IMAGES)
        full = work(self.recipe, self.recipe.optim.epochs)
        limit = TimeLimit(
            recipe=self.recipe,
            seconds=self.max_time,
            began=0.0,
            train_images=IMAGES,
            validation_work=full,
            clock=lambda: self.now,
        )
        limit.start(update)
        while update < pace.total and update != stop:
            self.epochs.append(pace.at(update))
            self.rates.append(learning_rate(self.recipe, pace.at(update)))
            self.now += self.seconds(update) * work(self.recipe, pace.at(update)) / full
            update += 1
            pace = limit.fit(update, pace)
            if pace.validates(update):
                self.validations.append(update)
                self.now += self.validation_s
                limit.spent(self.validation_s, validation=True)
        return update, pace

    @property
    def end(self) -> float:
        return self.now + self.ending_s


def test_the_schedule_ends_with_the_time() -> None:
    recipe = recipe_of('optim.schedule="onecycle"', "optim.milestones=[]")
    run = Simulated(recipe, 120, lambda update: 0.25)
    updates, pace = run.run()
    assert 0.9 * 120 < run.end <= 120
    assert 280 < updates < 400
    assert pace.at(updates) == pytest.approx(10)
    assert run.rates[-1] < 0.01 * max(run.rates)
    assert max(run.rates) == pytest.approx(recipe.optim.lr, rel=0.01)
    assert np.diff(run.epochs).max() < 2 * np.median(np.diff(run.epochs))  # no jump
    assert 3 <= len(run.validations) <= 11
    assert run.validations[-1] == updates


def test_milestones_and_ramps_keep_their_place() -> None:
    recipe = recipe_of(
        'optim.schedule="step"',
        "optim.warmup_epochs=0",
        "optim.milestones=[5, 7.5]",
        "objective.inside.attack.steps=6",
        "objective.inside.ramp_epochs=5",
        "objective.inside.ramp_steps_from=1",
    )
    run = Simulated(recipe, 200, lambda update: 0.4)
    updates, _ = run.run()
    assert 0.9 * 200 < run.end <= 200  # although updates become three times as expensive
    rates = np.array(run.rates)
    assert set(np.round(rates / recipe.optim.lr, 6)) == {1, 0.1, 0.01}
    at = [int(np.argmax(rates < rate * recipe.optim.lr)) for rate in (0.5, 0.05)]
    assert at[1] - at[0] == pytest.approx((updates - at[0]) / 2, rel=0.1)


@pytest.mark.parametrize(
    "seconds",
    [
        lambda update: 60.0 if update == 0 else 0.2,  # compiled before the first update
        lambda update: 0.2 if update < 60 else 0.9,  # other work on the machine
        lambda update: 0.9 if update < 60 else 0.2,
        lambda update: 0.2 + 0.2 * (update % 7 == 0),
        lambda update: 15.0,
    ],
)
@pytest.mark.parametrize("validation_s", [0.01, 5.0])
def test_a_changing_speed_is_followed(seconds: Callable[[int], float], validation_s: float) -> None:
    recipe = recipe_of('optim.schedule="cosine"', "optim.milestones=[]", "optim.lr=0.1")
    run = Simulated(recipe, 300, seconds, validation_s=validation_s)
    updates, pace = run.run()
    assert 0.8 * 300 < run.end <= 300
    assert pace.at(updates) == pytest.approx(10, abs=0.1)
    assert run.rates == sorted(run.rates, reverse=True)
    assert len(run.validations) * validation_s < 0.25 * 300


def test_with_enough_time_the_run_is_the_recipe_s() -> None:
    recipe = recipe_of("optim.epochs=0.5")
    run = Simulated(recipe, 3600, lambda update: 0.25)
    full = full_pace(recipe, IMAGES)
    assert run.run() == (100, full)
    assert run.epochs == [update / 200 for update in range(100)]
    assert run.validations == [100]


def test_a_resumed_run_fits_what_is_left_without_a_higher_rate() -> None:
    recipe = recipe_of('optim.schedule="cosine"', "optim.milestones=[]")
    first = Simulated(recipe, 200, lambda update: 0.25)
    update, pace = first.run(stop=300)
    assert update == 300 < pace.total
    for minutes in (1, 30):
        second = Simulated(recipe, 60 * minutes, lambda update: 0.25)
        updates, ended = second.run(update, pace)
        assert second.end <= 60 * minutes
        assert second.rates[0] <= first.rates[-1]
        assert second.rates == sorted(second.rates, reverse=True)
        assert ended.at(updates) == pytest.approx(10, abs=0.01)
    # Half an hour is enough for every update of the epochs that are left of the recipe.
    assert updates - update == pytest.approx((10 - pace.at(update)) * 200, rel=0.05)


@pytest.mark.parametrize("max_time", [15.0, 22.0, 24.0])
def test_a_time_without_a_useful_update_is_refused(max_time: float) -> None:
    run = Simulated(recipe_of(), max_time, lambda update: 1.0)
    with pytest.raises(UsageError, match="too short") as caught:
        run.run()
    assert "--max-time" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8m", 480), ("2h", 7200), ("90s", 90), ("1h30m", 5400), ("1h30m15s", 5415), ("1.5h", 5400), (20, 20)],
)
def test_durations(text: str | int, seconds: float) -> None:
    assert seconds_of(text, "--max-time") == seconds


@pytest.mark.parametrize(
    "text", ["", "8", "m", "0s", "-8m", "8 minutes", "1m2h", "nan", float("nan"), True, None]
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(UsageError, match="1h30m"):
        seconds_of(text, "--max-time")


def decisions(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "max_time" in row]


def test_decisions_are_recorded_and_survive_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates that take five seconds on the run's clock: 90 seconds are enough for about fifteen."""
    recipe = recipes.load("digits-ratio", [*TINY, "optim.epochs=3"])
    now, stop = [0.0], [6]
    step = loop._step

    def slow(run: Any, state: Any, *arguments: Any, **options: Any) -> None:
        step(run, state, *arguments, **options)
        now[0] += 5.0
        if state.update == stop[0]:
            deliver(signal.SIGTERM)

    monkeypatch.setattr(loop, "_step", slow)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    events: list[dict[str, Any]] = []
    with pytest.raises(Interrupted):
        fit(recipe, tmp_path, max_time=90, callback=events.append)
    decided = [event for event in events if event["event"] == "schedule"]
    assert decided[0]["update_s"] == pytest.approx(5)
    total = decided[-1]["updates"]
    assert 10 < total < 18
    assert [row["max_time"]["updates"] for row in decisions(tmp_path)] == [d["updates"] for d in decided]
    state = json.loads((tmp_path / "checkpoint/state.json").read_text())
    assert state["time_limit"][-1]["updates"] == state["pace"]["total"] == total

    stop[0] = 0
    package = fit(recipe, tmp_path, resume=True)  # without a limit: what was decided
    provenance = package.config["ratio"]["provenance"]
    assert provenance["updates"] == total
    assert provenance["max_time"]["recipe_epochs"] == 3
    assert fit(recipe, tmp_path, resume=True, max_time=1e-3).digest == package.digest  # finished


def test_from_the_command_line_and_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"--set={setting}" for setting in (*TINY, "optim.epochs=0.2")]
    assert main(["train", "digits-ratio", *settings, "--max-time", "1h", "--out", str(tmp_path / "a")]) == 0
    assert "all of the recipe fits into 1 h" in capsys.readouterr().err
    same = ratioctl.train(
        "digits-ratio", settings=[*TINY, "optim.epochs=0.2"], out=tmp_path / "b", max_time="1h"
    )
    assert same.calibrated
    assert packages.read(tmp_path / "a/package").weights_path.read_bytes() == same.weights_path.read_bytes()
    assert main(["train", "digits-ratio", *settings, "--max-time", "soon", "--out", str(tmp_path / "c")]) == 2
    assert "1h30m" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert main(["train", "digits-ratio", *settings, "--max-time", "1s", "--out", str(tmp_path / "c")]) == 2
    assert "too short" in capsys.readouterr().err
