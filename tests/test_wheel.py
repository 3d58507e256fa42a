"""What is installed from a wheel works in another folder: recipes, assets and model are inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    assert wheel.stat().st_size < 30_000_000
    target = out / "site"
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
