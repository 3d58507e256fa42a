"""Kills and disk faults at the write points of the real command line: nothing may be lost.

    python -m tools.faults [--kills 100] [--disk 50] [--seed 0] [--seconds N] [--json FILE]

A write point is a call that changes the disk below the command's folder: opening a file for writing, write,
fsync, rename, link, unlink, mkdir, rmdir, truncate. A first run of each command counts them. Then `--kills`
runs are killed (SIGKILL), most at a write point, some of these after half of the bytes, the others at any
time, and `--disk` runs meet a full or failing disk at a write point. After each fault

- every file under a final name is whole, every package that was there before is readable, and a document of
  counterfactuals describes the images beside it (the old ones until the new ones are complete),
- the same command, with `--resume` for `train`, ends with the same files, byte for byte except durations, and
  nothing left over.

The processes are those of `tools.fault_injection`. To continue a run that `--seconds` cut short, use another
`--seed` with the same `--json`: the same seed would repeat its faults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools import harness


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended: `returncode` (-9 when killed), its output, and its write points."""

    returncode: int
    said: str
    points: list[tuple[str, str]]  # (call, path below the root)
    seconds: float


class Forks:
    """The forking process; a context manager."""

    def __init__(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="faults-"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "300"}
        environment.pop("RATIOCTL_DEBUG", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.fault_injection"],
            cwd=harness.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def start(
        self,
        args: Sequence[str],
        root: Path,
        fault: Mapping[str, Any] | None = None,
    ) -> int:
        """Start `ratioctl ARGS` in `root` and return its process id."""
        assert self.process.stdin is not None
        order = {
            "args": list(args),
            "root": str(root),
            "fault": dict(fault or {}),
            "log": str(self.scratch / "log"),
            "trace": str(self.scratch / "trace"),
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._answer()["pid"])

    def end(self) -> Ended:
        """Wait for the started process."""
        answer = self._answer()
        trace = (self.scratch / "trace").read_text(encoding="utf-8", errors="replace")
        return Ended(
            returncode=answer["returncode"],
            said=(self.scratch / "log").read_text(encoding="utf-8", errors="replace"),
            points=[
                (parts[1], parts[2]) for line in trace.splitlines() if len(parts := line.split(" ", 2)) == 3
            ],
            seconds=answer["seconds"],
        )

    def run(self, *args: Any, **options: Any) -> Ended:
        """Start a command and wait for it."""
        self.start(*args, **options)
        return self.end()

    def killed_after(self, seconds: float, args: Sequence[str], root: Path) -> Ended:
        """Run the command and kill it after `seconds`."""
        pid = self.start(args, root)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.end()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the forking process has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A command and the content of the folder in which it runs.

    Attributes:
        again: what a user types after a fault.
        packages: packages below the folder that stay readable at every moment.
        changing: packages that exist only after the command.
        answers: folders that hold complete counterfactuals, old or new, at every moment.
    """

    name: str
    start: Path
    args: tuple[str, ...]
    again: tuple[str, ...]
    packages: tuple[str, ...] = ()
    changing: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


TINY = (
    "--set=model.width=4",
    "--set=optim.epochs=0.2",
    "--set=optim.batch_size=32",
    "--set=optim.batch_size_out=16",
    "--set=optim.validate_every=0.08",
    "--set=optim.validate_images=16",
    '--set=data.outside="noise:uniform"',
    '--set=data.outside_test="noise:uniform"',
    "--set=objective.inside.attack.steps=1",
    "--set=objective.outside.attack.steps=1",
)


def cases(forks: Forks, folder: Path) -> dict[str, Case]:
    """The five commands that write users' files, on the smallest models and data that cover everything."""
    from PIL import Image
    from sklearn.datasets import load_digits

    empty, model, photos, answered = (folder / name for name in ("empty", "model", "photos", "answered"))
    for path in (empty, model, photos):
        path.mkdir(parents=True)
    quiet = ("-q", "--device", "cpu")
    train = ("train", "digits-ratio", *TINY, "--out", "run", *quiet)
    done = forks.run(train, model)
    assert done.returncode == 0, done.said
    os.rename(model / "run" / "package", model / "net")
    shutil.rmtree(model / "run")
    for k, image in enumerate(load_digits().images[:2]):
        Image.fromarray((image * 15.9375).astype("uint8")).save(photos / f"digit {k}.png")
    shutil.copytree(model / "net", photos / "net")
    evaluate = ("evaluate", "net", "--data", "digits:test", "--limit", "6", "--ood", "noise=noise:uniform")
    evaluate += ("--write", "--out", "report", "--precision", "fp32", *quiet)
    calibrate = ("calibrate", "net", "--data", "digits:test", "--objective", "nll", *quiet)
    search = ("--model", "net", "--steps", "5", "--out", "answers", *quiet)
    ask = ("counterfactual", "digit 0.png", "digit 1.png", "--target", "3,8", "--eps", "0.5,1", *search)
    first = [{"3,8": "8,1", "0.5,1": "0.5,2"}.get(part, part) for part in ask]
    shutil.copytree(photos, answered)
    done = forks.run([*first, "--format", "gif"], answered)
    assert done.returncode == 0, done.said
    again = "counterfactual over earlier ones"
    net: dict[str, Any] = {"packages": ("net",)}
    every = (
        Case(name="train", start=empty, args=train, again=(*train, "--resume"), changing=("run/package",)),
        Case(name="evaluate", start=model, args=evaluate, again=evaluate, **net),
        Case(name="calibrate", start=model, args=calibrate, again=calibrate, **net),
        Case(name="export", start=model, args=("export", "net", "-q"), again=("export", "net", "-q"), **net),
        Case(name="counterfactual", start=photos, args=ask, again=ask, **net),
        Case(name=again, start=answered, args=ask, again=ask, answers=("answers",), **net),
    )
    return {case.name: case for case in every}


def half_written(root: Path, case: Case) -> list[str]:
    """Files under a final name that are not whole; empty when nothing is lost."""
    import numpy as np
    import onnx
    from PIL import Image

    from ratioctl import package
    from ratioctl.errors import PackageError
    from ratioctl.report import counterfactual_files as report

    found = []
    for name in case.answers:
        places = [root / name / report.DOCUMENT, root / name / report.COMPLETE / report.DOCUMENT]
        if not any(place.exists() for place in places):
            found.append(f"{name}: neither the old answers nor the new ones")
    for name in (*case.packages, *case.changing):
        if name in case.packages or (root / name).exists():
            try:
                package.read_weights(package.read(root / name))
            except PackageError as error:
                found.append(str(error))
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not _temporary(p.relative_to(root))):
        try:
            data = path.read_bytes()
            if path.suffix == ".json":
                document = json.loads(data)
                for name in document.get("files", {}) if path.name == "state.json" else ():
                    package.parse_weights((path.parent / name).read_bytes(), name)
                if path.name == report.DOCUMENT and path.parent.name != report.COMPLETE:
                    found += mixed(path)
            elif path.suffix == ".jsonl":
                assert not data or data.endswith(b"\n"), "ends within a line"
                [json.loads(line) for line in data.splitlines()]
            elif path.suffix == ".png":
                with Image.open(path) as image:
                    image.load()
            elif path.suffix == ".npz":
                with np.load(path) as arrays:
                    [arrays[name] for name in arrays.files]
            elif path.suffix == ".safetensors":
                package.parse_weights(data, path)
            elif path.suffix == ".onnx":
                onnx.checker.check_model(onnx.load(path))
            elif path.suffix == ".html":
                assert data.rstrip().endswith(b"</html>"), "has no end"
            elif path.suffix == ".parquet":
                import pyarrow.parquet

                pyarrow.parquet.read_table(io.BytesIO(data))
        except Exception as error:
            found.append(f"{path.relative_to(root)}: {type(error).__name__}: {error}")
    return found


