"""`ratioctl thresholds`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratioctl.cli._common import COMPUTE, Context, command, emit_json
from ratioctl.errors import OutputError, UncalibratedError, UsageError
from ratioctl.utils.defaults import DEFAULT_MODEL

if TYPE_CHECKING:
    from ratioctl.package import Spec


@command(unused=COMPUTE)
def thresholds(
    context: Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|FILE.onnx", help="A package, a bundled model or an exported file."),
    ] = DEFAULT_MODEL,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.html",
            help="Also write a page that plots the ID over the OOD acceptance rate.",
        ),
    ] = None,
) -> int | None:
    """Show stored thresholds and what they accept."""
    from ratioctl import package

    if model.endswith(".onnx"):
        from ratioctl.onnx import runtime

        spec: Spec = runtime.load(model).spec
    else:
        spec = package.resolve(model)
    if not spec.thresholds_of(spec.score):
        step = f"Run `ratioctl calibrate {spec.name} --data SOURCE --out DIR`."
        raise UncalibratedError(spec.name, "has no thresholds: it is not calibrated", step)
    if out is not None:
        _write(context, spec, out)
    from ratioctl.report import terminal
    from ratioctl.report import thresholds as report

    if context.json:
        emit_json({**report.document(spec), "page": out})
        return None
    table = report.table(spec)
    context.out.print(terminal.rich_table(table))
    for text in (table.note, *report.statements(spec)):
        context.out.print(text, style="dim", soft_wrap=True)
    if out is not None:
        context.out.print(f"Written: {out}")
    return None


def _write(context: Context, spec: Spec, out: Path) -> None:
    from ratioctl.package.records import acceptances
    from ratioctl.report import thresholds as report
    from ratioctl.utils.atomic_files import write_file

    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}", "is not the name of a page", "Name a file that ends in .html.")
    if out.exists() and (not out.is_file() or report.MARK.encode() not in out.read_bytes()):
        step = "Delete it, or choose another --out."
        raise OutputError(out, "exists and was not written by ratioctl thresholds", step)
    measured = acceptances(spec)
    if measured is None or not measured.ood:
        context.warn(
            f"{spec.name} has no acceptances of OOD images, so the page has no plot; calibrate it with "
            "--ood NAME=SOURCE"
        )
    write_file(out, report.page(spec).encode())
