"""The device and precision to compute with, and why (shown by `--verbose`)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ratioctl.errors import UsageError
from ratioctl.models.precision import bf16_gain
from ratioctl.utils import resources

_LEAST_GAIN = 1.1  # bf16 is chosen on a CPU where it is faster than fp32 by this factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """A device and how to compute on it. `why` is one sentence for the log."""

    device: torch.device
    bf16: bool
    why: str

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the network's passes: bf16 autocast, or nothing."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def select_device(
    device: str = "auto", precision: str = "auto", *, reason: str | None = None
) -> ComputeConfig:
    """The configuration for `--device` and `--precision`, logged at level INFO.

    On a CPU with bf16 instructions the faster of bf16 and fp32 is chosen, by a measurement that the cache
    folder keeps. Without them bf16 is about ten times slower than fp32 and is not tried. Folded batch norms,
    the channels-last layout and one part of the batch for each thread are always used in attacks.

    Args:
        reason: for `precision`, where the user did not request it.

    Raises:
        UsageError: unknown device or precision, or a GPU that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device}", "no such device", "Use auto, cpu, cuda or cuda:N.") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}", "is not supported", "Use auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(f"--device {device}", "no CUDA device is available", "Use --device cpu.")
        if chosen.index is not None and chosen.index >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise UsageError(f"--device {device}", f"there are {count} CUDA device(s)", "Count from cuda:0.")
        chosen = torch.device("cuda", chosen.index or 0)
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision}", "is unknown", "Use auto, fp32 or bf16.")
    able = has_bf16(chosen)
    bf16 = able if precision == "auto" else precision == "bf16"
    why = "has bf16 instructions" if able else "has no bf16 instructions"
    if precision == "auto" and reason is None and able and chosen.type == "cpu":
        gain = bf16_gain()
        bf16 = gain >= _LEAST_GAIN
        why = f"{why}, measured {gain:.2g} times as fast as fp32"
    reasons = {
        "auto": why,
        "fp32": "requested",
        "bf16": "requested" + ("" if able else ", though the processor has no instructions for it"),
    }
    if chosen.type == "cuda":
        name = torch.cuda.get_device_name(chosen)
    else:
        if torch.get_num_threads() > resources.processors():  # torch does not know of CPU quotas
            torch.set_num_threads(resources.processors())
        count = torch.get_num_threads()
        name = "1 thread" if count == 1 else f"{count} threads, in attacks each with its part of the batch"
    said = reason or reasons[precision]
    compute = ComputeConfig(
        device=chosen, bf16=bf16, why=f"{chosen} ({name}), {'bf16' if bf16 else 'fp32'}: {said}"
    )
    logging.getLogger(__name__).info("Computing on %s", compute.why)
    return compute


def in_precision(net: Callable[[Tensor], Tensor], compute: ComputeConfig) -> Callable[[Tensor], Tensor]:
    """`net` in the precision of `compute`."""
    if not compute.bf16:
        return net

    def logits_of(x: Tensor) -> Tensor:
        with compute.autocast():
            return net(x)

    return logits_of


def has_bf16(device: torch.device) -> bool:
    """Whether the processor multiplies bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags
