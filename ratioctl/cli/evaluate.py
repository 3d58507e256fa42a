"""`ratioctl evaluate`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ratioctl import scores
from ratioctl.cli._common import MODEL_HELP, SOURCE_HELP, Context, Download, command, emit_json
from ratioctl.cli._progress import Progress
from ratioctl.utils.durations import duration

if TYPE_CHECKING:
    from ratioctl.types import Evaluation

Data = Annotated[str, typer.Option("--data", metavar="SOURCE", help=f"Labelled test images: {SOURCE_HELP}.")]
Models = Annotated[
    list[str] | None, typer.Argument(metavar="MODEL", help=MODEL_HELP + " [default: cifar10-ratio]")
]
Ood = Annotated[
    list[str] | None,
    typer.Option("--ood", metavar="NAME=SOURCE", help="An out-of-distribution (OOD) set; repeatable."),
]
SuiteName = Annotated[
    Literal["clean", "quick", "paper", "full", "explanations"],
    typer.Option("--suite", metavar="SUITE", help="clean (no attacks), quick, paper, full, explanations."),
]
ProtocolName = Annotated[
    Literal["robustbench-l2", "robustbench-linf", "paper", "good", "atd", "openood"] | None,
    typer.Option(
        "--protocol",
        metavar="NAME",
        help="A published protocol instead of a suite, with published figures beside: robustbench-l2 and "
        "robustbench-linf (AutoAttack), paper (worst case at l2 1), good (linf 0.01), atd (linf 8/255, ID "
        "and OOD attacked), openood (near and far).",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Use a stratified subset of N images.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Also reuse the batches of a finished evaluation in DIR (an interrupted one always continues).",
    ),
]
Write = Annotated[
    bool, typer.Option("--write", help="Also write the measurements into the package's card and config.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="Folder for the reports [default: reports/MODEL-DIGEST-SUITE]."
    ),
]
BackendName = Annotated[
    Literal["own", "reference"] | None,
    typer.Option(
        "--backend",
        metavar="BACKEND",
        help="Attacks of the robust accuracy: reference (pyautoattack's standard version, slower) or own "
        "(the same attacks in this package) [default: reference in paper and full, own in quick].",
    ),
]
SaveAdversarial = Annotated[
    bool,
    typer.Option(
        "--save-adversarial", help="Also save the attacked images, as float32 in DIR/adversarial/*.npz."
    ),
]
JudgeModel = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="MODEL",
        help="With --suite explanations: a second model that scores the counterfactuals.",
    ),
]

FurtherScores = Annotated[
    list[str] | None,
    typer.Option(
        "--score",
        metavar="NAME",
        help="Also measure this OOD score, under its own worst-case attack "
        f"({', '.join(scores.names(network=True))}); repeatable.",
    ),
]
Certified = Annotated[
    bool,
    typer.Option(
        "--certified",
        help="Also measure the confidence on OOD images that the model's certified head guarantees: no "
        "change within its linf radius exceeds it.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Compute part I of N into DIR, without a report; `ratioctl merge` joins the parts.",
    ),
]


@command
def evaluate(
    context: Context,
    data: Data,
    models: Models = None,
    ood: Ood = None,
    suite: SuiteName = "quick",
    protocol: ProtocolName = None,
    limit: Limit = None,
    resume: Resume = False,
    write: Write = False,
    out: Out = None,
    backend: BackendName = None,
    save_adversarial: SaveAdversarial = False,
    judge: JudgeModel = None,
    score: FurtherScores = None,
    certified: Certified = False,
    shard: ShardOption = None,
    download: Download = False,
) -> int | None:
    """Measure accuracy, robustness, calibration and OOD detection.

    Without --ood, the OOD sets are the built-in uniform and smooth noise. An interrupted evaluation continues
    where it stopped when the same command is given again.
    """
    from ratioctl import package as packages
    from ratioctl.errors import Interrupted
    from ratioctl.evaluation import run
    from ratioctl.report import evaluation_files

    loaded = [packages.resolve(model) for model in models or [packages.DEFAULT_MODEL]]
    folder = out or default_folder([(package.name, package.digest) for package in loaded], protocol or suite)
    if out is None and shard is not None:
        folder /= f"shard-{shard.replace('/', '-of-')}"
    evaluation_files.refuse_foreign(folder)
    written: list[Path] = []
    try:
        with Progress(context, total=1.0) as progress:
            events = Events(progress)
            evaluation = run(
                loaded,
                data=data,
                ood=ood or (),
                suite=suite,
                protocol=protocol,
                limit=limit,
                resume=resume,
                write=write,
                out=folder,
                backend=backend,
                save_adversarial=save_adversarial,
                judge=judge,
                score=score or (),
                certified=certified,
                shard=shard,
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
    if shard is not None:
        _present_shard(context, shard, folder)
        return None
    updated = [package.path for package in loaded] if write else []
    present(context, evaluation, [*written, *events.files], updated)
    return 3 if any(entry["unreadable"] for entry in evaluation.data) else None


def _present_shard(context: Context, shard: str, folder: Path) -> None:
    if context.json:
        emit_json({"shard": shard, "folder": folder})
    context.note(f"Shard {shard} is finished: {folder}. Join all of them with `ratioctl merge`.")


def present(
    context: Context, evaluation: Evaluation, written: Sequence[Path], updated: Sequence[Path]
) -> None:
    """Warnings to stderr; tables, or one JSON document, to stdout."""
    for model in evaluation.models:
        prefix = f"{model.name}: " if len(evaluation.models) > 1 else ""
        for warning in model.report.warnings:
            context.warn(prefix + warning)
    if context.json:
        emit_json({**evaluation.to_json(), "files": [str(path) for path in written]})
        return
    from ratioctl.report import terminal

    for shown in terminal.evaluation_tables(evaluation):
        context.out.print(shown)
    for path in written:
        context.out.print(f"Written: {path}")
    for path in updated:
        context.out.print(f"Measurements written into: {path}")


def default_folder(models: Sequence[tuple[str, str]], suite: str) -> Path:
    """Where reports go without --out, from (name, digest) of each model.

    The digest keeps reports of different packages with the same name apart.
    """
    name, digest = models[0]
    if len(models) > 1:
        name, digest = "comparison", hashlib.sha256(" ".join(d for _, d in models).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    return Path("reports") / f"{name}-{digest[:8]}-{suite}"


class Events:
    """Shows the progress events of an evaluation; `files` are the attacked images it has written."""

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
