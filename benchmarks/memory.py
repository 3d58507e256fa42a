"""The most memory each command holds at once, and whether it grows with the number of images.

    python benchmarks/memory.py [--images 500] [--rounds 3] [--json FILE]
    python benchmarks/memory.py --short

Every command runs as a process of its own on small made-up data; those that take images run with N and with
4 N of them (`counterfactual` with N / 50 and 4 N / 50). "ratios" are the peak with 4 N over the peak with N,
medians and ranges over rounds. `train` holds its data set as 8-bit pixels (that is its design: 3 KiB an
image here), so its figure may grow by those bytes. "floor" are processes that only import what the commands
compute with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _result import finish
from _rounds import beside_stored, ratio
from PIL import Image

from ratioctl import package as packages

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FLOORS = {
    "nothing": "sys",
    "onnxruntime": "numpy, PIL.Image, onnxruntime",
    "torch": "numpy, PIL.Image, torch",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--images", type=int, default=500, help="N; rounded to a multiple of ten")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    count = 40 if options.short else options.images // 10 * 10
    rounds = 1 if options.short else options.rounds
    os.environ["RATIOCTL_KEY_PASSWORD"] = ""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = {"N": count, "4N": 4 * count}
        for name, images in sizes.items():
            make(folder / name, images)
        onnx, model, key = str(folder / "model.onnx"), options.model, str(folder / "key")
        found = packages.read(packages.find(model))
        copied, weights = folder / "copy", folder / "weights.safetensors"
        shutil.copytree(found.path, copied)
        shutil.copy(found.weights_path, weights)
        peak("export", model, "--output", onnx)
        peak("sign", "--new-key", key)
        peaks: dict[str, list[float]] = {}
        for number in range(rounds):
            jobs: dict[str, tuple[str, ...]] = {
                "export": ("export", model, "--output", onnx),
                "package": (
                    *("package", str(weights), "--arch", found.architecture, "--labels", ",".join(LABELS)),
                    *("--mean", "0.5", "--std", "0.25", "--out", str(folder / f"package-{number}")),
                ),
                "inspect": ("inspect", model),
                "verify": ("verify", model),
                "sign": ("sign", str(copied), "--key", f"{key}.key"),
                "models": ("models",),
            }
            for name in sizes:
                data, out = str(folder / name), str(folder / f"out-{name}-{number}")
                few = sorted(str(path) for path in (folder / name).rglob("*.png"))[
                    : max(sizes[name] // 50, 1)
                ]
                growing: dict[str, tuple[str, ...]] = {
                    "ood-score, ONNX": ("ood-score", data, "--model", onnx, "--format", "csv"),
                    "ood-score, package": ("ood-score", data, "--model", model, "--format", "csv"),
                    "calibrate": ("calibrate", model, "--data", data, "--out", out + "-k"),
                    "counterfactual": (
                        *("counterfactual", *few, "--model", model, "--target", "second", "--steps", "2"),
                        *("--out", out + "-c"),
                    ),
                    "evaluate": (
                        *("evaluate", model, "--data", data, "--limit", str(sizes[name]), "--suite", "quick"),
                        *("--out", out + "-e"),
                    ),
                    "train": (
                        *("train", "digits-plain", "--out", out + "-t"),
                        *("--set", f'data.train="{data}"', "--set", f'data.test="{data}"'),
                        *("--set", "data.size=32", "--set", "data.channels=3"),
                        *("--set", f"optim.epochs={0.2 if name == '4N' else 0.8}"),
                    ),
                }
                jobs |= {f"{job}, {name}": arguments for job, arguments in growing.items()}
            if options.short:
                kept = ("ood-score, ONNX", "calibrate", "sign")
                jobs = {job: arguments for job, arguments in jobs.items() if job.startswith(kept)}
            for job, arguments in jobs.items():
                peaks.setdefault(job, []).append(peak(*arguments))
            for name, imports in FLOORS.items():
                code = f"import {imports}"
                peaks.setdefault(f"floor: {name}", []).append(peak_of(sys.executable, "-c", code))
    grows = [job.removesuffix(", 4N") for job in peaks if job.endswith(", 4N")]
    result = {
        "benchmark": "peak memory of every command",
        "ratios": {f"{job}, 4 N over N images": ratio(peaks, f"{job}, 4N", f"{job}, N") for job in grows},
        "peak_mib": {job: statistics.median(each) for job, each in peaks.items()},
        "all_peak_mib": peaks,
        "images": sizes,
        "rounds": rounds,
    }
    finish(result, options.json)
    if options.short:
        beside_stored(result, "memory")


def make(folder: Path, count: int) -> None:
    """`count` random 32x32 PNGs in class folders."""
    rng = np.random.default_rng(0)
    for label in LABELS:
        (folder / label).mkdir(parents=True)
    for k in range(count):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / LABELS[k % 10] / f"{k}.png")


def peak(*arguments: str) -> float:
    """MiB of resident memory of `ratioctl ARGUMENTS` at its most."""
    return peak_of(sys.executable, "-m", "ratioctl", *arguments)


def peak_of(*command: str) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{said}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
