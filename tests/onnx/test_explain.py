"""The graph that searches counterfactuals: its gradient, its parts beside the engine's, and its promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ratioctl import metrics, package
from ratioctl.attacks import engine, goals
from ratioctl.cli import main
from ratioctl.counterfactuals import distances, round_into_ball
from ratioctl.errors import OutputError, PackageError, RatioctlError, UsageError
from ratioctl.models.predict import Predictor, predictor
from ratioctl.onnx import explain, explainer, export, parity, runtime
from ratioctl.onnx import graph as graphs
from ratioctl.onnx.builder import Builder
from ratioctl.onnx.gradient_rules import RULES
from ratioctl.recipe import Attack, Ball

SHAPE = (3, 8, 8)
F32, F64, I64 = np.float32, np.float64, np.int64


def session(model: onnx.ModelProto) -> Callable[..., list[np.ndarray]]:
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    loaded = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda **given: list(loaded.run(None, given))


# --- gradients of single operators ------------------------------------------------------------------------

TEXT = '<ir_version: 8, opset_import: ["": 18]> g (float[N,4,6,6] image) => (float[N,K] logits) { %s }'
POINTS = np.random.default_rng(0).normal(size=(3, 4, 6, 6)).astype(np.float32)
KERNEL = np.random.default_rng(1).normal(size=(8, 4, 3, 3)).astype(np.float32)
POINTWISE = KERNEL[..., :1, :1]
DEPTHWISE = np.random.default_rng(1).normal(size=(4, 1, 3, 3)).astype(np.float32)
MATRIX = np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)
NORMS = np.random.default_rng(3).uniform(0.5, 2, size=(4, 4)).astype(np.float32)
ROWS = np.random.default_rng(4).normal(0, 0.1, (3, 4 * 6 * 6)).astype(np.float32)
T = torch.from_numpy

# Lines of ONNX text from `image` to `y`; the same in torch; constants.
OPERATORS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]] = {
    "Relu": ("y = Relu(image)", F.relu, {}),
    "Clip": ("y = Clip(image, low, high)", lambda x: x.clamp(-0.5, 0.7), {"low": -0.5, "high": 0.7}),
    "Clip below": ("y = Clip(image, low)", lambda x: x.clamp(min=-0.5), {"low": -0.5}),
    "SiLU": ("s = Sigmoid(image) y = Mul(image, s)", F.silu, {}),
    "GELU": (
        "d = Div(image, root) e = Erf(d) f = Add(e, one) h = Mul(image, half) y = Mul(h, f)",
        F.gelu,
        {"root": math.sqrt(2), "one": 1.0, "half": 0.5},
    ),
    "Tanh": ("y = Tanh(image)", torch.tanh, {}),
    "HardSwish": ("y = HardSwish(image)", F.hardswish, {}),
    "HardSigmoid": ("y = HardSigmoid <alpha = 0.16666667> (image)", F.hardsigmoid, {}),
    "Neg, Sub, Div": (
        "n = Neg(image) s = Sub(one, n) t = Sub(n, s) u = Mul(n, n) v = Add(u, one) y = Div(t, v)",
        lambda x: (-x - (1 + x)) / (x * x + 1),
        {"one": 1.0},
    ),
    "a gate for each channel": (
        "m = GlobalAveragePool(image) s = Sigmoid(m) y = Mul(image, s)",
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        {},
    ),
    "Conv": (
        "y = Conv <pads = [1, 1, 1, 1]> (image, k)",
        lambda x: F.conv2d(x, T(KERNEL), padding=1),
        {"k": KERNEL},
    ),
    "Conv, stride": (
        "y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (image, k)",
        lambda x: F.conv2d(x, T(KERNEL), stride=2, padding=1),
        {"k": KERNEL},
    ),
    "Conv, stride beyond the kernel": (
        "y = Conv <pads = [0, 1, 0, 2], strides = [3, 3]> (image, k)",
        lambda x: F.conv2d(F.pad(x, (1, 2)), T(KERNEL[..., :2, :2]), stride=3),
        {"k": KERNEL[..., :2, :2]},
    ),
    "Conv, strides of two on one value": (
        "a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (image, k) "
        "b = Conv <strides = [2, 2]> (image, pointwise) c = Add(a, b) "
        "d = Conv <strides = [3, 3]> (image, pointwise) e = ReduceMean(d, axes) y = Mul(c, e)",
        lambda x: (
            (F.conv2d(x, T(KERNEL), stride=2, padding=1) + F.conv2d(x, T(POINTWISE), stride=2))
            * F.conv2d(x, T(POINTWISE), stride=3).mean((2, 3), keepdim=True)
        ),
        {"k": KERNEL, "pointwise": POINTWISE, "axes": [2, 3]},
    ),
    "Conv of sliced pixels": (
        "a = Slice(image, zero, six, rows, two) b = Slice(a, zero, six, columns, two) y = Conv(b, pointwise)",
        lambda x: F.conv2d(x[:, :, ::2, ::2], T(POINTWISE)),
        {"zero": [0], "six": [6], "rows": [2], "columns": [3], "two": [2], "pointwise": POINTWISE},
    ),
    "Conv, dilated, a kernel that leaves a row over": (
        "y = Conv <dilations = [2, 1], strides = [1, 2]> (image, k)",
        lambda x: F.conv2d(x, T(KERNEL), dilation=(2, 1), stride=(1, 2)),
        {"k": KERNEL},
    ),
    "Conv, padding beyond the kernel": (
        "y = Conv <pads = [3, 3, 3, 3]> (image, k)",
        lambda x: F.conv2d(x, T(KERNEL), padding=3),
        {"k": KERNEL},
    ),
    "Conv, groups": (
        "y = Conv <pads = [1, 1, 1, 1], group = 4> (image, k)",
        lambda x: F.conv2d(x, T(DEPTHWISE), padding=1, groups=4),
        {"k": DEPTHWISE},
    ),
    "Slice": (
        "y = Slice(image, starts, ends, axes, steps)",
        lambda x: x[:, :, 1:6:2, ::3],
        {"starts": [1, 0], "ends": [6, 2**62], "axes": [2, 3], "steps": [2, 3]},
    ),
    "MaxPool": (
        "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (image)",
        lambda x: F.max_pool2d(x, 3, 2, 1),
        {},
    ),
    "AveragePool": (
        "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], "
        "count_include_pad = 1> (image)",
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        {},
    ),
    "BatchNormalization": (
        "y = BatchNormalization <epsilon = 0.01> (image, scale, shift, mean, variance)",
        lambda x: F.batch_norm(x, T(NORMS[2]), T(NORMS[3]), T(NORMS[0]), T(NORMS[1]), eps=0.01),
        dict(zip(("scale", "shift", "mean", "variance"), NORMS, strict=True)),
    ),
    "Concat": (
        "r = Relu(image) y = Concat <axis = 1> (image, r, image)",
        lambda x: torch.cat([x, F.relu(x), x], 1),
        {},
    ),
    "Transpose, MatMul": (
        "t = Transpose <perm = [0, 2, 1, 3]> (image) y = MatMul(t, m)",
        lambda x: x.transpose(1, 2) @ T(MATRIX),
        {"m": MATRIX},
    ),
    "MatMul of both": (
        "t = Transpose <perm = [0, 1, 3, 2]> (image) y = MatMul(image, t)",
        lambda x: x @ x.transpose(2, 3),
        {},
    ),
    "Abs, Exp, Log, LogSoftmax": (
        "a = Abs(image) e = Exp(a) f = Log(e) l = LogSoftmax <axis = 1> (image) y = Mul(f, l)",
        lambda x: x.abs() * x.log_softmax(1),
        {},
    ),
    "Flatten, Gemm": (
        "f = Flatten(image) g = Gemm <transB = 1, alpha = 0.5> (f, w) y = Reshape(g, shape)",
        lambda x: 0.5 * x.flatten(1) @ T(ROWS).T,
        {"w": ROWS, "shape": [-1, 3, 1, 1]},
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_gradient_of_an_operator_is_torchs(name: str) -> None:
    lines, function, constants = OPERATORS[name]
    model = parsed(f"{lines} z = Flatten(y) logits = Mul(z, z)", constants)
    x = torch.from_numpy(POINTS).requires_grad_()
    goal = goals.log_probability(torch.tensor([0, 1, 2]), 0.7)
    logits = function(x).flatten(1) ** 2
    (expected,) = torch.autograd.grad(goal(logits).sum(), x)
    found = explain.gradient_graph(model, temperature=0.7, name="test")
    value, gradient = session(found)(image=POINTS, target=np.arange(3))
    assert value == pytest.approx(goal(logits).detach().numpy(), rel=1e-4, abs=1e-4)
    assert np.abs(gradient - expected.numpy()).max() < 1e-4 * expected.abs().max()
    assert expected.abs().max() > 0.01


def parsed(lines: str, constants: dict[str, Any]) -> onnx.ModelProto:
    """A model without its tail, which the gradient does not need."""
    model = onnx.parser.parse_model(TEXT % lines)
    for name, value in constants.items():
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def test_every_operator_with_a_rule_is_tested() -> None:
    tested = {node.op_type for lines, _, c in OPERATORS.values() for node in parsed(lines, c).graph.node}
    same = {"Identity", "Dropout", "Squeeze", "Unsqueeze"}  # rules of tested ones
    assert set(RULES) == tested | same


def test_an_operator_without_a_gradient_is_named() -> None:
    model = parsed("s = Softplus(image) y = Ceil(s) logits = Flatten(y)", {})
    with pytest.raises(UsageError, match=r"pets: the operator Ceil, Softplus has no gradient"):
        explain.gradient_graph(model, temperature=1.0, name="pets")


# --- the small network ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(small_package: Path) -> Predictor:
    return predictor(package.read(small_package))


@pytest.fixture(scope="module")
def loaded(small_explain: Path) -> explainer.Explainer:
    return explainer.load(small_explain, threads=1)


@pytest.fixture(scope="module")
def loaded_linf(
    small_package: Path, small_graph: bytes, tmp_path_factory: pytest.TempPathFactory
) -> explainer.Explainer:
    path = tmp_path_factory.mktemp("linf") / "explain.onnx"
    path.write_bytes(graphs.explain(small_graph, package.read(small_package), threshold=0.5, p=math.inf))
    return explainer.load(path, threads=1)


def test_the_gradient_of_a_network_is_torchs(small_graph: bytes, network: Predictor) -> None:
    x = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
    targets = np.arange(5) % 4
    model = explain.gradient_graph(onnx.load_model_from_string(small_graph), temperature=0.3, name="small")
    value, gradient = session(model)(image=x, target=targets)
    image = torch.from_numpy(x).requires_grad_()
    expected = goals.log_probability(torch.from_numpy(targets), 0.3)(network.exact(image))
    (slope,) = torch.autograd.grad(expected.sum(), image)
    assert value == pytest.approx(expected.detach().numpy(), rel=1e-4, abs=1e-5)
    assert np.abs(gradient - slope.numpy()).max() < 1e-4 * slope.abs().max()


def problem(builder: Builder, base: bytes | None, p: float) -> explain.Problem:
    given = None if base is None else explain.Network(onnx.load_model_from_string(base), builder, "small")
    return explain.Problem(builder=builder, network=given, shape=SHAPE, temperature=0.3, p=p)  # type: ignore[arg-type]


def inputs(**shapes: tuple[int, list[Any]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, *kind) for name, kind in shapes.items()]


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_the_loop_is_the_engines_auto_pgd(small_graph: bytes, network: Predictor, p: float) -> None:
    builder = Builder()
    names = {"start": F32, "x0": F32, "radii": F64, "target": I64, "steps": I64}
    start, x0, radii, target, count = (builder.value(name, dtype) for name, dtype in names.items())
    found = explain._ascend(problem(builder, small_graph, p), start, x0, radii, target, count)
    n = math.prod(SHAPE)
    rows = (TensorProto.FLOAT, ["M", n])
    model = builder.model(
        inputs(
            start=rows,
            x0=rows,
            radii=(TensorProto.DOUBLE, ["M", 1]),
            target=(TensorProto.INT64, ["M"]),
            steps=(TensorProto.INT64, []),
        ),
        {"best": (found["best"], ["M", n]), "best_value": (found["best_value"], ["M", 1])},
        18,
    )
    x = np.random.default_rng(1).random((3, *SHAPE), dtype=np.float32)
    eps, targets = np.array([0.1, 0.5, 1.0]) / (1 if p == 2 else 10), np.array([0, 1, 3])
    flat = x.reshape(3, -1)
    run = session(model)
    for steps in (1, 9, 25):
        best, value = run(start=flat, x0=flat, radii=eps[:, None], target=targets, steps=np.array(steps))
        theirs = engine.perturb(
            network.exact,
            torch.from_numpy(x),
            goals.log_probability(torch.from_numpy(targets), 0.3),
            Attack(ball=Ball(p=p, eps=1.0), method="apgd", steps=steps),
            eps=torch.from_numpy(eps),
        )
        assert value[:, 0] == pytest.approx(theirs.value.numpy(), rel=1e-3, abs=1e-4)
        assert np.abs(best.reshape(x.shape) - theirs.x.numpy()).mean() < 1e-4


@settings(deadline=None, max_examples=20, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), p=st.sampled_from([2.0, math.inf]), eps=st.floats(1e-3, 4))
def test_points_are_rounded_as_the_engine_rounds_them(seed: int, p: float, eps: float) -> None:
    run = rounding(p)
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    d = generator.normal(size=pixels.shape) ** 3
    d *= eps * (1 - 2e-6) / np.linalg.norm(d.reshape(2, -1), ord=p, axis=1)[:, None, None, None]
    x = np.clip(pixels / 255 + d, 0, 1).astype(np.float32).transpose(0, 3, 1, 2)
    centre = pixels.transpose(0, 3, 1, 2).astype(np.float32).reshape(2, -1)
    (found,) = run(points=x.reshape(2, -1), centre=centre, radii=np.array([eps, eps]))
    for k in range(2):
        expected = round_into_ball(x[k], pixels[k], p, eps)
        assert (found[k].reshape(SHAPE).transpose(1, 2, 0) == expected).all()


ROUNDINGS: dict[float, Callable[..., list[np.ndarray]]] = {}


def rounding(p: float) -> Callable[..., list[np.ndarray]]:
    if p not in ROUNDINGS:
        builder = Builder()
        points, centre, radii = (
            builder.value(n, d) for n, d in (("points", F32), ("centre", F32), ("radii", F64))
        )
        picture = explain._round(problem(builder, None, p), points, centre, radii)
        rows = (TensorProto.FLOAT, ["R", math.prod(SHAPE)])
        given = inputs(points=rows, centre=rows, radii=(TensorProto.DOUBLE, ["R"]))
        ROUNDINGS[p] = session(builder.model(given, {"picture": (picture, rows[1])}, 18))
    return ROUNDINGS[p]


# --- the promises -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    radii=st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 3)), min_size=1, max_size=5),
    steps=st.integers(0, 12),
    linf=st.booleans(),
)
def test_pictures_are_in_the_ball_scored_and_monotone(
    loaded: explainer.Explainer,
    loaded_linf: explainer.Explainer,
    network: Predictor,
    seed: int,
    radii: list[float],
    steps: int,
    linf: bool,
) -> None:
    file = loaded_linf if linf else loaded
    if linf:
        radii = [eps / 10 for eps in radii]
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    target = int(generator.integers(4))
    found = file.search(pixels, [target], radii, steps)
    probabilities = metrics.softmax(network.predict(found["counterfactual"]), file.temperature)
    assert np.abs(found["probabilities"] - probabilities).max() < 1e-4
    assert (found["confidence"] == found["probabilities"][:, target]).all()
    assert (found["is_ood"] == (probabilities.max(1) < 0.5)).all()
    own = metrics.softmax(network.predict(pixels), file.temperature)[0, target]
    for n, eps in enumerate(radii):
        distance = distances(found["counterfactual"][n], pixels[0])["linf" if linf else "l2"]
        assert found["distance"][n] == pytest.approx(distance, rel=1e-12)
        assert distance <= eps * (1 + 1e-15)
        assert found["confidence"][n] >= own - 1e-5
        assert all(
            found["confidence"][n] >= found["confidence"][m] for m in range(len(radii)) if radii[m] <= eps
        ), "a larger ball has the better picture, in any order of the radii"
        if eps == 0:
            assert (found["counterfactual"][n] == pixels[0]).all()
            assert found["confidence_float"][n] == pytest.approx(own, abs=1e-5)


def test_a_search_gains_confidence(loaded: explainer.Explainer) -> None:
    pixels = np.random.default_rng(3).integers(60, 200, (1, 8, 8, 3), dtype=np.uint8)
    found = loaded.search(pixels, [2], [0, 0.25, 0.5, 1, 2], 30)
    assert found["confidence"][-1] > 1.3 * found["confidence"][0]
    assert (np.diff(found["confidence"]) > -1e-7).all()
    assert found["confidence_float"] == pytest.approx(found["confidence"], abs=0.2)


def test_an_image_and_a_target_for_every_radius(loaded: explainer.Explainer) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    found = loaded.search(pixels, [0, 1, 2], [0.5, 0.25, 0.5], 10)
    for n in range(3):
        alone = loaded.search(pixels[n : n + 1], [n], [[0.5, 0.25, 0.5][n]], 10)
        assert distances(found["counterfactual"][n], pixels[n])["l2"] <= 0.5
        assert found["confidence"][n] == pytest.approx(alone["confidence"][0], abs=0.05)


def test_scores_of_many_images(loaded: explainer.Explainer, network: Predictor) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    expected = metrics.softmax(network.predict(pixels), loaded.temperature)
    assert np.abs(loaded.probabilities(pixels) - expected).max() < 1e-4


@pytest.mark.parametrize(
    ("images", "targets", "radii"),
    [
        *((1, [4], [1.0]), (1, [-1], [1.0]), (1, [0], [-1.0]), (1, [0], [math.nan]), (1, [0], [math.inf])),
        *((1, [0], []), (2, [0], [1.0]), (1, [0, 1], [1.0])),
    ],
)
def test_the_wrapper_refuses(
    loaded: explainer.Explainer, images: int, targets: list[int], radii: list[float]
) -> None:
    with pytest.raises(ValueError, match=r"targets|radii"):
        loaded.search(np.zeros((images, 8, 8, 3), np.uint8), targets, radii, 1)
    with pytest.raises(ValueError, match="uint8"):
        loaded.search(np.zeros((1, 9, 8, 3), np.uint8), [0], [1.0], 1)


def test_the_graph_alone_is_harmless(loaded: explainer.Explainer) -> None:
    """Wrong classes become the nearest, wrong radii 0 or the diameter of the box, and no steps none."""
    pixels = np.random.default_rng(6).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    radii = np.array([math.nan, -1.0, 0.5, math.inf])
    for wrong, target in ((-7, 0), (99, 3)):
        given = {"image": pixels, "radii": radii, "steps": np.array([5])}
        found = loaded._run({**given, "target": np.array([wrong])})
        same = loaded._run({**given, "target": np.array([target])})
        assert all((a == b).all() for a, b in zip(found, same, strict=True))
        pictures = found[0]
        assert (pictures[:2] == pixels).all()
        assert distances(pictures[2], pixels[0])["l2"] <= 0.5
    steps = loaded._run({**given, "target": np.array([0]), "steps": np.array([-(2**40)])})
    assert (steps[0] == pixels).all()


def test_steps_have_a_limit(
    small_package: Path, small_graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "MAX_STEPS", 3)
    path = tmp_path / "three.onnx"
    path.write_bytes(graphs.explain(small_graph, package.read(small_package), threshold=0.5, p=2.0))
    file = explainer.load(path)
    pixels = np.random.default_rng(7).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    endless, three = (file.search(pixels, [1], [0.5], steps) for steps in (2**60, 3))
    assert all((endless[name] == three[name]).all() for name in endless)


# --- the file ---------------------------------------------------------------------------------------------


def test_the_file_is_the_contracts(small_explain: Path, small_package: Path, small_graph: bytes) -> None:
    model, other = onnx.load(small_explain), onnx.load_model_from_string(small_graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == other.ir_version
    assert list(model.opset_import) == list(other.opset_import)

    def shapes(values: Any) -> dict[str, tuple[int, list[Any]]]:
        return {
            v.name: (
                v.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    kind = TensorProto
    assert shapes(model.graph.input) == {
        "image": (kind.UINT8, ["N", 8, 8, 3]),
        "target": (kind.INT64, ["T"]),
        "radii": (kind.DOUBLE, ["R"]),
        "steps": (kind.INT64, [1]),
    }
    assert shapes(model.graph.output) == {
        "counterfactual": (kind.UINT8, ["R", 8, 8, 3]),
        "confidence": (kind.FLOAT, ["R"]),
        "probabilities": (kind.FLOAT, ["R", 4]),
        "is_ood": (kind.BOOL, ["R"]),
        "distance": (kind.DOUBLE, ["R"]),
        "confidence_float": (kind.FLOAT, ["R"]),
    }
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata == {
        "ratioctl": package.portable_config(package.read(small_package)),
        "ratioctl.export": {"threshold": 0.5, "explain": {"norm": "2"}},
    }
    assert small_explain.stat().st_size < 1.5 * len(small_graph) + 100_000, "the weights are stored once"


def test_files_of_the_two_kinds_are_told_apart(
    small_explain: Path, small_graph: bytes, tmp_path: Path
) -> None:
    with pytest.raises(PackageError, match=r"was exported with --explain.*ratioctl counterfactual"):
        runtime.load(small_explain)
    path = tmp_path / "model.onnx"
    path.write_bytes(small_graph)
    with pytest.raises(PackageError, match=r"no counterfactuals.*export MODEL --explain"):
        explainer.load(path)


def test_export_checks_and_writes_the_file(
    small_package: Path, small_graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "graph", lambda *args, **options: small_graph)
    done = export.export(small_package, explain=True, norm="linf")
    assert (done.path, done.package, done.input_type) == (Path("explain.onnx"), None, "uint8")
    assert done.parity is not None
    assert (done.parity.difference < 1e-4, done.parity.labels, done.parity.flags) == (True, 0, 0)
    assert explainer.load(done.path).p == math.inf
    assert [path.name for path in tmp_path.iterdir()] == ["explain.onnx"]
    Path("mine.onnx").write_text("mine")
    with pytest.raises(OutputError, match="not exported by ratioctl"):
        export.export(small_package, explain=True, output="mine.onnx")
    for options, words in (
        ({"norm": "1"}, "--norm 1: cannot be searched"),
        ({"int8": True}, "--int8: cannot be combined"),
        ({"layout": "triton"}, "--layout triton: cannot be combined"),
        ({"explain": False, "norm": "inf"}, "--norm: is for --explain"),
    ):
        with pytest.raises(UsageError, match=words):
            export.export(small_package, **{"explain": True, **options})  # type: ignore[arg-type]


def test_a_wrong_graph_is_not_written(
    small_package: Path, small_graph: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of another network, and pictures that leave the ball."""
    monkeypatch.chdir(tmp_path)
    other = onnx.load_model_from_string(small_graph)
    kernel = next(
        tensor for tensor in other.graph.initializer if tensor.name.endswith("layer3.0.conv1.weight")
    )
    kernel.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(kernel) * 1.1, kernel.name))
    monkeypatch.setattr(export, "graph", lambda *args, **options: other.SerializeToString())
    with pytest.raises(RatioctlError, match="gradients that differ from torch's"):
        export.export(small_package, explain=True)
    monkeypatch.setattr(export, "graph", lambda *args, **options: small_graph)
    monkeypatch.setattr(explain, "_round", lambda problem, points, centre, radii: points.cast(F64) * 0.0)
    with pytest.raises(RatioctlError, match="outside their balls"):
        export.export(small_package, explain=True)
    assert list(tmp_path.iterdir()) == []
    assert parity.sample_images(package.read(small_package)).shape[1:] == (8, 8, 3)


def test_inspect_says_what_the_file_does(small_explain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small_explain), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["input"]) == ("onnx", "uint8")
    assert shown["searches"] == "counterfactuals in l2"
    assert shown["is_ood"] == "confidence below 0.5"
