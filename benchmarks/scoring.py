"""How fast `ood-score` is: whole processes, start-up included, against what people would write themselves.

    python benchmarks/scoring.py [--small FOLDER] [--images N] [--photos N] [--widths 16,32] [--json FILE]

Roads, on the same files and the same weights (random ones: speed does not depend on them):
    ratioctl     `ratioctl ood-score FOLDER` on a package with its ONNX file
    torch        the obvious script: ImageFolder-like Dataset, DataLoader with 2 workers, eager torch, softmax
    pytorch-ood  the same with pytorch-ood's MaxSoftmax detector, where that is installed
    at best      decoding everything, then bare onnxruntime passes, on all processors: no tool can beat it

Small images are 32x32 JPEGs (crops of the sample photographs unless --small names a folder of real ones);
photographs are 640x480 JPEGs made of the sample photographs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = [f"class {k}" for k in range(10)]

BASELINE = """
import sys, pathlib, torch
from PIL import Image
from torchvision import transforms
from torch.utils.data import DataLoader, Dataset
folder, package, detector = sys.argv[1:]
import ratioctl
model = ratioctl.load_model(package)
make = transforms.Compose([transforms.Resize(32, transforms.InterpolationMode.BICUBIC),
                           transforms.CenterCrop(32), transforms.ToTensor()])
class Files(Dataset):
    def __init__(self): self.paths = sorted(pathlib.Path(folder).rglob("*.jpg"))
    def __len__(self): return len(self.paths)
    def __getitem__(self, k): return make(Image.open(self.paths[k]).convert("RGB")), k
if detector == "pytorch-ood":
    from pytorch_ood.detector import MaxSoftmax
    score = MaxSoftmax(model)
else:
    score = lambda x: -torch.softmax(model(x), 1).amax(1)
files = Files()
with torch.inference_mode(), open(sys.argv[2] + "/scores.csv", "w") as out:
    for x, index in DataLoader(files, batch_size=64, num_workers=2):
        for k, s in zip(index.tolist(), score(x).tolist()):
            out.write(f"{files.paths[k]},{s}\\n")
"""


def package_of(width: int, folder: Path) -> Path:
    """A package of a ResNet-18 with random weights that carries its ONNX file."""
    import ratioctl
    from ratioctl import package
    from ratioctl.nets import build

    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    network = build("resnet18", num_classes=10, width=width, mean=mean, std=std).network
    state = {k: v.numpy() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    config = {
        "architecture": "resnet18",
        "architecture_options": {"width": width},
        "label_names": LABELS,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": mean, "std": std},
        "ratio": {"thresholds": {"tpr95": 0.3}},
    }
    package.write(folder, config=config, weights=state)
    ratioctl.export(folder)
    return folder


def make_images(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    """`count` JPEGs, each a random crop of a sample photograph."""
    from ratioctl import resources

    paths = sorted((resources.folder("assets") / "samples").glob("*.jpg"))
    photos = [Image.open(path).convert("RGB") for path in paths]
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for k in range(count):
        photo = photos[k % len(photos)]
        share = rng.uniform(0.3, 1.0)
        width = min(photo.width, photo.height * size[0] / size[1]) * share
        height = width * size[1] / size[0]
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        crop = photo.resize(size, Image.Resampling.BICUBIC, box=box)
        crop.save(folder / f"{k:06d}.jpg", quality=90)


def timed(line: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - started


def at_best(folder: Path, package: Path) -> float:
    """Seconds for decoding all images and passing them through onnxruntime, nothing else."""
    from ratioctl import images, runtime

    loaded = runtime.load(package, threads=1)
    paths = sorted(folder.rglob("*.jpg"))
    cores = runtime.usable_processors()
    started = time.perf_counter()
    with ThreadPoolExecutor(cores) as pool:
        parts = [paths[k : k + 32] for k in range(0, len(paths), 32)]
        decoded = list(pool.map(lambda part: np.stack([images.decode(p, 32).pixels for p in part]), parts))
        list(pool.map(loaded.predict, decoded))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", type=Path)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--photos", type=int, default=2_000)
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    detectors = ["torch"]
    try:
        import pytorch_ood  # noqa: F401

        detectors.append("pytorch-ood")
    except ImportError:
        print("pytorch-ood is not installed: left out", file=sys.stderr)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        if options.small is None:
            make_images(base / "small", options.images, (32, 32), 0)
        small = options.small or base / "small"
        make_images(base / "photos", options.photos, (640, 480), 1)
        for width in map(int, options.widths.split(",")):
            package = package_of(width, base / f"w{width}")
            for name, folder in (("32x32", small), ("640x480", base / "photos")):
                count = len(list(folder.rglob("*.jpg")))
                ours = [sys.executable, "-m", "ratioctl", "ood-score", str(folder), "--model", str(package)]
                ours += ["--format", "csv", "--output", str(base / "rows.csv")]
                seconds = {"ratioctl": timed(ours), "at best": at_best(folder, package)}
                for detector in detectors:
                    script = [sys.executable, "-c", BASELINE, str(folder), str(package), detector]
                    seconds[detector] = timed(script)
                rates = {road: count / s for road, s in seconds.items()}
                rows.append({"width": width, "images": name, "n": count, "images_per_second": rates})
                shown = ", ".join(f"{road} {rate:,.0f}/s" for road, rate in rates.items())
                ratio = rates["ratioctl"] / rates["torch"]
                share = rates["ratioctl"] / rates["at best"]
                print(f"width {width}, {count} of {name}: {shown}; {ratio:.2f}x torch, {share:.0%} of best")
    if options.json is not None:
        facts = {"processors": os.cpu_count(), "rows": rows}
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
