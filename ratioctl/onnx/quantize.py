"""8-bit quantization of an exported file, and its cost on held-out images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ratioctl import metrics
from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, loader, out_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError, UsageError
from ratioctl.onnx import runtime
from ratioctl.onnx.graph import finish, quiet
from ratioctl.onnx.parity import Agreement, between, scratch
from ratioctl.package import ModelPackage
from ratioctl.utils.text import milliseconds

MIN_IMAGES = 32  # to quantize on and measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of quantization on held-out images; None where there are no labels.

    Attributes:
        source: the the ID images; agreement: with the unquantized model on them.
        outside, outside_agreement: the OOD images, and the agreement on them.
        accuracy, auroc: (before, after); auroc against `outside`.
    """

    source: str
    agreement: Agreement
    outside: str
    outside_agreement: Agreement
    accuracy: tuple[float, ...] | None
    auroc: tuple[float, ...] | None


def held_out(package: ModelPackage, source: str | None, download: bool) -> Images:
    """In-distribution images to quantize on: `source`, else the calibration data of the package's recipe.

    Raises:
        SourceError: there are none, or fewer than MIN_IMAGES; the step names the option that supplies them.
        UsageError: the package has a certified head, whose bounds do not hold for a quantized copy.
    """
    if package.certified is not None:
        reason = f"would break what the certified head of {package.name} guarantees"
        raise UsageError("--int8", reason, "Export it in fp32 or with --weights fp16.")
    channels, size = package.input_size[0], package.frame
    if source is not None:
        found = in_distribution.load(source, size, channels, download=download)
        if found.labels is not None:
            found = in_distribution.load_labelled(
                source, size, channels, package.label_names, download=download
            )
    else:
        step = f"Name in-distribution images for the quantization with --data SOURCE, {MIN_IMAGES} at least."
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
            f"holds {len(found)} image(s) that can be read; {MIN_IMAGES} are needed to quantize and measure"
        )
        raise SourceError(found.source, reason, "Name more of them with --data.")
    return found


def quantize(
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
    # One half to choose ranges, the other to measure: a range fits best the images it was chosen on.
    order = np.random.default_rng(0).permutation(len(held))
    ranges, rest = np.sort(order[: min(512, len(held) // 2)]), np.sort(order[min(512, len(held) // 2) :])

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [plain.prepare(held[ranges[k : k + 32]]) for k in range(0, len(ranges), 32)]

        def get_next(self) -> dict[str, Any] | None:
            return {"image": self.left.pop(0)} if self.left else None

    result = path.with_name("int8.onnx")
    with quiet():
        quantize_static(
            path,
            result,
            Reader(),
            quant_format=QuantFormat.QDQ,
            # The first and the last layer stay float32: they cost little and decide most.
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
    data = finish(model, package, {"threshold": threshold})
    with scratch(data) as (_, small):
        cost = _cost(held[rest], None if labels is None else labels[rest], plain, small, package, threshold)
    return data, dataclasses.replace(cost, source=images.source)


def _cost(
    pixels: np.ndarray,
    labels: np.ndarray | None,
    plain: runtime.Runtime,
    small: runtime.Runtime,
    package: ModelPackage,
    threshold: float,
) -> Cost:
    channels, size = package.input_size[0], package.frame
    sources = ["photos:flower", "noise:smooth"]
    out = out_distribution.load(sources, size, channels, count=max(8, min(256, 2**21 // size.area))).pixels
    logits = [_batched(model, pixels) for model in (plain, small)]
    far = [_batched(model, out) for model in (plain, small)]
    known = [metrics.confidence(z, package.temperature) for z in logits]
    other = [metrics.confidence(z, package.temperature) for z in far]
    accuracy = auroc = None
    if labels is not None:
        accuracy = tuple(metrics.accuracy(z.argmax(axis=1), labels) for z in logits)
        auroc = tuple(metrics.auroc(-c, -o) for c, o in zip(known, other, strict=True))
    return Cost(
        source="",
        agreement=between(logits, package, threshold),
        outside=", ".join(sources),
        outside_agreement=between(far, package, threshold),
        accuracy=accuracy,
        auroc=auroc,
    )


def _batched(model: runtime.Runtime, pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([model.predict(pixels[k : k + 32]) for k in range(0, len(pixels), 32)])


def int8_warnings(held: Images | None, latency: Mapping[str, Mapping[int, float]]) -> tuple[str, ...]:
    """Warnings about the numbers of a quantized file."""
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
            f"int8 is not faster here: batch 32 takes {milliseconds(after)} instead of "
            f"{milliseconds(before)}. It pays on wide networks where the processor has instructions for it "
            "(VNNI, or ARM's dot products)"
        )
    return tuple(found)
