"""Cost of one evaluation: time by part, the estimate printed before it, and peak memory.

    python -m benchmarks.evaluate cifar10.tar.xz:test svhn=svhn-test.tar.xz cifar100=cifar100-test.tar.xz \\
        textures=textures.tar.xz [--suite quick] [--limit N] [--json FILE]

Evaluates one model, writes the reports into a temporary folder and resumes nothing. Reading the sets is part
of the time.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from ratioctl import package as packages
from ratioctl.evaluation import run
from ratioctl.report import evaluation_files
from tools import harness


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("data", help="labelled images, e.g. cifar10.tar.xz:test")
    parser.add_argument("ood", nargs="*", help="NAME=SOURCE")
    parser.add_argument("--model", default=packages.DEFAULT_MODEL)
    parser.add_argument("--suite", default="quick")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    estimates: list[tuple[float, float]] = []  # seconds since the plan, seconds left as estimated then
    parts: dict[str, float] = {}
    began = last = time.perf_counter()
    planned = 0.0

    def callback(event: dict[str, Any]) -> None:
        nonlocal last, planned
        now = time.perf_counter()
        if event["event"] == "plan":
            planned, parts["loading, first look"] = now, now - last
            estimates.append((0.0, event["seconds"]))
        elif event["event"] == "batch":
            parts[event["what"]] = parts.get(event["what"], 0.0) + now - last
            estimates.append((now - planned, event["seconds_left"]))
        last = now

    with tempfile.TemporaryDirectory() as folder:
        names = ("data", "ood", "suite", "limit", "device", "precision")
        found = run(
            [options.model],
            **{name: getattr(options, name) for name in names},
            out=folder,
            callback=callback,
            finish=lambda done: evaluation_files.write(done, Path(folder)),
        )
        seconds = time.perf_counter() - began
    worked = time.perf_counter() - planned
    result = {
        "benchmark": "one evaluation",
        "suite": found.suite,
        "protocol": found.protocol,
        "sets": {entry["name"]: entry["n"] for entry in found.data},
        "seconds": seconds,
        "estimated_over_actual": estimates[0][1] / worked,
        "estimates_over_actual": {
            f"after {share:.0%}": next(
                (said / (worked - at) for at, said in estimates if share * worked <= at < worked), None
            )
            for share in (0.1, 0.25, 0.5)
        },
        "peak_memory_gib": harness.peak_memory_gib(),
        "seconds_by_part": dict(sorted(parts.items(), key=lambda item: -item[1])),
    }
    harness.finish(result, options)


if __name__ == "__main__":
    main()
