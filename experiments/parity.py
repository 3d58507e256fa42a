"""Do `ood-score`, the exported graph, Node and the server flag the same images?

    python -m experiments.parity SOURCE --node FOLDER [--models cifar10-ratio,cifar10-ratio-small:saturated]
                                 [--torch] [--limit N] [--keep FOLDER] [--json FILE]

Every way of computing the flags sees all images of SOURCE:

    ood-score  the command, on the package
    server     `ratioctl serve` of the package: the encoded files, 50 a request
    graph      `is_ood` of the exported file (uint8) in onnxruntime for Python
    node       the same file in onnxruntime-node, which FOLDER holds (npm install --ignore-scripts)
    torch      with --torch, the network in PyTorch

What has been computed is kept in `--keep FOLDER`, from which a run that was ended goes on.

`MODEL:saturated` is the model at a temperature so low that a third of its images lie below a log-odds of 20,
which is its threshold: their confidences round to 1 in float32, and so does the threshold itself. What a
comparison of float32 confidences would flag is counted beside.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve import Server
from ratioctl import images, metrics, package
from ratioctl.onnx import runtime
from tools import harness

BATCH = 50
LOG_ODDS = 20.0  # of the saturated threshold; float32 confidences round to 1 from 16.6 on
NODE = """
const ort = require("onnxruntime-node"), fs = require("fs");
(async () => {
  const [file, data, side, channels, batch] = process.argv.slice(1);
  const session = await ort.InferenceSession.create(file), bytes = new Uint8Array(fs.readFileSync(data));
  const each = side * side * channels, found = { is_ood: [], label: [], confidence: [] };
  for (let k = 0; k < bytes.length; k += each * batch) {
    const part = bytes.subarray(k, k + each * batch), shape = [part.length / each, +side, +side, +channels];
    const out = await session.run({ image: new ort.Tensor("uint8", part, shape) });
    for (const name in found) found[name].push(...Array.from(out[name].data, Number));
  }
  console.log(JSON.stringify(found));
})();
"""
HEAD = b'--b\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\n\r\n'
Found = dict[str, np.ndarray]  # is_ood, label, confidence; each (N,)


def read(source: str, limit: int | None, spec: package.Spec) -> tuple[list[images.Item], np.ndarray]:
    """The images of a SOURCE: files as they are, and the model's 8-bit inputs (N, H, W, C)."""
    items = []
    for item in images.walk([source]):
        data = item.read()
        items.append(images.Item(path=item.path, member=images.Member(name=item.path, data=data)))
        if len(items) == limit:
            break
    return items, np.stack(
        [images.decode(item.read(), spec.frame, spec.input_size[0]).pixels for item in items]
    )


def saturated(model: package.ModelPackage, logits: np.ndarray, folder: Path) -> package.ModelPackage:
    """The model at the temperature at which a third of the images has log-odds below LOG_ODDS; its threshold
    is in the widest of the gaps around there, so that no image lies on it.
    """
    score, third = model.ood_score, len(logits) // 3
    low, high = model.temperature / 1000, model.temperature
    for _ in range(60):
        middle = (low * high) ** 0.5
        below = np.sort(score.acceptance(logits, middle))[third] < LOG_ODDS
        low, high = (low, middle) if below else (middle, high)
    odds = np.sort(score.acceptance(logits, low))
    k = third - 25 + int(np.argmax(np.diff(odds)[third - 25 : third + 25]))
    limit = float(1 / (1 + np.exp(-(odds[k] + odds[k + 1]) / 2)))
    config = package.portable_config(model)
    ratio = {**config["ratio"], "temperature": low, "thresholds": {"tpr95": limit}}
    return package.write(folder, config={**config, "ratio": ratio}, weights=model.weights_path.read_bytes())


def by_command(source: str, limit: int | None, model: package.ModelPackage, scratch: Path) -> Found:
    rows, line = scratch / "rows.csv", [sys.executable, "-m", "ratioctl", "ood-score", source]
    line += ["--model", str(model.path), "--format", "csv", "--output", str(rows), "--quiet"]
    harness.run_process(*line)
    with rows.open(encoding="utf-8", newline="") as file:
        return _columns(list(csv.DictReader(file))[:limit], model)


