"""Start-up time of every command, measured as whole processes in turns.

    python -m benchmarks.startup [--rounds 7] [--json FILE]
    python -m benchmarks.startup --short

Runs `--help` of each command, the commands that need nothing but a model, a counterfactual of one step, and
the time to the first row of `ood-score` on one image with the ONNX file and with the package. Floors:
`python -c pass` for all, importing torch for the counterfactual, importing onnxruntime and opening the model
for the first rows. The warm-up writes the modules' bytecode, which an installation does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tools import harness

IMAGE = str(harness.SAMPLES / "cat.jpg")
TORCH = "import numpy, PIL.Image, torch"
ONNX = "import numpy, PIL.Image, onnxruntime; onnxruntime.InferenceSession({!r})"
SHORT = ("floor", "--help", "onnx floor", "ood-score, ONNX")


def commands(model: str, folder: Path) -> dict[str, list[str]]:
    """Command lines by name; makes the files that they read."""
    from ratioctl import package as packages
    from ratioctl.cli import COMMANDS

    cli = [sys.executable, "-m", "ratioctl"]
    onnx, copied, key = (str(folder / name) for name in ("model.onnx", "copy", "key"))
    harness.run_process(*cli, "export", model, "--output", onnx, "-q")
    shutil.copytree(packages.find(model), copied)
    os.environ["RATIOCTL_KEY_PASSWORD"] = ""
    harness.run_process(*cli, "sign", "--new-key", key, "-q")
    one_step = ("--target", "dog", "--eps", "1", "--steps", "1", "--out", str(folder / "one-step"))
    return {
        "floor": [sys.executable, "-c", "pass"],
        "--help": [*cli, "--help"],
        **{f"{name} --help": [*cli, name, "--help"] for name in COMMANDS},
        "inspect": [*cli, "inspect", model],
        "verify": [*cli, "verify", model],
        "models": [*cli, "models"],
        "sign": [*cli, "sign", copied, "--key", f"{key}.key"],
        "torch floor": [sys.executable, "-c", TORCH],
        "counterfactual, one step": [*cli, "counterfactual", IMAGE, "--model", model, *one_step],
        "onnx floor": [sys.executable, "-c", ONNX.format(onnx)],
        "ood-score, ONNX": [*cli, "ood-score", IMAGE, "--model", onnx, "--format", "csv"],
        "ood-score, package": [*cli, "ood-score", IMAGE, "--model", model, "--format", "csv"],
    }


def whole(line: list[str]) -> None:
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def first_row(line: list[str]) -> None:
    """Run until the first line after the header is there, then end the process."""
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        row = process.stdout.readline()
        process.kill()
    if not row:
        raise SystemExit(f"{' '.join(line)} printed no row")


def floor_of(name: str) -> str:
    return {"ood-score,": "onnx floor", "counterfactual,": "torch floor"}.get(name.split()[0], "floor")


def main() -> None:
    parser = harness.parser(__doc__, short={"rounds": 1})
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="cifar10-ratio-small")
    options: argparse.Namespace = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as folder:
        lines = commands(options.model, Path(folder))
        if options.short:
            lines = {name: lines[name] for name in SHORT}
        sides: dict[str, Callable[[], object]] = {
            name: partial(first_row if name.startswith("ood-score,") else whole, line)
            for name, line in lines.items()
        }
        times, _ = harness.interleaved(sides, options.rounds)  # the warm-up reads the files from disk
    names = [name for name in lines if "floor" not in name]
    result = {
        "benchmark": "start of every command",
        "ratios": {f"{n} over its floor": harness.ratio(times, n, floor_of(n)) for n in names},
        "seconds": harness.medians(times),
        "rounds": options.rounds,
    }
    harness.finish(result, options, "startup")


if __name__ == "__main__":
    main()
