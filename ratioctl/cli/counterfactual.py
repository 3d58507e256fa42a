"""`ratioctl counterfactual`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ratioctl.cli._common import BitDepth, Context, command, emit_json
from ratioctl.cli._progress import Progress
from ratioctl.errors import ImageError, Interrupted, UsageError
from ratioctl.utils.defaults import DEFAULT_MODEL

if TYPE_CHECKING:
    from ratioctl.counterfactuals import Picture, PreparedRequest
    from ratioctl.report.live import Live
    from ratioctl.types import Explanation

MAX_NOTES = 8  # images whose conversion to the model's input is reported one by one
MAX_PREVIEWS = 4  # images and targets previewed in the terminal

Images = Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER", help="Images, or folders of them.")]
TargetClass = Annotated[
    str,
    typer.Option("--target", metavar="CLASS[,CLASS...]", help="Target classes, or predicted, second or all."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A package folder, a bundled model, or a file of `export --explain`, which needs no torch; "
        "repeat it to compare. [default: cifar10-ratio]",
    ),
]
Eps = Annotated[
    str | None,
    typer.Option(
        "--eps",
        metavar="RANGE",
        help="Budgets: 2, or 0.5,1,2, or 0.5..3 (six of them), or 0.5..3:0.25. "
        "Default: the model's own ladder for the norm.",
    ),
]
Norms = Annotated[
    list[str] | None,
    typer.Option(
        "--norm",
        metavar="2|1.5|1|inf",
        help="The norm in which the change is bounded; repeat it to compare. [default: 2]",
    ),
]
Steps = Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Steps of the search.")]
Restarts = Annotated[int, typer.Option("--restarts", min=1, metavar="N", help="Independent searches.")]
Until = Annotated[
    float | None,
    typer.Option("--until", metavar="P", help="Find the smallest change that reaches this confidence."),
]
Region = Annotated[
    str | None,
    typer.Option(
        "--region", metavar="X,Y,W,H|MASK", help="Change only this box, or the white part of a mask image."
    ),
]
RegionSpace = Annotated[
    Literal["input", "image"],
    typer.Option(
        "--region-space",
        metavar="input|image",
        help="Pixels in which the box is given: those of the model's input, or of the image as displayed.",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Explain at most N images.")]
PictureFormat = Annotated[
    Literal["png", "gif", "webp"],
    typer.Option("--format", metavar="png|gif|webp", help="gif and webp add an animation."),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for pictures, JSON and page.")]
OpenPage = Annotated[bool, typer.Option("--open", help="Open the page when done.")]
LiveFolder = Annotated[
    Path | None,
    typer.Option(
        "--live",
        metavar="DIR",
        help="Let the page search other classes, radii and images itself: the folder dist of the npm package "
        "onnxruntime-web. Needs a file of `export --explain` as --model.",
    ),
]


@command
def counterfactual(
    context: Context,
    images: Images,
    target: TargetClass,
    model: Models = None,
    eps: Eps = None,
    norm: Norms = None,
    steps: Steps = 500,
    restarts: Restarts = 1,
    until: Until = None,
    region: Region = None,
    region_space: RegionSpace = "input",
    limit: Limit = None,
    bit_depth: BitDepth = None,
    picture_format: PictureFormat = "png",
    out: Out = Path("counterfactuals"),
    open_page: OpenPage = False,
    live: LiveFolder = None,
) -> int | None:
    """Find how an image must change to get another prediction."""
    from ratioctl import counterfactuals
    from ratioctl.report import counterfactual_files as report

    prepared = counterfactuals.prepare(
        images,
        target=target,
        eps=eps,
        model=model or [DEFAULT_MODEL],
        norm=norm or "2",
        steps=steps,
        restarts=restarts,
        seed=context.seed,
        until=until,
        region=region,
        region_space=region_space,
        limit=limit,
        bit_depth=bit_depth,
        out=out,
    )
    searching = None if live is None else _live(live, prepared)
    for warning in prepared.warnings:
        context.warn(warning)
    earlier = (out / report.DOCUMENT).exists()
    total = len(prepared.sources) * len(prepared.models)
    with Progress(context, total, tenths=False) as progress:
        run = _Run(context=context, prepared=prepared, progress=progress)
        try:
            done = report.write_counterfactuals(
                out,
                prepared.header,
                run.explanations(),
                errors=run.errors,
                inputs=counterfactuals.files_of(prepared.sources),
                animation=None if picture_format == "png" else picture_format,
                cards=prepared.cards,
                live=searching,
            )
        except KeyboardInterrupt as stop:
            raise _interrupted(stop, context, f"{run.finished} of {total}", out) from None
    if run.converted > MAX_NOTES and not context.verbose:
        more = run.converted - MAX_NOTES
        context.note(f"... and {more} more images were fitted to the model's input (--verbose lists them)")
    if context.json:
        emit_json({**prepared.header, **report.document_body(done, run.errors)})
    else:
        _show(context, prepared.header, done)
        if done or not earlier:
            context.note(f"Pictures, page and numbers: {out / report.PAGE}")
        else:
            context.note(f"Nothing was written; the earlier results in {out} are unchanged.")
    if open_page:
        import webbrowser

        webbrowser.open((out / report.PAGE).resolve().as_uri())
    return 3 if run.errors else None


def _live(folder: Path, prepared: PreparedRequest) -> Live:
    """What the page needs to search itself. Raises UsageError unless the model is one exported file."""
    from ratioctl.package import ModelPackage
    from ratioctl.report import live

    (spec, request), *others = prepared.models
    if others or isinstance(spec, ModelPackage):
        step = "Write one with `ratioctl export MODEL --explain`."
        raise UsageError("--live", "needs one file of `export --explain` as --model", step)
    if spec.frame.height != spec.frame.width or spec.frame.pad:
        reason = f"{spec.name} takes images of {spec.frame} pixels, and the page cuts images to a square"
        raise UsageError("--live", reason, "Leave out --live.")
    return live.load(folder, spec.path, spec.input_size, request.eps)


@dataclasses.dataclass(kw_only=True)
class _Run:
    """The searches of one call, with what they report.

    Attributes:
        errors: {"path", "error"} of unreadable images.
        finished: number of explanations.
        converted: number of images with notes on their conversion to the model's input.
    """

    context: Context
    prepared: PreparedRequest
    progress: Progress
    errors: list[dict[str, str]] = dataclasses.field(default_factory=list)
    finished: int = 0
    converted: int = 0

    def explanations(self) -> Iterator[Explanation]:
        from ratioctl import counterfactuals

        for explanation in counterfactuals.explain(
            self.prepared,
            device=self.context.device,
            precision=self.context.precision,
            on_error=self.add_error,
            on_picture=self.add_picture,
            callback=lambda images: self.progress.update(images, "searching"),
        ):
            self.finished += 1
            yield explanation

    def add_error(self, path: str, error: ImageError) -> None:
        self.errors.append({"path": path, "error": error.reason})
        self.progress.warn(str(error))

    def add_picture(self, picture: Picture) -> None:
        if picture.notes:
            self.converted += 1
            if self.converted <= MAX_NOTES or self.context.verbose:
                self.progress.note(f"{picture.path}: {'; '.join(picture.notes)}")


def _interrupted(stop: KeyboardInterrupt, context: Context, finished: str, out: Path) -> Interrupted:
    from ratioctl.report import counterfactual_files as report

    saved: Path | None = getattr(stop, "saved", None)
    steps = [f"Start again with: {context.typed()}"]
    if (out / report.DOCUMENT).exists() and saved != out:
        steps.insert(0, f"The earlier results in {out} are unchanged.")
    if saved is not None:
        steps.insert(0, f"They are in {saved / report.PAGE}.")
    reason = f"stopped with {finished} images done"
    return Interrupted(out, reason, " ".join(steps), signum=getattr(stop, "signum", 2))


def _show(context: Context, header: dict[str, Any], done: list[Explanation]) -> None:
    """Print previews, on a terminal only, and the tables."""
    from ratioctl.report import terminal

    for shown, (explanation, target) in enumerate((e, t) for e in done for t in e.targets):
        if not context.out.is_terminal or (shown >= MAX_PREVIEWS and not context.verbose):
            break
        labels = header["models"][explanation.model]["labels"]
        norm = explanation.norm or header["norm"]
        terminal.preview(context.out, explanation, target, labels=labels, norm=norm)
    for table in terminal.counterfactual_tables(header, done, context.out.width):
        context.out.print(table)
