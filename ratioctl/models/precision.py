"""How much faster a CPU computes in bf16 than in fp32, measured once and kept in the cache folder."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import time

import torch
from torch import Tensor
from torch.nn import functional

from ratioctl.images.cache import remembered

# The measured pass: 3x3 convolutions of the middle of a ResNet-18 of width 64, one core's part of a batch.
_SHAPE, _LAYERS, _ROUNDS = (8, 128, 16, 16), 2, 3


@functools.cache
def bf16_gain() -> float:
    """Time of an attack's pass in fp32 over that in bf16, on one thread of this CPU.

    The first call on a machine measures it, which takes about 50 ms on a processor with bf16 instructions.
    The cache folder keeps it for this processor, version of PyTorch and number of threads, so that runs on
    one machine choose alike; where that folder cannot be written, every process measures. 0 where PyTorch
    cannot compute in bf16.
    """
    facts = ("bf16 gain", _processor(), torch.__version__, torch.get_num_threads())
    return float(remembered(facts, lambda: round(_measure(), 2)))


def _measure() -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in attacks every thread has its part of the batch
    try:
        with torch.random.fork_rng(devices=[]):
            x = torch.rand(_SHAPE).to(memory_format=torch.channels_last)
            kernel = torch.rand(_SHAPE[1], _SHAPE[1], 3, 3).to(memory_format=torch.channels_last)
        seconds = {bf16: [_pass(x, kernel, bf16) for _ in range(_ROUNDS + 1)] for bf16 in (False, True)}
    except RuntimeError:
        return 0.0
    finally:
        torch.set_num_threads(threads)
    return min(seconds[False][1:]) / min(seconds[True][1:])


def _pass(x: Tensor, kernel: Tensor, bf16: bool) -> float:
    """Seconds of a forward pass and the gradient of the input."""
    began = time.perf_counter()
    leaf = x.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        y = leaf
        for _ in range(_LAYERS):
            y = functional.relu(functional.conv2d(y, kernel, padding=1))
        torch.autograd.grad(y.float().sum(), leaf)
    return time.perf_counter() - began


def _processor() -> str:
    """Name and flags of the processor, of which the same name can have several."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "flags"))]
        flags = sorted(f for f in " ".join(lines).split() if f.startswith(("avx512", "amx")))
        return " ".join([lines[0], *dict.fromkeys(flags)]) if lines else platform.machine()
    return f"{platform.processor() or platform.machine()} {os.name}"
