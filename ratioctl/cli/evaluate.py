"""`ratioctl evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ratioctl.cli._common import MODEL_HELP, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.cli._progress import Progress, duration


@command
def evaluate(
    context: Context,
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help=f"Labelled test images: {SOURCE_HELP}.")
    ],
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help=MODEL_HELP + " [default: cifar10-ratio]"),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option("--ood", metavar="NAME=SOURCE", help="An out-of-distribution set; repeatable."),
    ] = None,
    suite: Annotated[
        Literal["quick", "paper", "full", "explanations"],
        typer.Option("--suite", metavar="SUITE", help="quick, paper, full or explanations."),
    ] = "quick",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Use a stratified subset of N images.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Also reuse what a finished evaluation left in DIR (an interrupted one always continues).",
        ),
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Also write the measurements into the package's card and config.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the reports [default: reports/MODEL-SUITE]."),
    ] = None,
    backend: Annotated[
        Literal["own", "reference"] | None,
        typer.Option(
            "--backend",
            metavar="BACKEND",
            help="Of the robust accuracy: reference (pyautoattack's standard version, slower) or own (the "
            "same attacks by our engine) [default: reference in paper and full, own in quick].",
        ),
    ] = None,
    save_adversarial: Annotated[
        bool,
        typer.Option(
            "--save-adversarial", help="Also keep the attacked images, as float32 in DIR/adversarial/*.npz."
        ),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="MODEL",
            help="With --suite explanations: another model that says how much of the target it sees.",
        ),
    ] = None,
    download: Download = False,
) -> int | None:
    """Measure accuracy, robustness, calibration and OOD detection.

    Without --ood, out-distributions are the built-in uniform and smooth noise. An interrupted evaluation
    continues where it stopped when the same command is given again.
    """
    from ratioctl import package as packages
    from ratioctl.errors import Interrupted
    from ratioctl.evaluation import run

    loaded = [packages.resolve(model) for model in models or [packages.DEFAULT_MODEL]]
    folder = out or default_folder([package.name for package in loaded], suite)

    from ratioctl.report import evaluation_files, terminal

    written: list[Path] = []
    try:
        with Progress(context, total=1.0) as progress:
            events = _Events(progress)
            evaluation = run(
                loaded,
                data=data,
                ood=ood or (),
                limit=limit,
                resume=resume,
                write=write,
                out=folder,
                suite=suite,
                backend=backend,
                save_adversarial=save_adversarial,
                judge=judge,
                device=context.device,
                precision=context.precision,
                seed=context.seed,
                download=download,
                callback=events,
                finish=lambda found: written.extend(evaluation_files.write(found, folder)),
            )
    except KeyboardInterrupt as stop:
        raise Interrupted(
            folder,
            "the evaluation was interrupted, its finished batches are kept",
            f"Continue with: {context.typed()}",
            signum=getattr(stop, "signum", 2),
        ) from None
    written += events.files
    code = 3 if any(entry["unreadable"] for entry in evaluation.data) else None
    for model in evaluation.models:
        prefix = f"{model.name}: " if len(evaluation.models) > 1 else ""
        for warning in model.report.warnings:
            context.warn(prefix + warning)
    if context.json:
        emit_json({**evaluation.to_json(), "files": [str(path) for path in written]})
        return code
    for shown in terminal.evaluation_tables(evaluation):
        context.out.print(shown)
    for path in written:
        context.out.print(f"Written: {path}")
    if write:
        for package in loaded:
            context.out.print(f"Filed in: {package.path}")
    return code


def default_folder(names: list[str], suite: str) -> Path:
    """Where reports go without --out; a model's name may be anything, and stays below `reports`."""
    name = re.sub(r"[^\w.-]+", "-", names[0]).strip("-.") or "model"
    return Path("reports") / f"{name if len(names) == 1 else 'comparison'}-{suite}"


class _Events:
    """Shows what an evaluation reports; `files` are those it has written."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.files: list[Path] = []

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "plan":
            self.progress.note(f"This takes about {duration(event['seconds'])}.")
        elif event["event"] == "file":
            self.files.append(Path(event["path"]))
        else:
            self.progress.update(event["share"], event["what"], left=event["seconds_left"])