def by_server(items: list[images.Item], model: package.ModelPackage) -> Found:
    rows: list[dict[str, Any]] = []
    with Server(str(model.path)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", int(server.port), timeout=600)
        with contextlib.closing(connection):
            for k in range(0, len(items), BATCH):
                parts = [HEAD % j + item.read() + b"\r\n" for j, item in enumerate(items[k : k + BATCH])]
                kind = {"Content-Type": "multipart/form-data; boundary=b"}
                connection.request("POST", "/v1/score", b"".join([*parts, b"--b--\r\n"]), kind)
                answer = connection.getresponse()
                said = json.loads(answer.read())
                if answer.status != 200:
                    sys.exit(f"the server answers {answer.status}: {said}")
                rows += said["rows"]
    return _columns(rows, model)


def by_graph(pixels: np.ndarray, file: Path) -> Found:
    """With the logits as well."""
    loaded, names = runtime.load(file), ("is_ood", "label", "confidence", "logits")
    parts = [loaded.run(pixels[k : k + BATCH], names) for k in range(0, len(pixels), BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def by_node(pixels: np.ndarray, file: Path, node: Path, scratch: Path) -> Found:
    (scratch / "pixels").write_bytes(np.ascontiguousarray(pixels).tobytes())
    line = ["node", "-e", NODE, str(file), str(scratch / "pixels")]
    line += [str(pixels.shape[1]), str(pixels.shape[3]), str(BATCH)]
    done = subprocess.run(line, cwd=node, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout)
    return {"is_ood": np.array(found["is_ood"], bool), "label": np.array(found["label"]),
            "confidence": np.array(found["confidence"])}  # fmt: skip


def _columns(rows: list[dict[str, Any]], model: package.ModelPackage) -> Found:
    return {
        "is_ood": np.array([row["is_ood"] in (True, "true") for row in rows]),
        "label": np.array([model.label_names.index(row["label"]) for row in rows]),
        "confidence": np.array([float(row["confidence"]) for row in rows]),
    }


def float32_flags(logits: np.ndarray, model: package.ModelPackage) -> tuple[np.ndarray, np.ndarray]:
    """What a graph that compares float32 confidences would flag, and those confidences."""
    z = (logits / np.float32(model.temperature)).astype(np.float32)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    confidence = (p / p.sum(axis=1, keepdims=True)).max(axis=1)
    return confidence < np.float32(package.threshold(model)), confidence


def by_torch(pixels: np.ndarray, model: package.ModelPackage) -> Found:
    from ratioctl.models.predict import predictor

    network, limit, temperature = predictor(model), package.threshold(model), model.temperature
    logits = np.concatenate([network.predict(pixels[k : k + 100]) for k in range(0, len(pixels), 100)])
    return {
        "is_ood": model.ood_score.is_ood(logits, temperature, limit),
        "label": logits.argmax(axis=1),
        "confidence": metrics.confidence(logits, temperature),
    }


def kept(folder: Path | None, name: str, compute: Callable[[], Found]) -> Found:
    """What an earlier run has stored under this name, or else the result of `compute`."""
    path = None if folder is None else folder / f"{name}.npz"
    if path is not None and path.exists():
        with np.load(path) as stored:
            return dict(stored)
    found = compute()
    if path is not None:
        path.parent.mkdir(exist_ok=True)
        np.savez(path, **found)  # type: ignore[arg-type]
    return found


def compared(name: str, options: Any, scratch: Path) -> dict[str, Any]:
    """All ways for one model, each beside `ood-score`."""
    import ratioctl

    base, _, kind = name.partition(":")
    model = package.resolve(base)
    items, pixels = read(options.source, options.limit, model)
    if kind == "saturated":
        loaded = runtime.load(model)
        logits = np.concatenate([loaded.predict(pixels[k : k + 100]) for k in range(0, len(pixels), 100)])
        model = saturated(model, logits, scratch / "model")
        ratioctl.export(model)  # into it: the command and the server need no torch
        model = package.read(model.path)
    file = ratioctl.export(model, output=scratch / "model.onnx", input_type="uint8").path.resolve()
    ways: dict[str, Callable[[], Found]] = {
        "graph": lambda: by_graph(pixels, file),
        "node": lambda: by_node(pixels, file, options.node, scratch),
        "ood-score": lambda: by_command(options.source, options.limit, model, scratch),
        "server": lambda: by_server(items, model),
    }
    if options.torch:
        ways["torch"] = lambda: by_torch(pixels, model)
    found = {}
    for way, compute in ways.items():
        print(f"{name}: {way}, {len(items)} images", file=sys.stderr, flush=True)
        found[way] = kept(options.keep, f"{name.replace(':', '-')}-{way}", compute)
    first, limit, logits = found["ood-score"], package.threshold(model), found["graph"]["logits"]
    simple, confidence = float32_flags(logits, model)
    score = model.ood_score
    distance = np.abs(score.acceptance(logits, model.temperature) - score.acceptance_bound(limit))
    return {
        "model": name,
        "digest": model.digest,
        "temperature": model.temperature,
        "threshold": limit,
        "n": len(items),
        "flagged": int(first["is_ood"].sum()),
        "least_distance_log_odds": float(distance.min()),
        "float32_confidences_of_1": int((confidence == 1).sum()),
        "flags_changed_by_comparing_float32": int((simple != first["is_ood"]).sum()),
        "beside_ood_score": {
            way: {
                "n": len(other["is_ood"]),
                "changed_flags": int((other["is_ood"] != first["is_ood"]).sum()),
                "changed_labels": int((other["label"] != first["label"]).sum()),
                "confidence_difference": float(np.abs(other["confidence"] - first["confidence"]).max()),
            }
            for way, other in found.items()
            if way != "ood-score"
        },
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="images, for example cifar10.tar.xz:test")
    parser.add_argument(
        "--node", type=Path, required=True, help="a folder with node_modules/onnxruntime-node"
    )
    parser.add_argument("--models", default="cifar10-ratio,cifar10-ratio-small:saturated")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep what has been computed here")
    parser.add_argument("--torch", action="store_true", help="compare PyTorch, too")
    parser.add_argument("--limit", type=int, help="the first so many images")
    options = parser.parse_args()
    results = []
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            results.append(compared(name, options, Path(scratch)))
    harness.finish(
        {"experiment": "parity of flags", "source": Path(options.source).name, "models": results}, options
    )
    if any(way["changed_flags"] for model in results for way in model["beside_ood_score"].values()):
        sys.exit("flags differ")


if __name__ == "__main__":
    main()
