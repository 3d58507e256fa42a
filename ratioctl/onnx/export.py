"""A package as one ONNX file, or as a server's model folder.

Nothing appears under its name before the file was loaded by onnxruntime and compared with torch.

A `model.onnx` inside a package follows it: a change of the digest (temperature, thresholds) removes the file,
any other change (measurements of `evaluate --write`) is written to its metadata; see `package.update`. Files
elsewhere stay as they were exported.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ratioctl import package as packages
from ratioctl import recipe
from ratioctl.data.in_distribution import Images
from ratioctl.errors import OutputError, UsageError
from ratioctl.models import from_package
from ratioctl.models.predict import predictor
from ratioctl.onnx.explainer import NORMS
from ratioctl.onnx.explainer import load as load_explainer
from ratioctl.onnx.graph import OPSET, graph
from ratioctl.onnx.graph import explain as explain_graph
from ratioctl.onnx.layouts import DEFAULT, Input, Layout, find_layout, safe_name
from ratioctl.onnx.parity import (
    Agreement,
    agreement,
    check_gradient,
    check_parity,
    explained,
    latency_ms,
    sample_images,
    scratch,
)
from ratioctl.onnx.quantize import Cost, held_out, int8_warnings, quantize
from ratioctl.package import ModelPackage, Stored
from ratioctl.utils.atomic_files import make_folder, write_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and its measurements.

    Attributes:
        files: in the order in which they were written; `path`, the ONNX file, is the first.
        package: the package that contains the file; None where it was written elsewhere.
        threshold: the confidence below which `is_ood` is true.
        weights: how the file stores the weights.
        parity: onnxruntime against torch; None for a quantized file (see `cost`). Of a file with `explain`
            it compares the pictures of short searches, and probabilities instead of logits.
        latency_ms: "torch", "onnxruntime" and, for a quantized file, "onnxruntime int8" to
            {batch size: median milliseconds}; {} with `explain`.
        warnings: about the numbers.
    """

    path: Path
    files: tuple[Path, ...]
    package: ModelPackage | None
    input_type: Input
    layout: str
    opset: int
    threshold: float
    weights: Stored
    bytes: int
    parity: Agreement | None
    cost: Cost | None
    latency_ms: dict[str, dict[int, float]]
    warnings: tuple[str, ...] = ()


