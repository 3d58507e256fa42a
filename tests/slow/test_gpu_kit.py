"""`tools/gpu`, rehearsed on the CPU: data packed, sent and joined; training and measuring by its script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratioctl import package

ROOT = Path(__file__).parents[2]
KIT = ROOT / "tools" / "gpu"

RECIPE = """
base = "digits-ratio"
name = "rehearsal"
[data]
train = "$DATA/data:train"
outside = ["$DATA/data:other"]
outside_test = []
size = 8
channels = 3
validation = 0.3
[data.augment]
crop = 1
[model]
width = 2
[objective.inside.attack]
steps = 1
[objective.outside.attack]
steps = 1
[optim]
epochs = 5
batch_size = 8
batch_size_out = 4
validate_images = 8
validate_every = 2
"""


def images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(list(f"{folder.parent.name}/{folder.name}".encode()))
    folder.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number, label in enumerate(("cat", "dog", "frog", "horse")):
        images(tmp_path / "data" / "train" / label, 10 + number)
        images(tmp_path / "data" / "test" / label, 3)
    images(tmp_path / "data" / "other" / "any", 12)
    return tmp_path / "data"


def tree(at: Path) -> Path:
    """A small repository with the kit and a model."""
    shutil.copytree(KIT, at / "tools" / "gpu", ignore=shutil.ignore_patterns("__pycache__"))
    (at / "assets" / "models" / "one").mkdir(parents=True)
    (at / "assets" / "models" / "one" / "model.safetensors").write_bytes(os.urandom(2**20))
    (at / ".gitignore").write_text("build/\n")
    subprocess.run(["git", "init", "-q", str(at)], check=True)
    return at


@pytest.mark.slow
def test_data_travel_in_parts_and_models_stay(tmp_path: Path, data: Path) -> None:
    here, there = tree(tmp_path / "here"), tree(tmp_path / "there")
    big = tmp_path / "archive.tar"
    big.write_bytes(os.urandom(1_000_000))
    send = (
        f"test ! -e assets/models && test $(cat build/gpu/transfer/part-* | wc -c) -lt 500000 && "
        f"mkdir -p {there}/build/gpu && rm -rf {there}/build/gpu/transfer && "
        f"cp -r build/gpu/transfer {there}/build/gpu/ && "
        f"STATE={tmp_path}/state {there}/tools/gpu/run.sh collect"
    )
    line = [str(here / "tools/gpu/pack.sh"), "--limit", "512KiB", "--send", send, str(big), str(data)]
    subprocess.run(line, check=True, timeout=50)
    arrived = tmp_path / "state" / "data"
    assert (arrived / "archive.tar").read_bytes() == big.read_bytes()
    assert sorted(p.name for p in (arrived / "data/train").iterdir()) == ["cat", "dog", "frog", "horse"]
    assert (here / "assets/models/one/model.safetensors").stat().st_size == 2**20

    failing = subprocess.run([*line[:4], "exit 7", *line[5:]], check=False)
    assert failing.returncode == 7
    assert (here / "assets/models/one/model.safetensors").is_file()
    assert not (here / "build/gpu/transfer").exists()

    printed = subprocess.run([*line[:3], *line[5:]], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines()[0].startswith("tools/gpu/pack.sh stage 0")
    assert printed.splitlines()[-1] == "tools/gpu/pack.sh restore"
    small = subprocess.run([*line[:2], "20KiB", str(big)], check=False, capture_output=True, text=True)
    assert small.returncode == 2
    assert "the working tree alone" in small.stderr


@pytest.mark.slow
def test_the_run_is_rehearsed_on_a_cpu(tmp_path: Path, data: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    state, out = tmp_path / "state", tmp_path / "out"
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "STATE": str(state),
        "OUT": str(out),
        "DATA": str(data.parent),
        "RECIPE": str(tmp_path / "recipe.toml"),
        "TRAIN_TIME": "10m",
        "SMOKE_OPTIONS": "--set optim.epochs=1",
        "TEST": f"{data}:test",
        "IMAGES": "4",
        "PIECE": "2",
        "WIDTH": "2",
        "BATCHES": "2",
        "MEASURE_SECONDS": "0.01",
        "BENCHMARK_OPTIONS": "--batch 2 --images 16 --in-steps 1 --out-steps 1 --rounds 1",
        "COUNTERFACTUAL_OPTIONS": "--targets cat,dog --steps 2 --rounds 1",
        "DEVICE": "cpu",
        "PART_BYTES": "20K",
        "EVERY": "1",
    }
    stages = ["smoke", "throughput", "train", "weights", "attack", "benchmarks"]
    ended = subprocess.run(
        [str(KIT / "run.sh"), *stages], env=environment, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    made = package.read(state / "run/package")
    assert made.config["ratio"]["provenance"]["max_time"]["seconds"] == 600
    joined = tmp_path / "joined"
    shutil.copytree(out / "weights", joined)
    subprocess.run(["sh", "join.sh"], cwd=joined, check=True)
    halved = package.read(joined / "package")
    assert package.stored_as(halved.weights_path) == "fp16"
    assert max(path.stat().st_size for path in (out / "weights").iterdir()) <= 20 * 1024
    rows = json.loads((out / "throughput.json").read_text())["rows"]
    assert {(row["pass"], row["precision"]) for row in rows} == {
        (name, precision) for name in ("attack, eager", "train, eager") for precision in ("fp32", "bf16")
    }
    verdicts = json.loads((out / "autoattack.json").read_text())
    assert verdicts["images"] == 4
    assert verdicts["model_digest"] == halved.digest
    assert {"floor", "ours"} <= json.loads((out / "training.json").read_text())["seconds"].keys()
    assert (out / "counterfactual.json").is_file()
    assert "max_time" in (out / "metrics.jsonl").read_text()
    assert (out / "log").read_text().count(": done after") == len(stages)


def test_wheels_are_those_that_a_machine_with_torch_lacks() -> None:
    line = [sys.executable, "-m", "tools.gpu.wheels", "--list"]
    listed = subprocess.run(line, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    names = {wheel.split("==")[0] for wheel in listed}
    assert {"pydantic", "pydantic-core", "pyautoattack", "typer", "safetensors", "tomli-w", "scipy"} <= names
    assert not names & {"torch", "torchvision", "numpy", "pillow", "onnxruntime", "pyarrow", "sympy"}
    assert not any(name.startswith("nvidia") for name in names)
