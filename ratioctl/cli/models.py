"""`ratioctl models`."""

from __future__ import annotations

from ratioctl.cli._common import COMPUTE, Context, command, emit_json
from ratioctl.errors import PackageError
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.text import safe_text


@command(unused=COMPUTE)
def models(context: Context) -> int | None:
    """List the bundled models."""
    from ratioctl import package

    rows = []
    for name in package.bundled():
        try:
            found = package.read(package.find(name), verify=False)
        except PackageError as error:
            context.warn(str(error))
            continue
        rows.append((name, found))
    if context.json:
        emit_json(
            {
                "default": DEFAULT_MODEL,
                "models": [
                    {
                        "name": name,
                        "path": found.path,
                        "digest": found.digest,
                        "architecture": found.architecture,
                        "input_size": found.input_size,
                        "labels": found.label_names,
                        "calibrated": found.calibrated,
                        "onnx": found.onnx_path is not None,
                    }
                    for name, found in rows
                ],
            }
        )
        return None
    if not rows:
        context.note("No models are installed with ratioctl.")
        return None
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "architecture", "input", "classes", "calibrated", "digest"):
        table.add_column(column, overflow="fold")
    for name, found in rows:
        table.add_row(
            safe_text(name) + (" (default)" if name == DEFAULT_MODEL else ""),
            safe_text(found.architecture),
            "x".join(str(n) for n in found.input_size),
            str(len(found.label_names)),
            "yes" if found.calibrated else "no",
            found.digest[:12],
        )
    context.out.print(table)
    return None