def export(
    model: str | os.PathLike[str] | ModelPackage = packages.DEFAULT_MODEL,
    *,
    output: str | os.PathLike[str] | None = None,
    input_type: Input = "float",
    threshold: str | float = "tpr95",
    int8: bool = False,
    weights: Stored | None = None,
    layout: str = DEFAULT,
    opset: int | None = None,
    threshold_input: bool = False,
    explain: bool = False,
    norm: str | float = "2",
    data: str | None = None,
    download: bool = False,
    on_start: Callable[[], object] | None = None,
) -> Exported:
    """Write a package as ONNX.

    Args:
        model: a package, its folder, or a bundled model's name.
        output: the file, or for a server's layout the folder in which `<name>/` is created (default: the
            current one). None writes the file into the package, so that `ood-score` needs no torch; where the
            package is bundled or read-only, or the file differs from it (`int8`, another threshold, weights
            stored otherwise), it is `<name>.onnx` in the current folder.
        input_type: "float" for float32 NCHW in [0,1], "uint8" for uint8 NHWC.
        threshold: what `is_ood` compares with: a stored name, or a confidence.
        int8: quantize, calibrated on `data`, or on the held-out images of the package's recipe.
        weights: how the file stores them; None as the package does. With "fp16" it is half as large and still
            computes in fp32.
        opset: the ONNX operator set; default OPSET.
        threshold_input: let clients give another threshold, see `ratioctl.onnx.graph.graph`.
        explain: write a file that searches counterfactuals, by default `explain.onnx` in the current folder;
            see `ratioctl.onnx.explain`. Its images are uint8 NHWC whatever `input_type` says.
        norm: of the balls that it searches, "2" or "inf".
        data: a SOURCE of in-distribution images for `int8`; with class folders, accuracy is measured too.
        layout: a name of `layouts.layout_names`.
        on_start: called after all checks, before the work that takes long.

    Raises:
        PackageError: the package, or UncalibratedError: its threshold is missing.
        SourceError: `int8`, and neither `data` nor the recipe's held-out images can be read.
        UsageError: an opset that the exporter cannot write, an unknown layout, an impossible threshold, or
            with `explain` an option without effect, another norm, or an operator that has no gradient.
        OutputError, DiskError: the output cannot be written. RatioctlError: it does not agree with torch.
    """
    package = packages.resolve(model)
    limit = packages.threshold(package, threshold)
    stored = packages.stored_as(package.weights_path)
    weights = _stored(weights, stored, int8)
    chosen = find_layout(layout)
    _refuse_without(int8, data, "2" if explain else norm, threshold_input and (chosen, explain))
    if explain:
        return _export_explain(package, output, limit, norm, opset or OPSET, int8, weights, chosen, on_start)
    usual = (int8, threshold, weights, threshold_input) == (False, "tpr95", stored, False)
    target = _target(package, output, chosen, usual)
    held = held_out(package, data, download) if int8 else None
    if on_start is not None:
        on_start()
    more: dict[str, Any] = {"weights": weights, "threshold_input": threshold_input}
    content = graph(package, threshold=limit, input_type=input_type, opset=opset or OPSET, **more)
    content, measured = _measured(package, limit, content, held, weights)
    if target is None:
        written = packages.update(package, onnx=content)
        files = [written.onnx_path or written.path]
    else:
        name = safe_name(package.name)
        written, files = None, _write(chosen.contents(target, name, content, package, input_type))
    return Exported(
        path=files[0],
        files=tuple(files),
        package=written,
        input_type=input_type,
        layout=layout,
        opset=opset or OPSET,
        threshold=limit,
        weights=weights,
        bytes=len(content),
        **measured,
    )


def _target(
    package: ModelPackage, output: str | os.PathLike[str] | None, layout: Layout, usual: bool
) -> Path | None:
    """Where to write; None for the package itself. Raises OutputError, UsageError."""
    default = output is None and not layout.is_folder and usual
    if default and not packages.is_bundled(package) and os.access(package.path, os.W_OK):
        return None
    name = "." if layout.is_folder else f"{safe_name(package.name)}.onnx"
    target = Path(name if output is None else output)
    _check_target(target, layout)
    return target


def _write(contents: dict[Path, bytes]) -> list[Path]:
    files = list(contents)
    make_folder(files[0].parent)
    write_files(contents)
    return files


def _refuse_without(
    int8: bool, data: str | None, norm: str | float, threshold_input: tuple[Layout, bool] | Literal[False]
) -> None:
    """Refuse options that have no effect without `--int8` or `--explain`, or beside them.

    Args:
        threshold_input: the layout and `explain` where it is asked for.
    """
    if data is not None and not int8:
        raise UsageError("--data", "is for --int8, which is calibrated on it", "Give both, or neither.")
    if recipe.norm_name(_norm(norm)) != "2":
        raise UsageError("--norm", "is for --explain", "Give both, or neither.")
    layout, explain = threshold_input or (None, False)
    if layout is not None and (layout.is_folder or int8 or explain):
        option = "--int8" if int8 else "--explain" if explain else f"--layout {layout.name}"
        raise UsageError("--threshold-input", f"cannot be combined with {option}", "Leave one of them out.")


def _norm(norm: str | float) -> float:
    """The norm of a graph's balls. Raises UsageError for one that it cannot search."""
    name = norm.strip().lower().removeprefix("l") if isinstance(norm, str) else f"{norm:g}"
    if name not in NORMS:
        step = f"Known: {', '.join(NORMS)}. `ratioctl counterfactual` searches the others with torch."
        raise UsageError(f"--norm {norm}", "cannot be searched by an ONNX graph", step)
    return NORMS[name]


