"""What several rooms' tests need: a tiny exported model whose answers can be worked out on paper."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before torch is imported, here and in the processes that tests start: with two threads a network of width 4
# takes ten times the processor time, and the suite runs in several processes anyway (pytest-xdist).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# pytest-xdist sets it for its workers, and tables would be folded to it.
os.environ.pop("COLUMNS", None)

TINY_SIZE = 4
TINY_LABELS = ["red", "green", "blue"]
TINY_TEMPERATURE = 0.5
TINY_THRESHOLDS = {"tpr95": 0.9, "tpr99": 0.7}


def tiny_config(name: str = "tiny") -> dict[str, Any]:
    return {
        "architecture": "channel-means",
        "label_names": TINY_LABELS,
        "pretrained_cfg": {
            "input_size": [3, TINY_SIZE, TINY_SIZE],
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
        },
        "ratio": {
            "format": 1,
            "name": name,
            "temperature": TINY_TEMPERATURE,
            "thresholds": TINY_THRESHOLDS,
        },
    }


def small_config(
    architecture: str, options: dict[str, int], temperature: float, tpr95: float, **ratio: Any
) -> dict[str, Any]:
    """Config of a network for four classes and 8x8 pixels; `ratio`: further fields of the block `ratio`."""
    return {
        "architecture": architecture,
        "architecture_options": options,
        "label_names": ["cat", "dog", "red panda", "air/plane"],
        "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3},
        "ratio": {
            "temperature": temperature,
            "thresholds": {"tpr95": tpr95, "tpr99": 0.3},
            "ladders": {"2": [0.25, 0.5, 1.0]},
            **ratio,
        },
    }


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images and findings of tests do not go into the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATIOCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_graph() -> Callable[..., bytes]:
    """Bytes of an ONNX file of `ratioctl export`'s form whose logits are the means of the three channels."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def build(config: dict[str, Any] | None = None) -> bytes:
        kinds = {"label": TensorProto.INT64, "is_ood": TensorProto.BOOL}
        names = ("logits", "probabilities", "label", "confidence", "ood_score", "is_ood")
        outputs = [
            helper.make_tensor_value_info(
                name,
                kinds.get(name, TensorProto.FLOAT),
                ["N", 3] if name in ("logits", "probabilities") else ["N"],
            )
            for name in names
        ]
        nodes = [
            helper.make_node("ReduceMean", ["image", "space"], ["logits"], keepdims=0),
            helper.make_node("Div", ["logits", "temperature"], ["scaled"]),
            helper.make_node("Softmax", ["scaled"], ["probabilities"], axis=1),
            helper.make_node("ReduceMax", ["probabilities", "one_axis"], ["confidence"], keepdims=0),
            helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
            helper.make_node("Sub", ["one", "confidence"], ["ood_score"]),
            helper.make_node("Less", ["confidence", "threshold"], ["is_ood"]),
        ]
        constants = {
            "space": np.array([2, 3]),
            "one_axis": np.array([1]),
            "temperature": np.float32(TINY_TEMPERATURE),
            "threshold": np.float32(TINY_THRESHOLDS["tpr95"]),
            "one": np.float32(1),
        }
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, TINY_SIZE, TINY_SIZE])
        weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
        model = helper.make_model(
            helper.make_graph(nodes, "tiny", [image], outputs, weights),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=9,
        )
        entry = model.metadata_props.add()
        entry.key, entry.value = "ratioctl", json.dumps(config or tiny_config())
        onnx.checker.check_model(model)
        return model.SerializeToString()

    return build


@pytest.fixture
def tiny_onnx(tmp_path: Path, tiny_graph: Callable[..., bytes]) -> Path:
    path = tmp_path / "tiny.onnx"
    path.write_bytes(tiny_graph())
    return path


@pytest.fixture
def tiny_package(tmp_path: Path, tiny_graph: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries the tiny model's ONNX file; its weights fit no network of ours."""
    import os

    from ratioctl import package

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = tmp_path / "tiny"
    package.write(folder, config=tiny_config(), weights={"w": np.ones(3, np.float32)}, onnx=tiny_graph())
    return folder


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    """A folder of plainly colored PNGs: red, green and blue of full strength, and grey."""
    from PIL import Image

    folder = tmp_path / "colors"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (4, 4), (0, 0, 255)).save(folder / "blue.png")
    Image.new("RGB", (9, 7), (0, 255, 0)).save(folder / "deep" / "green.png")
    Image.new("RGB", (4, 4), (128, 128, 128)).save(folder / "grey.png")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(folder / "red.png")
    return folder


