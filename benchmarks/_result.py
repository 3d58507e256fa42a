"""The end of every benchmark: its figures as JSON, printed and kept."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Print `result` with what it ran on, and write it to `path` where one is given."""
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.platform(),
    }
    text = json.dumps({**result, **machine}, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n", encoding="utf-8")