def _export_explain(
    package: ModelPackage,
    output: str | os.PathLike[str] | None,
    threshold: float,
    norm: str | float,
    opset: int,
    int8: bool,
    weights: Stored,
    layout: Layout,
    on_start: Callable[[], object] | None,
) -> Exported:
    """`export` with `explain`."""
    p = _norm(norm)
    if int8 or layout.name != DEFAULT:
        option = "--int8" if int8 else f"--layout {layout.name}"
        raise UsageError(option, "cannot be combined with --explain", "Export two files.")
    target = Path("explain.onnx" if output is None else output)
    _check_target(target, layout)
    if on_start is not None:
        on_start()
    base = graph(package, threshold=threshold, opset=opset, weights=weights, guarantee=False)
    content = explain_graph(base, package, threshold=threshold, p=p, weights=weights)
    network = predictor(from_package(package, weights_as=weights), "cpu")
    check_gradient(base, package, network)
    reference, sample = network.predict, sample_images(package)[:32]
    with tempfile.TemporaryDirectory(prefix="ratioctl-export-") as folder:
        path = Path(folder) / "explain.onnx"
        path.write_bytes(content)
        parity = explained(sample, reference, load_explainer(path), threshold)
    check_parity(parity, reference(sample))
    write_files({target: content})
    return Exported(
        path=target,
        files=(target,),
        package=None,
        input_type="uint8",
        layout=layout.name,
        opset=opset,
        threshold=threshold,
        bytes=len(content),
        weights=weights,
        parity=parity,
        cost=None,
        latency_ms={},
    )


def _stored(asked: Stored | None, stored: Stored, int8: bool) -> Stored:
    """How the file stores its weights, given how the package does."""
    if asked == "fp16" and int8:
        raise UsageError("--weights fp16", "cannot be combined with --int8", "Leave out --int8, or this.")
    return asked or ("fp32" if int8 else stored)


def _measured(
    package: ModelPackage, threshold: float, content: bytes, held: Images | None, weights: Stored
) -> tuple[bytes, dict[str, Any]]:
    """The file, quantized where there are `held` images, and the measured fields of `Exported`."""
    cost = None
    with scratch(content) as (path, loaded):
        reference = predictor(from_package(package, weights_as=weights), "cpu").predict
        sample = sample_images(package)
        parity = agreement(sample, reference, loaded, package, threshold)
        check_parity(parity, reference(sample))
        if held is not None:
            content, cost = quantize(path, loaded, package, threshold, held)
        latency = {"torch": latency_ms(reference, sample), "onnxruntime": latency_ms(loaded.predict, sample)}
    if held is not None:
        with scratch(content) as (_, small):
            latency["onnxruntime int8"] = latency_ms(small.predict, sample)
    return content, {
        "parity": parity if held is None else None,
        "cost": cost,
        "latency_ms": latency,
        "warnings": int8_warnings(held, latency),
    }


def _check_target(target: Path, layout: Layout) -> None:
    """Refuse an output that cannot be written, before the minutes that exporting takes."""
    if not layout.is_folder:
        if target.is_dir():
            raise OutputError(target, "is a folder", f"Name a file, for example {target / 'model.onnx'}.")
        if target.exists() and not target.is_file():
            raise OutputError(target, "is a device or a pipe, not a regular file", "Name a file.")
        if target.is_file() and target.stat().st_size and b"ratioctl.export" not in target.read_bytes():
            step = "Delete it, or choose another --output."
            raise OutputError(target, "exists and was not exported by ratioctl", step)
        if not target.absolute().parent.is_dir():
            raise OutputError(target, "cannot be written: there is no such folder", "Create it first.")
        if not os.access(target.absolute().parent, os.W_OK):
            raise OutputError(target, "cannot be written: permission denied", "Write somewhere else.")
        return
    if target.suffix == ".onnx":
        step = "Name a folder, or leave out --output for the current one."
        raise UsageError(f"--output {target}", f"is a file, and --layout {layout.name} makes a folder", step)
    if target.exists() and not target.is_dir():
        raise OutputError(target, "is not a folder", "Name a folder.")
