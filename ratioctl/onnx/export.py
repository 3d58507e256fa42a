"""A package as one ONNX file that says by itself what it does not know, or as a server's model folder.

    image -> [to floats] -> network -> logits -> / T -> softmax -> probabilities, label, confidence,
                                                                   ood_score, is_ood

Nothing appears under its name before the file was loaded by onnxruntime and compared with torch.

The metadata hold the package's config under "ratioctl" and, under "ratioctl.export", the threshold that
`is_ood` compares with. A `model.onnx` inside a package follows it: what changes its digest (temperature,
thresholds) removes the file, anything else (measurements of `evaluate --write`) is brought into its metadata;
see `ratioctl.package.update`. Files elsewhere stay as they were exported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, loader, out_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import OutputError, RatioctlError, SourceError, UsageError
from ratioctl.models import fold_batchnorm, from_package
from ratioctl.models.predict import predictor
from ratioctl.onnx import runtime
from ratioctl.package import ModelPackage, Spec
from ratioctl.utils import resources
from ratioctl.utils.atomic_files import make_folder, write_file, write_files

OPSET = 18  # the lowest the exporter writes without conversion, so what the most servers read
TOLERANCE = 1e-4  # of logits up to 32 in size; beyond, float32 itself has less
MAX_BATCH = 64  # of Triton's dynamic batcher
MIN_IMAGES = 32  # to quantise on and measure

Input = Literal["float", "uint8"]
Layout = Literal["file", "triton", "kserve"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two roads agree on the same images.

    Attributes:
        n: images; difference: the largest of their logits.
        labels, flags: how many predictions, and how many out-of-distribution flags, differ.
    """

    n: int
    difference: float
    labels: int
    flags: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What quantisation costs on held-out images, before and after; None where there are no labels.

    Attributes:
        source: the images; agreement: with the unquantised model on them.
        outside, outside_agreement: of images that are no class of the model's.
        accuracy, auroc: (before, after); auroc against `outside`.
    """

    source: str
    agreement: Agreement
    outside: str
    outside_agreement: Agreement
    accuracy: tuple[float, float] | None
    auroc: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and what was measured before.

    Attributes:
        files: in the order they were written; `path`, the ONNX file, is the first.
        package: the package that carries the file now; None where it was written elsewhere.
        threshold: the confidence below which `is_ood` is true.
        parity: onnxruntime against torch, of the file as it is; None for a quantised file (see `cost`).
        latency_ms: "torch", "onnxruntime" and, for a quantised file, "onnxruntime int8" to
            {batch size: median milliseconds}.
        warnings: findings that stand beside the numbers.
    """

    path: Path
    files: tuple[Path, ...]
    package: ModelPackage | None
    input_type: Input
    layout: Layout
    opset: int
    threshold: float
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
    layout: Layout = "file",
    opset: int | None = None,
    data: str | None = None,
    download: bool = False,
    on_start: Callable[[], object] | None = None,
) -> Exported:
    """Write a package as ONNX.

    Args:
        model: a package, its folder, or a bundled model's name.
        output: the file, or for a server's layout the folder in which `<name>/` is made (default: here).
            None puts the file into the package, so that `ood-score` needs no torch; where the package is
            bundled or read-only, or the file departs from it (`int8`, another threshold), it is
            `<name>.onnx` here.
        input_type: "float" for float32 NCHW in [0,1], "uint8" for uint8 NHWC.
        threshold: what `is_ood` compares with: a stored name, or a confidence.
        int8: quantise, calibrated on `data`, or on the held-out images of the package's recipe.
        opset: the ONNX operator set; default OPSET.
        data: a SOURCE of in-distribution images for `int8`; with class folders, accuracy is measured too.
        begin: called when everything was checked, before the work that takes long.

    Raises:
        PackageError: the package, or UncalibratedError: its threshold is missing.
        SourceError: `int8`, and neither `data` nor the recipe's held-out images can be read.
        UsageError: an opset that cannot be had, or a threshold that cannot be.
        OutputError, DiskError: it cannot be written there.
        RatioctlError: the file does not agree with torch; nothing is written then.
    """
    package = packages.resolve(model)
    limit = packages.threshold(package, threshold)
    if data is not None and not int8:
        raise UsageError("--data", "is for --int8, which is calibrated on it", "Give both, or neither.")
    name = safe_name(package.name)
    inside = output is None and layout == "file" and not int8 and threshold == "tpr95" and _ours(package)
    target = Path(output) if output is not None else Path(f"{name}.onnx" if layout == "file" else ".")
    if not inside:
        _check_target(target, layout)
    held = _held_out(package, data, download) if int8 else None
    if on_start is not None:
        on_start()
    content = graph(package, threshold=limit, input_type=input_type, opset=opset or OPSET)
    cost = None
    with _scratch(content) as (path, loaded):
        reference = predictor(package, "cpu").predict
        sample = _sample(package)
        parity = agreement(sample, reference, loaded, package, limit)
        _insist(parity, reference(sample), path)
        if held is not None:
            content, cost = _quantised(path, loaded, package, limit, held)
        latency = {"torch": _latency(reference, sample), "onnxruntime": _latency(loaded.predict, sample)}
    if held is not None:
        with _scratch(content) as (_, small):
            latency["onnxruntime int8"] = _latency(small.predict, sample)
    written: ModelPackage | None = None
    if inside:
        written = packages.update(package, onnx=content)
        assert written.onnx_path is not None
        files = [written.onnx_path]
    elif layout == "file":
        write_file(target, content)
        files = [target]
    else:
        files = _lay_out(target, name, content, package, input_type, layout)
    return Exported(
        path=files[0],
        files=tuple(files),
        package=written,
        input_type=input_type,
        layout=layout,
        opset=opset or OPSET,
        threshold=limit,
        bytes=len(content),
        parity=None if int8 else parity,
        cost=cost,
        latency_ms=latency,
        warnings=_doubts(held, latency),
    )


