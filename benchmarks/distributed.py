"""Training steps of several processes beside one process with the same threads, and communication on paper.

    python -m benchmarks.distributed [--width 16] [--batch 32] [--processes 2] [--rounds 3] [--json FILE]
    python -m benchmarks.distributed --short        # a small step; its ratio beside the stored one

Sides, in turns, each in processes of its own:

    one       one process with as many threads as `several` has processes
    several   `--processes` processes with one thread each, connected by gloo; synchronized batch norms
    own       the same with `optim.sync_batchnorm = false`

The same batch in all: `--batch` ID and as many OOD images, 7 and 20 steps. Seconds are medians over the
updates of a round, without the first. "ratios" are round by round; above 1 the several processes are faster.

"paper" is calculated, not measured: bytes that a ring all-reduce sends for each update of the recipe
`tools/gpu/cifar10-ratio-w64.toml` (512 + 256 images) on 8 GPUs, and the seconds that takes at given
bandwidths, beside the operations of the update and the seconds they take at given rates.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.training import FILL, images, recipe_of
from ratioctl import models
from ratioctl.data import loader
from ratioctl.models.device import in_precision, select_device
from ratioctl.training.distributed import joined
from ratioctl.training.objective import losses
from ratioctl.training.replica import Replica
from tools import harness

SHORT = {"width": 8, "batch": 8, "updates": 3, "rounds": 1, "in_steps": 2, "out_steps": 3}
RATIOS = {"one over several": ("one", "several"), "one over own": ("one", "own")}
BANDWIDTHS = {"NVLink": 200e9, "PCIe 4.0 x16": 20e9, "25 Gbit/s Ethernet": 2.5e9}  # bytes a second and GPU
RATES = {"slow": 50e12, "fast": 200e12}  # operations a second and GPU in bf16, far below the peak


def main() -> None:
    parser = harness.parser(__doc__, short=SHORT)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32, help="ID images, and as many OOD images")
    parser.add_argument("--in-steps", type=int, default=7)
    parser.add_argument("--out-steps", type=int, default=20)
    parser.add_argument("--updates", type=int, default=6, help="of each round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--precision", default="auto")
    parser.add_argument(
        "--worker", action="store_true", help="one of the processes (used by the script itself)"
    )
    parser.add_argument("--own", action="store_true", help="of a worker: optim.sync_batchnorm = false")
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    sides = {"one": (1, options.processes, False), "several": (options.processes, 1, False)}
    sides["own"] = (options.processes, 1, True)
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = run(*sides[name], options)
            times[name].append(statistics.median(seconds[1:]))
            print(f"{name:8} {times[name][-1]:.3f} s an update", file=sys.stderr)
    result = {
        "benchmark": "training steps of several processes",
        "shape": {
            k: vars(options)[k] for k in ("width", "batch", "in_steps", "out_steps", "updates", "rounds")
        },
        "processes": options.processes,
        "device": select_device("cpu", options.precision).why,
        "seconds_an_update": harness.medians(times),
        "rounds": times,
        "ratios": {name: harness.ratio(times, *pair) for name, pair in RATIOS.items()},
        "paper": paper(),
    }
    harness.finish(result, options, "distributed")


def run(count: int, threads: int, own: bool, options: Any) -> list[float]:
    """Seconds of each update of `count` processes with `threads` threads each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shape = ("width", "batch", "in_steps", "out_steps", "updates", "precision")
    command = [sys.executable, "-m", "benchmarks.distributed", "--worker", *(["--own"] if own else [])]
    command += [part for k in shape for part in (f"--{k.replace('_', '-')}", str(vars(options)[k]))]
    started = []
    for rank in range(count):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        variables |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables["OMP_NUM_THREADS"] = str(threads)
        env = os.environ | variables
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"a worker ended with {[process.returncode for process in started]}")
    seconds: list[float] = json.loads(said[0])
    return seconds


def work(options: Any) -> None:
    """One process: `--updates` updates, and their seconds as JSON on stdout of the first one."""
    recipe = recipe_of(options)
    optim = recipe.optim.model_copy(update={"sync_batchnorm": not options.own})
    recipe = recipe.model_copy(update={"optim": optim})
    compute = select_device("cpu", options.precision)
    with joined("cpu") as processes:
        train, out = images(1024, True), images(1024, False)
        model = harness.random_network(width=options.width)
        replica, frozen = Replica(model, recipe, processes), models.fold_batchnorm(model)
        logits, attacked = in_precision(replica, compute), in_precision(frozen, compute)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
        seconds = []
        for update in range(options.updates):
            processes.wait()
            began = time.perf_counter()
            batch = loader.batch_at(update, recipe, train, out, FILL, share=processes.share)
            models.sync_folded(frozen, model)
            replica.train()
            sizes = (optim.batch_size, optim.batch_size_out)
            named = losses(logits, attacked, batch, recipe.objective, share=processes.share, counts=sizes)
            sgd.zero_grad(set_to_none=True)
            named["total"].backward()
            replica.average_statistics()
            sgd.step()
            processes.highest([0.0] * 8)  # as after every update of `ratioctl train`
            seconds.append(time.perf_counter() - began)
        if processes.first:
            print(json.dumps(seconds))


def paper(gpus: int = 8, images_in: int = 512, images_out: int = 256) -> dict[str, Any]:
    """Communication against computation of an update of a ResNet-18 of width 64, without overlap."""
    from torch.utils.flop_counter import FlopCounterMode

    model = harness.random_network(width=64).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, 32, 32))
    forward = counter.get_total_flops()
    passes = images_in * (2 * 7 + 1) + images_out * (2 * 20 + 1) + 3 * (images_in + images_out)
    parameters = sum(p.numel() for p in model.parameters())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    sent = {kind: 2 * (gpus - 1) / gpus * size * parameters for kind, size in (("fp32", 4), ("bf16", 2))}
    return {
        "gpus": gpus,
        "images": [images_in, images_out],
        "steps": [7, 20],
        "parameters": parameters,
        "operations_each": passes * forward / gpus,
        "seconds_computing": {name: passes * forward / gpus / rate for name, rate in RATES.items()},
        "bytes_sent_each": sent,
        "seconds_sending_fp32": {name: sent["fp32"] / rate for name, rate in BANDWIDTHS.items()},
        "batch_norms": len(norms),
        "collectives_of_batch_norms": 2 * len(norms),
        "bytes_of_batch_norms": 4 * sum(4 * m.num_features + 1 for m in norms),
    }


if __name__ == "__main__":
    main()
