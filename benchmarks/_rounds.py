"""Measuring sides against each other: in turns, so that what else the machine does falls on all of them."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


Times = Mapping[str, list[float]]


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> tuple[Times, Times]:
    """Seconds of each side in each round, and seconds of all processors; the order turns round by round.

    On a machine that does other things as well, processor seconds say more.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    worked: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _wait()
            began, busy = time.perf_counter(), time.process_time()
            sides[name]()
            _wait()
            times[name].append(time.perf_counter() - began)
            worked[name].append(time.process_time() - busy)
    return times, worked


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(times: Times, of: str, over: str) -> dict[str, float]:
    """How many times as long `of` takes as `over`: the median over rounds, and their range."""
    each = [a / b for a, b in zip(times[of], times[over], strict=True)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def beside_stored(result: Mapping[str, Any], name: str) -> None:
    """Say how the ratios compare with those kept in results/; never an error: timings are not tests."""
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key, value in result.get("ratios", {}).items():
        before = stored.get("ratios", {}).get(key, {}).get("median")
        kept = f"stored {before:.2f}" if before else "none stored"
        print(f"{name}: {key} {value['median']:.2f} ({kept})", file=sys.stderr)
