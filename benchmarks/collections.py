"""Images a second and memory of scoring a collection: one process, two shards, Ray with one and two workers.

    python -m benchmarks.collections [--images 2500 10000] [--rounds 1] [--json FILE]
    python -m benchmarks.collections --short

Random 64x64 JPEGs in folders of 1,000 are scored by `ratioctl ood-score` on the CPU, each variant as
processes of its own. "seconds" is the time from start to end, start of Ray and `merge` included. "marginal"
is the rate between the two largest sizes, without start-up. "peak_mib" is the largest sum of the proportional
set sizes (PSS) of all its processes, sampled every 0.2 s. "ratios" are seconds over those of one process.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools import harness

CLI = (sys.executable, "-m", "ratioctl")


def collection(folder: Path, count: int) -> None:
    """`count` random 64x64 JPEGs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for k in range(count):
        below = folder / f"{k // 1000:04}"
        below.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize((64, 64), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        (below / f"{k:07}.jpg").write_bytes(stream.getvalue())


def variants(images: Path, out: Path, model: str) -> dict[str, list[list[tuple[str, ...]]]]:
    """By name: steps one after the other, each of processes at the same time."""
    score = (*CLI, "ood-score", str(images), "--model", model, "--device", "cpu", "-q", "--output")
    parts = [str(out / f"part-{k}.csv") for k in (1, 2)]
    shards = [(*score, part, "--shard", f"{k}/2", "--workers", "1") for k, part in enumerate(parts, 1)]
    ray = ("--engine", "ray", "--workers")
    return {
        "one process": [[(*score, str(out / "one.csv"))]],
        "one process, one thread": [[(*score, str(out / "thread.csv"), "--workers", "1")]],
        "two shards and merge": [shards, [(*CLI, "merge", *parts, "--output", str(out / "two.csv"), "-q")]],
        "Ray, one worker": [[(*score, str(out / "ray-1.csv"), *ray, "1")]],
        "Ray, two workers": [[(*score, str(out / "ray-2.csv"), *ray, "2")]],
    }


def measured(steps: Sequence[Sequence[Sequence[str]]]) -> tuple[float, float]:
    """(seconds, peak MiB) of processes and their descendants."""
    began = time.perf_counter()
    peaks = []
    for step in steps:
        running = [subprocess.Popen(line, stdout=subprocess.DEVNULL) for line in step]
        with sampled([process.pid for process in running]) as peak:
            codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"exit codes {codes} of {step}")
        peaks.append(peak[0])
    return time.perf_counter() - began, max(peaks) / 2**20


@contextlib.contextmanager
def sampled(pids: Sequence[int]) -> Iterator[list[float]]:
    """The largest sum of PSS bytes of the processes and their descendants, in a list of one."""
    peak, ended = [0.0], threading.Event()

    def sample() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], sum(map(pss, descendants(pids))))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def descendants(pids: Sequence[int]) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def pss(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return float(line.split()[1]) * 1024
    return 0.0


def main() -> None:
    parser = harness.parser(__doc__, short={"images": [200, 400], "rounds": 1})
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--images", type=int, nargs="+", default=[2500, 10000])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants, by their names")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, list[float]] = {}
    sizes = sorted(options.images)
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = Path(scratch) / str(size)
            collection(folder / "images", size)
            for _ in range(options.rounds):
                for name, steps in variants(folder / "images", folder, options.model).items():
                    if options.only and name not in options.only:
                        continue
                    taken, peak = measured(steps)
                    seconds.setdefault(f"{name}, {size}", []).append(taken)
                    peaks.setdefault(f"{name}, {size}", []).append(peak)
                    print(f"{name}, {size}: {taken:.1f} s, {peak:.0f} MiB", file=sys.stderr)
    median = {key: statistics.median(each) for key, each in seconds.items()}
    names = list(dict.fromkeys(key.rpartition(", ")[0] for key in seconds))
    rates = {key: int(key.rpartition(" ")[2]) / taken for key, taken in median.items()}
    low, high = sizes[-2:] if len(sizes) > 1 else (0, sizes[0])
    marginal = {
        name: (high - low) / (median[f"{name}, {high}"] - median[f"{name}, {low}"])
        for name in names
        if low and median[f"{name}, {high}"] > median[f"{name}, {low}"]
    }
    result = {
        "benchmark": "scoring of collections",
        "ratios": {
            f"{name} over one process, {size}": harness.ratio(
                seconds, f"{name}, {size}", f"one process, {size}"
            )
            for name in names
            for size in sizes
            if name != "one process" and f"one process, {size}" in seconds
        },
        "seconds": seconds,
        "images_per_second": rates,
        "marginal_images_per_second": marginal,
        "peak_mib": peaks,
        "images": sizes,
        "model": options.model,
        "rounds": options.rounds,
    }
    harness.finish(result, options, "collections")


if __name__ == "__main__":
    main()
