"""Real processes, real signals, real disks that are full, closed, slow or gone: nothing is lost.

`tools/faults.py` does a hundred kills; here are fifteen, and what that script does not do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ratioctl import package
from ratioctl.utils import atomic_files as files
from tools import faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc"),
]


@pytest.fixture(scope="module")
def forks() -> Iterator[Any]:
    with faults.Forks() as running:
        yield running


@pytest.fixture(scope="module")
def cases(forks: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = faults.cases(forks, tmp_path_factory.mktemp("cases"))
    return found


@pytest.fixture(scope="module")
def known(forks: Any, cases: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a command to its uninterrupted run, done once."""
    done: dict[str, Any] = {}

    def reference(name: str) -> Any:
        if name not in done:
            done[name] = faults.reference(forks, cases[name], tmp_path_factory.mktemp("reference") / "work")
        return done[name]

    return reference


# --- crashes ------------------------------------------------------------------------------------------------

AGAIN = "counterfactual over earlier ones"
KILLS = {"train": 5, "calibrate": 3, "counterfactual": 2, AGAIN: 3, "evaluate": 1, "export": 1}


@pytest.mark.parametrize("name", KILLS)
def test_killed_anywhere_nothing_is_lost(name: str, forks: Any, known: Any, tmp_path: Path) -> None:
    assert sum(KILLS.values()) == 15
    reference = known(name)
    assert len(reference.points) > 15
    for fault in faults.kills(reference, KILLS[name], random.Random(7)):
        assert faults.suffer(forks, reference, tmp_path / "work", fault) == [], fault


def test_a_line_of_metrics_is_there_whole_or_not_at_all(forks: Any, known: Any, tmp_path: Path) -> None:
    reference = known("train")
    points = enumerate(reference.points, 1)
    *_, at = (k for k, (call, path) in points if call == "write" and "metrics.jsonl" in path)
    assert faults.suffer(forks, reference, tmp_path / "work", {"kind": "torn", "at": at}) == []


def test_the_harness_notices_what_is_lost(forks: Any, known: Any, tmp_path: Path) -> None:
    """Were the tests above blind, this one would fail: each kind of loss is found."""
    reference = known("train")
    folder = tmp_path / "work"
    shutil.copytree(reference.case.start, folder)
    for name, data in reference.result.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    ended = faults.Ended(returncode=-9, said="", points=[], seconds=0.0)
    (folder / "run" / "left.tmp~").touch()
    (folder / "run" / "metrics.jsonl").write_bytes(b'{"update"')
    weights = folder / "run" / "package" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    lost = " ".join(faults.half_written(folder, reference.case))
    assert "SHA-256" in lost
    assert "metrics.jsonl" in lost
    assert "run/left.tmp~" in faults.differences(faults.content(folder), reference.result)
    assert any("ended with -9" in text for text in faults.outcome(forks, reference, folder, ended, (0,)))


def test_the_harness_notices_other_pictures_than_the_document_s(
    cases: dict[str, Any], tmp_path: Path
) -> None:
    case = cases[AGAIN]
    folder = faults.fresh(case, tmp_path / "work")
    assert faults.half_written(folder, case) == []
    answers = folder / "answers"
    targets = [path.parent for path in sorted(answers.rglob("eps-2.png"))]
    pairs = [(target / "eps-2.png", target / "eps-0.5.png") for target in targets]
    shutil.copy(*next(pair for pair in pairs if pair[0].read_bytes() != pair[1].read_bytes()))
    assert any("eps-0.5.png is not the image" in text for text in faults.half_written(folder, case))
    (answers / "counterfactuals.json").unlink()
    assert any("neither the old answers" in text for text in faults.half_written(folder, case))


@pytest.mark.parametrize(
    ("name", "where", "signum"),
    [
        ("train", "state.json", signal.SIGTERM),
        ("train", r"package/\.README", signal.SIGINT),  # calibrating
        ("train", r"\.partial/model", signal.SIGTERM),  # packaging
        ("calibrate", r"config\.json", signal.SIGTERM),
        ("counterfactual", r"digit 1/.*flip|digit 1/3", signal.SIGINT),
        ("export", r"model", signal.SIGINT),
        ("evaluate", r"\.result-cache", signal.SIGTERM),
    ],
)
def test_signals_save_and_say_how_to_go_on(
    name: str, where: str, signum: int, forks: Any, known: Any, tmp_path: Path
) -> None:
    reference = known(name)
    points = enumerate(reference.points, 1)
    at = next(k for k, (call, path) in points if call == "write" and re.search(where, path))
    folder = faults.fresh(reference.case, tmp_path / "work")
    ended = forks.run(reference.case.args, folder, {"kind": "signal", "signum": int(signum), "at": at})
    assert ended.returncode == 128 + signum, ended.said
    assert faults.half_written(folder, reference.case) == []
    assert not list(folder.rglob("*.tmp~"))
    assert not list(folder.rglob(".lock"))
    line = re.search(r"(Continue|Start again) with: (.*)", ended.said)
    assert line is not None, ended.said
    assert (line[1] == "Continue") == (name in ("train", "evaluate"))
    assert line[2].startswith(f"ratioctl {name} ")
    assert ("--resume" in line[2]) == (name == "train")
    again = shlex.split(line[2])[1:]
    done = forks.run(again, folder)
    assert done.returncode == 0, done.said
    assert faults.differences(faults.content(folder), reference.result) == []


