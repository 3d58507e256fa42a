"""A reader that is not ours: onnxruntime for Node computes the same answers from an exported file."""

from __future__ import annotations

import json
import subprocess
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

SCRIPT = """
const ort = require("onnxruntime-node");
const fs = require("fs");
(async () => {
  const [file, kind, shape, data] = process.argv.slice(2);
  const session = await ort.InferenceSession.create(file);
  const bytes = fs.readFileSync(data);
  const values = kind === "uint8" ? new Uint8Array(bytes)
    : new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
  const image = new ort.Tensor(kind === "uint8" ? "uint8" : "float32", values, JSON.parse(shape));
  const out = await session.run({ image });
  const plain = {};
  for (const [name, tensor] of Object.entries(out)) plain[name] = Array.from(tensor.data, Number);
  console.log(JSON.stringify({ names: session.outputNames, plain }));
})();
"""


def sample_images(size: int) -> np.ndarray:
    """uint8 (N, size, size, 3): the bundled photographs, and as many images of noise."""
    photos = sorted((resources.folder("assets") / "samples").glob("*.jpg"))
    real = np.stack([images.decode(path, size).pixels for path in photos])
    noise = np.random.default_rng(0).integers(0, 256, real.shape, dtype=np.uint8)
    return np.concatenate([real, noise])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, npm_install: Callable[..., None]) -> Path:
    """A folder with onnxruntime-node in it; its processor library comes inside the npm package."""
    folder = tmp_path_factory.mktemp("node")
    npm_install(folder, "onnxruntime-node@^1.20")
    (folder / "run.js").write_text(SCRIPT)
    return folder


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_node_agrees_with_python(node: Path, kind: Any) -> None:
    found = package.read(package.find())
    file = node / f"{kind}.onnx"
    limit = package.threshold(found)
    file.write_bytes(graph(found, threshold=limit, input_type=kind))
    pixels = sample_images(found.input_size[1])
    sent = pixels if kind == "uint8" else images.to_pixels(pixels)
    (node / "data").write_bytes(np.ascontiguousarray(sent).tobytes())
    line = ["node", "run.js", file.name, kind, json.dumps(sent.shape), "data"]
    done = subprocess.run(line, cwd=node, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert theirs["names"] == list(runtime.OUTPUTS)
    ours = runtime.load(file).run(pixels)
    for name in ("logits", "probabilities", "confidence", "ood_score"):
        assert np.abs(np.reshape(theirs["plain"][name], ours[name].shape) - ours[name]).max() < 1e-4, name
    assert theirs["plain"]["label"] == ours["label"].tolist()
    assert theirs["plain"]["is_ood"] == ours["is_ood"].astype(int).tolist()
    assert 0 < sum(theirs["plain"]["is_ood"]) < len(pixels), "both answers occur, or the test proves nothing"
