"""What is installed from a wheel works in another folder: recipes, assets and model are inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ONNX = "ratioctl/assets/models/cifar10-ratio/model.onnx"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    assert path.stat().st_size < 80_000_000
    return path


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The unpacked wheel."""
    target = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(site: Path, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ratioctl", *arguments],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_recipes_and_models_travel(site: Path, tmp_path: Path) -> None:
    assert (site / "ratioctl/recipes/digits-ratio.toml").is_file()
    assert sorted(path.name for path in (site / "ratioctl/assets").iterdir()) == ["models", "samples"]
    listed = run(site, tmp_path, "models", "--json")
    assert listed.returncode == 0, listed.stderr
    inspected = run(site, tmp_path, "inspect", "cifar10-ratio", "--json")
    assert str(site) in json.loads(inspected.stdout)["path"]
    assert run(site, tmp_path, "verify", "cifar10-ratio").returncode == 0
    unknown = run(site, tmp_path, "train", "digits-ratoi")
    assert unknown.returncode == 2
    assert "digits-ratio" in unknown.stderr


def test_a_counterfactual_from_the_wheel(site: Path, tmp_path: Path) -> None:
    photo = site / "ratioctl/assets/samples/kitten.jpg"
    done = run(
        site,
        tmp_path,
        "counterfactual",
        str(photo),
        "--target",
        "dog",
        "--eps",
        "1",
        "--steps",
        "3",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    png = answer["images"][0]["targets"][0]["budgets"][0]["png"]
    assert (tmp_path / "counterfactuals" / png).is_file()


def test_the_wheel_ships_its_types(site: Path) -> None:
    assert (site / "ratioctl/py.typed").is_file()


@pytest.fixture(scope="module")
def light(wheel: Path) -> Path:
    """The interpreter of a fresh environment with the wheel and what it depends on, without extras."""
    folder = wheel.parent / "light"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    line = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        if os.environ.get("CI"):
            pytest.fail(done.stderr)
        pytest.skip("the dependencies cannot be installed: " + done.stderr.strip()[-200:])
    return python


def lightly(python: Path, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(python), *arguments], cwd=where, env=environment, capture_output=True, text=True, check=False
    )


def test_the_light_installation_scores_photographs(light: Path, tmp_path: Path) -> None:
    (packages,) = (light.parent.parent / "lib").glob("python*/site-packages")
    names = {path.name for path in packages.iterdir()}
    assert not names & {"torch", "torchvision", "onnx", "pyarrow", "sklearn", "scipy", "matplotlib"}
    counted = [path for path in packages.iterdir() if not path.name.startswith(("pip", "setuptools"))]
    size = sum(file.stat().st_size for path in counted for file in [path, *path.rglob("*")] if file.is_file())
    assert size < 300e6
    samples = packages / "ratioctl" / "assets" / "samples"

    for command in (["models"], ["inspect"], ["verify"], ["inspect", str(packages / ONNX)]):
        done = lightly(light, tmp_path, "-m", "ratioctl", *command, "--json")
        assert done.returncode == 0, done.stderr
    line = ["ood-score", str(samples), "--format", "jsonl"]
    done = lightly(light, tmp_path, "-m", "ratioctl", *line)
    assert done.returncode == 0, done.stderr
    rows = {Path(row["path"]).stem: row for row in map(json.loads, done.stdout.splitlines())}
    assert (rows["horse"]["label"], rows["horse"]["is_ood"], rows["rocket"]["is_ood"]) == (
        "horse",
        False,
        True,
    )
    ours = run(ROOT, tmp_path, *line)
    for here in map(json.loads, ours.stdout.splitlines()):
        assert rows[Path(here["path"]).stem]["confidence"] == pytest.approx(here["confidence"], abs=1e-6)


def test_the_light_installation_explains_with_an_onnx_file(light: Path, tmp_path: Path) -> None:
    done = run(ROOT, tmp_path, "export", "--explain")
    assert done.returncode == 0, done.stderr
    (packages,) = (light.parent.parent / "lib").glob("python*/site-packages")
    photo = str(packages / "ratioctl/assets/samples/cat.jpg")
    line = ["counterfactual", photo, "--target", "dog", "--model", "explain.onnx", "--steps", "20"]
    done = lightly(light, tmp_path, "-m", "ratioctl", *line)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "counterfactuals" / "counterfactuals.json").read_text())
    assert document["images"][0]["targets"][0]["budgets"][-1]["confidence"] > 0.95
    assert (tmp_path / "counterfactuals" / "index.html").is_file()


def test_the_light_installation_names_the_full_one(light: Path, tmp_path: Path) -> None:
    (packages,) = (light.parent.parent / "lib").glob("python*/site-packages")
    photo = str(packages / "ratioctl/assets/samples/cat.jpg")
    for line in (
        ["train", "digits-ratio"],
        ["calibrate", "--out", "calibrated"],
        ["evaluate", "--data", "digits"],
        ["export"],
        ["counterfactual", photo, "--target", "dog"],
        ["ood-score", photo, "--worst-case", "0.5"],
        ["ood-score", photo, "--model", "cifar10-plain"],
        ["ood-score", photo, "--output", "rows.parquet"],
    ):
        done = lightly(light, tmp_path, "-m", "ratioctl", *line)
        assert done.returncode == 2, (line, done.stderr)
        assert done.stderr.rstrip().endswith('pip install "ratioctl[torch]"')
