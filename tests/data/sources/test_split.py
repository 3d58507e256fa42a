"""The split by content: complete, stratified, stable, and no near duplicate on both sides."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratioctl.data import in_distribution
from ratioctl.errors import SourceError
from ratioctl.images import duplicate_groups, near_duplicates


def scene(seed: int, side: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return np.kron(blocks, np.ones((side // 6, side // 6, 1), np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 20 scenes; scenes 0 to 4 of each have a brighter copy."""
    for c, name in enumerate(("ant", "bee")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for k in range(20):
            pixels = scene(100 * c + k)
            Image.fromarray(pixels).save(folder / f"{k:02}.png")
            if k < 5:
                Image.fromarray(np.clip(pixels.astype(int) + 4, 0, 255).astype(np.uint8)).save(
                    folder / f"{k:02}-copy.png"
                )
    return tmp_path / "photos"


def both(photos: Path) -> tuple[in_distribution.Images, in_distribution.Images]:
    return tuple(in_distribution.load(f"split:{p}:{photos}", 24, 3) for p in ("train", "test"))  # type: ignore[return-value]


def test_the_parts_are_complete_stratified_and_without_duplicates_across(photos: Path) -> None:
    train, test = both(photos)
    assert {*train.names, *test.names} == {p.relative_to(photos).as_posix() for p in photos.rglob("*.png")}
    assert not {*train.names} & {*test.names}
    assert test.labels is not None
    assert all(4 <= n <= 5 for n in np.bincount(test.labels)), "15 % of 25, whole groups"
    assert near_duplicates(np.asarray(train.pixels), np.asarray(test.pixels)) == ()


def test_the_parts_follow_the_content_alone(photos: Path, tmp_path: Path) -> None:
    _, test = both(photos)
    bytes_of = {(photos / name).read_bytes() for name in test.names}
    renamed = tmp_path / "renamed"
    for path in photos.rglob("*.png"):
        place = renamed / path.parent.name / f"x{path.stem[::-1]}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    _, again = both(renamed)
    assert {(renamed / name).read_bytes() for name in again.names} == bytes_of
    smaller = in_distribution.load(f"split:test:{photos}", 12, 3)
    assert {(photos / name).read_bytes() for name in smaller.names} == bytes_of, "of any size"


def test_held_out_images_keep_the_groups_together(photos: Path) -> None:
    train, _ = both(photos)
    assert train.labels is not None
    assert train.groups is not None
    for seed in range(5):
        keep, held = in_distribution.hold_out(train.labels, 0.2, seed, groups=train.groups)
        assert len(keep) + len(held) == len(train)
        assert not {*train.groups[keep]} & {*train.groups[held]}
        assert set(train.labels[held]) == {0, 1}


def test_groups_of_duplicates() -> None:
    pixels = np.stack(
        [scene(1), scene(2), scene(1), np.clip(scene(2).astype(int) + 3, 0, 255).astype(np.uint8), scene(4)]
    )
    np.testing.assert_array_equal(duplicate_groups(pixels), [0, 1, 0, 1, 4])


def test_bad_names(photos: Path) -> None:
    for source in ("split", "split:train", f"split:val:{photos}"):
        with pytest.raises(SourceError, match="names no part"):
            in_distribution.load(source, 8, 3)


def test_digits_have_parts_too() -> None:
    train, test = (in_distribution.load(f"split:{part}:digits", 8, 1) for part in ("train", "test"))
    assert len(train) + len(test) == 1797