def mixed(document: Path) -> list[str]:
    """Images that are not those of the document of counterfactuals, judged by their distances."""
    import numpy as np
    from PIL import Image

    def pixels(name: str) -> Any:
        with Image.open(document.parent / name) as image:
            return np.asarray(image, np.float64) / 255

    found = []
    for image in json.loads(document.read_bytes())["images"]:
        original = pixels(image["input_png"])
        for budget in (budget for target in image["targets"] for budget in target["budgets"]):
            distance = np.linalg.norm(pixels(budget["png"]) - original)
            if abs(distance - budget["distance"]["l2"]) > 1e-6:
                found.append(f"{budget['png']} is not the image that {document.name} describes")
    return found


def _temporary(path: Path) -> bool:
    return path.name.endswith(".tmp~") or any(part.endswith(".partial") for part in path.parts)


def content(root: Path) -> dict[str, bytes]:
    """Every file below `root` by name, without durations and without caches of interrupted runs."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = str(path.relative_to(root))
        if ".result-cache" not in path.parts:
            found[name] = _timeless(name, path.read_bytes())
    return found


def _timeless(name: str, data: bytes) -> bytes:
    if name.endswith((".json", ".jsonl")):
        return re.sub(rb'"(duration_s|seconds)": [0-9.e+-]+', rb'"\1": 0', data)
    return data


def differences(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Names of the files that differ or that one of two folders lacks."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """An uninterrupted run of a case: its write points, duration, result and start."""

    case: Case
    points: list[tuple[str, str]]
    seconds: float
    result: dict[str, bytes]
    before: dict[str, bytes]


def reference(forks: Forks, case: Case, folder: Path) -> Reference:
    """Run a case without a fault in a new `folder`."""
    before = content(fresh(case, folder))
    done = forks.run(case.args, folder)
    assert done.returncode == 0, done.said
    assert half_written(folder, case) == []
    return Reference(
        case=case, points=done.points, seconds=done.seconds, result=content(folder), before=before
    )


def fresh(case: Case, folder: Path) -> Path:
    """Copy the start of a case to `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(case.start, folder)
    return folder


def outcome(forks: Forks, known: Reference, folder: Path, ended: Ended, expected: Sequence[int]) -> list[str]:
    """What a fault has broken, now and after the command was repeated."""
    found = half_written(folder, known.case)
    if ended.returncode not in expected:
        found.append(f"ended with {ended.returncode}: {ended.said[-500:]}")
    if "Traceback" in ended.said or "internal error" in ended.said:
        found.append(f"said: {ended.said[-500:]}")
    again = forks.run(known.case.again, folder)
    if again.returncode != 0:
        return [*found, f"again: ended with {again.returncode}: {again.said[-500:]}"]
    return found + [f"again: {name} differs" for name in differences(content(folder), known.result)]


def kills(known: Reference, count: int, generator: random.Random) -> Iterator[dict[str, Any]]:
    """`count` kills: three quarters at write points, evenly spread, some writes torn; the rest any time."""
    timed = count // 4
    for number in range(count - timed):
        low, high = (len(known.points) * (number + d) // (count - timed) for d in (0, 1))
        at = generator.randrange(low, max(high, low + 1)) + 1
        call, where = known.points[at - 1]
        kind = "torn" if call == "write" and number % 2 == 0 else "kill"
        yield {"kind": kind, "at": at, "call": call, "where": where}
    for number in range(timed):
        yield {"kind": "any time", "after_s": known.seconds * (number + generator.random()) / timed}


def disk_faults(known: Reference, count: int, generator: random.Random) -> Iterator[dict[str, Any]]:
    """`count` disk faults at write points: full, over quota, failing once, failing for good."""
    kinds = itertools.cycle(
        [("ENOSPC", False), ("EDQUOT", False), ("EIO", True), ("ENOSPC", True), ("EIO", False)]
    )
    needing = [k for k, (call, _) in enumerate(known.points, 1) if call in ("open", "write", "mkdir", "link")]
    for number in range(count):
        low, high = (len(needing) * (number + d) // count for d in (0, 1))
        at = needing[generator.randrange(low, max(high, low + 1))]
        kind, once = next(kinds)
        call, where = known.points[at - 1]
        yield {"kind": kind, "at": at, "once": once, "call": call, "where": where}


def suffer(forks: Forks, known: Reference, folder: Path, fault: Mapping[str, Any]) -> list[str]:
    """Run a case with one fault; returns what it broke."""
    fresh(known.case, folder)
    if fault["kind"] == "any time":
        ended = forks.killed_after(fault["after_s"], known.case.args, folder)
        return outcome(forks, known, folder, ended, (-9, 0))
    ended = forks.run(known.case.args, folder, fault)
    if not fault["kind"].startswith("E"):
        return outcome(forks, known, folder, ended, (-9,))
    # A fault while cleaning up after the change is harmless, and the command ends with 0.
    return outcome(forks, known, folder, ended, (0, 6))


def added(earlier: Any, now: Any) -> Any:
    """Figures of several runs: counts, lists and seconds are added, the rest is that of this run."""
    if isinstance(now, Mapping) and isinstance(earlier, Mapping):
        both = {key: added(earlier[key], value) for key, value in now.items() if key in earlier}
        both |= {key: value for key, value in earlier.items() if key not in now}
        points = {"write points": now["write points"]} if "write points" in now else {}
        return {**now, **both, **points}
    if isinstance(now, list | int | float) and isinstance(earlier, list | int | float):
        return earlier + now  # type: ignore[operator]
    return now


def planned(
    known: Sequence[Reference], family: str, total: int, generator: random.Random
) -> list[tuple[Reference, dict[str, Any]]]:
    """`total` faults of one family, evenly over the commands, shuffled so that a run can end early."""
    faults = {"kills": kills, "disk faults": disk_faults}[family]
    plan = []
    for k, one in enumerate(known):
        mine = (total * (k + 1)) // len(known) - (total * k) // len(known)
        plan += [(one, fault) for fault in faults(one, mine, generator)]
    generator.shuffle(plan)
    return plan


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--disk", type=int, default=50, help="faults of the disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no fault after this time")
    options = parser.parse_args()
    generator, began = random.Random(options.seed), time.perf_counter()
    figures: dict[str, Any] = {"benchmark": "faults: killed and starved at write points"}
    broken: list[dict[str, Any]] = []
    with Forks() as forks, tempfile.TemporaryDirectory(prefix="faults-cases-") as scratch:
        root = Path(scratch)
        chosen = [c for c in cases(forks, root / "start").values() if options.only in (None, c.name)]
        known = [reference(forks, case, root / "reference" / case.name) for case in chosen]
        figures["write points"] = {one.case.name: len(one.points) for one in known}
        for family, total in (("kills", options.kills), ("disk faults", options.disk)):
            rows: dict[str, Any] = {
                one.case.name: {"faults": 0, "survived": 0, "kinds": Counter()} for one in known
            }
            for one, fault in planned(known, family, total, generator):
                if time.perf_counter() - began > options.seconds:
                    break
                lost = suffer(forks, one, root / "work", fault)
                row = rows[one.case.name]
                row["faults"] += 1
                row["survived"] += not lost
                row["kinds"][fault["kind"]] += 1
                if lost:
                    broken.append({"command": one.case.name, **fault, "lost": lost})
                    print(f"{one.case.name} {fault}: {lost}", file=sys.stderr)
            count = {key: sum(row[key] for row in rows.values()) for key in ("faults", "survived")}
            print(f"{family}: {count['survived']} of {count['faults']} survived", file=sys.stderr)
            figures[family] = {**rows, "all": count}
    figures |= {"broken": broken, "seeds": [options.seed], "seconds": time.perf_counter() - began}
    if options.json is not None and options.json.exists():
        figures = added(json.loads(options.json.read_bytes()), figures)
    harness.finish(figures, options)
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
