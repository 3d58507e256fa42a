"""The most memory each command holds at once, and whether it grows with the number of images.

    python benchmarks/memory.py [--images 200] [--json FILE]
    python benchmarks/memory.py --short

Every command runs as a process of its own on small made-up data; those that take images run with N and with
4 N of them. "ratios" are the peak with 4 N over the peak with N. `train` holds its data set in memory as
8-bit pixels (that is its design), so its figure is stated for both sizes and may grow by those bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from _result import finish
from _rounds import beside_stored
from PIL import Image

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--images", type=int, default=200, help="N; rounded to a multiple of ten")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    count = 40 if options.short else options.images // 10 * 10
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = {"N": count, "4N": 4 * count}
        for name, images in sizes.items():
            make(folder / name, images)
        onnx, model = str(folder / "model.onnx"), options.model
        peaks = {
            "export": peak("export", model, "--output", onnx),
            "inspect": peak("inspect", model),
            "verify": peak("verify", model),
            "models": peak("models"),
        }
        grown = {}
        for name in sizes:
            data, out = str(folder / name), str(folder / f"out-{name}")
            few = sorted(str(path) for path in (folder / name).rglob("*.png"))[: sizes[name] // 20]
            jobs = {
                "ood-score, ONNX": ("ood-score", data, "--model", onnx, "--format", "csv"),
                "ood-score, package": ("ood-score", data, "--model", model, "--format", "csv"),
                "counterfactual": (
                    "counterfactual", *few, "--target", "second", "--steps", "2", "--out", out + "-c",
                ),
                "evaluate": ("evaluate", model, "--data", data, "--limit", "20", "--out", out + "-e"),
                "calibrate": ("calibrate", model, "--data", data, "--out", out + "-k"),
                "train": (
                    "train", "digits-plain", "--out", out + "-t", "--set", "optim.epochs=1",
                ),
            }  # fmt: skip
            if options.short:
                jobs = {key: jobs[key] for key in ("ood-score, ONNX", "calibrate")}
            for job, arguments in jobs.items():
                grown.setdefault(job, {})[name] = peak(*arguments)
    result = {
        "benchmark": "peak memory of every command",
        "ratios": {
            f"{job}, 4 N over N images": {"median": both["4N"] / both["N"]}
            for job, both in grown.items()
            if job != "train"
        },
        "peak_mib": {**peaks, **grown},
        "images": sizes,
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
    process = subprocess.Popen(
        [sys.executable, "-m", "ratioctl", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"ratioctl {' '.join(arguments)} ended with {process.returncode}:\n{said}")
    return usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
