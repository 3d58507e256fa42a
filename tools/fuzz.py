"""Coverage-guided fuzzing of our parsers (see `fuzz_targets.py`), with atheris.

    pip install 'ratioctl[fuzz]'
    python -m tools.fuzz [--parser NAME]... [--inputs N] [--limit-s S] [--keep FOLDER] [--json FILE]

Each parser runs in its own process for `--inputs` inputs or `--limit-s` seconds. A fault is an exception
other than those of `ratioctl.errors`, a failed assertion of the target, a crash of the process, or an input
that takes more than ten seconds. One input per place in the code is kept under `--keep/PARSER/`; move it to
`tests/corpus/` with its fix.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tools import harness

TIMEOUT_S = 10


def fuzz_one(name: str, inputs: int, limit_s: float, keep: Path, result: Path) -> None:
    """Fuzz one parser in this process and end the process: libFuzzer does not return."""
    import atheris

    # The first import of ratioctl in this process, so that all of it is instrumented.
    with atheris.instrument_imports(include=["ratioctl"]):
        from tools import fuzz_targets

    with tempfile.TemporaryDirectory() as corpus:
        for k, seed in enumerate(fuzz_targets.seeds(name)):
            Path(corpus, f"seed-{k}").write_bytes(seed)
        faults: dict[str, dict[str, str]] = {}
        started = time.monotonic()
        count = 0

        def end() -> None:
            grown = len(os.listdir(corpus))
            found = {"parser": name, "inputs": count, "seconds": round(time.monotonic() - started, 1)}
            result.write_text(json.dumps({**found, "corpus": grown, "faults": list(faults.values())}))

        def one(data: bytes) -> None:
            nonlocal count
            count += 1
            try:
                fuzz_targets.run(name, data)
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                ours = [f for f in frames if "ratioctl" in f.filename or "fuzz_targets" in f.filename]
                place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
                label = f"{type(error).__name__} in {place}"
                if label not in faults:
                    (keep / name).mkdir(parents=True, exist_ok=True)
                    (keep / name / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
                    faults[label] = {"fault": label, "message": str(error)[:200]}
            if count >= inputs or time.monotonic() - started > limit_s:
                end()
                os._exit(0)

        (keep / name).mkdir(parents=True, exist_ok=True)
        options = [f"-timeout={TIMEOUT_S}", "-rss_limit_mb=4096", "-max_len=8192", "-seed=1", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={keep / name}/", corpus], one)
        atheris.Fuzz()


def fuzz(name: str, inputs: int, limit_s: float, keep: Path) -> dict[str, Any]:
    """Fuzz one parser in another process; a crash of that process is a fault as well."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        line = [
            sys.executable,
            "-m",
            "tools.fuzz",
            "--child",
            name,
            "--inputs",
            str(inputs),
            "--limit-s",
            str(limit_s),
        ]
        done = subprocess.run(
            [*line, "--keep", str(keep), "--json", str(result)], capture_output=True, text=True, check=False
        )
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text())
            return found
    tail = " ".join(done.stderr.split())[-400:]
    fault = {"fault": f"the process ended with {done.returncode}", "message": tail}
    return {"parser": name, "inputs": None, "faults": [fault]}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--parser", action="append", help="one parser; default: all")
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser")
    parser.add_argument("--limit-s", type=float, default=120, help="for each parser")
    parser.add_argument("--keep", type=Path, default=Path("faults"), help="where inputs with faults go")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz_one(options.child, options.inputs, options.limit_s, options.keep, options.json)
    import atheris  # noqa: F401 - here, so that its absence is said before anything runs

    from tools.fuzz_targets import TARGETS

    parts = []
    for name in options.parser or TARGETS:
        parts.append(fuzz(name, options.inputs, options.limit_s, options.keep.absolute()))
        print(json.dumps(parts[-1]), file=sys.stderr)
    total = sum(part["inputs"] or 0 for part in parts)
    faults = sum(len(part["faults"]) for part in parts)
    harness.finish(
        {
            "benchmark": "fuzz",
            "atheris": importlib.metadata.version("atheris"),
            "most": {"inputs": options.inputs, "seconds": options.limit_s},  # of each parser
            "inputs": total,
            "faults": faults,
            "parsers": parts,
        },
        options,
    )


if __name__ == "__main__":
    main()
