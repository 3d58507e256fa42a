"""The environment of measurements: versions, hardware, precision."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ratioctl._version import __version__
from ratioctl.models.device import ComputeConfig


def environment(compute: ComputeConfig, search: str, score: str) -> dict[str, Any]:
    """Plain JSON values. `search` and `score` are the keys of two precisions: that of `compute`, and fp32."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"model name\s*:\s*(.+)", text)
        processor = found[1].strip() if found else processor
    gpu = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else None
    return {
        "versions": {
            "ratioctl": __version__,
            "torch": torch.__version__,
            "pyautoattack": importlib.metadata.version("pyautoattack"),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "hardware": {"processor": processor, "threads": torch.get_num_threads(), "gpu": gpu},
        "device": str(compute.device),
        search: "bf16" if compute.bf16 else "fp32",
        score: "fp32",
    }
