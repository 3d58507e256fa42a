"""`ratioctl train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ratioctl.cli._common import Context, Download, command, emit_json
from ratioctl.cli._progress import Progress
from ratioctl.errors import DiskError, Interrupted


@command
def train(
    context: Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a bundled recipe.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run folder [default: runs/<recipe name>].")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its checkpoint.")
    ] = False,
    init: Annotated[
        str | None, typer.Option("--init", metavar="MODEL", help="Start from the weights of this model.")
    ] = None,
    download: Download = False,
) -> int | None:
    """Train a model from a recipe, package it and calibrate it.

    The recipe's own seed is used unless --seed is given and not 0.
    """
    from ratioctl import recipe as recipes

    changes = [*(settings or []), *([f"seed={context.seed}"] if context.seed else [])]
    loaded = recipes.load(recipe, changes)
    folder = out or Path("runs") / loaded.name

    from ratioctl import package as packages

    start = None if init is None else packages.resolve(init)

    from ratioctl.calibration.temperature import calibrate
    from ratioctl.training.loop import fit

    context.note(f"Recipe {loaded.name} ({loaded.digest[:12]}), run folder {folder}")
    line = f"Continue with: {context.typed('--resume')}"
    try:
        with Progress(context, tenths=False) as progress:
            events = _Events(progress)
            package = fit(
                loaded,
                folder,
                resume=resume,
                init=start,
                device=context.device,
                precision=context.precision,
                download=download,
                callback=events,
            )
        found = calibrate(package, device=context.device, download=download)
    except Interrupted as stop:
        raise Interrupted(stop.thing, stop.reason, line, signum=stop.exit_code - 128) from None
    except KeyboardInterrupt as stop:  # while the data were loaded, or while calibrating
        reason = "was stopped, and what is in it is whole"
        raise Interrupted(folder, reason, line, signum=getattr(stop, "signum", 2)) from None
    except DiskError as fault:
        raise DiskError(fault.thing, fault.reason, f"{fault.next_step} {line}") from None
    for doubt in found.warnings:
        context.warn(doubt)
    if context.json:
        emit_json(
            {
                "package": str(found.package.path),
                "digest": found.package.digest,
                "recipe_digest": loaded.digest,
                "validation": events.last,
                "calibration": found.package.config["ratio"]["calibration"],
                "temperature": found.temperature,
                "thresholds": found.thresholds,
            }
        )
        return None
    last = events.last
    context.out.print(f"Package: {found.package.path} (digest {found.package.digest[:12]})")
    if "validation.clean" in last:
        attacked = f", attacked {last['validation.attacked']:.1%}" if "validation.attacked" in last else ""
        context.out.print(f"Held-out accuracy: {found.accuracy:.1%} of {found.n}{attacked}")
    context.out.print(
        f"Temperature {found.temperature:.4g}: ECE {found.before['ece_report']:.2%} -> "
        f"{found.after['ece_report']:.2%}; threshold tpr95 {found.thresholds['tpr95']:.4f}"
    )
    context.out.print(f"Next: ratioctl counterfactual IMAGE --target CLASS --model {found.package.path}")
    return None


class _Events:
    """Shows what `training.loop.fit` reports; `last` is the last validation."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.last: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "leaks":
            self._leaks(event)
        elif event["event"] == "validation":
            self.last = {k: v for k, v in event.items() if k != "event"}
            parts = [f"clean {event['validation.clean']:.1%}"]
            if "validation.attacked" in event:
                parts.append(f"attacked {event['validation.attacked']:.1%}")
            if "validation.out_confidence" in event:
                parts.append(f"mean confidence on OOD images {event['validation.out_confidence']:.3f}")
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
                f"leak check: of {held} held-out images {exact} stand in the out-distribution exactly "
                f"and {near} nearly; remove them there, or their class with data.exclude"
            )
        if event["train.exact"]:
            self.progress.warn(
                f"leak check: {event['train.exact']} of {held} held-out images are also trained on"
            )
        if event.get("init"):
            self.progress.warn(
                f"leak check: the model of --init was trained on another split of the same images, so it may "
                f"know the {held} held-out ones, and selection and calibration will be too hopeful; give the "
                "seed and data.validation of its recipe"
            )
        if not (exact or near or event["train.exact"] or event.get("init")):
            self.progress.note(f"Leak check: none of {held} held-out images stands in the training data")