@pytest.fixture(scope="session")
def small_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of a real network of ours, 8x8 RGB, with random weights: nothing is learnt, all is there."""
    import torch

    from ratioctl import package
    from ratioctl.models import build

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build("resnet18", num_classes=4, width=4, mean=[0.5] * 3, std=[0.25] * 3)
    weights = {
        key: value.numpy()
        for key, value in model.network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    folder = tmp_path_factory.mktemp("packages") / "small"
    config = small_config("resnet18", {"width": 4}, temperature=0.01, tpr95=0.5)
    package.write(folder, config=config, weights=weights)
    return folder


@pytest.fixture(scope="session")
def certified_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of the small package with a certified head, both with random weights."""
    import torch

    from ratioctl import package
    from ratioctl.models import build, state_of

    options = {"width": 4, "head_width": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build("certified:resnet18", num_classes=4, mean=[0.5] * 3, std=[0.25] * 3, **options)
        for parameter in model.network.discriminator.parameters():
            parameter.data *= 2  # outputs that differ between images
    model.network.temperature.fill_(0.2)
    model.network.shift.fill_(0.5)
    folder = tmp_path_factory.mktemp("packages") / "certified"
    config = small_config(
        "certified:resnet18",
        options,
        temperature=0.9,
        tpr95=0.4,
        certified={"norm": "inf", "eps": 0.02, "statement": "At most the guaranteed confidence."},
    )
    package.write(folder, config=config, weights={k: v.numpy() for k, v in state_of(model).items()})
    return folder


@pytest.fixture(scope="session")
def small_graph(small_package: Path) -> bytes:
    """The small package as ONNX; tracing takes seconds."""
    from ratioctl import package
    from ratioctl.onnx.graph import graph

    return graph(package.read(small_package), threshold=0.5)


@pytest.fixture(scope="session")
def small_explain(small_package: Path, small_graph: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `export --explain` of the small package, in l2."""
    from ratioctl import package
    from ratioctl.onnx.graph import explain

    path = tmp_path_factory.mktemp("explain") / "explain.onnx"
    path.write_bytes(explain(small_graph, package.read(small_package), threshold=0.5, p=2.0))
    return path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of three PNGs of noise: two of 8x8, one of 12x10."""
    from PIL import Image

    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = np.random.default_rng(5)
    for name, shape in (("one", (8, 8, 3)), ("two", (8, 8, 3)), ("wide", (10, 12, 3))):
        Image.fromarray(generator.integers(40, 215, shape, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def cats_and_dogs(tmp_path: Path) -> Path:
    """A labelled SOURCE for the small package, called "data": four PNGs of noise in each of two classes."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for k in range(4):
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return tmp_path / "data"


class Serving:
    """`ratioctl serve` in a process of its own."""

    def __init__(self, *line: str | Path, **env: str) -> None:
        command = [sys.executable, "-m", "ratioctl", "serve", *map(str, line), "--port", "0", "--json", "-q"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
        )
        assert self.process.stdout is not None
        said = ""
        while said.count("}") == 0:
            said += (read := self.process.stdout.readline())
            if not read:
                raise AssertionError(self.process.communicate()[1])
        self.url = str(json.loads(said)["url"]).rstrip("/")

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit code after a signal, and what was written to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        said = self.process.communicate(timeout=120)[1]
        return self.process.returncode, said


@pytest.fixture
def serving() -> Iterator[Callable[..., Serving]]:
    """serving(model, ..., option, ..., VARIABLE=value): a server on a free port, ended after the test."""
    started: list[Serving] = []

    def start(*line: str | Path, **env: str) -> Serving:
        started.append(Serving(*line, **env))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


@pytest.fixture(scope="session")
def npm_install() -> Callable[..., None]:
    """npm_install(folder, package, ...); skips where npm cannot, and fails there under CI."""

    def install(folder: Path, *wanted: str) -> None:
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("no npm on this machine")
        (folder / "package.json").write_text('{"private": true}')
        line = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", *wanted]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            if os.environ.get("CI"):
                pytest.fail(done.stderr)
            pytest.skip(f"{wanted[0]} cannot be installed: " + done.stderr.strip()[-200:])

    return install
