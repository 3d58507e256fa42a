"""Counterfactuals from one ONNX file: the search of `ratioctl.counterfactuals` as a graph.

    image, target, radii, steps
        -> counterfactual, confidence, probabilities, is_ood, distance, confidence_float

Every radius is a row. Auto-PGD is an ONNX `Loop` (`_ascend`) inside another one, which runs it twice
(`_search`):

1. for a fifth of the steps from the image, in the ball of twice the radius and in the ball itself;
2. for three fifths of the steps in the ball, from the best point so far.

After both, every radius takes the best of its own points and of its neighbors' points moved into its ball.
Then the points are rounded to 8 bits inside their balls (`_round`) and scored again, and every radius takes
the best picture of the radii up to its own (`_outputs`). A radius of 0 gives the image itself.

The engine differs in that it also searches from random points, and looks for the smallest radius that flips.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ratioctl import recipe
from ratioctl.errors import UsageError
from ratioctl.onnx.builder import Builder, State, Value
from ratioctl.onnx.explainer import NORMS
from ratioctl.onnx.gradient import Network

MAX_STEPS = 10_000
# Percent of the steps of each turn, and what becomes of its points. The first turn has two rows per radius.
TURNS = ((20, "spread"), (0, "choose"), (60, "spread"), (0, "finish"), (0, "keep"))
_NEIGHBORS = (0, -1, 1, 2, 3)  # radii whose points are tried in a ball, by their places
_SATURATED = math.log(1 - 1e-4)  # a run ends when every row has this log-probability
_ALPHA = 0.75  # share of the new step against the momentum
_CHECKPOINTS = (22, 41, 57, 70, 80, 87, 93, 99)  # percent of the steps: Croce and Hein 2020, section 3
_TINY = 1e-30
_ROUNDING = 5e-7  # as in `ratioctl.counterfactuals.rounding`
F32, F64, I64 = np.float32, np.float64, np.int64


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What is searched: the goal log p(target) over balls in the norm `p`, and what both have in common.

    Attributes:
        shape: (C, H, W) of the images; points are rows (M, n).
    """

    builder: Builder
    network: Network
    shape: tuple[int, int, int]
    temperature: float
    p: float

    @property
    def pixels(self) -> int:
        return math.prod(self.shape)


def explain_graph(base: onnx.ModelProto, *, p: float, temperature: float, name: str) -> onnx.ModelProto:
    """The graph, without metadata.

    Args:
        base: the graph of `ratioctl.onnx.graph.graph` with float input.
        p: norm of the balls, 2 or infinity.
        temperature: the package's, as in `base`.
        name: of the package, for messages.

    Raises:
        UsageError: the network has an operator without a gradient, or `p` is another norm.
    """
    if recipe.norm_name(p) not in NORMS:
        known = ", ".join(NORMS)
        raise UsageError(
            f"--norm {recipe.norm_name(p)}", "cannot be searched by an ONNX graph", f"Known: {known}."
        )
    builder = Builder()
    _, channels, height, width = (d.dim_value for d in base.graph.input[0].type.tensor_type.shape.dim)
    problem = Problem(
        builder=builder,
        network=Network(base, builder, name),
        shape=(channels, height, width),
        temperature=temperature,
        p=p,
    )
    radii = builder.value("radii", F64)
    count = radii.rows()
    # NaN and negative radii become 0, radii beyond the box's diameter that; wrong targets the nearest class.
    radii = (radii >= 0.0).where(radii, 0.0).op("Min", problem.pixels ** (1 / p))
    steps = builder.value("steps", I64).reshape().clip(0, MAX_STEPS)
    classes = base.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    target = builder.value("target", I64).op("Expand", count).clip(0, classes - 1)
    image = builder.value("image", np.uint8)
    one = builder.constant([1, 1, 1], I64)
    centre = image.op("Expand", count.join(one)).cast(F32).transpose(0, 3, 1, 2).reshape(-1, problem.pixels)
    rows, logits = _search(problem, centre, target, radii, steps)
    outputs = _outputs(problem, rows, logits, image.rows().equals(1), target, radii)
    kinds: dict[str, tuple[int, list[Any]]] = {
        "image": (TensorProto.UINT8, ["N", height, width, channels]),
        "target": (TensorProto.INT64, ["T"]),
        "radii": (TensorProto.DOUBLE, ["R"]),
        "steps": (TensorProto.INT64, [1]),
    }
    inputs = [helper.make_tensor_value_info(key, *kind) for key, kind in kinds.items()]
    shapes = {"counterfactual": [height, width, channels], "probabilities": [classes]}
    named = {key: (value, ["R", *shapes.get(key, [])]) for key, value in outputs.items()}
    return builder.model(inputs, named, base.opset_import[0].version)


