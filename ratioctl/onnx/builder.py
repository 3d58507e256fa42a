"""Nodes of an ONNX graph written as expressions: `x + scale * d` adds the nodes that compute it.

A `Builder` collects the nodes of the graph that is being written, or of the body of a `loop` or a branch.
These read values of the graphs around them by name, so every constant is stored once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Number = bool | int | float
State = dict[str, "Value"]


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the graph. Operators broadcast as NumPy's; both sides have one type, numbers take it."""

    builder: Builder
    name: str
    dtype: np.dtype[Any]

    def op(self, kind: str, *others: Value | Number, dtype: Any = None, **attributes: Any) -> Value:
        """The node `kind` of this value and `others`; numbers among them have this value's type."""
        inputs = [self.builder.constant(o, self.dtype) if isinstance(o, Number) else o for o in others]
        name = self.builder.node(kind, self.name, *[o.name for o in inputs], **attributes)
        return Value(self.builder, name, np.dtype(dtype or self.dtype))

    def __add__(self, other: Value | Number) -> Value:
        return self.op("Add", other)

    def __sub__(self, other: Value | Number) -> Value:
        return self.op("Sub", other)

    def __mul__(self, other: Value | Number) -> Value:
        return self.op("Mul", other)

    def __truediv__(self, other: Value | Number) -> Value:
        return self.op("Div", other)

    def __and__(self, other: Value) -> Value:
        return self.op("And", other)

    def __or__(self, other: Value) -> Value:
        return self.op("Or", other)

    def __invert__(self) -> Value:
        return self.op("Not")

    def __lt__(self, other: Value | Number) -> Value:
        return self.op("Less", other, dtype=bool)

    def __gt__(self, other: Value | Number) -> Value:
        return self.op("Greater", other, dtype=bool)

    def __le__(self, other: Value | Number) -> Value:
        return self.op("LessOrEqual", other, dtype=bool)

    def __ge__(self, other: Value | Number) -> Value:
        return self.op("GreaterOrEqual", other, dtype=bool)

    def equals(self, other: Value | Number) -> Value:
        return self.op("Equal", other, dtype=bool)

    def where(self, yes: Value | Number, no: Value | Number) -> Value:
        """`yes` where this, a condition, is true, else `no`; one of them is a Value."""
        like = yes if isinstance(yes, Value) else no
        assert isinstance(like, Value)
        sides = [self.builder.constant(o, like.dtype) if isinstance(o, Number) else o for o in (yes, no)]
        return self.op("Where", *sides, dtype=like.dtype)

    def clip(self, low: Value | Number, high: Value | Number) -> Value:
        return self.op("Max", low).op("Min", high)

    def cast(self, dtype: Any) -> Value:
        return self.op("Cast", to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), dtype=dtype)

    def reduce(self, kind: str, axis: int, *, keep: bool = True) -> Value:
        """ReduceSum, ReduceMax, ... along one axis."""
        return self.op(kind, self.builder.constant([axis], np.int64), keepdims=int(keep))

    def reshape(self, *shape: int) -> Value:
        """To `shape`; -1 is what remains."""
        return self.op("Reshape", self.builder.constant(shape, np.int64))

    def transpose(self, *axes: int) -> Value:
        return self.op("Transpose", perm=list(axes))

    def take(self, indices: Value, axis: int = 0) -> Value:
        return self.op("Gather", indices, axis=axis)

    def join(self, *others: Value, axis: int = 0) -> Value:
        return self.op("Concat", *others, axis=axis)

    def shaped(self, *shape: int | str) -> Value:
        """This value, its shape noted where inference cannot tell it; names stand for unknown lengths."""
        self.builder.shapes[self.name] = shape
        return self

    def rows(self) -> Value:
        """The length (1,) of the first axis."""
        return self.op("Shape", start=0, end=1, dtype=np.int64)


