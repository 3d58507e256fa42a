"""`ratioctl init` and `ratioctl train PHOTOS`: what is found, what is chosen, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ratioctl import recipe as recipes
from ratioctl.cli import main
from ratioctl.data import in_distribution, proposal, survey
from tests.photographs import CLASSES, photographs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos") / "scenes", 10)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))


def noise(folder: Path, each: dict[str, int], side: int = 20, gray: bool = False, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name, count in each.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (side, side) if gray else (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder


def document(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    assert main(["init", *line, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_folder_without_a_split(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(photos))
    assert set(found["classes"]) == set(CLASSES)
    assert found["next"] == "ratioctl train scenes.toml --init cifar10-ratio-small"
    recipe = recipes.load("scenes.toml")
    data = recipe.data
    assert (data.train, data.test) == (f"split:train:{photos}", f"split:test:{photos}")
    assert (data.size, data.channels, recipe.model.stem_stride) == (64, 3, 2)
    assert f"patches:{data.train}" in data.outside
    inside, outside = recipe.objective.inside, recipe.objective.outside
    assert inside.attack is not None
    assert outside is not None
    assert outside.attack is not None
    assert (inside.attack.ball.eps, outside.attack.ball.eps) == (0.5, 2.0), "0.25 and 1 times 64/32"
    assert main(["init", str(photos)]) == 2, "the recipe is not replaced"
    assert main(["init", str(photos), "--out", "scenes.toml", "--size", "32"]) == 0
    small = recipes.load("scenes.toml")
    assert (small.data.size, small.model.stem_stride) == (32, None), "the size of the start"
    assert small.optim.head_epochs > 0
    Path("mine.toml").write_text("x = 1\n")
    assert main(["init", str(photos), "--out", "mine.toml"]) == 2
    assert Path("mine.toml").read_text() == "x = 1\n"


def test_gray_small_uneven_and_split_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(tmp_path / "xray" / "train", {"healthy": 20, "sick": 5}, gray=True)
    noise(tmp_path / "xray" / "test", {"healthy": 4, "sick": 4}, gray=True, seed=1)
    shutil.copy("xray/train/sick/0.png", "xray/test/sick/copy.png")
    found = document(capsys, "xray", "--outside", "noise:smooth")
    recipe = recipes.load("xray.toml")
    assert (recipe.data.train, recipe.data.test) == ("xray:train", "xray:test")
    assert (recipe.data.size, recipe.data.channels, recipe.data.balance) == (16, 1, "sampling")
    assert recipe.data.outside == ("noise:smooth",)
    assert any("1 of 9 test images duplicate a training image" in text for text in found["findings"])
    assert any("the largest class has 20 images, the smallest 5" in text for text in found["findings"])
    assert any("fewer than 30 training images: healthy (20), sick (5)" in t for t in found["findings"])


def test_wide_photographs_are_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "wide" / name).mkdir(parents=True)
        for k in range(6):
            pixels = np.random.default_rng(k + 10 * (name == "b")).integers(
                0, 256, (40, 90, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(tmp_path / "wide" / name / f"{k}.png")
    document(capsys, "wide")
    assert recipes.load("wide.toml").data.resize == "pad"
    assert "cut away 56% of the median picture" in Path("wide.toml").read_text()


def test_a_library_s_network(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(photos), "--arch", "timm:resnet18", "--size", "32")
    assert found["next"].endswith("--init timm:resnet18 --download")
    assert recipes.load("scenes.toml").model.architecture == "timm:resnet18"


@pytest.mark.parametrize(
    ("each", "says"),
    [
        ({"only": 6}, "has 1 class (only). A classifier needs at least two"),
        ({"many": 6, "one": 1}, "too few images of a class: 'one' has 1"),
        ({"Cat": 6, "cat": 6, "dog": 6}, "'Cat' and 'cat', which differ by case or spaces only"),
        ({"cat": 6, "cat ": 6}, "'cat' and 'cat ', which differ by case or spaces only"),
    ],
)
def test_classes_that_cannot_be_right(
    each: dict[str, int], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(tmp_path / "bad", each)
    assert main(["init", "bad"]) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*.toml"))
    assert main(["train", "bad"]) == 2
    assert not (tmp_path / "runs" / "bad" / "checkpoint").exists()


def test_gray_and_color_are_mixed(tmp_path: Path) -> None:
    noise(tmp_path / "mixed", {"color": 8})
    noise(tmp_path / "gray", {"gray": 8}, gray=True)
    shutil.move(tmp_path / "gray/gray", tmp_path / "mixed/gray")
    found = survey.shapes("mixed")
    assert found.channels == 3
    assert "50% of the images are gray" in found.notes[0]
    assert "100% of gray are gray and 0% of color" in found.notes[1]


def test_sixteen_bit_images_are_mentioned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 4096, (20, 20)).astype(np.uint16)
            Image.fromarray(pixels).save(tmp_path / "deep" / name / f"{k}.png")
    found = survey.shapes("deep")
    assert "8 of 8 images have 16 bits per pixel" in found.notes[0]
    assert "they fill 12 bits only" in found.notes[1]
    assert main(["init", "deep", "--outside", "noise:smooth"]) == 0
    recipe = recipes.load("deep.toml")
    assert recipe.data.bit_depth == 12
    bright = in_distribution.load("deep", recipe.data.frame, 1).pixels
    dark = in_distribution.load("deep", recipe.data.frame.height, 1).pixels
    assert bright.max() > 200 > 20 > dark.max()
    Image.fromarray(np.full((20, 20), 60000, np.uint16)).save("deep/a/full.png")
    mixed = survey.shapes("deep")
    assert mixed.bit_depth is None
    assert "8 of them fill fewer bits and look nearly black" in mixed.notes[1]


def test_an_out_distribution_that_contains_the_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise(tmp_path / "in", {"cat": 6, "dog": 6})
    noise(tmp_path / "out", {"CAT": 3, "rock": 5}, seed=1)
    shutil.copy("in/dog/0.png", "out/rock/dog.png")
    found = document(capsys, "in", "--outside", "out")
    assert any("folders with the names of classes (CAT)" in text for text in found["findings"])
    assert any("near duplicate in out" in text for text in found["findings"])
    assert recipes.load("in.toml").data.exclude == ("CAT",)


def test_unreadable_files_and_copies_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise(tmp_path / "some", {"a": 6, "b": 6})
    (tmp_path / "some/a/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    shutil.copy("some/a/0.png", "some/b/copy.png")
    found = document(capsys, "some")
    assert any("could not be read" in text and "broken.png" in text for text in found["findings"])
    assert any("near duplicates have two labels" in text for text in found["findings"])


def test_what_train_takes_for_photographs(photos: Path) -> None:
    assert proposal.is_photos(str(photos))
    assert proposal.is_photos("digits")
    assert not proposal.is_photos("digits-ratio")
    assert not proposal.is_photos("missing.toml")
    assert not proposal.is_photos("missing")
    assert proposal.name_of("a/b c.tar.xz:train") == "b-c"
