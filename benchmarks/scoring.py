"""Throughput of `ood-score` as a whole process, start-up included, beside a script written by hand.

    python -m benchmarks.scoring [--small FOLDER] [--images N] [--photos N] [--widths 16,32,64] [--rounds 3]
                                 [--memory N] [--int8 SOURCE] [--json FILE]

Sides, in turns, on the same files with the same random weights (speed does not depend on them):

    ratioctl     `ratioctl ood-score FOLDER` on a package with its ONNX file
    torch        the obvious script: a Dataset of files, DataLoader with 2 workers, eager torch, softmax
    pytorch-ood  the same with pytorch-ood's MaxSoftmax detector, where it is installed
    floor        decoding on all processors, then onnxruntime passes on all of them; timed inside its process
                 after the imports, so without start-up

Small images are the 32x32 JPEGs of --small, else crops of the sample photographs; photographs are 640x480
crops; `--images 1` and `--photos 1` leave a size out. `--memory N` scores N and 10 N links to the small
images and compares the peaks of memory. Processor seconds (of the process with its children) are recorded
beside seconds. `--int8 SOURCE` exports the default model with --int8 on these images and compares passes of
one thread and 32 images with those of fp32; "price" holds the changes that `export` measures.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools import harness

SIZES = {"32x32": (32, 32), "640x480": (640, 480)}

BASELINE = """
import sys, pathlib, torch
from PIL import Image
from torchvision import transforms
from torch.utils.data import DataLoader, Dataset
folder, package, detector, result = sys.argv[1:]
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
with torch.inference_mode(), open(result, "w") as out:
    for x, index in DataLoader(files, batch_size=64, num_workers=2):
        for k, s in zip(index.tolist(), score(x).tolist()):
            out.write(f"{files.paths[k]},{s}\\n")
"""

FLOOR = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from ratioctl import images
from ratioctl.onnx import runtime
from ratioctl.utils import resources
loaded = runtime.load(sys.argv[2], threads=1)
with ThreadPoolExecutor(resources.processors()) as pool:
    started = time.perf_counter()
    paths = sorted(Path(sys.argv[1]).rglob("*.jpg"))
    parts = [paths[k : k + 32] for k in range(0, len(paths), 32)]
    decoded = list(pool.map(lambda part: np.stack([images.decode(p, 32).pixels for p in part]), parts))
    list(pool.map(loaded.predict, decoded))
    print(time.perf_counter() - started)
"""

# In its own process: a child's memory is counted from its parent's at the moment of the fork.
PREPARE = "from pathlib import Path; from benchmarks import scoring; scoring.make_packages(Path({!r}), {})"


def make_packages(base: Path, widths: list[int]) -> None:
    """Packages of ResNet-18s with random weights that carry their ONNX files."""
    import ratioctl
    from ratioctl import package

    for width in widths:
        state = harness.random_network(width=width).network.state_dict()
        config = {
            "architecture": "resnet18",
            "architecture_options": {"width": width},
            "label_names": [f"class {k}" for k in range(10)],
            "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3},
            "ratio": {"thresholds": {"tpr95": 0.3}},
        }
        weights = {k: v.contiguous().numpy() for k, v in state.items() if v.is_floating_point()}
        package.write(base / f"w{width}", config=config, weights=weights)
        ratioctl.export(base / f"w{width}")


def command(side: str, folder: Path, package: Path, base: Path) -> list[str]:
    if side == "ratioctl":
        line = [sys.executable, "-m", "ratioctl", "ood-score", str(folder), "--model", str(package)]
        return [*line, "--format", "csv", "--output", str(base / "rows.csv")]
    if side == "floor":
        return [sys.executable, "-c", FLOOR, str(folder), str(package)]
    return [sys.executable, "-c", BASELINE, str(folder), str(package), side, str(base / "scores.csv")]


def compared(base: Path, folder: Path, package: Path, sides: list[str], rounds: int) -> dict[str, Any]:
    """Images per second of each side, and the ratios round by round."""
    done: dict[str, list[harness.Finished]] = {side: [] for side in sides}
    for k in range(rounds):
        turn = k % len(sides)
        for side in sides[turn:] + sides[:turn]:
            done[side].append(harness.run_process(*command(side, folder, package, base)))
    seconds = {side: [one.seconds for one in runs] for side, runs in done.items()}
    over = {f"times {side}": seconds[side] for side in sides if side not in ("ratioctl", "floor")}
    over["share of floor with its start-up"] = seconds["floor"]
    seconds["floor"] = over["share of floor"] = [float(one.stdout) for one in done["floor"]]
    ours = seconds["ratioctl"]
    ratios = {name: [b / a for a, b in zip(ours, other, strict=True)] for name, other in over.items()}
    worked = {side: [one.processor_seconds for one in runs] for side, runs in done.items()}
    count = sum(1 for _ in folder.rglob("*.jpg"))
    return {
        "n": count,
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "images_per_second": {side: round(count / statistics.median(s), 1) for side, s in seconds.items()},
        "peak_mib": round(max(one.peak_mib for one in done["ratioctl"]), 1),
        "rounds": {name: [round(v, 3) for v in values] for name, values in ratios.items()},
        "processor_seconds": {side: round(s, 3) for side, s in harness.medians(worked).items()},
        "seconds": {side: [round(s, 3) for s in values] for side, values in seconds.items()},
    }


