"""A search with a file of `export --explain` in the browser and in Node, beside Python; sizes of the files.

    python -m benchmarks.explain_browser NODE_MODULES [--steps 100] [--rounds 3] [--json FILE]

NODE_MODULES contains onnxruntime-web and onnxruntime-node. One photograph, one target, six radii, the bundled
model of width 16. The page of `counterfactual --live` is opened from disk in headless Chromium; its first
search loads the model and the runtime, the following ones do not.

    browser            WebAssembly with SIMD, one thread: what the page says that the search took
    node, python       onnxruntime with one thread, and with one per processor
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import ratioctl
from ratioctl import images
from ratioctl.cli import main as command
from ratioctl.onnx import explainer
from ratioctl.report.live import FILES
from ratioctl.utils import resources
from tools import harness

RADII, TARGET = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0), "dog"
NODE = """
const [ort, fs] = [require("onnxruntime-node"), require("fs")];
(async () => {
  const [file, pixels, threads, target, radii, steps, rounds] = JSON.parse(process.argv[2]);
  const session = await ort.InferenceSession.create(file, { intraOpNumThreads: threads });
  const given = {
    image: new ort.Tensor("uint8", Uint8Array.from(fs.readFileSync(pixels)), [1, 32, 32, 3]),
    target: new ort.Tensor("int64", [target], [1]), radii: new ort.Tensor("float64", radii, [radii.length]),
    steps: new ort.Tensor("int64", [steps], [1]),
  };
  const seconds = [];
  let out;
  for (let k = 0; k < rounds; k++) {
    const began = performance.now();
    out = await session.run(given);
    seconds.push((performance.now() - began) / 1000);
  }
  console.log(JSON.stringify([seconds, Array.from(out.confidence.data)]));
})();
"""


def in_browser(page: Path, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of the searches and of the first one with loading, and the confidences of the last one."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium was not found. Install it, for example with: apt-get install chromium")
    seconds, first = [], 0.0
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        tab = browser.new_page()
        tab.set_default_timeout(300_000)
        tab.goto(page.as_uri(), wait_until="load")
        tab.fill("#live-steps", str(steps))
        tab.fill("#live-radii", ", ".join(map(str, RADII)))
        tab.select_option("#live-target", label=TARGET)
        for number in range(rounds + 1):
            began = time.perf_counter()
            tab.click("#live [type=submit]")
            tab.locator("#live [type=submit]:not([disabled])").wait_for()
            said = tab.inner_text("#live [role=status]")
            if number == 0:
                first = time.perf_counter() - began
            else:
                seconds.append(float(said.removeprefix("Found in ").removesuffix(" s.")))
        found = tab.evaluate("t => answerOf(groups[0].columns[0], t).budgets.map(b => b.confidence)", TARGET)
        version = browser.version
        browser.close()
    return {
        "seconds": harness.spread(seconds),
        "first_search_with_loading_s": first,
        "confidence": found,
        "chromium": version,
    }


def in_node(modules: Path, given: list[Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "search.js"
        script.write_text(NODE, encoding="utf-8")
        (Path(folder) / "node_modules").symlink_to(modules, target_is_directory=True)
        line = ["node", str(script), json.dumps(given)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"node ended with {done.returncode}: {done.stderr}")
    seconds, confidence = json.loads(done.stdout)
    return {"seconds": harness.spread(seconds), "confidence": confidence}


def in_python(file: Path, pixels: np.ndarray, threads: int, steps: int, rounds: int) -> dict[str, Any]:
    loaded, seconds = explainer.load(file, threads=threads), []
    for _ in range(rounds):
        began = time.perf_counter()
        found = loaded.search(pixels[None], [loaded.label_names.index(TARGET)], RADII, steps)
        seconds.append(time.perf_counter() - began)
    return {"seconds": harness.spread(seconds), "confidence": found["confidence"].tolist()}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("modules", type=Path, metavar="NODE_MODULES")
    parser.add_argument("--model", default="cifar10-ratio-small", help="a package, or an exported file")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    steps, rounds = options.steps, options.rounds
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = Path(options.model)
        if file.suffix != ".onnx":
            file = ratioctl.export(options.model, explain=True, output=folder / "explain.onnx").path
        photo = harness.SAMPLES / "cat.jpg"
        dist = options.modules / "onnxruntime-web" / "dist"
        line = [str(photo), "--target", TARGET, "--eps", "1", "--steps", "1", "-q", "--model", str(file)]
        if code := command(["counterfactual", *line, "--live", str(dist), "--out", str(folder / "out")]):
            sys.exit(code)
        page = folder / "out" / "index.html"
        pixels = images.decode(photo, 32).pixels
        (folder / "pixels").write_bytes(pixels.tobytes())
        target = explainer.load(file).label_names.index(TARGET)
        parts = {"model": file, **{name: dist / part for name, part in FILES.items()}}
        sides: dict[str, Any] = {"browser": in_browser(page, steps, rounds)}
        for threads in sorted({1, resources.processors()}):
            given = [str(file), str(folder / "pixels"), threads, target, RADII, steps, rounds]
            sides[f"node, {threads} threads"] = in_node(options.modules.resolve(), given)
            sides[f"python, {threads} threads"] = in_python(file, pixels, threads, steps, rounds)
        sizes = {"page": page.stat().st_size}
        for name, part in parts.items():
            content = part.read_bytes()
            sizes |= {name: len(content), f"{name}, compressed": len(gzip.compress(content, 9, mtime=0))}
    reference = sides["python, 1 threads"]
    difference = {
        name: max(abs(a - b) for a, b in zip(side["confidence"], reference["confidence"], strict=True))
        for name, side in sides.items()
    }
    package = json.loads((options.modules / "onnxruntime-web" / "package.json").read_text())
    result = {
        "benchmark": "a search in the browser, in Node and in Python",
        "steps": steps,
        "rounds": rounds,
        "radii": RADII,
        "bytes": sizes,
        "sides": sides,
        "largest difference of confidences": difference,
        "onnxruntime-web": package["version"],
    }
    harness.finish(result, options, "explain_browser")


if __name__ == "__main__":
    main()