def gradient_graph(base: onnx.ModelProto, *, temperature: float, name: str) -> onnx.ModelProto:
    """image (M, C, H, W), target (M,) -> value (M,) and gradient, as in the loop of `explain_graph`."""
    builder = Builder()
    _, *shape = (d.dim_value for d in base.graph.input[0].type.tensor_type.shape.dim)
    network = Network(base, builder, name)
    problem = Problem(
        builder=builder, network=network, shape=(shape[0], shape[1], shape[2]), temperature=temperature, p=2
    )
    image, target = builder.value("image", F32), builder.value("target", I64)
    builder.initializers |= {tensor.name: tensor for tensor in network.weights}
    value, gradient, _ = _goal(problem, image.reshape(-1, problem.pixels), target)
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["M", *shape]),
        helper.make_tensor_value_info("target", TensorProto.INT64, ["M"]),
    ]
    outputs = {
        "value": (value.reshape(-1), ["M"]),
        "gradient": (gradient.reshape(-1, *shape), ["M", *shape]),
    }
    return builder.model(inputs, outputs, base.opset_import[0].version)


# --- the goal and the balls ---------------------------------------------------------------------------------


def _goal(problem: Problem, x: Value, target: Value) -> tuple[Value, Value, Value]:
    """log p(target) after temperature (M, 1) at points (M, n), its gradient (M, n), and the logits."""
    scores = []

    def outer(logits: Value) -> Value:
        logs = (logits / problem.temperature).op("LogSoftmax", axis=1)
        classes = problem.builder.count_to(logits.op("Shape", start=1, end=2, dtype=I64))
        chosen = target.reshape(-1, 1).equals(classes)
        scores.extend([chosen.where(logs, 0.0).reduce("ReduceSum", 1), logits])
        return (chosen.cast(F32) - logs.op("Exp")) / problem.temperature

    gradient = problem.network.gradient(x.reshape(-1, *problem.shape), outer)
    return scores[0], gradient.reshape(-1, problem.pixels), scores[1]


def _length(problem: Problem, d: Value) -> Value:
    """Norms (M, 1) of rows; l2 only."""
    return (d * d).reduce("ReduceSum", -1).op("Sqrt").op("Max", _TINY)


def _project(problem: Problem, x0: Value, z: Value, inner: Value) -> Value:
    """Onto the ball of radius `inner` (M, 1), then the box; see `ratioctl.attacks.balls.project`."""
    if math.isinf(problem.p):
        return z.clip(x0 - inner, x0 + inner).clip(0.0, 1.0)
    d = z - x0
    return (x0 + d * (inner / _length(problem, d)).op("Min", 1.0)).clip(0.0, 1.0)


def _inner(problem: Problem, radii: Value) -> Value:
    """Radii (M, 1) float32 that leave room for rounding; see `ratioctl.attacks.balls.inner_radius`."""
    p = problem.p
    slack = 4e-8 if math.isinf(p) else 1e-7 * problem.pixels ** (1 / p - 0.5)
    return (radii * (1 - 1e-6) - slack).op("Max", 0.0).cast(F32)


def _steepest(problem: Problem, gradient: Value) -> Value:
    return gradient.op("Sign") if math.isinf(problem.p) else gradient / _length(problem, gradient)


# --- the search ---------------------------------------------------------------------------------------------


