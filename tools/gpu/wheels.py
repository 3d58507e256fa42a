"""Wheels for a machine without a network that has torch and torchvision already.

    python -m tools.gpu.wheels --out build/gpu/wheels [--python 3.12] [--present FILE]

Downloads, with `pip download --no-deps`, what pyproject.toml requires for training and evaluation, and what
that requires in turn as installed here, less what the machine has: FILE is its `pip freeze`. By default that
is torch and torchvision with all that they require. What the kit does not use is left out (SKIP).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
# Exports, tables in Parquet, and pictures in terminals: none of them is needed to train and to measure.
SKIP = {"onnx", "onnxruntime", "onnxscript", "pyarrow", "textual-image"}
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_17_x86_64",
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: Iterable[str], python: str, stop: frozenset[str] = frozenset()) -> dict[str, str]:
    """Names to the versions installed here of `requirements` and all that these require, less `stop`."""
    found: dict[str, str] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    target = {"python_version": python, "python_full_version": f"{python}.0"}
    target |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    while waiting:
        wanted, extra = waiting.pop()
        name = canonical(wanted.name)
        applies = wanted.marker is None or wanted.marker.evaluate({**target, "extra": extra})
        if name in found or name in stop or not applies:
            continue
        try:
            there = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not for this platform or version of Python
        found[name] = there.version
        for extra in wanted.extras or {""}:
            waiting += [(Requirement(text), extra) for text in there.requires or ()]
    return found


def wanted(python: str, present: Path | None = None) -> dict[str, str]:
    """Names to versions of the wheels that the machine lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    if present is None:
        there = set(closure(("torch", "torchvision"), python))
    else:
        lines = present.read_text(encoding="utf-8").splitlines()
        there = {canonical(re.split(r"[ =@]", line)[0]) for line in lines if line.strip()}
    there |= {"torch", "torchvision"} | SKIP
    return closure(
        [*project["dependencies"], *project["optional-dependencies"]["torch"]], python, frozenset(there)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu" / "wheels")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--present", type=Path, metavar="FILE", help="`pip freeze` of the machine")
    parser.add_argument("--list", action="store_true", help="print the list and download nothing")
    options = parser.parse_args()
    wheels = [
        f"{name}=={version}" for name, version in sorted(wanted(options.python, options.present).items())
    ]
    print("\n".join(wheels))
    if options.list:
        return
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    line += ["--python-version", options.python, "--implementation", "cp", "--dest", str(options.out)]
    line += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*line, *wheels], check=True)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {size / 2**20:.0f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
