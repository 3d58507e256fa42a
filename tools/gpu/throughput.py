"""Images a second of the passes that training consists of: eager and compiled, fp32 and bf16.

    python -m tools.gpu.throughput [--width 64] [--batches 256,512,1024] [--seconds 2] [--json FILE]

"attack" is a forward pass and the gradient of the input on the folded network, "train" a forward pass in
train mode and all gradients. A table is printed on stderr.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch

from ratioctl.models import fold_batchnorm
from ratioctl.models.compiled import compiled
from ratioctl.models.device import in_precision, select_device
from tools import harness


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batches", default="256,512,1024")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = select_device(options.device).device
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    model = harness.random_network(width=options.width).to(device)
    rows = []
    for batch in map(int, options.batches.split(",")):
        x = torch.rand(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        for precision in ("fp32", "bf16"):
            compute = select_device(options.device, precision)
            frozen = fold_batchnorm(model)
            sides = {"attack, eager": in_precision(frozen, compute)}
            if options.compile:
                sides["attack, compiled"] = in_precision(compiled(frozen), compute)
            passes = {name: attack_pass(logits_of, x) for name, logits_of in sides.items()}
            twin = copy.deepcopy(model).train()
            passes["train, eager"] = train_pass(in_precision(twin, compute), twin, x)
            for name, once in passes.items():
                rate = batch / seconds_of(once, options.seconds, device)
                rows.append({"pass": name, "precision": precision, "batch": batch, "images_per_s": rate})
                print(f"{name:18} {precision} batch {batch:5}: {rate:10,.0f} images/s", file=sys.stderr)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    result = {"benchmark": "passes of training", "width": options.width, "rows": rows, "peak_gpu_gib": peak}
    harness.finish({**result, "device": select_device(options.device).why}, options)


def attack_pass(logits_of: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    def once() -> None:
        image = x.detach().requires_grad_()
        torch.autograd.grad(logits_of(image).float().logsumexp(1).sum(), image)

    return once


def train_pass(
    logits_of: Callable[[torch.Tensor], torch.Tensor], model: torch.nn.Module, x: torch.Tensor
) -> Callable[[], object]:
    def once() -> None:
        model.zero_grad(set_to_none=True)
        logits_of(x).float().logsumexp(1).mean().backward()

    return once


def seconds_of(once: Callable[[], object], at_least: float, device: torch.device) -> float:
    """Seconds of a call, after two for warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    once(), once()
    wait()
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < at_least:
        once()
        calls += 1
        if calls % 10 == 0:  # the host would run far ahead of the device
            wait()
    wait()
    return (time.perf_counter() - began) / calls


if __name__ == "__main__":
    main()
