"""`ratioctl inspect`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratioctl.cli._common import COMPUTE, Context, command, emit_json
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.text import clipped, safe_text

if TYPE_CHECKING:
    from ratioctl.package import Spec


@command(unused=COMPUTE)
def inspect(
    context: Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|FILE.onnx", help="A package, a bundled model or an exported file."),
    ] = DEFAULT_MODEL,
) -> int | None:
    """Describe a package or an ONNX file."""
    from ratioctl import package
    from ratioctl.onnx import runtime

    if runtime.is_onnx_file(model):
        from ratioctl.onnx import explainer
        from ratioctl.recipe import norm_name

        opened = runtime.open_file(Path(model))
        loaded = (explainer if "explain" in opened.about else runtime).from_opened(opened)
        spec: Spec = opened.spec
        about = {"path": str(loaded.path), "kind": "onnx"}
        if isinstance(loaded, explainer.Explainer):
            about |= {"input": "uint8", "searches": f"counterfactuals in l{norm_name(loaded.p)}"}
        else:
            about["input"] = loaded.input_type
        stored: str = loaded.weights
        if loaded.threshold is not None:
            per_class = ", per class" if getattr(loaded.threshold, "classes", None) is not None else ""
            about["is_ood"] = f"confidence below {loaded.threshold:.4g}{per_class}"
    else:
        found = spec = package.resolve(model)
        about = {"path": str(found.path), "kind": "package", "digest": found.digest}
        stored = package.stored_as(found.weights_path)
        if found.edited:
            context.warn(f"{found.path}/config.json was edited after packaging: its recorded digest differs.")
    about["weights"] = stored if context.json or stored == "fp32" else "fp16, computed in fp32"
    if context.json:
        emit_json({**spec.config, "name": spec.name, **about, "calibrated": spec.calibrated})
        return None
    _print(context, spec, about)
    return None


def _print(context: Context, spec: Spec, about: dict[str, str]) -> None:
    """The facts, then the measurements, then the provenance; at most 80 columns where names are short."""
    from ratioctl import package

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
    if spec.certified is not None:
        rows.append(("certified head", f"bounds the confidence in linf {spec.certified:g}"))
    rows += [(f"threshold {key}", f"{value:.4g}") for key, value in sorted(spec.thresholds.items())]
    rows += [
        (f"ladder l{norm}", ", ".join(f"{value:.4g}" for value in ladder))
        for norm, ladder in spec.ladders.items()
    ]
    objective = ratio.get("objective")
    if isinstance(objective, dict):
        sides = {"inside": "ID objective", "outside": "OOD objective", "certified": "head objective"}
        rows += [(sides.get(str(side), str(side)), _short(value)) for side, value in objective.items()]
    elif objective:
        rows.append(("objective", package.inline(objective)))
    context.out.print(_facts(rows))
    metrics = ratio.get("metrics")
    if isinstance(metrics, dict):
        metrics = metrics.get("measurements")
    if isinstance(metrics, list) and metrics:
        context.out.print()
        context.out.print(_measurements(metrics))
    if isinstance(ratio.get("provenance"), dict):
        context.out.print()
        context.out.print(_facts([(str(key), _short(value)) for key, value in ratio["provenance"].items()]))


def _short(value: object) -> str:
    """A JSON value in one line, SHA-256 digests by their first 12 digits (`--json` has them in full)."""
    from ratioctl import package

    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", package.inline(value))


def _facts(rows: list[tuple[str, str]]) -> object:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(safe_text(key), safe_text(value))
    return table


def _measurements(metrics: list[object]) -> object:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    columns = ("name", "value", "interval", "n", "dataset", "ball")
    for column in columns:
        right = column in ("value", "n")
        table.add_column(
            column, justify="right" if right else "left", overflow="fold", no_wrap=column != "dataset"
        )
    for row in metrics:
        if isinstance(row, dict):
            cells = {column: _cell(row.get(column)) for column in columns}
            for name, shown in (("kept_at_", "ID acceptance "), ("let_through_at_", "OOD acceptance ")):
                cells["name"] = cells["name"].replace(name, shown)
            table.add_row(*map(safe_text, cells.values()))
    return table


def _cell(value: object) -> str:
    from ratioctl import package

    if isinstance(value, list):
        return " to ".join(map(package.inline, value))
    return "-" if value is None else package.inline(value)


def _some(labels: tuple[str, ...], most: int = 20) -> str:
    shown = ", ".join(clipped(label) for label in labels[:most])
    return f"{len(labels)}: {shown}" + (", ..." if len(labels) > most else "")
