"""What lies at hand: bundled files (beside the package in a checkout, inside a wheel), and processors."""

import os
from pathlib import Path


def folder(name: str) -> Path:
    """The folder of bundled `name` ("recipes" or "assets"); it may be absent in a damaged install."""
    here = Path(__file__).resolve().parents[1]
    inside = here / name
    return inside if inside.is_dir() else here.parent / name


def processors() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
