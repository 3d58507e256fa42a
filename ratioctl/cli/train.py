"""`ratioctl train`."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratioctl.cli._common import Context, Download, command, emit_json
from ratioctl.cli._progress import Progress
from ratioctl.cli.calibrate import alert_chance
from ratioctl.cli.init import show
from ratioctl.errors import DiskError, Interrupted, RatioctlError
from ratioctl.utils.durations import duration, seconds_of

if TYPE_CHECKING:
    from ratioctl.calibration.calibrate import Calibrated
    from ratioctl.data.proposal import Proposal
    from ratioctl.recipe import Recipe
    from ratioctl.training.distributed import Processes
    from ratioctl.training.starts import Start

MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time",
        metavar="TIME",
        help="Shorten the schedule to end within this time, such as 8m or 1h30m.",
    ),
]
Log = Annotated[
    list[str] | None,
    typer.Option(
        "--log",
        metavar="tensorboard|mlflow|wandb",
        help="Record the metrics there too; repeatable.",
    ),
]
RecipeSeed = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=2**63 - 1, metavar="N", help="Random seed [default: the recipe's]."),
]


@command
def train(
    context: Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|PHOTOS",
            help="A TOML file, the name of a bundled recipe, or labelled photographs (see `ratioctl init`).",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Run folder [default: runs/<recipe name>]."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its checkpoint.")
    ] = False,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            metavar="MODEL",
            help="Start from these weights: a model, or timm:NAME[=WEIGHTS] or torchvision:NAME[=WEIGHTS].",
        ),
    ] = None,
    max_time: MaxTime = None,
    log: Log = None,
    seed: RecipeSeed = None,
    download: Download = False,
) -> int | None:
    """Train a model from a recipe, package it and calibrate it."""
    began = time.monotonic()
    limit = None if max_time is None else seconds_of(max_time, "--max-time")
    from ratioctl.training.distributed import joined, silent

    with joined(context.device) as processes:
        if not processes.first:
            logging.getLogger("ratioctl").setLevel(logging.ERROR)  # process 0 says it
        try:
            _train(
                context,
                processes,
                recipe=recipe,
                out=out,
                changes=[*(settings or []), *([] if seed is None else [f"seed={seed}"])],
                resume=resume or processes.restarts > 0,
                init=init,
                limit=limit,
                began=began,
                log=log or [],
                download=download,
            )
        except RatioctlError as error:
            if silent(error, processes):
                return error.exit_code
            if not processes.first and not error.thing.startswith("rank "):
                error.thing = f"{processes.describe(processes.rank)}: {error.thing}"
            raise
    return None


def _train(
    context: Context,
    processes: Processes,
    *,
    recipe: str,
    out: Path | None,
    changes: list[str],
    resume: bool,
    init: str | None,
    limit: float | None,
    began: float,
    log: list[str],
    download: bool,
) -> None:
    from ratioctl.calibration.calibrate import calibrate
    from ratioctl.training import starts
    from ratioctl.training.loop import fit
    from ratioctl.training.photographs import recipe_of
    from ratioctl.training.trackers import Trackers

    def prepared() -> tuple[Recipe, Path, Proposal | None, Start | None]:
        start = None if init is None else starts.resolve(init, download=download)
        return recipe_of(recipe, changes, out, start=start, resume=resume, download=download)

    loaded, folder, proposal, start = processes.everywhere(prepared, in_turn=True)
    if processes.first:
        if proposal is not None:
            show(context, proposal)
        context.note(f"Recipe {loaded.name} ({loaded.digest[:12]}), run folder {folder}")
        if processes.world > 1:
            context.note(f"{processes.world} processes share every batch")
        if resume and not (folder / "checkpoint" / "state.json").exists():
            context.note(f"{folder}: no checkpoint, so training starts from the beginning.")
    line = f"Continue with: {context.typed('--resume')}"
    if processes.world > 1:
        line = f"Continue with torchrun and: -m {context.typed('--resume')}"
    with _continued(folder, line):
        with contextlib.ExitStack() as shown:
            events = None
            if processes.first:
                events = _Events(shown.enter_context(Progress(context, tenths=False)))
            trackers = shown.enter_context(Trackers(log if processes.first else [], folder, loaded, events))
            package = fit(
                loaded,
                folder,
                resume=resume,
                init=start,
                max_time=limit,
                began=began,
                device=context.device,
                precision=context.precision,
                download=download,
                callback=trackers,
                processes=processes,
            )
        if events is None:
            return
        result = calibrate(package, device=processes.device(context.device), download=download)
    for warning in result.warnings:
        context.warn(warning)
    _print_result(context, result, events.last, loaded)
    if result.collapsed:
        advice = "Lower optim.lr, train longer, or look at the labels; see metrics.jsonl."
        if events.share < 0.5:
            advice = f"Raise --max-time: {events.share:.1%} of the recipe's updates fitted into it."
        alert_chance(context, result, advice)


@contextlib.contextmanager
def _continued(folder: Path, line: str) -> Iterator[None]:
    """Interruptions and a full disk end with the `line` that continues the run."""
    try:
        yield
    except Interrupted as stop:
        stop.next_step = line
        raise
    except KeyboardInterrupt as stop:  # while the data were loaded, or while calibrating
        saved = (folder / "checkpoint" / "state.json").exists()
        reason = "was stopped; " + ("what is in it is complete" if saved else "nothing was saved yet")
        raise Interrupted(folder, reason, line, signum=getattr(stop, "signum", 2)) from None
    except DiskError as fault:
        fault.next_step = f"{fault.next_step} {line}"
        raise


def _print_result(context: Context, result: Calibrated, last: dict[str, Any], recipe: Recipe) -> None:
    if context.json:
        emit_json(
            {
                "package": str(result.package.path),
                "digest": result.package.digest,
                "recipe_digest": recipe.digest,
                "validation": last,
                "calibration": result.package.config["ratio"]["calibration"],
                "temperature": result.temperature,
                "thresholds": result.thresholds,
            }
        )
        return
    context.out.print(f"Package: {result.package.path} (digest {result.package.digest[:12]})")
    if "validation.clean" in last:
        attacked = f", attacked {last['validation.attacked']:.1%}" if "validation.attacked" in last else ""
        context.out.print(f"Held-out accuracy: {result.accuracy:.1%} of {result.n}{attacked}")
    context.out.print(
        f"Temperature {result.temperature:.4g}: ECE {result.before['ece_report']:.2%} -> "
        f"{result.after['ece_report']:.2%}; threshold tpr95 {result.thresholds['tpr95']:.4f}"
    )
    if not result.collapsed:
        model = str(result.package.path)
        if recipe.data.test is not None:
            line = ["ratioctl", "report", model, "--data", recipe.data.test]
            for k, source in enumerate(recipe.data.outside_test):
                line += ["--ood", f"outside{k + 1 if k else ''}={source}"]
            context.out.print(f"Report: {shlex.join(line)}")
        context.out.print(f"Next: ratioctl counterfactual IMAGE --target CLASS --model {shlex.quote(model)}")


class _Events:
    """Shows what `training.loop.fit` reports; `last` is the last validation."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.last: dict[str, Any] = {}
        self.planned = 0  # updates, as shown last
        self.share = 1.0  # of the recipe's epochs that fit into --max-time

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "leaks":
            self._leaks(event)
        elif event["event"] == "start":
            self.progress.note(event["text"])
        elif event["event"] == "schedule":
            self.share = share = event["epochs"] / event["recipe_epochs"]
            if abs(event["updates"] - self.planned) <= 0.1 * self.planned:
                return
            self.planned = event["updates"]
            fits = "all of the recipe fits" if share >= 0.9995 else f"{share:.1%} of the recipe's updates fit"
            self.progress.note(
                f"{event['update_s']:.2g} s an update: {event['updates']:,} updates, {fits} into "
                f"{duration(event['seconds'])}; {duration(event['reserved_s'])} are reserved for validation, "
                "saving and calibration"
            )
        elif event["event"] == "validation":
            self.last = {k: v for k, v in event.items() if k != "event"}
            parts = [f"clean {event['validation.clean']:.1%}"]
            if "validation.attacked" in event:
                parts.append(f"attacked {event['validation.attacked']:.1%}")
            if "validation.out_confidence" in event:
                parts.append(f"mean confidence on OOD images {event['validation.out_confidence']:.3f}")
            if "validation.out_guaranteed" in event:
                parts.append(f"at most {event['validation.out_guaranteed']:.3f} guaranteed")
            at = f"epoch {event['epoch']:.1f} ({event['update']}/{event['updates']})"
            self.progress.note(f"{at}: held out {', '.join(parts)}")
        else:
            pace = f"{event['images_per_s']:.0f} images/s, loss {event['total']:.3f}"
            self.progress.update(
                event["update"], f"epoch {event['epoch']:.1f}, {pace}", total=event["updates"]
            )

    def _leaks(self, event: dict[str, Any]) -> None:
        held = event["held_out"]
        exact, near = event.get("outside.exact", 0), event.get("outside.near", 0)
        if exact or near:
            self.progress.warn(
                f"leak check: of {held} held-out images, {exact} have an exact and {near} a near duplicate "
                "among the OOD training images (generated ones look alike by chance); remove them there, or "
                "their class with data.exclude"
            )
        if event["train.exact"]:
            self.progress.warn(
                f"leak check: {event['train.exact']} of {held} held-out images duplicate a training image"
            )
        if event.get("init"):
            self.progress.warn(
                "leak check: the model of --init was trained on another split of the same images, so it may "
                f"have seen the {held} held-out ones, and selection and calibration will be too optimistic; "
                "use the seed and data.validation of its recipe"
            )
        if not (exact or near or event["train.exact"] or event.get("init")):
            self.progress.note(f"Leak check: no held-out image of {held} duplicates a training image")
