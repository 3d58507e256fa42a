"""`ratioctl inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from ratioctl.cli._common import COMPUTE, Context, command, emit_json
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.text import clipped, safe_text


@command(unused=COMPUTE)
def inspect(
    context: Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|FILE.onnx", help="A package, a bundled model or an exported file."),
    ] = DEFAULT_MODEL,
) -> int | None:
    """Show what a package or an ONNX file is."""
    from ratioctl import package

    if model.endswith(".onnx"):
        from ratioctl.onnx import runtime

        loaded = runtime.load(model)
        spec: package.Spec = loaded.spec
        about = {"path": str(loaded.path), "kind": "onnx", "input": loaded.input_type}
        if loaded.threshold is not None:
            about["is_ood"] = f"confidence below {loaded.threshold:.4g}"
    else:
        found = spec = package.resolve(model)
        about = {"path": str(found.path), "kind": "package", "digest": found.digest}
        if found.edited:
            context.warn(f"{found.path}/config.json was edited after packaging: its recorded digest differs.")
    if context.json:
        emit_json({**spec.config, "name": spec.name, **about, "calibrated": spec.calibrated})
        return None
    _print(context, spec, about)
    return None


def _print(context: Context, spec: object, about: dict[str, str]) -> None:
    from rich.table import Table

    from ratioctl import package

    assert isinstance(spec, package.Spec)
    channels, height, width = spec.input_size
    ratio = spec.config["ratio"]
    options = ", ".join(f"{key} {value}" for key, value in spec.architecture_options.items())
    rows = [
        ("name", spec.name),
        *about.items(),
        ("architecture", spec.architecture + (f" ({options})" if options else "")),
        ("input size", f"{channels} x {height} x {width}, {spec.interpolation}"),
        ("mean", ", ".join(f"{value:.4g}" for value in spec.mean)),
        ("std", ", ".join(f"{value:.4g}" for value in spec.std)),
        ("classes", _some(spec.label_names)),
        ("temperature", f"{spec.temperature:.4g}" + ("" if spec.calibrated else " (not calibrated)")),
    ]
    rows += [(f"threshold {key}", f"{value:.4g}") for key, value in sorted(spec.thresholds.items())]
    rows += [
        (f"ladder l{norm}", ", ".join(f"{value:.4g}" for value in ladder))
        for norm, ladder in spec.ladders.items()
    ]
    if ratio.get("objective"):
        rows.append(("objective", str(ratio["objective"])))
    if isinstance(ratio.get("provenance"), dict):
        rows += [(str(key), str(value)) for key, value in ratio["provenance"].items()]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(safe_text(key), safe_text(value))
    context.out.print(table)
    metrics = ratio.get("metrics")
    if isinstance(metrics, dict):
        metrics = metrics.get("measurements")
    if isinstance(metrics, list) and metrics:
        context.out.print()
        context.out.print(_measurements(metrics))


def _measurements(metrics: list[object]) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    columns = ("name", "value", "interval", "n", "dataset", "ball")
    for column in columns:
        table.add_column(column, justify="right" if column in ("value", "n") else "left", overflow="fold")
    for row in metrics:
        if isinstance(row, dict):
            table.add_row(*(safe_text(_cell(row.get(column))) for column in columns))
    return table


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(_cell(item) for item in value)
    if isinstance(value, dict) and set(value) == {"p", "eps"}:
        return f"l{value['p']} {_cell(value['eps'])}"
    return str(value)


def _some(labels: tuple[str, ...], most: int = 20) -> str:
    shown = ", ".join(clipped(label) for label in labels[:most])
    return f"{len(labels)}: {shown}" + (", ..." if len(labels) > most else "")