def _ascend(problem: Problem, start: Value, x0: Value, radii: Value, target: Value, steps: Value) -> State:
    """Auto-PGD, as `ratioctl.attacks.apgd`: "best" (M, n), "best_value" (M, 1) and "best_logits" (M, K).

    Args:
        start, x0: (M, n) float32; radii: (M, 1) float64; target: (M,); steps: int64 scalar.
    """
    builder = problem.builder
    inner = _inner(problem, radii)
    rows = radii.op("Shape", dtype=I64)
    lowest = builder.fill(-math.inf, rows, F32)
    zero = start * 0.0
    marks = (steps * builder.constant(_CHECKPOINTS, I64) + 99) / 100
    state: State = {
        "x": start,
        "previous": start,
        "gradient": zero,
        "size": (radii * 2.0).cast(F32),
        "value": builder.fill(math.inf, rows, F32),
        "rises": builder.fill(0, rows, F32),
        "best": start,
        "best_value": lowest,
        "best_gradient": zero,
        "best_logits": builder.fill(0.0, builder.constant([1, 1], I64), F32),
        "at_check": lowest,
        "halved": builder.fill(True, rows, bool),
        "last_check": builder.constant(0, I64),
    }

    def body(step: Value, s: State) -> tuple[Value, State]:
        """Iteration 0 scores the start, each later one moves and scores."""
        alpha = (step <= 1).where(builder.constant(1.0, F32), _ALPHA)
        z = _project(problem, x0, s["x"] + _steepest(problem, s["gradient"]) * s["size"], inner)
        momentum = (s["x"] - s["previous"]) * (alpha * -1.0 + 1.0)
        moved = _project(problem, x0, s["x"] + (z - s["x"]) * alpha + momentum, inner)
        x = step.equals(0).where(s["x"], moved)
        value, gradient, logits = _goal(problem, x, target)
        rises = s["rises"] + (value > s["value"]).cast(F32)
        better = value > s["best_value"]
        best, best_value = better.where(x, s["best"]), better.where(value, s["best_value"])
        best_gradient = better.where(gradient, s["best_gradient"])
        best_logits = better.where(logits, s["best_logits"])
        at_check = step.equals(0).where(value, s["at_check"])
        # At a checkpoint, rows that hardly rose halve their step and go back to their best point.
        check = marks.equals(step).cast(I64).reduce("ReduceMax", 0, keep=False).cast(bool)
        few = rises < (step - s["last_check"]).cast(F32) * 0.75
        stuck = few | (~s["halved"] & (best_value <= at_check))
        back = check & stuck
        return (best_value < _SATURATED).cast(I64).op("ReduceMax", keepdims=0).cast(bool), {
            "x": back.where(best, x),
            "previous": s["x"],
            "gradient": back.where(best_gradient, gradient),
            "size": back.where(s["size"] * 0.5, s["size"]),
            "value": back.where(best_value, value),
            "rises": check.where(rises * 0.0, rises),
            "best": best,
            "best_value": best_value,
            "best_gradient": best_gradient,
            "best_logits": best_logits,
            "at_check": check.where(best_value, at_check),
            "halved": back | (~check & s["halved"]),
            "last_check": check.where(step, s["last_check"]),
        }

    return builder.loop(steps + 1, state, body, problem.network.weights)


def _search(
    problem: Problem, centre: Value, target: Value, radii: Value, steps: Value
) -> tuple[Value, Value]:
    """Rows (3 R, n) and their logits (3 R, K): the image, the picture and the point of every radius.

    The outer loop scores rows in every turn, after a search of as many steps as `TURNS` says, and then makes
    the rows of the next turn. So the file contains the network once.

    Args:
        centre: (R, n) float32 from 0 to 255; radii: (R,) float64; steps: int64 scalar.
    """
    builder, n = problem.builder, problem.pixels
    x0, column = centre / 255.0, radii.reshape(-1, 1)
    inner = _inner(problem, column)
    count, places = radii.rows(), builder.count_to(radii.rows())
    neighbors = builder.constant(_NEIGHBORS, I64).reshape(-1, 1)
    around = (places + neighbors).clip(0, count - 1)  # (places, R)
    shares = builder.constant([share for share, _ in TURNS], I64)
    skipped = steps.equals(0).cast(I64) * [name for _, name in TURNS].index("finish")

    def turn(number: Value, s: State) -> tuple[Value, State]:
        number = number + skipped  # without steps there are no points to compare
        groups = s["rows"].rows() / count  # rows of each radius
        once = builder.constant([1], I64)
        centres, goals = x0.op("Tile", groups.join(once)), target.op("Tile", groups)
        budget = (steps * shares.take(number) + 99) / 100
        found = _ascend(problem, s["rows"], centres, s["radii"], goals, budget)
        best = found["best"]

        def spread() -> State:
            """Every point of a radius and of its neighbors, moved into its ball."""
            by_radius = best.op("Reshape", groups.join(count, builder.constant([n], I64)))
            tried = _project(problem, x0, by_radius.take(around, axis=1), inner)  # (groups, places, R, n)
            return following(tried.reshape(-1, n))

        def chosen() -> Value:
            """The best row (R, n) of every radius."""
            values = found["best_value"].op("Reshape", builder.constant([-1], I64).join(count))
            return best.take(values.op("ArgMax", axis=0, keepdims=0, dtype=I64) * count + places)

        def finish() -> State:
            points = chosen()
            return following(x0.join(_round(problem, points, centre, radii).cast(F32) / 255.0, points))

        def following(rows: Value) -> State:
            again = column.op("Tile", (rows.rows() / count).join(once))
            return {"rows": rows, "radii": again, "logits": found["best_logits"]}

        makers = {
            "spread": spread,
            "choose": lambda: following(chosen()),
            "finish": finish,
            "keep": lambda: following(best),
        }
        return builder.constant(True, bool), builder.switch(number, [makers[name] for _, name in TURNS])

    first = {
        "rows": x0.join(x0),
        "radii": (column * 2.0).join(column),
        "logits": builder.fill(0.0, builder.constant([1, 1], I64), F32),
    }
    ended = builder.loop(skipped * -1 + len(TURNS), first, turn)
    return ended["rows"], ended["logits"]