def int8(base: Path, source: str, rounds: int) -> dict[str, Any]:
    """Images per second of one thread with the default model in fp32 and int8, and what int8 changes."""
    import dataclasses

    import numpy as np

    import ratioctl
    from ratioctl.onnx import runtime
    from ratioctl.utils.defaults import DEFAULT_MODEL

    fp32 = ratioctl.export(DEFAULT_MODEL, output=base / "fp32.onnx", weights="fp32")
    small = ratioctl.export(DEFAULT_MODEL, output=base / "int8.onnx", int8=True, data=source)
    assert small.cost is not None
    batch = np.random.default_rng(0).random((32, 3, 32, 32), dtype=np.float32)
    sides = {
        name: functools.partial(runtime.load(made.path, threads=1).predict, batch)
        for name, made in {"fp32": fp32, "int8": small}.items()
    }
    times, _ = harness.interleaved(sides, rounds)
    return {
        "times as fast": harness.ratio(times, "fp32", "int8"),
        "images_per_second": {name: round(32 / s, 1) for name, s in harness.medians(times).items()},
        "price": dataclasses.asdict(small.cost),
    }


def peaks(base: Path, small: Path, package: Path, count: int) -> dict[str, float]:
    """Peak memory of ood-score in MiB, by number of images."""
    found = {}
    for n in (count, 10 * count):
        folder = base / f"links-{n}"
        for k, original in zip(range(n), itertools.cycle(sorted(small.rglob("*.jpg"))), strict=False):
            link = folder / f"{k // 1000:03d}" / f"{k:06d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(original.resolve())
        done = harness.run_process(*command("ratioctl", folder, package, base))
        found[str(n)] = round(done.peak_mib, 1)
    return found


def main() -> None:
    parser = harness.parser(__doc__, short={"images": 64, "photos": 16, "widths": "16", "rounds": 1})
    parser.add_argument("--small", type=Path, help="a folder of 32x32 JPEGs")
    parser.add_argument("--images", type=int, default=10_000, help="crops instead of --small")
    parser.add_argument("--photos", type=int, default=2_000)
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0, metavar="N")
    parser.add_argument("--int8", metavar="SOURCE", help="labelled images of CIFAR-10's classes")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation has the modules' bytecode
    widths = [int(width) for width in options.widths.split(",")]
    sides = ["ratioctl", "torch", *(["pytorch-ood"] if find_spec("pytorch_ood") else []), "floor"]
    result: dict[str, Any] = {"benchmark": "throughput of ood-score"}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        harness.run_process(sys.executable, "-c", PREPARE.format(scratch, widths))
        photos = harness.sample_crops(base / "640x480", options.photos, SIZES["640x480"], seed=1)
        small = options.small or harness.sample_crops(base / "32x32", options.images, SIZES["32x32"])
        (base / "one").mkdir()
        (base / "one" / "photograph.jpg").symlink_to(photos / "000000.jpg")
        one = command("ratioctl", base / "one", base / f"w{widths[0]}", base)
        alone = [harness.run_process(*one).seconds for _ in range(1 if options.short else 5)]
        result["one_photograph_s"] = round(statistics.median(alone), 3)
        for width in widths:
            for name, folder in {"32x32": small, "640x480": photos}.items():
                if sum(1 for _ in folder.rglob("*.jpg")) == 1:
                    continue
                found = compared(base, folder, base / f"w{width}", sides, options.rounds)
                result[f"width {width}, {name}"] = found
                print(f"width {width}, {name}: {json.dumps(found['images_per_second'])}", file=sys.stderr)
        if options.memory:
            result["peak_mib_by_images"] = peaks(base, small, base / f"w{widths[0]}", options.memory)
        if options.int8:
            result["int8"] = int8(base, options.int8, max(9, options.rounds))
    harness.finish(result, options, "scoring")


if __name__ == "__main__":
    main()
