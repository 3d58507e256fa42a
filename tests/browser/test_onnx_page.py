"""Exported files in a web page: onnxruntime-web in a real browser gives Python's answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratioctl import images, package
from ratioctl.onnx import explainer, runtime
from ratioctl.onnx.graph import explain, graph
from ratioctl.utils import resources

pytestmark = pytest.mark.slow

PAGE = """<!doctype html><meta charset="utf-8"><title>ONNX</title>
<script id="library" type="text/plain">LIBRARY</script>
<script>
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const run = async () => {
  const source = new TextDecoder().decode(bytes(document.getElementById("library").textContent));
  const ort = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = bytes("BINARY").buffer;
  const session = await ort.InferenceSession.create(bytes("MODEL"));
  const image = new ort.Tensor("uint8", bytes("IMAGES"), SHAPE);
  const out = await session.run({ image, ...(INPUTS) });
  const plain = {};
  for (const [name, tensor] of Object.entries(out)) plain[name] = Array.from(tensor.data, Number);
  return JSON.stringify(plain);
};
</script>
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, npm_install: Callable[..., None]) -> Path:
    """onnxruntime-web's folder of built files."""
    folder = tmp_path_factory.mktemp("web")
    npm_install(folder, "onnxruntime-web@^1.20")
    return folder / "node_modules" / "onnxruntime-web" / "dist"


def answers(
    open_page: Callable[[Path], Any], library: Path, file: Path, pixels: np.ndarray, inputs: str = "{}"
) -> dict[str, list[float]]:
    """The outputs that a page with everything in it computes; `inputs` is JavaScript."""
    text = PAGE.replace("SHAPE", json.dumps(pixels.shape)).replace("INPUTS", inputs)
    for name, data in (
        ("LIBRARY", (library / "ort.wasm.bundle.min.mjs").read_bytes()),
        ("BINARY", (library / "ort-wasm-simd-threaded.wasm").read_bytes()),
        ("MODEL", file.read_bytes()),
        ("IMAGES", pixels.tobytes()),
    ):
        text = text.replace(name, base64.b64encode(data).decode(), 1)
    page = file.with_suffix(".html")
    page.write_text(text)
    found: dict[str, list[float]] = json.loads(open_page(page).evaluate("run()"))
    return found


def test_a_page_agrees_with_python(library: Path, tmp_path: Path, open_page: Callable[[Path], Any]) -> None:
    found = package.read(package.find())
    file = tmp_path / "model.onnx"
    file.write_bytes(graph(found, threshold=package.threshold(found), input_type="uint8"))
    photos = sorted((resources.folder("assets") / "samples").glob("*.jpg"))
    pixels = np.stack([images.decode(path, found.input_size[1]).pixels for path in photos])
    pixels = np.concatenate([pixels, np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)])
    theirs = answers(open_page, library, file, pixels)
    ours = runtime.load(file).run(pixels)
    assert list(theirs) == list(runtime.OUTPUTS)
    for name in ("logits", "probabilities", "confidence", "ood_score"):
        assert np.abs(np.reshape(theirs[name], ours[name].shape) - ours[name]).max() < 1e-4, name
    assert theirs["label"] == ours["label"].tolist()
    assert theirs["is_ood"] == ours["is_ood"].astype(int).tolist()
    assert 0 < sum(theirs["is_ood"]) < len(pixels), "both answers occur, or the test proves nothing"


def test_a_page_explains_as_python_does(
    library: Path, tmp_path: Path, open_page: Callable[[Path], Any]
) -> None:
    found = package.read(package.find())
    limit = package.threshold(found)
    file = tmp_path / "explain.onnx"
    file.write_bytes(explain(graph(found, threshold=limit), found, threshold=limit, p=2.0))
    photo = resources.folder("assets") / "samples" / "cat.jpg"
    pixels = images.decode(photo, found.input_size[1]).pixels[None]
    inputs = """{
      target: new ort.Tensor("int64", [5], [1]), steps: new ort.Tensor("int64", [15], [1]),
      radii: new ort.Tensor("float64", [0, 0.5, 2], [3]),
    }"""
    theirs = answers(open_page, library, file, pixels, inputs)
    ours = explainer.load(file).search(pixels, [5], [0, 0.5, 2], 15)
    assert list(theirs) == list(explainer.OUTPUTS)
    for name in ("confidence", "probabilities", "distance", "confidence_float"):
        assert np.abs(np.reshape(theirs[name], ours[name].shape) - ours[name]).max() < 1e-3, name
    pictures = np.reshape(theirs["counterfactual"], ours["counterfactual"].shape)
    length = np.linalg.norm((pictures - pixels.astype(float)).reshape(3, -1) / 255, axis=1)
    assert (length <= [0, 0.5, 2]).all()
    assert ours["confidence"][0] < 0.2 < 0.9 < ours["confidence"][2]
