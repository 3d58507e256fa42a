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
    from ratioctl.types import Explanation

_TOLD = 8  # images whose way to the model's input is told one by one
_SHOWN = 4  # images and targets previewed in the terminal


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
    from ratioctl.errors import ImageError, Interrupted
    from ratioctl.report import counterfactual_files as report
    from ratioctl.report import terminal

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
    for doubt in prepared.warnings:
        context.warn(doubt)
    errors: list[dict[str, str]] = []
    told = 0

    def tell_error(path: str, error: ImageError) -> None:
        errors.append({"path": path, "error": error.reason})
        progress.warn(str(error))

    def tell_picture(picture: counterfactuals.Picture) -> None:
        nonlocal told
        if picture.notes:
            told += 1
            if told <= _TOLD or context.verbose:
                progress.note(f"{picture.path}: {'; '.join(picture.notes)}")

    finished = 0
    earlier = (out / report.DOCUMENT).exists()
    total = len(prepared.sources) * len(prepared.models)
    with Progress(context, total, tenths=False) as progress:

        def counted() -> Iterator[Explanation]:
            nonlocal finished
            for explanation in counterfactuals.explain(
                prepared,
                device=context.device,
                precision=context.precision,
                on_error=tell_error,
                on_picture=tell_picture,
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
                animation=None if picture_format == "png" else picture_format,
                cards=prepared.cards,
            )
        except KeyboardInterrupt as stop:
            reason = f"stopped with {finished} of {total} images done"
            saved: Path | None = getattr(stop, "saved", None)
            steps_on = [f"Start again with: {context.typed()}"]
            if (out / report.DOCUMENT).exists() and saved != out:
                steps_on.insert(0, f"The earlier answers in {out} stay.")
            if saved is not None:
                steps_on.insert(0, f"They are in {saved / report.PAGE}.")
            step = " ".join(steps_on)
            raise Interrupted(out, reason, step, signum=getattr(stop, "signum", 2)) from None
    if told > _TOLD and not context.verbose:
        context.note(
            f"... and {told - _TOLD} more images were fitted to the model's input (--verbose lists them)"
        )
    if context.json:
        emit_json({**prepared.header, **report.document_body(done, errors)})
    else:
        for shown, (explanation, target_of) in enumerate((e, t) for e in done for t in e.targets):
            if not context.out.is_terminal or (shown >= _SHOWN and not context.verbose):
                break
            labels = prepared.header["models"][explanation.model]["labels"]
            norm_of = explanation.norm or prepared.header["norm"]
            terminal.preview(context.out, explanation, target_of, labels=labels, norm=norm_of)
        for table in terminal.counterfactual_tables(prepared.header, done, context.out.width):
            context.out.print(table)
    if not context.json and (done or not earlier):
        context.note(f"Pictures, page and numbers: {out / report.PAGE}")
    elif not context.json:
        context.note(f"Nothing was written; the earlier answers in {out} stay.")
    if open_page:
        import webbrowser

        webbrowser.open((out / report.PAGE).resolve().as_uri())
    return 3 if errors else None
