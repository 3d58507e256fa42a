"""`torchrun -m ratioctl train`: killed and interrupted processes, restarts, other numbers of processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ratioctl import package as packages
from tests.processes import ROOT
from tests.training.test_distributed import TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc"),
]
# Long enough to be interrupted: about 120 updates, a checkpoint every 6.
LONG = [*TINY, "optim.epochs=2", "optim.validate_every=0.1"]


def line(out: Path, processes: int, *options: str, settings: list[str] = LONG) -> list[str]:
    sets = [part for setting in settings for part in ("--set", setting)]
    train = ["-m", "ratioctl", "train", "digits-ratio", "--out", str(out), "--device", "cpu", *sets]
    if processes == 1:
        return [sys.executable, *train, *options]
    own = [option for option in options if option.startswith("--max-restarts")]
    rest = [option for option in options if option not in own]
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--standalone", *own),
        *train,
        *rest,
    ]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(agent: int) -> list[int]:
    """Process ids of the workers of torchrun, by rank."""
    found = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        values = dict(v.split(b"=", 1) for v in variables if b"=" in v)
        if b"RANK" in values:
            found[int(values[b"RANK"])] = int(child)
    return [found[rank] for rank in sorted(found)]


def wait_for_checkpoint(out: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not (out / "checkpoint" / "state.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


def updates(out: Path) -> int:
    found: int = json.loads((out / "checkpoint" / "state.json").read_text())["update"]
    return found


def finished(out: Path) -> bool:
    package = packages.read(out / "package")
    return package.calibrated and package.config["ratio"]["provenance"]["updates"] == updates(out)


def test_a_killed_process_ends_the_job_and_any_number_of_processes_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = start(line(out, 2))
    wait_for_checkpoint(out, job)
    victim = workers(job.pid)[1]
    os.kill(victim, signal.SIGKILL)
    said, complaints = job.communicate(timeout=120)
    assert job.returncode != 0
    assert f"Error: rank 1 (process {victim} on " in complaints
    assert "ended during the run" in complaints
    assert f"{out} keeps the last checkpoint: start torchrun again, with --resume." in complaints
    assert complaints.count("Error: rank") == 1
    assert not (out / "package").exists()
    before = updates(out)
    for processes in (3, 1):
        job = start(line(out, processes, "--resume"))
        if processes == 3:
            while updates(out) == before:
                assert job.poll() is None, job.communicate()
                time.sleep(0.1)
            os.kill(job.pid, signal.SIGTERM)
            _, complaints = job.communicate(timeout=120)
            assert complaints.count("Interrupted: ") == 1, complaints
            assert "Continue with torchrun and: -m ratioctl train digits-ratio" in complaints
            assert before < updates(out) < 120
        else:
            said, complaints = job.communicate(timeout=300)
            assert job.returncode == 0, complaints
            assert said.count("Package: ") == 1
    assert finished(out)
    rows = [json.loads(row)["update"] for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows))


def test_a_restart_by_torchrun_continues_by_itself(tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = start(line(out, 2, "--max-restarts=1"))
    wait_for_checkpoint(out, job)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    said, complaints = job.communicate(timeout=300)
    assert job.returncode == 0, complaints
    assert said.count("Package: ") == 1
    assert finished(out)


def test_a_recipe_that_differs_is_named_once(tmp_path: Path) -> None:
    from tests import processes

    def arguments(rate: float) -> list[str]:
        return line(tmp_path / "run", 1, settings=[*TINY, f"optim.lr={rate}"])[1:]

    ended = processes.finish(processes.start([arguments(0.1), arguments(0.2)]))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "rank 1 (process " in ended[0][2]
    assert "has another recipe than rank 0; different: optim.lr." in ended[0][2]
    assert ended[1][2] == ""
    assert not (tmp_path / "run").exists()
