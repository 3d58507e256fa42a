"""Harness of `benchmarks/`, `experiments/` and `tools/`: arguments, timing in rounds, provenance, JSON.

A script builds its parser with `parser`, measures, and ends with `finish`. Run the scripts as modules from
the root of the repository, for example `python -m benchmarks.training --short`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = (ROOT / "benchmarks" / "results", ROOT / "experiments" / "results")
SAMPLES = ROOT / "assets" / "samples"
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
VERSIONS = ("ratioctl", "torch", "numpy", "onnxruntime", "pillow", "pyautoattack")

Times = Mapping[str, list[float]]


def parser(doc: str | None, *, short: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """Parser with the module's docstring as help and the options that all scripts share.

    `short` maps option names to the values that `--short` sets; without it there is no `--short`.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the result to this file")
    if short is not None:
        made.add_argument(
            "--short",
            action=_Short,
            nargs=0,
            const=dict(short),
            default=False,
            help="small sizes; prints the ratios beside the stored ones",
        )
    return made


class _Short(argparse.Action):
    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        vars(namespace).update({"short": True, **self.const})


def provenance(seed: int | None = None) -> dict[str, Any]:
    """Command, seed, processor with its instructions, GPU, threads and versions, as plain JSON values."""
    processor, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
        if name := re.search(r"model name\s*:\s*(.+)", text):
            processor = name[1].strip()
        if found := re.search(r"(?:flags|Features)\s*:\s*(.+)", text):
            flags = set(found[1].split())
    torch = sys.modules.get("torch")
    installed = {}
    for name in VERSIONS:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *(without_folders(word) for word in sys.orig_argv[1:])]),
        "seed": seed,
        "hardware": {
            "processor": processor,
            "processors": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "instructions": [name for name in INSTRUCTIONS if name in flags],
            "threads": torch.get_num_threads() if torch else None,
            "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
            "platform": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **installed},
    }


def without_folders(word: str) -> str:
    """A word of a command line, absolute paths cut to their last part: "a=/data/b.tar" is "a=b.tar"."""
    return re.sub(r"(^|=)/(?:[^/]+/)*", r"\1", word)