# --- disk ---------------------------------------------------------------------------------------------------


def test_an_interrupted_rerun_leaves_the_earlier_answers(forks: Any, known: Any, tmp_path: Path) -> None:
    reference = known(AGAIN)
    points = enumerate(reference.points, 1)
    at = next(k for k, (call, path) in points if call == "write" and "digit 1/" in path)
    folder = faults.fresh(reference.case, tmp_path / "work")
    ended = forks.run(reference.case.args, folder, {"kind": "signal", "signum": 15, "at": at})
    assert ended.returncode == 143, ended.said
    assert "The earlier results in answers are unchanged." in ended.said
    there = faults.content(folder)
    assert {name: there.get(name) for name in reference.before} == reference.before
    if saved := re.search(r"They are in (\S+)\.", ended.said):
        assert (folder / saved[1]).is_file()
    shutil.rmtree(folder / "answers" / ".interrupted", ignore_errors=True)
    assert forks.run(reference.case.again, folder).returncode == 0
    assert faults.differences(faults.content(folder), reference.result) == []


@pytest.mark.parametrize("name", ["train", "calibrate", "counterfactual", AGAIN])
def test_a_disk_that_fails_at_some_point(name: str, forks: Any, known: Any, tmp_path: Path) -> None:
    """Full, over quota, failing, in the middle of a write: exit code 6, and the same command afterwards."""
    reference = known(name)
    for fault in faults.disk_faults(reference, 3, random.Random(3)):
        assert faults.suffer(forks, reference, tmp_path / "work", fault) == [], fault


@pytest.mark.parametrize(("name", "most"), [("train", 100_000), (AGAIN, 20_000)])
def test_a_quota_that_cuts_a_write_short(
    name: str, most: int, forks: Any, known: Any, tmp_path: Path
) -> None:
    """The system itself takes a part of a write and refuses the rest (RLIMIT_FSIZE)."""
    reference = known(name)
    assert max(map(len, reference.result.values())) > most
    folder = faults.fresh(reference.case, tmp_path / "work")
    ended = forks.run(reference.case.args, folder, {"kind": "quota", "bytes": most})
    assert ended.returncode == 6, ended.said
    assert "file too large" in ended.said
    assert "Free some space" in ended.said
    assert faults.half_written(folder, reference.case) == []
    there = faults.content(folder)
    assert {path: there.get(path) for path in reference.before} == reference.before
    assert not [path for path in folder.rglob("*") if faults._temporary(path.relative_to(folder))]
    again = reference.case.again if (folder / "run" / "checkpoint").exists() else reference.case.args
    assert forks.run(again, folder).returncode == 0
    assert faults.differences(faults.content(folder), reference.result) == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of that size; skips where mounting is not allowed."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes every byte that is left."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    return path


def test_training_on_a_disk_that_fills_up(forks: Any, known: Any, tmp_path: Path) -> None:
    reference = known("train")
    need = sum(len(data) for name, data in reference.result.items() if "checkpoint" in name)
    with small_disk(tmp_path / "disk", str(int(1.6 * need))) as disk:  # one checkpoint, but not two
        ended = forks.run(reference.case.args, disk)
        assert ended.returncode == 6, ended.said
        assert "no space left on device" in ended.said
        assert "Free some space" in ended.said
        assert "Continue with: ratioctl train" in ended.said
        assert (disk / "run" / "checkpoint" / "state.json").is_file(), "the first checkpoint had room"
        assert faults.half_written(disk, reference.case) == []
        remount(disk, "size=64m")
        again = forks.run(reference.case.again, disk)
        assert again.returncode == 0, again.said
        assert faults.differences(faults.content(disk), reference.result) == []


@pytest.mark.parametrize("state", ["full", "closed"])
def test_a_full_and_a_closed_disk_keep_what_is_there(
    state: str, forks: Any, cases: Any, tmp_path: Path
) -> None:
    """Every command that writes, on a disk without a byte left, and on one that may not be written."""
    case = cases["counterfactual"]
    expected = 6 if state == "full" else 2
    with small_disk(tmp_path / "disk", "8m") as disk:
        shutil.copytree(case.start, disk, dirs_exist_ok=True)
        rows = disk / "rows.csv"
        rows.write_text("path,label,confidence\nprecious\n")
        commands = {
            "train": cases["train"].args,
            "calibrate": cases["calibrate"].args,
            "evaluate": cases["evaluate"].args,
            "counterfactual": case.args,
            "export": ("export", "net", "-q", "--output", "net.onnx"),
            "ood-score": ("ood-score", "digit 0.png", "--model", "net", "--output", "rows.csv", "-q"),
        }
        filler = fill(disk) if state == "full" else None
        before = faults.content(disk)
        if filler is None:
            remount(disk, "ro")
        for name, command in commands.items():
            ended = forks.run(command, disk)
            assert ended.returncode == expected, f"{name}: {ended.said}"
            assert "Traceback" not in ended.said, name
            steps = ("Free some space", "Check the path", "Write somewhere else", "Leave --write out")
            assert any(step in ended.said for step in steps), f"{name}: {ended.said}"
            kept = faults.content(disk)
            lost = [path for path in before if kept.get(path) != before[path]]
            assert lost == [], f"{name}: {ended.said}"
            package.read_weights(package.read(disk / "net"))
        if filler is not None:
            filler.unlink()
        else:
            remount(disk, "rw")
        assert forks.run(commands["ood-score"], disk).returncode == 0
        assert rows.read_text().startswith("path,label") or "path" in rows.read_text().splitlines()[0]


