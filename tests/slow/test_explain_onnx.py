"""`export --explain` with real networks: gradients, searches beside the engine, and the guide's programs."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

import ratioctl
from ratioctl import images, package
from ratioctl.attacks import goals
from ratioctl.errors import UsageError
from ratioctl.models import build
from ratioctl.models.predict import predictor
from ratioctl.onnx import explainer, graph, parity
from ratioctl.onnx.explain import gradient_graph
from ratioctl.utils.resources import folder

pytestmark = pytest.mark.slow

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "explain.md").read_text(encoding="utf-8")
SAMPLES = sorted((folder("assets") / "samples").glob("*.jpg"))


@pytest.fixture(scope="module")
def spec() -> package.ModelPackage:
    return package.read(package.find())


@pytest.fixture(scope="module")
def base(spec: package.ModelPackage) -> bytes:
    return graph.graph(spec, threshold=package.threshold(spec))


@pytest.fixture(scope="module")
def place(spec: package.ModelPackage, base: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with explain.onnx of the default model, and the sample photographs."""
    where = tmp_path_factory.mktemp("explain")
    content = graph.explain(base, spec, threshold=package.threshold(spec), p=2.0)
    (where / "explain.onnx").write_bytes(content)
    (where / "assets").symlink_to(folder("assets"), target_is_directory=True)
    return where


class Relus(TorchFunctionMode):
    """Gives every ReLU of a network the sides of zero that another computation has found.

    Attributes:
        sides: for every ReLU in order, which elements (B, ...) are positive.
        near: for every ReLU the elements on the other side here, as shares of the mean size of its inputs.
        changed: (B,), whether an image has such elements.
    """

    def __init__(self, sides: list[np.ndarray]) -> None:
        super().__init__()
        self.sides, self.near = iter(sides), list[np.ndarray]()
        self.changed = np.zeros(len(sides[0]), bool)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.nn.functional.relu, torch.relu, torch.relu_):
            return function(*args, **(kwargs or {}))
        x, side = args[0], torch.from_numpy(next(self.sides))
        other = (x.detach() > 0) != side
        self.near.append((x.detach().abs()[other] / x.detach().abs().mean()).numpy())
        self.changed |= other.flatten(1).any(1).numpy()
        return x * side


def test_gradients_of_the_default_model_on_200_images(spec: package.ModelPackage, base: bytes) -> None:
    """100 crops of photographs and 100 images of noise, within 1e-4 of torch's gradient in float64.

    A ReLU's input within rounding of zero may be on either side, which changes a gradient by more: where this
    happens (fp32 torch differs from float64 as well), torch takes the graph's side.
    """
    generator = np.random.default_rng(0)
    photos = [np.array(Image.open(path).convert("RGB").resize((96, 96))) for path in SAMPLES]
    crops = [
        photos[k % len(photos)][y : y + 32, x : x + 32]
        for k, (y, x) in enumerate(generator.integers(0, 64, (100, 2)))
    ]
    pixels = np.concatenate([np.stack(crops), generator.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)])
    x = images.to_pixels(pixels)
    targets = generator.integers(0, len(spec.label_names), len(x))
    model = gradient_graph(onnx.load_model_from_string(base), temperature=spec.temperature, name=spec.name)
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in relus)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    network = copy.deepcopy(predictor(spec).network).double()
    wrong, near, changed = [], [], []
    for start in range(0, len(x), 20):
        part, target = x[start : start + 20], targets[start : start + 20]
        value, gradient, *outputs = session.run(None, {"image": part, "target": target})
        image = torch.from_numpy(part).double().requires_grad_()
        with Relus([output > 0 for output in outputs]) as mode:
            goal = goals.log_probability(torch.from_numpy(target), spec.temperature)(network(image))
        (slope,) = torch.autograd.grad(goal.sum(), image)
        assert next(mode.sides, None) is None, "every ReLU was met"
        assert value == pytest.approx(goal.detach().numpy(), rel=1e-4, abs=1e-4)
        difference = (gradient - slope.numpy()).reshape(len(part), -1)
        wrong.extend(np.linalg.norm(difference, axis=1) / slope.flatten(1).norm(dim=1).numpy())
        near += mode.near
        changed.extend(mode.changed)
    assert max(wrong) < 1e-4
    assert np.concatenate(near).max(initial=0) < 1e-4, "only what rounding explains has changed sides"
    assert np.mean(changed) < 0.2


