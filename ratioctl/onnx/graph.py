"""The graph of an exported package, with temperature, score and flag inside.

    image -> [to floats] -> network -> logits -> / T -> softmax -> probabilities, label, confidence,
                                                                   ood_score, is_ood

A certified head adds the output `guaranteed_confidence`: what no image in the linf ball exceeds whose radius
the metadata state.

The metadata hold the package's config under "ratioctl" and, under "ratioctl.export", the threshold that
`is_ood` compares with.

With fp16 weights the file holds the kernels as the package does, before a batch norm was folded into them,
and casts and scales them: onnxruntime does so once, while it loads, and computes in fp32.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from ratioctl import package as packages
from ratioctl.errors import RatioctlError, UsageError
from ratioctl.models import Classifier, fold_batchnorm, fold_scales, from_package
from ratioctl.models.certified import guaranteed_log_odds, head_of, upper_bound
from ratioctl.onnx import runtime
from ratioctl.onnx.layouts import Input, safe_name
from ratioctl.package import ModelPackage, Spec, Stored
from ratioctl.recipe import norm_name
from ratioctl.scores import DEFAULT, OodScore, Threshold, by_name

OPSET = 18  # the lowest the exporter writes without conversion, so what the most servers read


class Flagging(nn.Module):
    """From the input as clients send it to the six outputs.

    The flag compares the score's acceptance (log-odds for maximum softmax) in double precision, as
    `OodScore.is_ood` does: in float32 confidences round to 1 where thresholds may lie. Of thresholds per
    class that of the predicted class applies.
    """

    def __init__(
        self,
        network: nn.Module,
        temperature: float,
        threshold: float,
        input_type: Input,
        score: OodScore | None = None,
        certified: float | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature
        self.score = score or by_name(DEFAULT)
        self.threshold: Tensor
        self.bounds: Tensor
        classes = getattr(threshold, "classes", None) or (float(threshold),)
        self.register_buffer("threshold", torch.tensor(classes, dtype=torch.float64))
        bounds = [self.score.acceptance_bound(value) for value in classes]
        self.register_buffer("bounds", torch.tensor(bounds, dtype=torch.float64))
        self.input_type = input_type
        self.certified = certified

    def forward(self, image: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, ...]:
        pixels = image.permute(0, 3, 1, 2).float() / 255 if self.input_type == "uint8" else image
        logits = self.network(pixels)
        probabilities = torch.softmax(logits / self.temperature, dim=1)
        confidence = probabilities.amax(dim=1)
        label = logits.argmax(dim=1)
        acceptance = self.score.acceptance_tensor(logits.double(), self.temperature)
        bounds = self.bounds if threshold is None else self.score.acceptance_bound_tensor(threshold)
        bound = bounds[label] if len(self.bounds) > 1 else bounds
        # Comparisons with NaN are false, so inputs that are not finite are flagged.
        is_ood = torch.logical_not((acceptance >= bound) & (confidence >= 0))
        score = (
            1 - confidence if self.score.name == DEFAULT else self.score.from_tensor(logits, self.temperature)
        )
        found = (logits, probabilities, label, confidence, score, is_ood)
        return found if self.certified is None else (*found, self.guaranteed(pixels, self.certified))

    def guaranteed(self, pixels: Tensor, eps: float) -> Tensor:
        """(N,) float32 confidence that no image in the linf balls of radius `eps` exceeds."""
        assert isinstance(self.network, Classifier)
        head = head_of(self.network)
        assert head is not None
        upper = upper_bound(self.network, pixels, eps)
        return guaranteed_log_odds(upper, head.num_classes, self.temperature).sigmoid().float()


def graph(
    package: ModelPackage,
    *,
    threshold: float,
    input_type: Input = "float",
    opset: int = OPSET,
    weights: Stored = "fp32",
    threshold_input: bool = False,
    guarantee: bool = True,
) -> bytes:
    """The ONNX file of a package, checked by `onnx.checker`, with its config as metadata.

    Args:
        weights: how the file stores them.
        threshold_input: add the input "threshold", float64 [1], or [K] for thresholds per class. Its default
            is `threshold`: clients that do not give it get the same answers as without.
        guarantee: add the output "guaranteed_confidence" where the package has a certified head.

    Raises:
        UsageError: an opset that the exporter cannot write.
    """
    refused = UsageError(f"--opset {opset}", "cannot be written", f"Try {OPSET}, the default, or above.")
    if opset < OPSET:
        raise refused
    model = from_package(package, weights_as=weights)
    network = fold_batchnorm(model)
    channels, height, width = package.input_size
    if input_type == "uint8":
        example = torch.zeros(2, height, width, channels, dtype=torch.uint8)
    else:
        example = torch.zeros(2, channels, height, width)
    eps = package.certified if guarantee else None
    flagging = Flagging(network, package.temperature, threshold, input_type, package.ood_score, eps).eval()
    inputs: dict[str, Tensor] = {"image": example}
    shapes: list[dict[int, Any] | None] = [{0: torch.export.Dim("batch")}]
    if threshold_input:
        inputs[runtime.THRESHOLD] = flagging.threshold
        shapes.append(None)
    try:
        with quiet():
            program = torch.onnx.export(
                flagging,
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=[*runtime.OUTPUTS, *([runtime.GUARANTEED] if eps is not None else [])],
                dynamic_shapes=tuple(shapes),
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
    exported: onnx.ModelProto = program.model_proto
    if {entry.domain: entry.version for entry in exported.opset_import}.get("") != opset:
        raise refused
    if weights == "fp16":
        _store_halves(exported, model)
    if threshold_input:  # an initializer with the name of an input is its default
        default = numpy_helper.from_array(flagging.threshold.numpy(), runtime.THRESHOLD)
        exported.graph.initializer.append(default)
    return finish(exported, package, _about(threshold, weights))


def _about(threshold: float, weights: Stored) -> dict[str, Any]:
    """The metadata that describe the graph alone."""
    about: dict[str, Any] = {"threshold": float(threshold)}
    if isinstance(threshold, Threshold) and threshold.classes is not None:
        about["classes"] = list(threshold.classes)
    return {**about, **({"weights": weights} if weights == "fp16" else {})}


@torch.no_grad()
def _store_halves(exported: onnx.ModelProto, model: Classifier) -> None:
    """Replace initializers that are fp16 kernels, or these times a batch norm's factors; others stay."""
    scales = fold_scales(model)
    kernels = {name: value for name, value in model.named_parameters() if value.dim() > 1}
    nodes: list[onnx.NodeProto] = []
    for tensor in list(exported.graph.initializer):
        key = next((name for name in kernels if tensor.name.endswith(name)), None)
        if tensor.data_type != onnx.TensorProto.FLOAT or key is None:
            continue
        half = kernels[key].half()
        scale = scales.get(key.removesuffix(".weight"))
        value = half.float() if scale is None else half.float() * scale.view(-1, *(1,) * (half.dim() - 1))
        stored = numpy_helper.to_array(tensor)
        if stored.shape != tuple(value.shape) or not np.array_equal(stored, value.numpy()):
            continue  # the exporter changed it
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half.numpy(), f"{name}.fp16"))
        cast = name if scale is None else f"{name}.fp32"
        nodes.append(helper.make_node("Cast", [f"{name}.fp16"], [cast], to=onnx.TensorProto.FLOAT))
        if scale is not None:
            factors = scale.view(-1, *(1,) * (half.dim() - 1)).numpy()
            exported.graph.initializer.append(numpy_helper.from_array(factors, f"{name}.scale"))
            nodes.append(helper.make_node("Mul", [cast, f"{name}.scale"], [name]))
    nodes += exported.graph.node
    del exported.graph.node[:]
    exported.graph.node.extend(nodes)


def explain(base: bytes, package: Spec, *, threshold: float, p: float, weights: Stored = "fp32") -> bytes:
    """The file that searches counterfactuals in balls of the norm `p`, made of `graph`'s file for floats.

    Args:
        weights: how `base` stores them.

    Raises:
        UsageError: a norm that it cannot search, or an operator of the network without a gradient.
    """
    from ratioctl.onnx.explain import explain_graph

    parsed = onnx.load_model_from_string(base)
    model = explain_graph(parsed, p=p, temperature=package.temperature, name=package.name)
    return finish(model, package, {**_about(threshold, weights), "explain": {"norm": norm_name(p)}})


def finish(model: onnx.ModelProto, package: Spec, about: dict[str, Any]) -> bytes:
    """The file's bytes: without the exporter's notes (paths of our sources among them), with our metadata:
    the package's config, and beside it what holds of the graph alone, such as its threshold.
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
    metadata = {runtime.CONFIG: packages.portable_config(package), runtime.ABOUT: about}
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    onnx.checker.check_model(model, full_check=True)
    model.ir_version = min(model.ir_version, helper.find_min_ir_version_for(model.opset_import))
    data: bytes = model.SerializeToString()
    return data


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings and log: they address its developers, not the user's model."""
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