class Builder:
    """The nodes and constants of a graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []  # of the innermost graph
        self.initializers: dict[str, TensorProto] = {}
        self.shapes: dict[str, tuple[int | str, ...]] = {}  # noted by `Value.shaped`
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def name(self, hint: str) -> str:
        """An unused name."""
        self._count += 1
        return f"{hint.lower()}_{self._count}"

    def node(self, kind: str, *inputs: str, count: int = 1, **attributes: Any) -> Any:
        """Add a node; the name of its output, or the names of its `count` outputs."""
        outputs = [self.name(kind) for _ in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs[0] if count == 1 else outputs

    def constant(self, value: Any, dtype: Any) -> Value:
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._constants[key] = self.name("constant")
            self.initializers[name] = numpy_helper.from_array(array, name)
        return Value(self, self._constants[key], array.dtype)

    def value(self, name: str, dtype: Any) -> Value:
        """A value that exists under this name, such as an input of the graph."""
        return Value(self, name, np.dtype(dtype))

    def fill(self, number: Number, shape: Value, dtype: Any) -> Value:
        """A tensor of `shape`, a Value (rank,), that is `number` everywhere."""
        tensor = numpy_helper.from_array(np.asarray([number], dtype))
        return Value(self, self.node("ConstantOfShape", shape.name, value=tensor), np.dtype(dtype))

    def count_to(self, length: Value) -> Value:
        """0, 1, ... below `length` (1,) int64."""
        end = length.reshape()
        return self.constant(0, np.int64).op("Range", end, 1)

    def loop(
        self,
        count: Value,
        state: State,
        body: Callable[[Value, State], tuple[Value, State]],
        weights: Iterable[TensorProto] = (),
    ) -> State:
        """ONNX `Loop`: `state` after at most `count` (int64 scalar) iterations.

        Args:
            body: iteration number (int64 scalar) and state -> whether to continue (bool scalar), new state.
            weights: constants stored in the body. onnxruntime packs the weights of convolutions for the
                processor only where they belong to the same graph.
        """
        names = {key: self.name(key) for key in state}
        iteration, going = self.name("iteration"), self.name("going")
        with self._inner() as nodes:
            inside = {key: Value(self, names[key], state[key].dtype) for key in state}
            on, after = body(Value(self, iteration, np.dtype(np.int64)), inside)
            for key in state:
                assert after[key].dtype == state[key].dtype, key
            outputs = [on.op("Identity"), *[after[key].op("Identity") for key in state]]
        inputs = [
            helper.make_tensor_value_info(iteration, TensorProto.INT64, []),
            helper.make_tensor_value_info(going, TensorProto.BOOL, []),
            *[_info(inside[key]) for key in state],
        ]
        graph = helper.make_graph(
            nodes, self.name("body"), inputs, [_info(o) for o in outputs], list(weights)
        )
        graph.value_info.extend(self._noted(nodes))
        started = self.constant(True, bool).name
        given = [count.name, started, *[state[key].name for key in state]]
        results = [self.name(key) for key in state]
        self.nodes.append(helper.make_node("Loop", given, results, body=graph))
        return {key: Value(self, name, state[key].dtype) for key, name in zip(state, results, strict=True)}

    def switch(self, number: Value, branches: Sequence[Callable[[], State]]) -> State:
        """The state that branch `number` (int64 scalar) computes; the last one for larger numbers."""
        if len(branches) == 1:
            return branches[0]()
        states, graphs = [], []
        for branch in (branches[0], lambda: self.switch(number - 1, branches[1:])):
            with self._inner() as nodes:
                state = branch()
                outputs = [state[key].op("Identity") for key in state]
            states.append(state)
            graphs.append(helper.make_graph(nodes, self.name("branch"), [], [_info(o) for o in outputs]))
        results = {key: Value(self, self.name(key), value.dtype) for key, value in states[0].items()}
        first = number.equals(0).name
        self.nodes.append(
            helper.make_node(
                "If",
                [first],
                [value.name for value in results.values()],
                then_branch=graphs[0],
                else_branch=graphs[1],
            )
        )
        return results

    def _noted(self, nodes: Iterable[onnx.NodeProto]) -> list[onnx.ValueInfoProto]:
        """The shapes noted of float32 outputs of these nodes."""
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name])
            for node in nodes
            for name in node.output
            if name in self.shapes
        ]

    @contextlib.contextmanager
    def _inner(self) -> Iterator[list[onnx.NodeProto]]:
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def inline(self, nodes: Iterable[onnx.NodeProto], given: Mapping[str, str]) -> dict[str, str]:
        """Copy nodes; names of their inputs and outputs by the names in the original.

        Args:
            given: the values to use under names of the original.
        """
        names = dict(given)
        for original in nodes:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            node.name = ""
            for part in (node.input, node.output):
                for index, name in enumerate(part):
                    if name and part is node.output:
                        names[name] = self.name(node.op_type)
                    part[index] = names.get(name, name)
            self.nodes.append(node)
        return names

    def model(
        self, inputs: list[onnx.ValueInfoProto], outputs: Mapping[str, tuple[Value, list[Any]]], opset: int
    ) -> onnx.ModelProto:
        """The finished model; `outputs` by name, each with its shape."""
        infos = []
        for name, (value, shape) in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value.name], [name]))
            infos.append(
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)
            )
        used = {name for node in _all_nodes(self.nodes) for name in node.input}
        constants = [tensor for name, tensor in self.initializers.items() if name in used]
        graph = helper.make_graph(self.nodes, "explain", inputs, infos, constants)
        graph.value_info.extend(self._noted(self.nodes))
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def _info(value: Value) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), None)


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g.node)