# --- pictures -----------------------------------------------------------------------------------------------


def _round(problem: Problem, points: Value, centre: Value, radii: Value) -> Value:
    """Pictures (R, n) float64 from 0 to 255: `ratioctl.counterfactuals.rounding.round_into_ball`.

    Where that left the ball by the rounding of floats alone, the picture is the image.
    """
    builder, column = problem.builder, radii.reshape(-1, 1)
    whole = centre.cast(F64)
    wanted = points.cast(F64).clip(0.0, 1.0) * 255.0 - whole
    change = wanted.op("Round")
    size = change.op("Abs")
    if math.isinf(problem.p):
        size = size.op("Min", (column.op("Min", 1.0) * (255 * (1 + 1e-12))).op("Floor"))
        return whole + change.op("Sign") * size
    limit = column * (255 * (1 - _ROUNDING))
    limit = limit * limit
    excess = (size * size).reduce("ReduceSum", 1) - limit
    up = size - wanted.op("Abs")
    most, order = builder.node("TopK", up.name, builder.constant([problem.pixels], I64).name, count=2, axis=1)
    away, order = builder.value(most, F64) > 0.0, builder.value(order, I64)
    gains = away.where(size.op("GatherElements", order, axis=1) * 2.0 - 1.0, 0.0)
    spent = gains.op("CumSum", builder.constant(1, I64), exclusive=1)
    back = (away & (spent < excess)).cast(F64)
    size = size - (size * 0.0).op("ScatterElements", order, back, axis=1)
    inside = (size * size).reduce("ReduceSum", 1) <= limit
    return whole + change.op("Sign") * inside.where(size, 0.0)


def _outputs(
    problem: Problem, rows: Value, logits: Value, alone: Value, target: Value, radii: Value
) -> dict[str, Value]:
    """The outputs: for every radius the best picture among the image and the pictures of radii up to its own.

    Args:
        rows, logits: what `_search` returns; alone: bool (1,), whether all radii have the same image.
    """
    builder = problem.builder
    outputs = builder.inline(problem.network.after, {"logits": logits.name})
    probabilities = builder.value(outputs["probabilities"], F32)
    place = [builder.constant(k, I64) for k in range(3)]
    parts = rows.reshape(3, -1, problem.pixels)
    whole, picture = ((parts.take(place[k]).cast(F64) * 255.0).op("Round") for k in range(2))
    count = radii.rows()
    of_target = probabilities.take(target, axis=1).transpose(1, 0)  # (R, 3 R): each row with its own target
    places = builder.count_to(count)
    own = places.reshape(-1, 1).equals(places)
    smaller = radii.reshape(1, -1) <= radii.reshape(-1, 1)
    may = (own | alone).join(own | (smaller & alone), axis=1)
    two = builder.constant([0], I64), count + count, builder.constant([1], I64)
    found = may.where(of_target.op("Slice", *two), -1.0)
    chosen = found.op("ArgMax", axis=1, keepdims=0, dtype=I64)
    exact = chosen + (chosen >= count).cast(I64) * count  # the row of the point behind the picture
    at = chosen.reshape(-1, 1)
    best = whole.join(picture).take(chosen)
    d = best - whole
    far = (
        d.op("Abs").reduce("ReduceMax", 1)
        if math.isinf(problem.p)
        else (d * d).reduce("ReduceSum", 1).op("Sqrt")
    )
    pixels = best.reshape(-1, *problem.shape).transpose(0, 2, 3, 1).cast(np.uint8)
    return {
        "counterfactual": pixels,
        "confidence": found.op("GatherElements", at, axis=1).reshape(-1),
        "probabilities": probabilities.take(chosen),
        "is_ood": builder.value(outputs["is_ood"], bool).take(chosen),
        "distance": (far / 255.0).reshape(-1),
        "confidence_float": of_target.op("GatherElements", exact.reshape(-1, 1), axis=1).reshape(-1),
    }
