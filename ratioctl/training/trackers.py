"""`train --log`: the metrics of a run in TensorBoard, MLflow or Weights & Biases, beside `metrics.jsonl`.

Names of metrics are those of `metrics.jsonl` with "/" for ".", the step is the number of updates; what is
shown about once a second between validations is below "progress/". A resumed run continues its record.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ratioctl.errors import UsageError
from ratioctl.recipe import Recipe
from ratioctl.utils import atomic_files as files
from ratioctl.utils import optional

_LEFT_OUT = {"event", "update", "updates", "remaining_s", "validation.n"}


class Tracker(Protocol):
    """One record of a run."""

    id: str  # by which a resumed run finds it

    def write(self, values: Mapping[str, float], update: int) -> None: ...

    def close(self, *, finished: bool) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the run; values from `update` on are replaced."""

    def __init__(self, folder: Path, recipe: Recipe, update: int, known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if known is None else update
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        self.id = "tensorboard"
        if known is None:
            text = "\n".join(f"    {line}" for line in _text(recipe).splitlines())  # a block of Markdown
            self.writer.add_text("recipe", text, 0)

    def write(self, values: Mapping[str, float], update: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, update)

    def close(self, *, finished: bool) -> None:
        self.writer.close()


class MLflow:
    """A run at MLFLOW_TRACKING_URI, else in the folder `mlruns` of the run folder.

    The experiment is MLFLOW_EXPERIMENT_NAME, else "ratioctl".
    """

    def __init__(self, folder: Path, recipe: Recipe, update: int, known: str | None) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow 3.7 refuses folders without it
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
        self.client = MlflowClient(tracking_uri=uri)
        if known is not None:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ratioctl")
        experiment = self.client.get_experiment_by_name(name)
        number = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.id = self.client.create_run(number, run_name=recipe.name).info.run_id
        for key, value in _flat(recipe.model_dump(mode="json")).items():
            self.client.log_param(self.id, key, str(value)[:500])  # longer ones are refused

    def write(self, values: Mapping[str, float], update: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=update)

    def close(self, *, finished: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Wandb:
    """A run of Weights & Biases, with its own files in the run folder.

    WANDB_MODE=offline, WANDB_PROJECT and the other variables of wandb have their usual effect.
    """

    def __init__(self, folder: Path, recipe: Recipe, update: int, known: str | None) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ratioctl"),
            name=recipe.name,
            config=recipe.model_dump(mode="json"),
            dir=str(folder),
            id=known,
            resume="allow" if known is not None else None,
        )
        self.id = str(self.run.id)
        self.run.define_metric("*", step_metric="update")

    def write(self, values: Mapping[str, float], update: int) -> None:
        self.run.log({**values, "update": update})

    def close(self, *, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


_KINDS: dict[str, tuple[str, Callable[[Path, Recipe, int, str | None], Any]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", Wandb),
}
NAMES = tuple(_KINDS)


class Trackers:
    """Passes the events of `training.loop.fit` on to trackers and `callback`; a context that closes them.

    They are opened with the first values, when the run folder is held and its checkpoint is read. One that
    fails later is given up with a warning: the run goes on, and `metrics.jsonl` has everything.

    Raises:
        UsageError: an unknown name, a package that is not installed, or a tracker that cannot be opened.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        folder: Path,
        recipe: Recipe,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.folder, self.recipe, self.callback = folder, recipe, callback
        self.names = (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))
        self.open: dict[str, Tracker] | None = None
        for name in self.names:
            if name not in _KINDS:
                raise UsageError(f"--log {name}", "no such tracker", f"Use {', '.join(NAMES)}.")
            optional.load(_KINDS[name][0], f"--log {name}")

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for name, tracker in (self.open or {}).items():
            try:
                tracker.close(finished=error is None)
            except Exception as problem:  # a service that is not there must not hide what ended the run
                _warn(name, problem)

    def __call__(self, event: dict[str, Any]) -> None:
        if self.callback is not None:
            self.callback(event)
        if event["event"] not in ("validation", "progress") or not self.names:
            return
        prefix = "progress/" if event["event"] == "progress" else ""
        values = {
            prefix + name.replace(".", "/"): float(value)
            for name, value in event.items()
            if isinstance(value, int | float) and name not in _LEFT_OUT
        }
        if self.open is None:
            self._open_all(event["update"])
        assert self.open is not None
        for name, tracker in list(self.open.items()):
            try:
                tracker.write(values, event["update"])
            except Exception as problem:
                _warn(name, problem)
                del self.open[name]

    def _open_all(self, update: int) -> None:
        path = self.folder / "trackers.json"
        known = _known(path) if (self.folder / "checkpoint" / "state.json").exists() else {}
        self.open = {}
        for name in self.names:
            try:
                tracker = _KINDS[name][1](self.folder, self.recipe, update, known.get(name))
            except Exception as problem:
                reason = f"cannot be opened: {_short(problem)}"
                step = "See its documentation, or train without it: metrics.jsonl has all values."
                raise UsageError(f"--log {name}", reason, step) from problem
            self.open[name] = tracker
            known[name] = tracker.id
        files.write_file(path, (json.dumps(known, indent=1) + "\n").encode())


def _known(path: Path) -> dict[str, str]:
    """Identifiers of the records that an interrupted run has begun."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(k): str(v) for k, v in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _warn(name: str, problem: Exception) -> None:
    logging.getLogger("ratioctl").warning(
        "Warning: --log %s is given up, training goes on: %s", name, _short(problem)
    )


def _short(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def _text(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(mode="json"), indent=1)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
