"""Processors and memory within the limits of cgroups."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from ratioctl.utils import resources


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def cgroup(root: Path, lines: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": lines, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup"


def v1(folder: str, quota: int) -> dict[str, str]:
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": 100_000}
    return {f"{V2}/{folder}/{name}": f"{value}\n" for name, value in files.items()}


@pytest.mark.parametrize(
    ("lines", "files", "count"),
    [
        ("0::/a/b\n", {}, 8),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "50000 100000\n"}, 1),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "9900000 100000\n"}, 8),
        ("0::/../../host\n", {f"{V2}/cpu.max": "300000 100000\n"}, 3),
        ("4:cpu,cpuacct:/x\n0::/\n", v1("cpu,cpuacct/x", 250000), 3),
        ("4:cpu,cpuacct:/host\n", v1("cpu", 100000), 1),
        ("1:cpu:/\n", v1("cpu", -1), 8),
        ("rubbish", {f"{V2}/cpu.max": "1 1"}, 8),
    ],
)
def test_cpu_quotas(tmp_path: Path, lines: str, files: dict[str, str], count: int) -> None:
    assert resources.processors(cgroup(tmp_path, lines, files)) == count


def test_no_cgroups(tmp_path: Path) -> None:
    assert resources.processors(tmp_path) == 8


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        ("0::/a\n", {f"{V2}/a/memory.max": "4096\n"}, 4096),
        ("0::/a\n", {f"{V2}/a/memory.max": "max\n"}, math.inf),
        ("4:memory:/a\n", {f"{V2}/memory/a/memory.limit_in_bytes": "8192\n"}, 8192),
        ("4:memory:/a\n", {f"{V2}/memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, math.inf),
    ],
)
def test_memory_limits(tmp_path: Path, lines: str, files: dict[str, str], limit: float) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert resources.memory_limit(cgroup(tmp_path, lines, files)) == min(limit, physical)
