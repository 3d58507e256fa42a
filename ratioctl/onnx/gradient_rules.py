"""Rules of `ratioctl.onnx.gradient`: the gradients of ONNX operators as nodes.

    rule(tape, node, g) -> gradients, one per input, None where none is needed

where `g` is the gradient of the node's output. `RULES` holds one per operator.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ratioctl.errors import UsageError
from ratioctl.onnx.builder import Builder, Value

Gradients = Sequence["Value | Phases | None"]
Rule = Callable[["Tape", onnx.NodeProto, Value], Gradients]

RULES: dict[str, Rule] = {}
ROWS = "M"  # the name of the number of images: shapes by which onnxruntime sees that values fit together
_LARGE = 1e38


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return register


def refused(name: str, what: str) -> UsageError:
    return UsageError(
        "--explain",
        f"cannot differentiate {name}: {what} has no gradient here",
        "Use `ratioctl counterfactual` with the package instead; it computes gradients with torch.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tape:
    """What rules read of the forward pass: values, shapes and constants under the names of the original."""

    builder: Builder
    title: str
    shapes: Mapping[str, list[int | None]]
    constants: Mapping[str, np.ndarray]
    on_path: Set[str]
    names: Mapping[str, str]

    def value(self, name: str) -> Value:
        """A float32 value of the forward pass, or a weight."""
        return self.builder.value(self.names.get(name, name), np.float32)

    def needs(self, name: str) -> bool:
        return name in self.on_path

    def shape(self, name: str) -> list[int | None]:
        """The dimensions; None for the number of images."""
        return self.shapes[name]

    def size(self, name: str) -> list[int]:
        """The dimensions; -1 for the number of images, which may be the first one alone."""
        shape = self.shape(name)
        if None in shape[1:]:
            raise self.refuse(f"a value of shape {shape}")
        return [-1 if d is None else d for d in shape]

    def reshape(self, g: Value, *size: int) -> Value:
        """To `size`, whose first number may be -1 for the number of images."""
        return g.reshape(*size).shaped(*(ROWS if d == -1 else d for d in size))

    def constant(self, name: str) -> np.ndarray:
        if name not in self.constants:
            raise self.refuse(f"an operator with a computed parameter ({name})")
        return self.constants[name]

    def refuse(self, what: str) -> UsageError:
        return refused(self.title, what)

    def like(self, g: Value, output: str, name: str) -> Value:
        """The gradient `g` of a broadcast result `output`, summed to the shape of its operand `name`."""
        wide, given = self.shape(output), self.shape(name)
        narrow = [*[1] * (len(wide) - len(given)), *given]
        for axis, (many, one) in enumerate(zip(wide, narrow, strict=True)):
            if one == 1 and many != 1:
                g = g.reduce("ReduceSum", axis)
        return g


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phases:
    """A gradient (M, C, H, W) as step x step images: number step r + k holds pixels (r + step i, k + step j).

    None stands for an image of zeros.
    """

    step: int
    channels: int
    images: tuple[Value | None, ...]

    def __add__(self, other: Phases) -> Phases:
        both = zip(self.images, other.images, strict=True)
        return dataclasses.replace(self, images=tuple(_total([g for g in pair if g]) for pair in both))

    def joined(self) -> Value:
        some = next(g for g in self.images if g)
        first, *others = (g or some * 0.0 for g in self.images)
        pixels = first.join(*others, axis=1).op("DepthToSpace", blocksize=self.step)
        return blocked(pixels, self.channels)


def _total(parts: Sequence[Value]) -> Value | None:
    return functools.reduce(Value.__add__, parts) if parts else None


def blocked(x: Value, channels: int) -> Value:
    """The values (M, C, H, W) themselves, through a convolution.

    onnxruntime computes convolutions, their sums and products in a blocked layout, which values enter here.
    """
    ones = x.builder.fill(1.0, x.builder.constant([channels, 1, 1, 1], np.int64), np.float32)
    return x.op("Conv", ones, kernel_shape=[1, 1], group=channels)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# --- element by element -------------------------------------------------------------------------------------


@rule("Identity", "Dropout")
def _identity(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    return [g]


@rule("Neg")
def _neg(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    return [g * -1.0]


@rule("Add", "Sub")
def _add(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    a, b = node.input
    first = tape.like(g, node.output[0], a) if tape.needs(a) else None
    if not tape.needs(b):
        return [first, None]
    second = tape.like(g, node.output[0], b)
    return [first, second * -1.0 if node.op_type == "Sub" else second]


@rule("Mul")
def _mul(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    a, b = node.input
    return [
        tape.like(g * tape.value(other), node.output[0], name) if tape.needs(name) else None
        for name, other in ((a, b), (b, a))
    ]


@rule("Div")
def _div(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    a, b = node.input
    first = tape.like(g / tape.value(b), node.output[0], a) if tape.needs(a) else None
    if not tape.needs(b):
        return [first, None]
    return [first, tape.like(g * tape.value(node.output[0]) / tape.value(b) * -1.0, node.output[0], b)]


@rule("Relu")
def _relu(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    y, shape = tape.value(node.output[0]), tape.shape(node.output[0])
    if len(shape) != 4 or shape[1] is None:
        return [g * (y > 0.0).cast(np.float32)]
    # 0 or 1, as the activation of a convolution: a comparison leaves the blocked layout.
    return [g * blocked(y, shape[1]).op("HardSigmoid", alpha=_LARGE, beta=0.0)]


@rule("Clip")
def _clip(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    x = tape.value(node.input[0])
    for bound, beyond in zip(node.input[1:], (Value.__gt__, Value.__lt__), strict=False):
        if bound:
            g = g * beyond(x, float(tape.constant(bound))).cast(np.float32)
    return [g]


@rule("Abs")
def _abs(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    x = tape.value(node.input[0])
    return [g * ((x > 0.0).cast(np.float32) - (x < 0.0).cast(np.float32))]


@rule("Exp")
def _exp(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    return [g * tape.value(node.output[0])]


@rule("Log")
def _log(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    return [g / tape.value(node.input[0])]


@rule("LogSoftmax")
def _log_softmax(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    axis = int(attributes(node).get("axis", -1)) % len(tape.shape(node.input[0]))
    return [g - tape.value(node.output[0]).op("Exp") * g.reduce("ReduceSum", axis)]


@rule("Sigmoid")
def _sigmoid(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    y = tape.value(node.output[0])
    return [g * (y - y * y)]


@rule("Tanh")
def _tanh(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    y = tape.value(node.output[0])
    return [g - g * (y * y)]


@rule("Erf")
def _erf(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    x = tape.value(node.input[0])
    return [g * (x * x * -1.0).op("Exp") * (2 / math.sqrt(math.pi))]


@rule("HardSigmoid")
def _hard_sigmoid(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    y = tape.value(node.output[0])
    between = ((y > 0.0) & (y < 1.0)).cast(np.float32)
    return [g * between * float(attributes(node).get("alpha", 0.2))]


@rule("HardSwish")
def _hard_swish(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    x = tape.value(node.input[0])  # x min(max(x / 6 + 1/2, 0), 1)
    inner = (x * (1 / 6) + 0.5).clip(0.0, 1.0)
    between = ((inner > 0.0) & (inner < 1.0)).cast(np.float32)
    return [g * (inner + x * between * (1 / 6))]


@rule("BatchNormalization")
def _batch_norm(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    scale, variance = tape.constant(node.input[1]), tape.constant(node.input[4])
    epsilon = float(attributes(node).get("epsilon", 1e-5))
    factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
    shape = (-1, *[1] * (len(tape.shape(node.input[0])) - 2))
    return [g * tape.builder.constant(factor.reshape(shape), np.float32)]


# --- shapes -------------------------------------------------------------------------------------------------


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    return [tape.reshape(g, *tape.size(node.input[0]))]


@rule("Transpose")
def _transpose(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    rank = len(tape.shape(node.input[0]))
    order = attributes(node).get("perm", list(reversed(range(rank))))
    return [g.transpose(*[int(axis) for axis in np.argsort(order)])]


@rule("Concat")
def _concat(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    axis = attributes(node)["axis"]
    start, parts = 0, []
    for name in node.input:
        length = tape.shape(name)[axis]
        if length is None:
            raise tape.refuse("Concat along the images")
        ends = [tape.builder.constant([k], np.int64) for k in (start, start + length, axis)]
        parts.append(g.op("Slice", *ends))
        start += length
    return parts


@rule("Slice")
def _slice(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    """Zeros between and around the elements that were taken, axis by axis."""
    name, shape = node.input[0], tape.size(node.input[0])
    starts, ends = (tape.constant(node.input[k]) for k in (1, 2))
    axes = tape.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(len(starts))
    steps = tape.constant(node.input[4]) if len(node.input) > 4 else np.ones_like(starts)
    now = list(tape.size(node.output[0]))
    for start, end, axis, step in zip(starts, ends, axes % len(shape), steps, strict=True):
        length = shape[axis]
        if length == -1 or step < 1:
            if (start, step) == (0, 1) and end > 2**30:
                continue  # takes everything
            raise tape.refuse(f"Slice of {name} along the images or backwards")
        first, _, _ = slice(int(start), int(end), int(step)).indices(length)
        count = now[axis]
        if step > 1:
            spread = tape.reshape(g, *now[: axis + 1], 1, *now[axis + 1 :])
            now[axis] = count * int(step)
            g = tape.reshape(_pad(spread, len(shape) + 1, axis + 1, 0, step - 1), *now)
        g = _pad(g, len(shape), axis, first, length - first - now[axis])
        now[axis] = length
    return [g]


def _pad(g: Value, rank: int, axis: int, before: int, after: int) -> Value:
    """Zeros before and after along an axis; negative numbers crop."""
    if before == after == 0:
        return g
    pads = np.zeros(2 * rank, np.int64)
    pads[axis], pads[rank + axis] = before, after
    return g.op("Pad", g.builder.constant(pads, np.int64))


# --- averages and pooling -----------------------------------------------------------------------------------


@rule("ReduceMean", "GlobalAveragePool")
def _mean(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    shape = tape.size(node.input[0])
    if node.op_type == "GlobalAveragePool":
        axes = list(range(2, len(shape)))
    else:
        given = attributes(node).get("axes")
        axes = list(given if given is not None else tape.constant(node.input[1]))
    axes = [int(axis) % len(shape) for axis in axes]
    if 0 in axes:
        raise tape.refuse("a mean over the images")
    kept = [1 if axis in axes else size for axis, size in enumerate(shape)]
    spread = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    scaled = tape.reshape(g, *kept) * (1 / math.prod(spread))
    g = scaled.op("Expand", tape.builder.constant(spread, np.int64))
    return [blocked(g, shape[1]) if axes == [2, 3] else g]


@rule("MaxPool")
def _max_pool(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    """The gradient of each maximum is added where the maximum was; the forward node lists the places."""
    builder, x = tape.builder, tape.value(node.input[0])
    _, where = builder.node("MaxPool", x.name, count=2, **attributes(node))
    places = builder.value(where, np.int64).reshape(-1)
    size = x.op("Shape", dtype=np.int64)
    zeros = builder.fill(0.0, size.reduce("ReduceProd", 0), np.float32)
    flat = zeros.op("ScatterElements", places, g.reshape(-1), axis=0, reduction="add")
    return [tape.reshape(flat, *tape.size(node.input[0]))]


@rule("AveragePool")
def _average_pool(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    given = attributes(node)
    kernel, pads = given["kernel_shape"], given.get("pads", [0, 0, 0, 0])
    if given.get("ceil_mode") or (any(pads) and not given.get("count_include_pad")):
        raise tape.refuse("AveragePool that does not count its padding")
    channels = tape.size(node.input[0])[1]
    weight = np.full((channels, 1, *kernel), 1 / math.prod(kernel))
    depthwise = {**given, "group": channels, "kernel_shape": kernel}
    return [_transposed_conv(tape, node, g, tape.builder.constant(weight, np.float32), depthwise)]


# --- linear maps --------------------------------------------------------------------------------------------


@rule("Conv")
def _conv(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    """A convolution with the mirrored kernel; with a stride a transposed convolution."""
    given = attributes(node)
    weight = tape.value(node.input[1])
    if tape.needs(node.input[1]):
        raise tape.refuse("Conv with a computed kernel")
    shape = tape.size(node.input[1])
    given.setdefault("kernel_shape", shape[2:])
    pads, dilations = given.get("pads", [0, 0, 0, 0]), given.get("dilations", [1, 1])
    reach = [d * (k - 1) for d, k in zip(dilations, given["kernel_shape"], strict=True)]
    rest = [r - p for r, p in zip(reach * 2, pads, strict=True)]
    same = given.get("auto_pad", b"NOTSET") in (b"NOTSET", "NOTSET")
    if not same or len(shape) != 4:
        raise tape.refuse("Conv of another kind than two-dimensional with explicit padding")
    if max(given.get("strides", [1])) > 1 or min(rest) < 0 or given.get("group", 1) > 1:
        return [_by_phases(tape, node, g, given) or _transposed_conv(tape, node, g, weight, given)]
    return [
        g.op(
            "Conv",
            _mirrored(tape, node.input[1]),
            pads=rest,
            dilations=dilations,
            kernel_shape=given["kernel_shape"],
        )
    ]


def _mirrored(tape: Tape, name: str, starts: Sequence[int] = (0, 0), step: int = 1) -> Value:
    """The kernel (in, out, h, w), turned by 180 degrees; onnxruntime computes it when it loads the file.

    Args:
        starts: the first row and column; step: every which of those after them.
    """
    swapped, size = tape.value(name).transpose(1, 0, 2, 3), tape.size(name)[2:]
    if max(size) == 1:
        return swapped
    last = [start + step * (len(range(start, k, step)) - 1) for start, k in zip(starts, size, strict=True)]
    least = [
        start - 1 - k if start else np.iinfo(np.int64).min for start, k in zip(starts, size, strict=True)
    ]
    ends = (last, least, [2, 3], [-step, -step])
    return swapped.op("Slice", *(tape.builder.constant(e, np.int64) for e in ends))


def _transposed_conv(
    tape: Tape, node: onnx.NodeProto, g: Value, weight: Value, given: dict[str, Any]
) -> Value:
    """The adjoint of a convolution or an average; what a stride left over at the end gets its zeros."""
    kernel, pads = given["kernel_shape"], given.get("pads", [0, 0, 0, 0])
    strides, dilations = given.get("strides", [1, 1]), given.get("dilations", [1, 1])
    before, after = tape.size(node.input[0])[2:], tape.size(node.output[0])[2:]
    missing = [
        n - ((m - 1) * s + d * (k - 1) + 1 - pads[axis] - pads[axis + 2])
        for axis, (n, m, s, d, k) in enumerate(zip(before, after, strides, dilations, kernel, strict=True))
    ]
    return g.op(
        "ConvTranspose",
        weight,
        kernel_shape=kernel,
        pads=pads,
        strides=strides,
        dilations=dilations,
        group=given.get("group", 1),
        output_padding=missing,
    )


def _by_phases(tape: Tape, node: onnx.NodeProto, g: Value, given: dict[str, Any]) -> Phases | None:
    """The adjoint of a convolution with stride s as s x s convolutions; None where ConvTranspose is needed.

    onnxruntime computes them faster. Along an axis, pixel i = s q + r of the input contributed to pixel
    o = q + c - u of the output through kernel element t + s u, where t = (r + pad) mod s and
    c = (r + pad) div s, for every u for which there is such an element.
    """
    (step, *other), pads = given.get("strides", [1, 1]), given.get("pads", [0, 0, 0, 0])
    (channels, *before), after = tape.size(node.input[0])[1:], tape.size(node.output[0])[2:]
    even = step > 1 and other == [step] and all(n % step == 0 for n in before)
    if not even or given.get("group", 1) > 1 or max(given.get("dilations", [1])) > 1:
        return None
    kernel, images = tape.size(node.input[1])[2:], list[Value | None]()
    for phase in itertools.product(range(step), repeat=2):
        starts = [(r + p) % step for r, p in zip(phase, pads, strict=False)]
        counts = [len(range(t, k, step)) for t, k in zip(starts, kernel, strict=True)]
        if 0 in counts:
            images.append(None)
            continue
        ends = [(r + p) // step for r, p in zip(phase, pads, strict=False)]
        first = [u - 1 - c for u, c in zip(counts, ends, strict=True)]
        last = [n // step - m + c for n, m, c in zip(before, after, ends, strict=True)]
        if min(*first, *last) < 0:
            return None
        part = _mirrored(tape, node.input[1], starts, step)
        images.append(g.op("Conv", part, kernel_shape=counts, pads=[*first, *last]))
    return Phases(step=step, channels=channels, images=tuple(images))


@rule("Gemm")
def _gemm(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    given = attributes(node)
    if given.get("transA") or tape.needs(node.input[1]):
        raise tape.refuse("Gemm of two computed matrices")
    weight = tape.value(node.input[1])
    return [g.op("Gemm", weight, transB=1 - given.get("transB", 0), alpha=given.get("alpha", 1.0))]


@rule("MatMul")
def _matmul(tape: Tape, node: onnx.NodeProto, g: Value) -> Gradients:
    a, b = node.input
    ranks = len(tape.shape(a)), len(tape.shape(b))
    if min(ranks) < 2 or (ranks[0] != ranks[1] and (tape.needs(b) or ranks[1] != 2)):
        raise tape.refuse("MatMul of broadcast matrices")

    def flipped(name: str, rank: int) -> Value:
        return tape.value(name).transpose(*range(rank - 2), rank - 1, rank - 2)

    first = g.op("MatMul", flipped(b, ranks[1])) if tape.needs(a) else None
    second = flipped(a, ranks[0]).op("MatMul", g) if tape.needs(b) else None
    return [first, second]
