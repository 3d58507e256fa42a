"""How fast `ood-score` is: whole processes, start-up included, against what people would write themselves.

    python benchmarks/scoring.py [--small FOLDER] [--images N] [--photos N] [--widths 16,32,64] [--rounds 3]
                                 [--memory N] [--json FILE]

Roads, on the same files, with the same weights (random ones: speed does not depend on them), interleaved:

    ratioctl     `ratioctl ood-score FOLDER` on a package with its ONNX file
    torch        the obvious script: a Dataset of files, DataLoader with 2 workers, eager torch, softmax
    pytorch-ood  the same with pytorch-ood's MaxSoftmax detector, where that is installed
    floor        decoding everything on all processors, then bare onnxruntime passes on all of them; timed
                 inside its process, after the imports, so it has no start-up: no tool can beat it

Small images are 32x32 JPEGs: those of --small, else crops of the sample photographs. Photographs are 640x480
JPEGs made of crops of the sample photographs. With --memory N, ood-score alone also scores N and 10 N links
to the small images, and the most memory it held at once is compared. The whole process for one photograph is
timed as well: its first row cannot come later.

On a machine that does other things as well, seconds mean little; processor seconds (of the whole process with
its children, start-up included, the floor's too) are recorded beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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


def prepare(base: Path, widths: list[int], small: bool, images: int, photos: int) -> None:
    """Make packages of ResNet-18s with random weights that carry their ONNX file, and the images."""
    import ratioctl
    from ratioctl import package
    from ratioctl.models import build

    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    for width in widths:
        network = build("resnet18", num_classes=10, width=width, mean=mean, std=std).network
        state = {k: v.numpy() for k, v in network.state_dict().items() if v.is_floating_point()}
        config = {
            "architecture": "resnet18",
            "architecture_options": {"width": width},
            "label_names": [f"class {k}" for k in range(10)],
            "pretrained_cfg": {"input_size": [3, 32, 32], "mean": mean, "std": std},
            "ratio": {"thresholds": {"tpr95": 0.3}},
        }
        package.write(base / f"w{width}", config=config, weights=state)
        ratioctl.export(base / f"w{width}")
    if small:
        make_images(base / "32x32", images, SIZES["32x32"], 0)
    make_images(base / "640x480", photos, SIZES["640x480"], 1)


def make_images(folder: Path, count: int, size: tuple[int, int], seed: int) -> None:
    """`count` JPEGs of quality 90, each a random crop of a sample photograph."""
    import numpy as np
    from PIL import Image

    from ratioctl.utils import resources

    paths = sorted((resources.folder("assets") / "samples").glob("*.jpg"))
    pictures = [Image.open(path).convert("RGB") for path in paths]
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for k in range(count):
        picture = pictures[k % len(pictures)]
        width = min(picture.width, picture.height * size[0] / size[1]) * rng.uniform(0.3, 1.0)
        height = width * size[1] / size[0]
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        picture.resize(size, Image.Resampling.BICUBIC, box=box).save(folder / f"{k:06d}.jpg", quality=90)


def run(line: list[str]) -> tuple[float, float, float, str]:
    """(seconds, processor seconds, MiB held at most, stdout) of a process with the children it waits for."""
    started = time.perf_counter()
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        said = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"ended with {child.returncode}: {' '.join(line)[:300]}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10, said


def road_of(name: str, folder: Path, package: Path, base: Path) -> list[str]:
    if name == "ratioctl":
        line = [sys.executable, "-m", "ratioctl", "ood-score", str(folder), "--model", str(package)]
        return [*line, "--format", "csv", "--output", str(base / "rows.csv")]
    if name == "floor":
        return [sys.executable, "-c", FLOOR, str(folder), str(package)]
    return [sys.executable, "-c", BASELINE, str(folder), str(package), name, str(base / "scores.csv")]


def compared(base: Path, folder: Path, package: Path, roads: list[str], rounds: int) -> dict[str, Any]:
    """Images a second of each road, and the ratios round by round; the order turns with every round."""
    count = sum(1 for _ in folder.rglob("*.jpg"))
    seconds: dict[str, list[float]] = {road: [] for road in roads}
    processor: dict[str, list[float]] = {road: [] for road in roads}
    whole_floor: list[float] = []
    memory = 0.0
    for k in range(rounds):
        turn = k % len(roads)
        for road in roads[turn:] + roads[:turn]:
            took, worked, held, said = run(road_of(road, folder, package, base))
            processor[road].append(worked)
            seconds[road].append(float(said) if road == "floor" else took)
            if road == "floor":
                whole_floor.append(took)
            elif road == "ratioctl":
                memory = max(memory, held)
    ours = seconds["ratioctl"]
    ratios = {
        f"times {road}": [b / a for a, b in zip(ours, seconds[road], strict=True)]
        for road in roads
        if road not in ("ratioctl", "floor")
    }
    ratios["share of floor"] = [b / a for a, b in zip(ours, seconds["floor"], strict=True)]
    ratios["share of floor with its start-up"] = [b / a for a, b in zip(ours, whole_floor, strict=True)]
    return {
        "n": count,
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "images_per_second": {road: round(count / statistics.median(s), 1) for road, s in seconds.items()},
        "peak_mib": round(memory, 1),
        "rounds": {name: [round(v, 3) for v in values] for name, values in ratios.items()},
        "processor_seconds": {road: round(statistics.median(s), 3) for road, s in processor.items()},
        "seconds": {road: [round(s, 3) for s in values] for road, values in seconds.items()},
    }


def memory_of(base: Path, small: Path, package: Path, count: int) -> dict[str, float]:
    """Most MiB that ood-score holds at once, by number of images."""
    originals = itertools.cycle(sorted(small.rglob("*.jpg")))
    found = {}
    for n in (count, 10 * count):
        folder = base / f"links-{n}"
        for k, original in zip(range(n), originals, strict=False):
            link = folder / f"{k // 1000:03d}" / f"{k:06d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(original.resolve())
        found[str(n)] = round(run(road_of("ratioctl", folder, package, base))[2], 1)
        print(f"{n:,} images: {found[str(n)]:.0f} MiB at most", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", type=Path, help="a folder of real 32x32 JPEGs")
    parser.add_argument("--images", type=int, default=10_000, help="crops instead of --small")
    parser.add_argument("--photos", type=int, default=2_000)
    parser.add_argument("--widths", default="16,32,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures here; rows of other widths there stay")
    options = parser.parse_args()
    widths = [int(width) for width in options.widths.split(",")]
    roads = ["ratioctl", "torch", "floor"]
    if find_spec("pytorch_ood"):
        roads.insert(2, "pytorch-ood")
    else:
        print("pytorch-ood is not installed: left out", file=sys.stderr)
    result: dict[str, Any] = {}
    result["machine"] = {
        "processors": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "onnxruntime", "pillow", "pytorch-ood")
            if name != "pytorch-ood" or "pytorch-ood" in roads
        },
    }

    def keep() -> None:
        if options.json is not None:
            before = json.loads(options.json.read_text()) if options.json.exists() else {}
            options.json.write_text(json.dumps({**before, **result}, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        # In a process of its own: a child's memory is counted from its parent's at the moment of the fork.
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
        code += f"import scoring; scoring.prepare(Path({scratch!r}), {widths!r}, {options.small is None}, "
        code += f"{options.images}, {options.photos})"
        subprocess.run([sys.executable, "-c", code], check=True)
        folders = {"32x32": options.small or base / "32x32", "640x480": base / "640x480"}
        (base / "one").mkdir()
        (base / "one" / "photograph.jpg").symlink_to(base / "640x480" / "000000.jpg")
        alone = [run(road_of("ratioctl", base / "one", base / f"w{widths[0]}", base))[0] for _ in range(5)]
        result["one_photograph_s"] = round(statistics.median(alone), 3)
        for width in widths:
            for name, folder in folders.items():
                found = compared(base, folder, base / f"w{width}", roads, options.rounds)
                result[f"width {width}, {name}"] = found
                keep()
                shown = {key: value for key, value in found.items() if key not in ("rounds", "seconds")}
                print(f"width {width}, {name}: {json.dumps(shown)}", file=sys.stderr)
        if options.memory:
            found = memory_of(base, folders["32x32"], base / f"w{widths[0]}", options.memory)
            result["peak_mib_by_images"] = found
    keep()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
