"""Counterfactuals with a file of `export --explain`: the same documents and promises, without torch."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl import metrics, package
from ratioctl.cli import main
from ratioctl.errors import PackageError, UsageError
from ratioctl.models.predict import predictor
from ratioctl.report import live

# A Python in which nothing but the light installation can be imported.
LIGHT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "onnx", "onnxscript", "scipy", "pyarrow"):
            raise ModuleNotFoundError(name, name=name.split(".")[0])
sys.meta_path.insert(0, Absent())
from ratioctl.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def written(small_explain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the command for one photograph and all targets, written without torch."""
    folder = tmp_path_factory.mktemp("light")
    pixels = np.random.default_rng(5).integers(40, 215, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "one.png")
    line = ["counterfactual", "one.png", "--target", "all", "--steps", "12", "--model", str(small_explain)]
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *line, "--eps", "0.25,0.5,1", "--out", "out", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "out" / "counterfactuals.json").read_text())
    return folder / "out"


def test_the_folder_is_that_of_the_command_with_torch(
    written: Path, small_package: Path, tmp_path: Path
) -> None:
    ratioctl.counterfactual(
        str(written.parent / "one.png"),
        target="all",
        model=small_package,
        steps=3,
        eps="0.25,0.5,1",
        out=tmp_path / "torch",
    )

    def names(folder: Path) -> set[str]:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name for name in found if not name.endswith("flip.png")}

    def keys(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: keys(part) for key, part in value.items()}
        return [keys(value[0])] if isinstance(value, list) and value else None

    assert names(written) == names(tmp_path / "torch")
    documents = [
        json.loads((folder / "counterfactuals.json").read_text()) for folder in (written, tmp_path / "torch")
    ]
    assert keys(documents[0]) == keys(documents[1])
    assert documents[0]["models"] == documents[1]["models"], "digest, temperature, labels, threshold"
    assert (written / "index.html").stat().st_size > 10_000


def test_every_promise_holds_for_the_saved_pictures(written: Path, small_package: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads((written / "counterfactuals.json").read_text())
    schema = Path(__file__).parents[1] / "compat" / "schemas" / "counterfactuals.json"
    jsonschema.validate(document, json.loads(schema.read_text()))
    spec = package.read(small_package)
    network = predictor(spec)
    (image,) = document["images"]
    pixels = np.array(Image.open(written / image["input_png"]))

    def score(name: str) -> tuple[np.ndarray, float]:
        picture = np.array(Image.open(written / name))
        probabilities = metrics.softmax(network.predict(picture[None]), spec.temperature)[0]
        return probabilities, float(np.linalg.norm((picture / 255.0 - pixels / 255.0).ravel()))

    assert image["original"]["probabilities"] == pytest.approx(list(score(image["input_png"])[0]), abs=1e-4)
    assert len(image["targets"]) == 3
    flips = 0
    for target in image["targets"]:
        k = spec.label_names.index(target["target"])
        confidence = image["original"]["probabilities"][k]
        for budget in target["budgets"]:
            probabilities, distance = score(budget["png"])
            assert distance <= budget["eps"]
            assert budget["distance"]["l2"] == pytest.approx(distance, abs=1e-9)
            assert budget["probabilities"] == pytest.approx(list(probabilities), abs=1e-4)
            assert budget["confidence"] == budget["probabilities"][k]
            assert budget["confidence"] >= confidence
            confidence = budget["confidence"]
        if target["flip_png"] is not None:
            flips += 1
            probabilities, distance = score(target["flip_png"])
            assert probabilities.argmax() == k
            assert target["flip_eps"] == pytest.approx(distance, abs=1e-9)
            assert target["flip_confidence"] == pytest.approx(float(probabilities[k]), abs=1e-4)
            first = next(b["eps"] for b in target["budgets"] if b["predicted"] == target["target"])
            assert target["flip_eps"] <= first
    assert flips, "nothing was flipped, so half of this was not tested"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm": "inf"}, "was exported for the norm 2"),
        ({"norm": ["2", "1"]}, "was exported for the norm 2"),
        ({"restarts": 2}, "restarts 2: has no effect on an ONNX file"),
        ({"region": "0,0,4,4"}, "region: cannot be used with an ONNX file"),
        ({"target": "dgo"}, 'Did you mean "dog"'),
        ({"device": "cuda"}, "is searched on the CPU"),
    ],
)
def test_what_a_file_cannot_do_is_refused(
    small_explain: Path, photographs: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        ratioctl.counterfactual(
            str(photographs / "one.png"), **{"target": "dog", "model": small_explain, "steps": 1, **change}
        )


def test_a_file_that_only_scores_is_refused(photographs: Path, small_graph: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(small_graph)
    with pytest.raises(PackageError, match="computes scores and no counterfactuals"):
        ratioctl.counterfactual(str(photographs), target="dog", model=tmp_path / "model.onnx")


def test_a_live_page_needs_an_exported_file_and_the_runtime(
    small_explain: Path,
    small_package: Path,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["counterfactual", str(photographs / "one.png"), "--target", "dog", "--live", str(tmp_path)]
    assert main([*line, "--model", str(small_package)]) == 2
    assert "--live: needs one file of `export --explain` as --model" in capsys.readouterr().err
    assert main([*line, "--model", str(small_explain)]) == 2
    said = capsys.readouterr().err
    assert "has no ort.wasm.bundle.min.mjs" in said
    assert "npm install onnxruntime-web" in said


def test_a_live_page_holds_the_model_and_the_runtime(
    small_explain: Path, photographs: Path, tmp_path: Path
) -> None:
    """The parts come out again; the policy forbids everything but them."""
    files = {name: name.encode() * 50 for name in live.FILES.values()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    line = ["counterfactual", str(photographs / "one.png"), "--target", "dog", "--live", str(tmp_path), "-q"]
    line += ["--eps", "0.5", "--steps", "1", "--model", str(small_explain), "--out", str(tmp_path / "out")]
    assert main(line) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    parts = dict(re.findall(r'<script type="text/plain" id="live-(\w+)">([\w+/=]+)</script>', page))
    unpacked = {name: gzip.decompress(base64.b64decode(text)) for name, text in parts.items()}
    expected = {name: files[file] for name, file in live.FILES.items()}
    assert unpacked == {**expected, "model": small_explain.read_bytes()}
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    scripts = re.search(r"script-src ([^;]*);", policy)
    assert scripts is not None
    assert [source[:8] for source in scripts[1].split()] == ["'sha256-", "'sha256-", "'wasm-un", "blob:"]


def test_an_interrupt_ends_the_search(small_explain: Path) -> None:
    """SIGINT during a search that would take hours."""
    program = (
        "import numpy as np, os, signal, sys, threading\n"
        "from ratioctl.onnx import explainer\n"
        f"file = explainer.load({str(small_explain)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may have it ignored
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "pixels = np.full((1, 8, 8, 3), 128, np.uint8)\n"
        "try:\n"
        "    file.search(pixels, [1], [0.001] * 5000, 10_000)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300, check=False)
    assert done.returncode == 7, done.stderr