@pytest.mark.parametrize("name", ["train", "evaluate", AGAIN])
def test_a_folder_that_vanishes_under_the_process(name: str, forks: Any, known: Any, tmp_path: Path) -> None:
    reference = known(name)
    folder = faults.fresh(reference.case, tmp_path / "work")
    at = next(k for k, (call, path) in enumerate(reference.points, 1) if call == "write" and k > 20)
    inside = folder / {"train": "run", "evaluate": "report"}.get(name, "answers")
    ended = forks.run(reference.case.args, folder, {"kind": "gone", "at": at, "what": str(inside)})
    assert ended.returncode == 6, ended.said
    assert f"{inside.name}: disappeared while it was being written." in ended.said
    assert not inside.exists(), "what was removed stays removed"
    assert forks.run(reference.case.again, folder).returncode == 0
    assert faults.differences(faults.content(folder), reference.result) == []


@pytest.mark.parametrize("name", ["calibrate", "export"])
@pytest.mark.parametrize("what", ["net", "new"])
def test_a_package_or_the_place_of_a_new_one_that_vanishes(
    name: str, what: str, forks: Any, known: Any, tmp_path: Path
) -> None:
    """At every write of the change: removed stays removed, the package elsewhere stays whole."""
    case = known(name).case
    folder = faults.fresh(case, tmp_path / "work")
    (folder / "new").mkdir()
    beside = ("--out", "new/net") if name == "calibrate" else ("--output", "new/net.onnx")
    args = case.args if what == "net" else (*case.args, *beside)
    before = faults.content(folder)
    points = forks.run(args, folder).points
    after = faults.content(folder)
    assert any(path.startswith(what) for _, path in points)
    writes = [k for k, (call, _) in enumerate(points, 1) if call in ("write", "replace", "rename")]
    assert len(writes) > 1
    for at in sorted({writes[0], writes[len(writes) // 2], writes[-1]}):
        faults.fresh(case, folder)
        (folder / "new").mkdir()
        ended = forks.run(args, folder, {"kind": "gone", "at": at, "what": str(folder / what)})
        assert ended.returncode == 6, ended.said
        assert f"{what}: disappeared while it was being written." in ended.said
        assert "Put it back, or write elsewhere." in ended.said
        there = faults.content(folder)
        assert there == {name: data for name, data in before.items() if not name.startswith(f"{what}/")}
        faults.fresh(case, folder)
        (folder / "new").mkdir()
        assert forks.run(args, folder).returncode == 0
        assert faults.differences(faults.content(folder), after) == []


@pytest.mark.parametrize("name", ["train", "calibrate", "counterfactual", "evaluate", "export"])
def test_a_second_writer_learns_who_is_first(name: str, forks: Any, cases: Any, tmp_path: Path) -> None:
    case = cases[name]
    folder = faults.fresh(case, tmp_path / "work")
    held = folder / {"train": "run", "counterfactual": "answers", "evaluate": "report"}.get(name, "net")
    held.mkdir(exist_ok=True)
    before = faults.content(folder)
    with files.lock(held):
        ended = forks.run(case.args, folder)
    assert ended.returncode == 2, ended.said
    assert f"is being written by process {os.getpid()} " in ended.said
    assert "Wait for it to end" in ended.said
    assert faults.content(folder) == before
    if name == "train":
        assert forks.run(case.args, folder).returncode == 0, "and then it is free"


def test_a_slow_disk_changes_nothing(forks: Any, known: Any, tmp_path: Path) -> None:
    for name in ("train", "counterfactual"):
        reference = known(name)
        folder = faults.fresh(reference.case, tmp_path / name)
        ended = forks.run(reference.case.args, folder, {"kind": "slow", "seconds": 0.02})
        assert ended.returncode == 0, ended.said
        assert faults.differences(faults.content(folder), reference.result) == []


def test_killed_runs_leave_no_heap_of_files(forks: Any, known: Any, tmp_path: Path) -> None:
    """A training that is killed in the same write again and again leaves one temporary at most."""
    reference = known("train")
    folder = faults.fresh(reference.case, tmp_path / "work")
    points = enumerate(reference.points, 1)
    at = next(k for k, (call, path) in points if call == "fsync" and "state-" in path)
    for _ in range(3):
        ended = forks.run(reference.case.args, folder, {"kind": "kill", "at": at})
        assert ended.returncode == -9
        assert len(list(folder.rglob("*.tmp~"))) == 1
    assert json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[0])["update"] > 0
