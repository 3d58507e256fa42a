"""An exported file in a web page: onnxruntime-web in a real browser gives Python's answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratioctl import images, package
from ratioctl.onnx import runtime
from ratioctl.onnx.graph import graph
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
  const out = await session.run({ image });
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


def test_a_page_agrees_with_python(library: Path, tmp_path: Path, open_page: Callable[[Path], Any]) -> None:
    found = package.read(package.find())
    file = tmp_path / "model.onnx"
    file.write_bytes(graph(found, threshold=package.threshold(found), input_type="uint8"))
    photos = sorted((resources.folder("assets") / "samples").glob("*.jpg"))
    pixels = np.stack([images.decode(path, found.input_size[1]).pixels for path in photos])
    pixels = np.concatenate([pixels, np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)])
    text = PAGE.replace("SHAPE", json.dumps(pixels.shape))
    for name, data in (
        ("LIBRARY", (library / "ort.wasm.bundle.min.mjs").read_bytes()),
        ("BINARY", (library / "ort-wasm-simd-threaded.wasm").read_bytes()),
        ("MODEL", file.read_bytes()),
        ("IMAGES", pixels.tobytes()),
    ):
        text = text.replace(name, base64.b64encode(data).decode(), 1)
    (tmp_path / "page.html").write_text(text)
    page = open_page(tmp_path / "page.html")
    theirs = json.loads(page.evaluate("run()"))
    ours = runtime.load(file).run(pixels)
    assert list(theirs) == list(runtime.OUTPUTS)
    for name in ("logits", "probabilities", "confidence", "ood_score"):
        assert np.abs(np.reshape(theirs[name], ours[name].shape) - ours[name]).max() < 1e-4, name
    assert theirs["label"] == ours["label"].tolist()
    assert theirs["is_ood"] == ours["is_ood"].astype(int).tolist()
    assert 0 < sum(theirs["is_ood"]) < len(pixels), "both answers occur, or the test proves nothing"