def finish(result: Mapping[str, Any], options: argparse.Namespace, stored: str = "") -> None:
    """Print `result` with its provenance as JSON, and write it where `--json` says.

    With `--short` the ratios are compared on stderr with those of the stored result of that name: NAME.json
    or NAME-KIND.json, whichever was measured on the same kind of processor, else either.
    """
    origin = provenance(getattr(options, "seed", None))
    text = json.dumps({**result, "provenance": origin}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")
    if getattr(options, "short", False):
        _compare_with_stored(result, stored, kind_of_processor(origin["hardware"]))


def kind_of_processor(hardware: Mapping[str, Any]) -> str:
    """The GPU's name, or what decides a processor's precision: "amx-bf16", "avx512-bf16", "arm-bf16", "fp32".

    Args:
        hardware: as of `provenance`.
    """
    if hardware["gpu"]:
        return str(hardware["gpu"])
    kinds = {"amx_bf16": "amx-bf16", "avx512_bf16": "avx512-bf16", "bf16": "arm-bf16"}
    return next((kind for name, kind in kinds.items() if name in hardware["instructions"]), "fp32")


def _compare_with_stored(result: Mapping[str, Any], name: str, kind: str) -> None:
    """Timings are no tests: a difference is printed and never an error."""
    stored: dict[str, Mapping[str, Any]] = {}  # ratios by kind of processor
    for path in (folder / f"{name}{end}.json" for folder in RESULTS for end in ("", f"-{kind}")):
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            hardware = content.get("provenance", {}).get("hardware")  # older results have none
            known = kind_of_processor(hardware) if hardware else "unknown"
            stored[known if path.stem == name else kind] = content.get("ratios", {})
    nearest = kind if kind in stored else next(iter(stored), None)
    note = "" if nearest == kind else f", on a processor of another kind ({nearest}; here {kind})"
    for key, value in result.get("ratios", {}).items():
        before = stored[nearest].get(key) if nearest else None
        known = f"stored {before['median']:.2f}{note}" if before else "none stored"
        print(f"{name}: {key} {value['median']:.2f} ({known})", file=sys.stderr)


# --- timing -------------------------------------------------------------------------------------------------


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True
) -> tuple[Times, Times]:
    """Wall-clock and processor seconds of each side in each round.

    The sides run in turns, and the order rotates from round to round, so that other load on the machine falls
    on all of them. On a busy machine processor seconds are the more reliable figure. With `warm_up` every
    side runs once before the first round.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    worked: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values() if warm_up else ():
        side()
    names = list(sides)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            _synchronize()
            began, busy = time.perf_counter(), time.process_time()
            sides[name]()
            _synchronize()
            times[name].append(time.perf_counter() - began)
            worked[name].append(time.process_time() - busy)
    return times, worked


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(times: Times, of: str, over: str) -> dict[str, float]:
    """How many times as long `of` takes as `over`, round by round: median and range."""
    return spread([a / b for a, b in zip(times[of], times[over], strict=True)])


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """A process that ended with 0, its children included."""

    seconds: float
    processor_seconds: float
    peak_mib: float
    stdout: str


def run_process(*line: str) -> Finished:
    """Run a command to its end (Unix only); raises SystemExit with its stderr where it fails."""
    began = time.perf_counter()
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=complaints, text=True) as process,
    ):
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        complaints.seek(0)
        if process.returncode:
            why = complaints.read().decode(errors="replace")
            raise SystemExit(f"{shlex.join(line)[:300]} ended with {process.returncode}:\n{why}")
    return Finished(
        seconds=time.perf_counter() - began,
        processor_seconds=used.ru_utime + used.ru_stime,
        peak_mib=_mib(used.ru_maxrss),
        stdout=said,
    )


def peak_memory_gib() -> float:
    """The most resident memory that this process has held so far."""
    import resource

    return _mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def _mib(maxrss: int) -> float:
    return maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --- data ---------------------------------------------------------------------------------------------------


def sample_crops(folder: Path, count: int, size: tuple[int, int], seed: int = 0, suffix: str = "jpg") -> Path:
    """`count` random crops of the sample photographs as files of `size` (width, height) in a new folder."""
    import numpy as np
    from PIL import Image

    pictures = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.jpg"))]
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for k in range(count):
        picture = pictures[k % len(pictures)]
        width = min(picture.width, picture.height * size[0] / size[1]) * rng.uniform(0.3, 1.0)
        height = width * size[1] / size[0]
        left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
        box = (left, top, left + width, top + height)
        crop = picture.resize(size, Image.Resampling.BICUBIC, box=box)
        crop.save(folder / f"{k:06d}.{suffix}", **({"quality": 90} if suffix == "jpg" else {}))
    return folder


def random_network(classes: int = 10, width: int = 16) -> Any:
    """A ResNet-18 for 32x32 pixels with random weights from seed 0, channels last."""
    import torch

    from ratioctl.models import build

    torch.manual_seed(0)
    net = build("resnet18", num_classes=classes, width=width, mean=(0.5,) * 3, std=(0.25,) * 3)
    return net.to(memory_format=torch.channels_last)


def bare_passes(network: Any, x: Any, steps: int, forwards: int = 0) -> None:
    """`steps` forward passes with the gradient of the input, then `forwards` without: the floor of an attack.

    The batch is split over threads as in the attacks.
    """
    import torch

    from ratioctl.attacks.batch_parallel import in_parts, one_each

    with one_each(x.device) as count:
        passes = in_parts(network, count)
        for _ in range(steps):
            z = x.detach().requires_grad_()
            torch.autograd.grad(passes(z).sum(), z)
        with torch.no_grad():
            for _ in range(forwards):
                passes(x)
