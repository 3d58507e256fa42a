"""Bundled files (beside the package in a checkout, inside a wheel), and the usable processors and memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def folder(name: str) -> Path:
    """The folder of bundled `name` ("recipes" or "assets"); it may be absent in a damaged installation."""
    here = Path(__file__).resolve().parents[1]
    inside = here / name
    return inside if inside.is_dir() else here.parent / name


def processors(root: Path = Path("/")) -> int:
    """How many processors this process may use: its affinity, within the CPU quota of its cgroups."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota(file, None) for file in _cgroup_files("cpu.max", "", root)]
    for file in _cgroup_files("cpu.cfs_quota_us", "cpu", root):
        quotas.append(_quota(file, file.with_name("cpu.cfs_period_us")))
    return min(count, max(1, math.ceil(min(quotas, default=count))))


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory this process may use: the machine's, within the limits of cgroups; None if unknown."""
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name, controller in (("memory.max", ""), ("memory.limit_in_bytes", "memory")):
        words = (_read(file) for file in _cgroup_files(name, controller, root))
        limits += [int(word) for word in words if word.isdecimal()]
    return min(limits, default=None)


def _quota(file: Path, period_file: Path | None) -> float:
    """Processors that one cgroup grants: v2 has "QUOTA PERIOD" in one file, v1 one file each."""
    quota, _, period = _read(file).partition(" ")
    period = _read(period_file) if period_file is not None else period
    if not quota.isdecimal() or not period.isdecimal() or int(period) == 0:  # "max", -1
        return float(2**20)
    return int(quota) / int(period)


def _cgroup_files(name: str, controller: str, root: Path) -> Iterator[Path]:
    """File `name` of this process's cgroup and of each above it, in v2 (no controller) or v1.

    Inside a container the path that /proc states may be the host's; the topmost folder is the container's.
    """
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if line.count(":") < 2 or controller not in controllers.split(","):
            continue
        below = Path(path.lstrip("/"))
        for base in (mount / controllers, mount / controller) if controller else (mount, mount / "unified"):
            for folder in {base / below, *(base / parent for parent in below.parents), base}:
                if (folder / name).is_file():
                    yield folder / name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