def _ours(package: ModelPackage) -> bool:
    """Whether the export may go into the package: it is neither bundled nor read-only."""
    assets = resources.folder("assets").resolve()
    return assets not in package.path.resolve().parents and os.access(package.path, os.W_OK)


def _check_target(target: Path, layout: Layout) -> None:
    """Say what cannot be written before the minutes that exporting takes."""
    if layout == "file":
        if target.is_dir():
            raise OutputError(target, "is a folder", f"Name a file, for example {target / 'model.onnx'}.")
        if target.exists() and not target.is_file():
            raise OutputError(
                target, "is a device or a pipe, and the file is put in its place whole", "Name a file."
            )
        if not target.absolute().parent.is_dir():
            raise OutputError(target, "cannot be written: there is no such folder", "Make it first.")
        if not os.access(target.absolute().parent, os.W_OK):
            raise OutputError(target, "cannot be written: permission denied", "Write somewhere else.")
        return
    if target.suffix == ".onnx":
        step = "Name a folder, or nothing for the present one."
        raise UsageError(f"--output {target}", f"is a file, and --layout {layout} makes a folder", step)
    if target.exists() and not target.is_dir():
        raise OutputError(target, "is not a folder", "Name a folder.")


# --- the graph ----------------------------------------------------------------------------------------------


class Flagging(nn.Module):
    """The network with everything around it: from the input as clients send it to the six outputs."""

    def __init__(self, network: nn.Module, temperature: float, threshold: float, input_type: Input) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature
        self.threshold = threshold
        self.input_type = input_type

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        pixels = image.permute(0, 3, 1, 2).float() / 255 if self.input_type == "uint8" else image
        logits = self.network(pixels)
        probabilities = torch.softmax(logits / self.temperature, dim=1)
        confidence = probabilities.amax(dim=1)
        is_ood = torch.logical_not(confidence >= self.threshold)  # true for NaN: what is no image is out
        return logits, probabilities, logits.argmax(dim=1), confidence, 1 - confidence, is_ood


