"""How long `train` takes from its start to its first update, with and without decoded images in the cache.

    python -m benchmarks.second_start --train cifar10.tar.xz:train --test cifar10.tar.xz:test \\
        --outside a.tar.xz:train b.tar.xz:train [--rounds 5] [--cold] [--json FILE]
    python -m benchmarks.second_start --short

Whole processes of `ratioctl train cifar10-ratio-0.25-small` that end where the first update begins. With
`--cold` one run with an empty cache folder comes first. Floor: importing torch and building its optimizer.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

from tools import harness

CHILD = """
import os, sys
from ratioctl.training import loop
def stop(*args, **kwargs):
    print("update", flush=True)
    os._exit(0)
loop.losses = stop
from ratioctl.cli import main
sys.exit(main(sys.argv[1:]))
"""
FLOOR = "import torch; torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)"


def first_update(line: list[str]) -> harness.Finished:
    """Run `train` in a new folder until its first update begins."""
    with tempfile.TemporaryDirectory() as folder:
        done = harness.run_process(
            sys.executable, "-c", CHILD, *line, "--out", str(Path(folder) / "run"), "-q"
        )
    if done.stdout != "update\n":
        raise SystemExit("train ended before its first update")
    return done


def main() -> None:
    short = {"train": "digits:train", "test": "digits:test", "outside": ["noise:uniform"], "rounds": 1}
    parser = harness.parser(__doc__, short=short)
    parser.add_argument("--train", default="cifar10:train")
    parser.add_argument("--test", default="cifar10:test")
    parser.add_argument("--outside", nargs="+", default=["noise:uniform"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="also measure a first start, in an empty cache")
    options = parser.parse_args()
    listed = "[" + ", ".join(f'"{source}"' for source in options.outside) + "]"
    settings = [f'data.train="{options.train}"', f'data.test="{options.test}"', f"data.outside={listed}"]
    settings += ["data.validation=0.04"]
    settings += ["data.size=8", "data.channels=3"] if options.short else []
    line = ["train", "cifar10-ratio-0.25-small", *(part for s in settings for part in ("--set", s))]
    result = {}
    if options.cold:
        with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, RATIOCTL_CACHE=empty):
            result["first_start_s"] = first_update(line).seconds
    spent: dict[str, list[float]] = {"floor": [], "second start": []}

    def side(name: str, run: Callable[[], harness.Finished]) -> Callable[[], None]:
        return lambda: spent[name].append(run().processor_seconds)

    times, _ = harness.interleaved(
        {
            "floor": side("floor", partial(harness.run_process, sys.executable, "-c", FLOOR)),
            "second start": side("second start", partial(first_update, line)),
        },
        options.rounds,
    )
    harness.finish(
        {
            "benchmark": "from the start of `train` to its first update",
            "train": options.train,
            "outside": options.outside,
            **result,
            "seconds": {name: harness.spread(values) for name, values in times.items()},
            "processor_seconds": {name: harness.spread(values[1:]) for name, values in spent.items()},
            "ratios": {"second start over its floor": harness.ratio(times, "second start", "floor")},
            "rounds": options.rounds,
        },
        options,
        "second_start",
    )


if __name__ == "__main__":
    main()
