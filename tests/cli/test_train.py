"""`ratioctl train` and `calibrate` as people type them, mistakes included."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ratioctl import package as packages
from ratioctl.cli import main

TINY = [
    "--set=model.architecture=wideresnet-10-1",
    "--set=model.width=",
    "--set=optim.epochs=0.4",
    "--set=optim.batch_size=32",
    "--set=optim.batch_size_out=16",
    "--set=optim.validate_every=0.1",
    "--set=optim.validate_images=24",
    '--set=data.outside="noise:uniform"',
    "--set=objective.inside.attack.steps=1",
    "--set=objective.outside.attack.steps=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "digits-ratio", *TINY, "--out", str(out), "-q"]) == 0
    return out


def test_a_run_folder_holds_what_is_promised(run: Path) -> None:
    assert (run / "metrics.jsonl").is_file()
    assert (run / "checkpoint/state.json").is_file()
    package = packages.read(run / "package")
    assert package.calibrated
    assert set(package.thresholds) == {"tpr95", "tpr99"}
    files = {path.name for path in (run / "package").iterdir()}
    assert files == {"model.safetensors", "config.json", "recipe.toml", "README.md"}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert {"update", "validation.clean", "validation.attacked"} <= json.loads(line).keys()


def test_json_is_the_only_thing_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "digits-ratio", *TINY, "--set=optim.epochs=0.05", "--out", str(tmp_path), "--json"]
    assert main(line) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["digest"] == packages.read(tmp_path / "package").digest
    assert document["calibration"]["n"] == 216


def test_a_collapsed_training_ends_with_a_warning_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dull = [*TINY, "--set=optim.lr=1e-12", "--set=optim.epochs=0.1", "--out", str(tmp_path)]
    assert main(["train", "digits-ratio", *dull]) == 0
    captured = capsys.readouterr()
    assert captured.err.rstrip().endswith("-" * 78)
    assert "WARNING: this model is no better than chance" in captured.err
    assert "always predicting the most frequent class" in captured.err
    assert "Next:" not in captured.out


def test_the_seed_is_the_recipe_s_unless_given_and_0_is_a_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ratioctl

    short = ["--set=optim.epochs=0.05", "--set=seed=7"]
    for arguments, seed in (([], 7), (["--seed", "0"], 0), (["--seed", "3"], 3)):
        out = tmp_path / str(seed)
        assert main(["train", "digits-ratio", *TINY, *short, *arguments, "--out", str(out), "-q"]) == 0
        assert packages.read(out / "package").config["ratio"]["provenance"]["seed"] == seed
    settings = [setting.removeprefix("--set=") for setting in (*TINY, *short)]
    again = ratioctl.train("digits-ratio", settings=settings, seed=0, out=tmp_path / "again")
    assert again.digest == packages.read(tmp_path / "0" / "package").digest


def test_a_finished_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "package/config.json").read_bytes()
    assert main(["train", "digits-ratio", *TINY, "--out", str(run)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (run / "package/config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["no-such-recipe"], "no such recipe"),
        (["digits-ratoi"], '"digits-ratio"'),
        (["digits-ratio", "--set", "optim.epochz=3"], '"epochs"'),
        (["digits-ratio", "--set", "optim.lr=-1"], "optim.lr"),
        (["digits-ratio", "--set", "optim.lr"], "KEY=VALUE"),
        (["digits-ratio", "--set", "data.train=nowhere/at/all"], "nowhere/at/all"),
        (["digits-ratio", "--set", 'data.outside="nowhere.tar.xz"'], "nowhere.tar.xz"),
        (["digits-ratio", "--set", "objective.inside.attack.ball.p=3"], "1, 1.5, 2, inf"),
        (["digits-ratio", "--set", "objective.inside.attack.ball.p=1.5"], "afw"),
        (["digits-ratio", "--set", 'model.architecture="resnet81"'], "resnet18"),
        (["digits-ratio", "--init", "no-such-model"], "no-such-model"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code = main(["train", *arguments, "--out", str(out)])
    error = capsys.readouterr().err
    assert code == (5 if "--init" in arguments else 2)
    assert told in error
    assert "Traceback" not in error
    assert not out.exists()


def test_class_folders_with_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    (tmp_path / "data/cat").mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (8, 8), (k, 0, 0)).save(tmp_path / f"data/cat/{k}.png")
    arguments = ["digits-plain", "--set", f'data.train="{tmp_path / "data"}"', "--set", "data.channels=3"]
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert "at least two" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main(["train", "digits-ratio", *TINY, "--out", str(tmp_path / "closed/run")]) == 2
    assert "closed" in capsys.readouterr().err


def test_output_under_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["train", "digits-ratio", *TINY, "--out", str(tmp_path / "file/run")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


# Its first checkpoint lasts until the signal has come.
WAITING = """
import signal, sys, time
from ratioctl.cli import main
from ratioctl.training import loop
save = loop.save
def save_and_wait(*arguments):
    save(*arguments)
    loop.save, handler = save, signal.getsignal(signal.SIGTERM)
    while signal.getsignal(signal.SIGTERM) is handler:
        time.sleep(0.01)
loop.save = save_and_wait
sys.exit(main())
"""


def test_a_real_process_stopped_by_a_signal_resumes(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", WAITING, "train", "digits-ratio", *TINY, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 240
    state = out / "checkpoint/state.json"
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 143, error
    line = next(part for part in error.splitlines() if "Continue with: " in part)
    again = shlex.split(line.partition("Continue with: ")[2])
    assert not list(out.rglob("*.tmp~"))
    assert again[0] == "ratioctl"
    assert main([*again[1:], "-q"]) == 0, "the line it printed resumes it"
    assert packages.read(out / "package").digest == packages.read(run / "package").digest


def test_calibrate_again_on_other_data(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "again"
    arguments = ["calibrate", str(run / "package"), "--data", "digits:test", "--out", str(target)]
    assert main([*arguments, "--objective", "nll", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["calibration"]["objective"] == "nll"
    assert document["calibration"]["after"]["nll"] <= document["calibration"]["before"]["nll"]
    assert packages.read(target).temperature == document["temperature"]


def test_calibrate_mistakes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(run / "package"), "--data", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert main(["calibrate", str(run / "nothing")]) == 5
    assert main(["calibrate", str(run / "package"), "--objective", "mse"]) == 2