def graph(
    package: ModelPackage, *, threshold: float, input_type: Input = "float", opset: int = OPSET
) -> bytes:
    """The ONNX file of a package, checked by `onnx.checker`, with its config as metadata.

    Raises:
        UsageError: an opset that the exporter cannot write.
    """
    refused = UsageError(f"--opset {opset}", "cannot be written", f"Try {OPSET}, the default, or above.")
    if opset < OPSET:
        raise refused
    network = fold_batchnorm(from_package(package))
    channels, height, width = package.input_size
    if input_type == "uint8":
        example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    else:
        example = torch.zeros(2, channels, height, width)
    flagging = Flagging(network, package.temperature, threshold, input_type).eval()
    try:
        with _quietly():
            program = torch.onnx.export(
                flagging,
                (example,),
                dynamo=True,
                input_names=["image"],
                output_names=list(runtime.OUTPUTS),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        if opset != OPSET:
            raise refused from error
        raise RatioctlError(
            package.name, f"torch cannot export this network: {type(error).__name__}", "Please report it."
        ) from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    if {entry.domain: entry.version for entry in model.opset_import}.get("") != opset:
        raise refused
    return _finished(model, package, threshold)


def _finished(model: onnx.ModelProto, package: Spec, threshold: float) -> bytes:
    """The file's bytes: without the exporter's notes (paths of our sources among them), with our metadata:
    the package's config, and beside it the threshold that the graph compares with.
    """
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        for field in ("metadata_props", "doc_string"):
            with contextlib.suppress(ValueError):  # an older onnx lacks some of them
                part.ClearField(field)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.ClearField("doc_string")
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == "batch":
                axis.dim_param = "N"
    model.graph.name = safe_name(package.name)
    model.producer_name = "ratioctl"
    metadata = {runtime.CONFIG: packages.portable_config(package), runtime.ABOUT: {"threshold": threshold}}
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    onnx.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString()
    return data


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter speaks to developers through warnings and the log; neither is about the user's model."""
    loud = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "")]
    levels = [logger.level for logger in loud]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loud:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loud, levels, strict=True):
                logger.setLevel(level)


# --- proof --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _scratch(data: bytes) -> Iterator[tuple[Path, runtime.Runtime]]:
    """The file under a name of its own, loaded as any user would load it."""
    with tempfile.TemporaryDirectory(prefix="ratioctl-export-") as folder:
        path = Path(folder) / "model.onnx"
        write_file(path, data)
        yield path, runtime.load(path)


