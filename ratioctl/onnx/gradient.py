"""The gradient of an ONNX graph with respect to its input, as plain ONNX operators (reverse mode).

`Network` is the part of an exported graph from the image to the logits. Its `gradient` adds, for every node
on the way back, the nodes of the operator's rule; see `ratioctl.onnx.gradient_rules`. A network with another
operator is refused with the operator's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ratioctl.onnx.builder import Builder, Value
from ratioctl.onnx.gradient_rules import ROWS, RULES, Phases, Tape, attributes, refused


class Network:
    """The nodes of an exported graph that compute `logits` from `image`.

    Attributes:
        weights: the constants that these nodes alone read, to be put where the nodes are.
        after: the graph's other nodes.

    Raises:
        UsageError: an operator that has no rule; it is named.
    """

    def __init__(self, model: onnx.ModelProto, builder: Builder, name: str) -> None:
        self.builder, self.title = builder, name
        typed = onnx.shape_inference.infer_shapes(model, data_prop=True)
        self.shapes = {
            v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
            for v in (*typed.graph.input, *typed.graph.value_info, *typed.graph.output)
        }
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.shapes |= {key: list(array.shape) for key, array in self.constants.items()}
        nodes = _before(model.graph.node, "logits")
        self.after = [node for node in model.graph.node if node not in nodes]  # logits -> other outputs
        self.nodes = self._strided(nodes)
        used, later = ({x for node in nodes for x in node.input} for nodes in (self.nodes, self.after))
        builder.initializers |= {t.name: t for t in model.graph.initializer if t.name in later}
        self.weights = [t for t in model.graph.initializer if t.name in used - later]
        self.on_path = {"image"}  # values that depend on the image
        for node in self.nodes:
            if self.on_path & set(node.input):
                self.on_path |= set(node.output)
        unknown = sorted({n.op_type for n in self.nodes if self.on_path & set(n.input)} - RULES.keys())
        if unknown:
            raise refused(name, f"the operator {', '.join(unknown)}")

    def gradient(self, image: Value, outer: Callable[[Value], Value]) -> Value:
        """The gradient with respect to the images of a function of their logits.

        Args:
            image: (M, C, H, W) float32.
            outer: logits (M, K) -> the gradient (M, K) of that function.
        """
        rows = image.shaped(ROWS, *(d or 0 for d in self.shapes["image"][1:]))
        names = self.builder.inline(self.nodes, {"image": rows.name})
        gradient = outer(self.builder.value(names["logits"], np.float32))
        tape = Tape(
            builder=self.builder,
            title=self.title,
            shapes=self.shapes,
            constants=self.constants,
            on_path=self.on_path,
            names=names,
        )
        parts: dict[str, list[Value | Phases]] = {"logits": [gradient]}
        for node in reversed(self.nodes):
            found = parts.pop(node.output[0], None)
            if found is None:
                continue
            for name, part in zip(node.input, RULES[node.op_type](tape, node, _sum(found)), strict=False):
                if part is not None and name in self.on_path:
                    parts.setdefault(name, []).append(part)
        return _sum(parts["image"])

    def _strided(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """The nodes, where pointwise convolutions of every s-th pixel do not slice but have a stride."""
        makers = {node.output[0]: node for node in nodes}
        found = []
        for original in nodes:
            node, strides = onnx.NodeProto(), [1, 1]
            node.CopyFrom(original)
            given = attributes(node)
            pointwise = node.op_type == "Conv" and self.shapes.get(node.input[1], [])[2:] == [1, 1]
            if pointwise and max([*given.get("strides", [1]), *(1 + p for p in given.get("pads", [0]))]) == 1:
                while (step := self._step(makers.get(node.input[0]))) is not None:
                    strides[step[0] - 2] *= step[1]
                    node.input[0] = makers[node.input[0]].input[0]
            if max(strides) > 1:
                kept = [a for a in node.attribute if a.name != "strides"]
                del node.attribute[:]
                node.attribute.extend([*kept, helper.make_attribute("strides", strides)])
            found.append(node)
        return _before(found, "logits")

    def _step(self, node: onnx.NodeProto | None) -> tuple[int, int] | None:
        """The axis and the step of a Slice that takes every s-th row or column from the first one on."""
        if node is None or node.op_type != "Slice" or len(node.input) != 5:
            return None
        given = [self.constants.get(name, np.zeros(0)).tolist() for name in node.input[1:]]
        if any(len(values) != 1 for values in given):
            return None
        start, end, axis, step = (values[0] for values in given)
        size = self.shapes[node.input[0]]
        whole = len(size) == 4 and axis in (2, 3) and size[axis] is not None and end >= size[axis]
        return (axis, step) if whole and start == 0 and step > 1 else None


def _before(nodes: Sequence[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """The nodes that `output` depends on, in order."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    return kept[::-1]


def _sum(parts: Sequence[Value | Phases]) -> Value:
    """The sum of gradients; that of phases is put together afterwards."""
    plain: list[Value] = []
    phases: dict[int, Phases] = {}
    for part in parts:
        if isinstance(part, Value):
            plain.append(part)
        else:
            phases[part.step] = phases[part.step] + part if part.step in phases else part
    return functools.reduce(Value.__add__, [*(part.joined() for part in phases.values()), *plain])
