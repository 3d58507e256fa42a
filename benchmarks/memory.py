"""Peak memory of every command, and whether it grows with the number of images.

    python -m benchmarks.memory [--model MODEL] [--images 500] [--rounds 3] [--json FILE]
    python -m benchmarks.memory --size 224 --images 100 # torchvision's ResNet-18 with random weights
    python -m benchmarks.memory --short

Every command runs as a process on random images; commands that take images run with N and with 4 N of them
(`counterfactual` with N / 50 and 4 N / 50). "ratios" are the peak with 4 N images over the peak with N.
`train` holds its data as 8-bit pixels by design (3 KiB an image here), so its peak may grow by those bytes.
"floor" are processes that only import what the commands compute with.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from tools import harness

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FLOORS = {
    "nothing": "sys",
    "onnxruntime": "numpy, PIL.Image, onnxruntime",
    "torch": "numpy, PIL.Image, torch",
}
NORMALIZED = ("--mean", "0.5", "--std", "0.25")
SHORT = ("ood-score, ONNX", "calibrate", "sign")
CLI = (sys.executable, "-m", "ratioctl")


def images(folder: Path, count: int, size: int) -> None:
    """`count` random PNGs of that size in class folders."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in LABELS:
        (folder / label).mkdir(parents=True)
    for k in range(count):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / LABELS[k % 10] / f"{k}.png")


def large_model(folder: Path, size: int) -> str:
    """Folder of a package of torchvision's ResNet-18 with random weights for images of that size."""
    import torch
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights, out = folder / "large.safetensors", folder / "large"
    save_file(torchvision.models.resnet18(num_classes=len(LABELS)).state_dict(), weights)
    made = ("--arch", "torchvision:resnet18", "--labels", ",".join(LABELS), "--input-size", str(size))
    harness.run_process(*CLI, "package", str(weights), *made, *NORMALIZED, "--out", str(out))
    return str(out)


def fixed_jobs(folder: Path, model: str, number: int) -> dict[str, tuple[str, ...]]:
    """Commands whose work does not depend on the number of images, by name."""
    from ratioctl import package as packages

    found = packages.read(packages.find(model))
    weights, copied, key = folder / "weights.safetensors", folder / "copy", str(folder / "key")
    if number == 0:
        shutil.copytree(found.path, copied)
        shutil.copy(found.weights_path, weights)
        harness.run_process(*CLI, "sign", "--new-key", key)
    made = ("--arch", found.architecture, "--labels", ",".join(LABELS), *NORMALIZED)
    made += ("--input-size", str(found.frame))
    return {
        "export": ("export", model, "--output", str(folder / "model.onnx")),
        "package": ("package", str(weights), *made, "--out", str(folder / f"package-{number}")),
        "inspect": ("inspect", model),
        "verify": ("verify", model),
        "sign": ("sign", str(copied), "--key", f"{key}.key"),
        "models": ("models",),
    }


def growing_jobs(
    folder: Path, model: str, count: int, size: int, out: str, epochs: float
) -> dict[str, tuple[str, ...]]:
    """Commands on the `count` images in `folder`, by name."""
    data = str(folder)
    few = sorted(str(path) for path in folder.rglob("*.png"))[: max(count // 50, 1)]
    sets = (f'data.train="{data}"', f'data.test="{data}"', f"data.size={size}", "data.channels=3")
    settings = [word for value in (*sets, f"optim.epochs={epochs}") for word in ("--set", value)]
    search = ("--model", model, "--target", "second", "--steps", "2")
    return {
        "ood-score, ONNX": ("ood-score", data, "--model", f"{folder.parent}/model.onnx", "--format", "csv"),
        "ood-score, package": ("ood-score", data, "--model", model, "--format", "csv"),
        "calibrate": ("calibrate", model, "--data", data, "--out", f"{out}-calibrated"),
        "counterfactual": ("counterfactual", *few, *search, "--out", f"{out}-counterfactuals"),
        "evaluate": (
            *("evaluate", model, "--data", data, "--limit", str(count), "--suite", "quick"),
            *("--out", f"{out}-report"),
        ),
        "train": ("train", "digits-plain", "--out", f"{out}-run", *settings),
    }


def main() -> None:
    parser = harness.parser(__doc__, short={"images": 40, "rounds": 1})
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--images", type=int, default=500, help="N, rounded to a multiple of ten")
    parser.add_argument(
        "--size",
        type=int,
        default=32,
        help="side of the images; other than 32: torchvision's ResNet-18 in place of --model",
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["RATIOCTL_KEY_PASSWORD"] = ""
    sizes = {"N": options.images // 10 * 10, "4N": options.images // 10 * 40}
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, count in sizes.items():
            images(folder / name, count, options.size)
        model = options.model if options.size == 32 else large_model(folder, options.size)
        for number in range(options.rounds):
            jobs = fixed_jobs(folder, model, number)
            for name, count in sizes.items():
                out, epochs = str(folder / f"out-{name}-{number}"), 0.2 if name == "4N" else 0.8
                growing = growing_jobs(folder / name, model, count, options.size, out, epochs)
                jobs |= {f"{job}, {name}": arguments for job, arguments in growing.items()}
            if options.short:
                kept = ("export", *SHORT)  # the ONNX file is needed
                jobs = {job: arguments for job, arguments in jobs.items() if job.startswith(kept)}
            lines = {job: (*CLI, *arguments) for job, arguments in jobs.items()}
            lines |= {f"floor: {n}": (sys.executable, "-c", f"import {what}") for n, what in FLOORS.items()}
            for job, line in lines.items():
                peaks.setdefault(job, []).append(harness.run_process(*line).peak_mib)
    grows = [job.removesuffix(", 4N") for job in peaks if job.endswith(", 4N")]
    ratios = {f"{job}, 4 N over N images": harness.ratio(peaks, f"{job}, 4N", f"{job}, N") for job in grows}
    result = {
        "benchmark": "peak memory of every command",
        "ratios": ratios,
        "peak_mib": {job: statistics.median(each) for job, each in peaks.items()},
        "all_peak_mib": peaks,
        "images": sizes,
        "model": options.model if options.size == 32 else "torchvision's ResNet-18, random weights",
        "size": options.size,
        "rounds": options.rounds,
    }
    harness.finish(result, options, "memory")


if __name__ == "__main__":
    main()