def _sample(package: Spec) -> np.ndarray:
    """uint8 (N, H, W, C): crops of two photographs, uniform and smooth noise, a quarter each."""
    channels, size, _ = package.input_size
    count = max(8, min(64, 2**20 // (size * size)))
    return out_distribution.load(out_distribution.GENERATED, size, channels, count=count).pixels


def agreement(
    pixels: np.ndarray,
    reference: Callable[[np.ndarray], np.ndarray],
    other: runtime.Runtime,
    package: Spec,
    threshold: float,
) -> Agreement:
    """Compare the graph's outputs with what follows from the reference's logits.

    A label or flag counts as different where it is, unless the reference itself is undecided to within
    float32's rounding (the two highest logits, or confidence and threshold, nearly equal).

    Args:
        pixels: uint8 (N, H, W, C), given to the graph in batches of 1, 2 and 32.
    """
    logits = reference(pixels)
    cuts = [0, 1, 3, *range(35, len(pixels), 32), len(pixels)]
    runs = [other.run(pixels[a:b]) for a, b in itertools.pairwise(cuts) if b > a]
    found = {name: np.concatenate([run[name] for run in runs]) for name in runtime.OUTPUTS}
    p = metrics.softmax(logits, package.temperature)
    top = np.sort(logits, axis=1)
    clear = top[:, -1] - top[:, -2] > 1e-5 * np.maximum(1, np.abs(top).max(axis=1))
    confidence = p.max(axis=1)
    decided = np.abs(confidence - threshold) > 1e-6
    return Agreement(
        n=len(pixels),
        difference=float(np.abs(logits - found["logits"]).max()),
        labels=int(((logits.argmax(axis=1) != found["label"]) & clear).sum()),
        flags=int((((confidence < threshold) != found["is_ood"]) & decided).sum()),
    )


def _insist(parity: Agreement, logits: np.ndarray, path: Path) -> None:
    allowed = TOLERANCE * max(1.0, float(np.abs(logits).max()) / 32)
    if parity.difference <= allowed and not parity.labels and not parity.flags:
        return
    reason = (
        f"does not agree with torch on {parity.n} images: logits differ by {parity.difference:.2g}, "
        f"{parity.labels} labels and {parity.flags} flags differ"
    )
    raise RatioctlError("the exported file", reason, "Nothing was written. Please report it.")


def _latency(predict: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> dict[int, float]:
    """{batch size: median milliseconds of one call}, batches of 1 and 32."""
    found = {}
    for batch in (1, 32):
        part = np.ascontiguousarray(np.resize(pixels, (batch, *pixels.shape[1:])))
        predict(part)
        times: list[float] = []
        while len(times) < 3 or (len(times) < 50 and sum(times) < 0.5):
            started = time.perf_counter()
            predict(part)
            times.append(time.perf_counter() - started)
        found[batch] = 1000 * statistics.median(times)
    return found


# --- quantisation -------------------------------------------------------------------------------------------


def _quantised(
    path: Path, plain: runtime.Runtime, package: ModelPackage, threshold: float, images: Images
) -> tuple[bytes, Cost]:
    """8-bit convolutions, calibrated on one half of `images`, and what that costs on the other half."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    held, labels = images.pixels, images.labels
    # Half to choose the ranges on, half to measure on: a range fits the images it was chosen on best.
    order = np.random.default_rng(0).permutation(len(held))
    ranges, rest = np.sort(order[: min(512, len(held) // 2)]), np.sort(order[min(512, len(held) // 2) :])

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [plain.fitting(held[ranges[k : k + 32]]) for k in range(0, len(ranges), 32)]

        def get_next(self) -> dict[str, Any] | None:
            return {"image": self.left.pop(0)} if self.left else None

    result = path.with_name("int8.onnx")
    with _quietly():
        quantize_static(
            path,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            # The first and the last layer stay in floats: they cost little, and everything hangs on them.
            op_types_to_quantize=["Conv", "Add"],
            nodes_to_exclude=[node.name for node in onnx.load(path).graph.node if node.op_type == "Conv"][:1],
            per_channel=True,
            # 7-bit weights: products of 8-bit ones overflow 16 bits on processors without VNNI. Measured on
            # a width-16 ResNet-18 there: 10 % of the labels changed with 8 bits, 1 % with 7.
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
    model = onnx.load(result)
    data = _finished(model, package, threshold)
    with _scratch(data) as (_, small):
        cost = _cost(held[rest], None if labels is None else labels[rest], plain, small, package, threshold)
    return data, dataclasses.replace(cost, source=images.source)


def _held_out(package: ModelPackage, source: str | None, download: bool) -> Images:
    """In-distribution images to quantise on: `source`, else what the package's recipe calibrates on.

    Raises:
        SourceError: there are none, or fewer than MIN_IMAGES; the step names the option that supplies them.
    """
    channels, size, _ = package.input_size
    if source is not None:
        found = in_distribution.load(source, size, channels, download=download)
        if found.labels is not None:
            found = in_distribution.load_labelled(
                source, size, channels, package.label_names, download=download
            )
    else:
        step = f"Name in-distribution images for the quantisation with --data SOURCE, {MIN_IMAGES} at least."
        if package.recipe_text is None:
            raise SourceError(package.name, "has no recipe, so no calibration data are known", step)
        recipe = recipes.loads(package.recipe_text, str(package.path))
        try:
            found = loader.held_out(recipe, package.label_names, download=download)
        except (SourceError, UsageError) as error:
            reason = f"the calibration data of its recipe cannot be read: {error.thing} {error.reason}"
            raise SourceError(package.name, reason, step) from None
    if len(found) < MIN_IMAGES:
        reason = (
            f"holds {len(found)} image(s) that can be read; {MIN_IMAGES} are needed to quantise and measure"
        )
        raise SourceError(found.source, reason, "Name more of them with --data.")
    return found


def _doubts(held: Images | None, latency: Mapping[str, Mapping[int, float]]) -> tuple[str, ...]:
    """What stands beside the numbers of a quantised file."""
    if held is None:
        return ()
    found = []
    if held.errors:
        found.append(f"{len(held.errors)} of the images of {held.source} could not be read")
    if held.labels is None:
        found.append(f"{held.source} has no class folders: accuracy and AUROC are not measured")
    before, after = (latency[name][32] for name in ("onnxruntime", "onnxruntime int8"))
    if after > before:
        found.append(
            f"int8 is not faster here: batch 32 takes {after:.3g} ms instead of {before:.3g} ms. It pays on "
            "wide networks where the processor has instructions for it (VNNI, or ARM's dot products)"
        )
    return tuple(found)


def _cost(
    pixels: np.ndarray,
    labels: np.ndarray | None,
    plain: runtime.Runtime,
    small: runtime.Runtime,
    package: ModelPackage,
    threshold: float,
) -> Cost:
    channels, size, _ = package.input_size
    sources = ["photos:flower", "noise:smooth"]
    out = out_distribution.load(
        sources, size, channels, count=max(8, min(256, 2**21 // (size * size)))
    ).pixels
    logits = [_batched(road, pixels) for road in (plain, small)]
    far = [_batched(road, out) for road in (plain, small)]
    known = [metrics.confidence(z, package.temperature) for z in logits]
    other = [metrics.confidence(z, package.temperature) for z in far]
    accuracy = auroc = None
    if labels is not None:
        accuracy = tuple(metrics.accuracy(z.argmax(axis=1), labels) for z in logits)
        auroc = tuple(metrics.auroc(-c, -o) for c, o in zip(known, other, strict=True))
    return Cost(
        source="",
        agreement=_between(logits, known, threshold),
        outside=", ".join(sources),
        outside_agreement=_between(far, other, threshold),
        accuracy=accuracy,  # type: ignore[arg-type]
        auroc=auroc,  # type: ignore[arg-type]
    )


def _between(logits: Sequence[np.ndarray], confidences: Sequence[np.ndarray], threshold: float) -> Agreement:
    labels = [z.argmax(axis=1) for z in logits]
    flags = [c < threshold for c in confidences]
    return Agreement(
        n=len(logits[0]),
        difference=float(np.abs(logits[0] - logits[1]).max()),
        labels=int((labels[0] != labels[1]).sum()),
        flags=int((flags[0] != flags[1]).sum()),
    )


def _batched(road: runtime.Runtime, pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([road.predict(pixels[k : k + 32]) for k in range(0, len(pixels), 32)])


# --- servers' folders ---------------------------------------------------------------------------------------


def safe_name(name: str) -> str:
    """A name that is also one of a folder, a Triton model and an ONNX graph."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"


def _lay_out(
    root: Path, name: str, data: bytes, package: Spec, input_type: Input, layout: Layout
) -> list[Path]:
    """Write a model repository; the configuration comes last, so a server that polls finds it complete."""
    folder = root / name
    make_folder(folder / "1")
    contents = {
        folder / "1" / "model.onnx": data,
        folder / "labels.txt": _label_lines(package).encode(),
        folder / "config.pbtxt": triton_config(name, package, input_type).encode(),
    }
    if layout == "kserve":
        contents[root / "inferenceservice.yaml"] = kserve_manifest(name).encode()
    write_files(contents)
    return list(contents)


def _label_lines(package: Spec) -> str:
    return "".join(re.sub(r"[\r\n]+", " ", label) + "\n" for label in package.label_names)


def triton_config(name: str, package: Spec, input_type: Input) -> str:
    """`config.pbtxt`. With batching the dims leave the batch out; values of one number per image are
    declared as [1] and reshaped to the empty shape that the graph has.
    """
    channels, height, width = package.input_size
    count = len(package.label_names)
    shape = [height, width, channels] if input_type == "uint8" else [channels, height, width]
    kind = "TYPE_UINT8" if input_type == "uint8" else "TYPE_FP32"
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {MAX_BATCH}",
        "input [",
        f'  {{ name: "image" data_type: {kind} dims: {shape} }}',
        "]",
        "output [",
    ]
    kinds = {"label": "TYPE_INT64", "is_ood": "TYPE_BOOL"}
    entries = []
    for output in runtime.OUTPUTS:
        if output in ("logits", "probabilities"):
            rest = f'dims: [ {count} ] label_filename: "labels.txt"'
        else:
            rest = "dims: [ 1 ] reshape { shape: [ ] }"
        entries.append(f'  {{ name: "{output}" data_type: {kinds.get(output, "TYPE_FP32")} {rest} }}')
    return "\n".join([*lines, ",\n".join(entries), "]", "dynamic_batching { }", ""])


def kserve_manifest(name: str) -> str:
    """An InferenceService for KServe's Triton runtime; where the folder lies is for the user to fill in."""
    host = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:50] or "model"
    return "\n".join(
        [
            "apiVersion: serving.kserve.io/v1beta1",
            "kind: InferenceService",
            "metadata:",
            f"  name: {json.dumps(host)}",
            "spec:",
            "  predictor:",
            "    model:",
            "      modelFormat:",
            "        name: onnx",
            '        version: "1"',
            "      protocolVersion: v2",
            "      runtime: kserve-tritonserver",
            f"      # The folder that holds {name}/, for example a volume or a bucket.",
            '      storageUri: "pvc://models/repository"',
            "",
        ]
    )