def packaged(where: Path, architecture: str, size: int, **options: Any) -> package.ModelPackage:
    """A package of a network with random weights and batch statistics."""
    torch.manual_seed(0)
    network = build(
        architecture, num_classes=3, input_size=size, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], **options
    )
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[operator,union-attr]
            module.running_var.uniform_(0.3, 1.0)  # type: ignore[operator,union-attr]
    weights = {
        name: value.numpy()
        for name, value in network.network.state_dict().items()
        if value.is_floating_point()
    }
    config = {
        "architecture": architecture,
        "architecture_options": options,
        "label_names": ["cat", "dog", "frog"],
        "pretrained_cfg": {"input_size": [3, size, size], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]},
        "ratio": {"name": "pets", "temperature": 0.4, "thresholds": {"tpr95": 0.5}},
    }
    return package.write(where, config=config, weights=weights)


@pytest.mark.parametrize(
    ("architecture", "size", "options"),
    [
        ("resnet34", 8, {"width": 2}),
        ("resnet50", 9, {"width": 2, "stem_stride": 2}),
        ("preactresnet18", 8, {"width": 2}),
        ("preactresnet18", 8, {"width": 2, "activation": "silu"}),
        ("wideresnet-10-1", 8, {}),
        ("torchvision:resnet18", 64, {}),
        ("torchvision:mobilenet_v3_small", 64, {}),
        ("torchvision:squeezenet1_1", 64, {}),
    ],
)
def test_every_architecture_has_torchs_gradient(
    tmp_path: Path, architecture: str, size: int, options: dict[str, Any]
) -> None:
    pets = packaged(tmp_path / "pets", architecture, size, **options)
    content = graph.graph(pets, threshold=0.5)
    assert parity.check_gradient(content, pets, predictor(pets)) < 1e-4
    path = tmp_path / "explain.onnx"
    path.write_bytes(graph.explain(content, pets, threshold=0.5, p=2.0))
    sample = parity.sample_images(pets)[:4]
    assert parity.explained(sample, predictor(pets).predict, explainer.load(path), 0.5).difference < 1e-4


def test_a_vision_transformer_is_refused_by_the_name_of_an_operator(tmp_path: Path) -> None:
    pets = packaged(tmp_path / "pets", "timm:vit_tiny_patch16_224", 32)
    with pytest.raises(UsageError, match=r"cannot differentiate pets: the operator .*Softmax.* no gradient"):
        graph.explain(graph.graph(pets, threshold=0.5), pets, threshold=0.5, p=2.0)


def test_searches_are_as_good_as_the_engines(place: Path, spec: package.ModelPackage) -> None:
    """Mean confidence over photographs, a random target each, and three radii; and no radius far behind."""
    generator = np.random.default_rng(1)
    file, radii, found = explainer.load(place / "explain.onnx"), [1.0, 2.0, 3.0], []
    for path in SAMPLES[:8]:
        target = int(generator.integers(len(spec.label_names)))
        pixels = images.decode(path, 32).pixels[None]
        ours = file.search(pixels, [target], radii, 60)["confidence"]
        (answer,) = ratioctl.counterfactual(
            path, target=spec.label_names[target], eps=radii, steps=60, device="cpu", precision="fp32"
        )
        found.append([ours, [budget.confidence for budget in answer.targets[0].budgets]])
    difference = np.subtract(*np.transpose(found, (1, 0, 2)))
    assert difference.mean() > -0.01
    assert np.abs(difference.mean(axis=0)).max() < 0.03


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    return str(found)


def test_the_guides_programs_agree(place: Path, npm_install: Callable[..., None]) -> None:
    """Python's and Node's ten lines, as printed, on a photograph of the model's size."""
    Image.fromarray(images.decode(SAMPLES[-1], 32).pixels).save(place / "small.png")
    python = block("python").replace("assets/samples/rocket.jpg", "small.png")
    assert SAMPLES[-1].name == "rocket.jpg"
    assert all(len([line for line in code.splitlines() if line]) <= 11 for code in (python, block("js")))
    program = f"import sys\nsys.modules['torch'] = None\n{python}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said = re.fullmatch(r"out of distribution: True dog: (\[.*\])\n", done.stdout)
    assert said is not None
    ours, picture = json.loads(said[1]), np.array(Image.open(place / "dog.png"))
    assert ours[0] < 0.2 < 0.9 < ours[2]
    (place / "dog.png").unlink()

    wanted = re.search(r"`npm install --ignore-scripts (onnxruntime-node [^`]*)`", GUIDE)
    assert wanted is not None
    npm_install(place, *wanted[1].split())
    (place / "explain.js").write_text(block("js"))
    done = subprocess.run(
        ["node", "explain.js", "small.png"], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    is_ood, theirs = json.loads(done.stdout)
    assert is_ood is True
    assert theirs == pytest.approx(ours, abs=1.5e-3)  # Python's are printed with three digits
    saved = np.array(Image.open(place / "dog.png")).astype(int)
    assert np.abs(saved - picture).mean() < 1
    original = np.array(Image.open(place / "small.png")) / 255.0
    assert np.linalg.norm(saved / 255.0 - original) <= 2.0
