"""`ratioctl counterfactual`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ratioctl.cli._common import BitDepth, Context, command, emit_json
from ratioctl.cli._progress import Progress
from ratioctl.utils.defaults import DEFAULT_MODEL

if TYPE_CHECKING:
    from ratioctl.counterfactuals import PreparedRequest
    from ratioctl.types import Explanation

_NOTED = 8  # images whose conversion to the model's input is noted one by one
_PREVIEWED = 4  # images and targets previewed in the terminal


@command
def counterfactual(
    context: Context,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE|FOLDER", help="Images, or folders of them.")],
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="CLASS[,CLASS...]", help="Classes to move to, or predicted, second or all."
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A package folder or a bundled model; repeat it to compare. [default: cifar10-ratio]",
        ),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            "--eps",
            metavar="RANGE",
            help="Budgets: 2, or 0.5,1,2, or 0.5..3 (six of them), or 0.5..3:0.25. "
            "Default: the model's own ladder for the norm.",
        ),
    ] = None,
    norm: Annotated[
        list[str] | None,
        typer.Option(
            "--norm",
            metavar="2|1.5|1|inf",
            help="The norm in which the change is bounded; repeat it to compare. [default: 2]",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Steps of the search.")] = 500,
    restarts: Annotated[
        int, typer.Option("--restarts", min=1, metavar="N", help="Independent searches.")
    ] = 1,
    until: Annotated[
        float | None,
        typer.Option("--until", metavar="P", help="Find the smallest change that reaches this confidence."),
    ] = None,
    region: Annotated[
        str | None,
        typer.Option(
            "--region",
            metavar="X,Y,W,H|MASK",
            help="Change nothing outside this box or a mask's white.",
        ),
    ] = None,
    region_space: Annotated[
        Literal["input", "image"],
        typer.Option(
            "--region-space",
            metavar="input|image",
            help="What the box counts: pixels of the model's input, or of the photograph.",
        ),
    ] = "input",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Explain at most N images.")
    ] = None,
    bit_depth: BitDepth = None,
    picture_format: Annotated[
        Literal["png", "gif", "webp"],
        typer.Option("--format", metavar="png|gif|webp", help="gif and webp add an animation."),
    ] = "png",
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for pictures, JSON and page.")
    ] = Path("counterfactuals"),
    open_page: Annotated[bool, typer.Option("--open", help="Open the page when done.")] = False,
) -> int | None:
    """Show how an image must change to become another class."""
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
    for warning in prepared.warnings:
        context.warn(warning)
    earlier = (out / report.DOCUMENT).exists()
    done, errors = _explain(context, prepared, out, None if picture_format == "png" else picture_format)
    if context.json:
        emit_json({**prepared.header, **report.document_body(done, errors)})
    else:
        _print(context, prepared, done)
        if done or not earlier:
            context.note(f"Pictures, page and numbers: {out / report.PAGE}")
        else:
            context.note(f"Nothing was written; the earlier results in {out} are unchanged.")
    if open_page:
        import webbrowser

        webbrowser.open((out / report.PAGE).resolve().as_uri())
    return 3 if errors else None


def _explain(
    context: Context, prepared: PreparedRequest, out: Path, animation: Literal["gif", "webp"] | None
) -> tuple[list[Explanation], list[dict[str, str]]]:
    """Search and write the results; returns them, and the images that could not be read."""
    from ratioctl import counterfactuals
    from ratioctl.errors import ImageError, Interrupted
    from ratioctl.report import counterfactual_files as report

    errors: list[dict[str, str]] = []
    finished = fitted = 0
    total = len(prepared.sources) * len(prepared.models)

    def report_error(path: str, error: ImageError) -> None:
        errors.append({"path": path, "error": error.reason})
        progress.warn(str(error))

    def report_picture(picture: counterfactuals.Picture) -> None:
        nonlocal fitted
        if picture.notes:
            fitted += 1
            if fitted <= _NOTED or context.verbose:
                progress.note(f"{picture.path}: {'; '.join(picture.notes)}")

    with Progress(context, total, tenths=False) as progress:

        def counted() -> Iterator[Explanation]:
            nonlocal finished
            for explanation in counterfactuals.explain(
                prepared,
                device=context.device,
                precision=context.precision,
                on_error=report_error,
                on_picture=report_picture,
                callback=lambda images: progress.update(images, "searching"),
            ):
                finished += 1
                yield explanation

        try:
            done = report.write_counterfactuals(
                out,
                prepared.header,
                counted(),
                errors=errors,
                inputs=counterfactuals.files_of(prepared.sources),
                animation=animation,
                cards=prepared.cards,
            )
        except KeyboardInterrupt as stop:
            saved: Path | None = getattr(stop, "saved", None)
            steps = [] if saved is None else [f"They are in {saved / report.PAGE}."]
            if (out / report.DOCUMENT).exists() and saved != out:
                steps.append(f"The earlier results in {out} are unchanged.")
            steps.append(f"Start again with: {context.typed()}")
            reason = f"stopped with {finished} of {total} images done"
            raise Interrupted(out, reason, " ".join(steps), signum=getattr(stop, "signum", 2)) from None
    if fitted > _NOTED and not context.verbose:
        context.note(
            f"... and {fitted - _NOTED} more images were fitted to the model's input (--verbose lists them)"
        )
    return done, errors


def _print(context: Context, prepared: PreparedRequest, done: list[Explanation]) -> None:
    """Previews in a terminal, then the tables."""
    from ratioctl.report import terminal

    pairs = [(explanation, target) for explanation in done for target in explanation.targets]
    previewed = len(pairs) if context.verbose else _PREVIEWED
    for explanation, target in pairs[:previewed] if context.out.is_terminal else ():
        labels = prepared.header["models"][explanation.model]["labels"]
        norm = explanation.norm or prepared.header["norm"]
        terminal.preview(context.out, explanation, target, labels=labels, norm=norm)
    for table in terminal.counterfactual_tables(prepared.header, done, context.out.width):
        context.out.print(table)
