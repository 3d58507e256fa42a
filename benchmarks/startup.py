"""How long every command takes to start: whole processes, in turns, medians.

    python benchmarks/startup.py [--rounds 7] [--json FILE]
    python benchmarks/startup.py --short

For each command `--help`; for those that need nothing but a model also the whole command; a counterfactual
of one step; and the first row of `ood-score` of one image, with the exported ONNX file and with the package.
"floor" is `python -c pass`; the first rows have their own, the imports without which nothing can be scored,
and so has what computes with torch: its import.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _result import finish
from _rounds import beside_stored

from ratioctl import package as packages
from ratioctl.cli import COMMANDS

IMAGE = "assets/samples/cat.jpg"
TORCH = "import numpy, PIL.Image, torch"
ONNX = "import numpy, PIL.Image, onnxruntime; onnxruntime.InferenceSession({!r})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        onnx = str(Path(folder) / "model.onnx")
        cli = [sys.executable, "-m", "ratioctl"]
        subprocess.run([*cli, "export", options.model, "--output", onnx, "-q"], check=True)
        copied, key = str(Path(folder) / "copy"), str(Path(folder) / "key")
        shutil.copytree(packages.find(options.model), copied)
        os.environ["RATIOCTL_KEY_PASSWORD"] = ""
        subprocess.run([*cli, "sign", "--new-key", key, "-q"], check=True)
        runs = {"floor": [sys.executable, "-c", "pass"], "--help": [*cli, "--help"]}
        runs |= {f"{name} --help": [*cli, name, "--help"] for name in COMMANDS}
        runs |= {
            "inspect": [*cli, "inspect", options.model],
            "verify": [*cli, "verify", options.model],
            "models": [*cli, "models"],
            "sign": [*cli, "sign", copied, "--key", f"{key}.key"],
            "torch floor": [sys.executable, "-c", TORCH],
            "counterfactual, one step": [
                *(*cli, "counterfactual", IMAGE, "--model", options.model, "--target", "dog", "--eps", "1"),
                *("--steps", "1", "--out", str(Path(folder) / "found")),
            ],
            "onnx floor": [sys.executable, "-c", ONNX.format(onnx)],
            "ood-score, ONNX": [*cli, "ood-score", IMAGE, "--model", onnx, "--format", "csv"],
            "ood-score, package": [*cli, "ood-score", IMAGE, "--model", options.model, "--format", "csv"],
        }
        if options.short:
            options.rounds = 1
            runs = {name: runs[name] for name in ("floor", "--help", "onnx floor", "ood-score, ONNX")}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(options.rounds + 1):
            for name, command in runs.items():
                seconds = first_row(command) if name.startswith("ood-score,") else whole(command)
                if number:  # the first time reads files that the others find in memory
                    times[name].append(seconds)
    floors = dict.fromkeys(runs, "floor")
    floors |= {name: "onnx floor" for name in runs if name.startswith("ood-score,")}
    floors["counterfactual, one step"] = "torch floor"
    each = {
        name: [a / b for a, b in zip(times[name], times[floors[name]], strict=True)]
        for name in runs
        if name not in ("floor", "onnx floor", "torch floor")
    }
    result = {
        "benchmark": "start of every command",
        "ratios": {
            f"{name} over its floor": {
                "median": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
            }
            for name, ratios in each.items()
        },
        "seconds": {name: statistics.median(seconds) for name, seconds in times.items()},
        "rounds": options.rounds,
    }
    finish(result, options.json)
    if options.short:
        beside_stored(result, "startup")


def whole(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_row(command: list[str]) -> float:
    """Seconds until the first line after the header is there."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        row = process.stdout.readline()
        seconds = time.perf_counter() - began
        process.stdout.read()
    if not row or process.returncode:
        raise SystemExit(f"{' '.join(command)} gave no row")
    return seconds


if __name__ == "__main__":
    main()
