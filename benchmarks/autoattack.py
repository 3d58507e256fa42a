"""Our AutoAttack ensemble beside `pyautoattack`'s standard version: verdicts and cost.

    python -m benchmarks.autoattack cifar10.tar.xz:test --json autoattack.json

Both sides attack the same images of one model in an l2 ball, piece by piece, with all four attacks and full
budgets. Ours works on the network with folded BatchNorm, as `ratioctl evaluate --backend own`, its searches
in --precision (auto: bf16 where the processor computes faster in it), its verdicts in fp32; the package gets
the module of `ratioctl.load_model`. "pass_ratio" is what the folding alone gains: a pass with the gradient
of the input on one network over one on the other. The floor of ours are the passes that its attacks made,
counted, each at the price of a bare pass in a full batch, measured after the piece. "ratios" are over
pieces. `--sides second` runs the package with another seed, for its own spread.

A finished piece of a side is a file in --parts, so that a long measurement can be interrupted; the result
sums up the pieces that all of --sides have finished. Small pieces cost both sides more per image, because the
last attacks meet few survivors.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ratioctl
from ratioctl import package as packages
from ratioctl.attacks.autoattack import STANDARD, backend_name, robust_verdicts
from ratioctl.data import in_distribution
from ratioctl.data.loader import to_float
from ratioctl.evaluation.datasets import stratified_indices
from ratioctl.metrics import wilson_interval
from ratioctl.models import fold_batchnorm
from ratioctl.models.device import ComputeConfig, in_precision, select_device
from ratioctl.recipe import Ball
from tools import harness

SIDES = {"own": ("own", 0), "package": ("reference", 0), "second": ("reference", 1)}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("source", help="labelled images, e.g. cifar10.tar.xz:test")
    parser.add_argument("--model", default=packages.DEFAULT_MODEL)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--piece", type=int, default=200, help="images at a time")
    parser.add_argument("--pieces", type=int, default=1000, help="stop after so many new ones")
    parser.add_argument("--sides", default="own,package", help="of own, package, second")
    parser.add_argument("--eps", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", help="of our searches")
    parser.add_argument("--parts", type=Path, default=Path("runs/autoattack"))
    options = parser.parse_args()
    package = packages.read(packages.find(options.model))
    channels, size, _ = package.input_size
    images = in_distribution.load_labelled(options.source, size, channels, package.label_names)
    images = images.subset(stratified_indices(images, options.images, 0))
    x, y = to_float(images.pixels, options.device), torch.from_numpy(images.labels).to(options.device)
    compute = select_device(options.device, options.precision)
    plain = ratioctl.load_model(options.model, device=options.device)
    folded = fold_batchnorm(plain).to(memory_format=torch.channels_last)
    ball, wanted = Ball(p=2.0, eps=options.eps), options.sides.split(",")
    digests = f"{package.digest[:12]}-{images.fingerprint[:12]}"
    setting = f"{digests}-{options.eps:g}-{options.piece}-{'bf16' if compute.bf16 else 'fp32'}"
    parts = options.parts / setting
    parts.mkdir(parents=True, exist_ok=True)
    starts, done = range(0, len(x), options.piece), 0

    def part(side: str, start: int) -> Path:
        return parts / f"{side}-{start}.json"

    for start in starts:
        missing = [side for side in wanted if not part(side, start).exists()]
        if missing and done >= options.pieces:
            break
        done += bool(missing)
        for side in missing:
            at = slice(start, start + options.piece)
            piece = run(side, folded if side == "own" else plain, x[at], y[at], ball, compute)
            part(side, start).write_text(json.dumps(piece), encoding="utf-8")
            print(f"{side} {start}: {piece['seconds']:.0f} s, {sum(piece['robust'])} robust", file=sys.stderr)
    ended = [start for start in starts if all(part(side, start).exists() for side in wanted)]
    if not ended:
        sys.exit("no piece is finished by all sides yet; run the command again")
    sides = {
        side: [json.loads(part(side, start).read_text()) for start in ended]
        for side in SIDES
        if all(part(side, start).exists() for start in ended)
    }
    result = {
        "benchmark": "our ensemble against pyautoattack standard",
        "model": package.name,
        "model_digest": package.digest,
        "data": options.source.replace("\\", "/").rsplit("/", 1)[-1],
        "ball": str(ball),
        "images": sum(len(piece["robust"]) for piece in sides[wanted[0]]),
        "batch_size": options.piece,
        "precision_of_our_searches": "bf16" if compute.bf16 else "fp32",
        **summed(sides),
        "pass_ratio": pass_ratio(plain, folded, x[: options.piece // 2]),
    }
    harness.finish(result, options)


def run(
    side: str,
    network: torch.nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    ball: Ball,
    compute: ComputeConfig,
) -> dict[str, Any]:
    """One side on one piece: verdicts, and seconds by attack."""
    backend, seed = SIDES[side]
    seconds: dict[str, float] = dict.fromkeys(STANDARD, 0.0)
    began = last = time.perf_counter()
    processor = time.process_time()

    def progress(name: str, count: int) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[name] += now - last
        last = now

    own = side == "own"
    counted = Counted(network)
    search = Counted(in_precision(copy.deepcopy(network), compute)) if own else None
    verdicts = robust_verdicts(
        counted if own else network,
        x,
        y,
        ball,
        batch_size=len(x),
        seed=seed,
        backend=backend,  # type: ignore[arg-type]
        progress=progress,
        search_logits_of=search,
    )
    ended, worked = time.perf_counter(), time.process_time()
    floor = {"floor_seconds": counted.floor(x) + search.floor(x)} if search is not None else {}
    return {
        **floor,
        "backend": backend_name(backend),  # type: ignore[arg-type]
        "name": verdicts.name,
        "seed": seed,
        "robust": verdicts.robust.int().tolist(),
        "broken_by": verdicts.broken_by.tolist(),
        "seconds": ended - began,
        "processor_seconds": worked - processor,
        "seconds_by_attack": seconds,
    }


class Counted:
    """A network that counts the images it is given, with and without a gradient."""

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.network, self.lock, self.images = network, threading.Lock(), {True: 0, False: 0}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.images[torch.is_grad_enabled() and x.requires_grad] += len(x)
        return self.network(x)

    def floor(self, x: torch.Tensor) -> float:
        """Seconds of as many bare passes in batches as large as `x`."""
        price = {
            True: median_seconds(partial(harness.bare_passes, self.network, x, 1)),
            False: median_seconds(partial(harness.bare_passes, self.network, x, 0, forwards=1)),
        }
        return sum(price[kind] / len(x) * images for kind, images in self.images.items())


def median_seconds(work: Callable[[], object], times: int = 5) -> float:
    return harness.medians(harness.interleaved({"work": work}, times)[0])["work"]


def summed(sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    robust = {side: np.concatenate([p["robust"] for p in pieces]) for side, pieces in sides.items()}
    total, processor = (
        {side: sum(p[key] for p in pieces) for side, pieces in sides.items()}
        for key in ("seconds", "processor_seconds")
    )
    result: dict[str, Any] = {}
    times = {side: [p["seconds"] for p in pieces] for side, pieces in sides.items()}
    result["ratios"] = {}
    if "own" in sides and "package" in sides:
        result["ratios"]["package over own"] = harness.ratio(times, "package", "own")
    if all("floor_seconds" in piece for piece in sides.get("own", [{}])):
        times["floor"] = [piece["floor_seconds"] for piece in sides["own"]]
        result["ratios"]["own over floor"] = harness.ratio(times, "own", "floor")
    if "own" in sides and "package" in sides:
        result["time_ratio"] = total["own"] / total["package"]
        result["processor_time_ratio"] = processor["own"] / processor["package"]
        result["same_verdict"] = float((robust["own"] == robust["package"]).mean())
    for side, pieces in sides.items():
        n, kept = len(robust[side]), int(robust[side].sum())
        result[side] = {
            "backend": pieces[0]["backend"],
            "name": pieces[0]["name"],
            "seed": pieces[0]["seed"],
            "robust_accuracy": kept / n,
            "interval": wilson_interval(kept, n),
            "seconds": total[side],
            "processor_seconds": processor[side],
            "seconds_by_attack": {a: sum(p["seconds_by_attack"][a] for p in pieces) for a in STANDARD},
        }
    pairs = [("own", "package"), ("own", "second"), ("package", "second")]
    result["verdicts_that_differ"] = {
        f"{a}, {b}": int((robust[a] != robust[b]).sum()) for a, b in pairs if a in robust and b in robust
    }
    return result


def pass_ratio(plain: torch.nn.Module, folded: torch.nn.Module, x: torch.Tensor) -> float:
    """Time of a forward and input-gradient pass on the folded network over that on the plain one."""

    def gradient(network: torch.nn.Module) -> None:
        z = x.detach().requires_grad_()
        torch.autograd.grad(network(z).sum(), z)

    sides = {"folded": partial(gradient, folded), "plain": partial(gradient, plain)}
    medians = harness.medians(harness.interleaved(sides, 10)[0])
    return medians["folded"] / medians["plain"]


if __name__ == "__main__":
    main()
