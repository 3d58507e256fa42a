"""Data: splits, out-distributions, augmentation and the determinism of batches."""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, loader, out_distribution
from ratioctl.data.augment import augment, crop, cutout, flip
from ratioctl.data.autoaugment import SIGNED, apply, autoaugment, policies
from ratioctl.data.sources import synthetic
from ratioctl.errors import SourceError
from ratioctl.recipe import Augment

FILL = torch.tensor([120, 110, 100], dtype=torch.uint8)


def some(n: int = 16, channels: int = 3, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- in-distribution -----------------------------------------------------------------------------------


def test_digits_splits_are_disjoint_and_complete() -> None:
    train, test = in_distribution.load("digits:train", 8, 1), in_distribution.load("digits:test", 8, 1)
    whole = in_distribution.load("digits", 8, 1)
    assert len(train) + len(test) == len(whole) == 1797
    assert whole.label_names == tuple("0123456789")

    def key(images: in_distribution.Images) -> Counter[bytes]:
        return Counter(p.tobytes() for p in images.pixels)

    assert not key(train) & key(test), "no picture is in both"
    assert key(train) + key(test) == key(whole)
    assert test.labels is not None
    assert min(np.bincount(test.labels)) >= 34


def test_digits_at_another_size_and_in_colour() -> None:
    images = in_distribution.load("digits:test", 32, 3)
    assert images.pixels.shape[1:] == (32, 32, 3)
    assert (images.pixels[..., 0] == images.pixels[..., 2]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(3, 40), min_size=2, max_size=6), st.floats(0.1, 0.6), st.integers(0, 5))
def test_hold_out_is_a_stratified_partition(counts: list[int], amount: float, seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    try:
        kept, held = in_distribution.hold_out(labels, amount, seed)
    except SourceError:
        assert round(amount * len(labels)) < len(counts)
        return
    assert sorted([*kept, *held]) == list(range(len(labels)))
    for c, count in enumerate(counts):
        share = (labels[held] == c).sum()
        assert 1 <= share < count
        assert abs(share - amount * count) < 2


def test_hold_out_depends_on_the_seed_alone() -> None:
    labels = np.repeat(np.arange(5), 50)
    first, again, other = (in_distribution.hold_out(labels, 50, seed)[1] for seed in (3, 3, 4))
    assert (first == again).all()
    assert not np.array_equal(first, other)
    assert len(first) == 50


def test_holding_out_too_much_is_refused() -> None:
    with pytest.raises(SourceError, match="one per class"):
        in_distribution.hold_out(np.repeat(np.arange(5), 3), 13, 0)


def folder(root: Path, classes: dict[str, int], size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", {"cat": 2, "dog": 3})
    images = in_distribution.load_labelled(str(source), 8, 3, ("dog", "bird", "cat"))
    assert images.label_names == ("dog", "bird", "cat")
    assert images.labels is not None
    assert Counter(images.labels.tolist()) == {2: 2, 0: 3}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_are_compared_after_normalization(tmp_path: Path, form: str) -> None:
    """macOS names folders decomposed; labels are typed composed, or the other way round."""
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    name, label = (unicodedata.normalize(kind, "caf\u00e9") for kind in (form, other))
    split = folder(tmp_path / "data" / name, {name: 2, "eau": 3}).parent
    source = f"{split}:{unicodedata.normalize(other, name)}"
    images = in_distribution.load_labelled(source, 8, 3, ("eau", label))
    assert images.labels is not None
    assert Counter(images.labels.tolist()) == {0: 3, 1: 2}
    assert len(out_distribution.load([source], 8, exclude=[label])) == 3


def test_a_folder_that_is_no_label_is_named_with_the_nearest(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", {"cat": 1, "dgo": 1})
    with pytest.raises(SourceError) as caught:
        in_distribution.load_labelled(str(source), 8, 3, ("cat", "dog"))
    assert '"dgo"' in str(caught.value)
    assert '"dog"' in str(caught.value)


def test_fewer_than_two_classes(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="at least two"):
        in_distribution.load_labelled(str(folder(tmp_path / "data", {"cat": 2})), 8, 3)


def test_named_sets_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="--download"):
        in_distribution.load("cifar10:test", 32, 3)
    with pytest.raises(SourceError, match="cifar10:train"):
        in_distribution.load("cifar10", 32, 3)


# --- out-distribution ----------------------------------------------------------------------------------


def test_class_exclusion(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"cat": 2, "tree": 3})
    b = folder(tmp_path / "b", {"rock": 4})
    assert len(out_distribution.load([str(a), str(b)], 8)) == 9
    assert len(out_distribution.load([str(a), str(b)], 8, exclude=["cat"])) == 7
    with pytest.raises(SourceError, match='"cta"'):
        out_distribution.load([str(a), str(b)], 8, exclude=["cta"])
    with pytest.raises(SourceError, match="no images left"):
        out_distribution.load([str(a), str(b)], 8, exclude=["cat", "tree", "rock"])


def test_excluded_classes_leave_the_held_out_out_images_too(tmp_path: Path) -> None:
    train, test = tmp_path / "a", tmp_path / "b"
    folder(train, {"cat": 2, "rock": 3})
    folder(test, {"cat": 1, "tree": 2})
    settings = [f"data.outside={train}", f"data.outside_test={test}", 'data.exclude=["cat", "rock"]']
    with pytest.raises(SourceError, match="no images left"):
        loader.load(recipes.load("digits-ratio", settings))
    splits = loader.load(recipes.load("digits-ratio", [*settings[:2], 'data.exclude=["cat"]']))
    assert splits.outside is not None
    assert splits.outside_test is not None
    assert (len(splits.outside), len(splits.outside_test)) == (3, 2)


def test_noise_is_what_it_says() -> None:
    uniform = synthetic.uniform_noise(50, 32, 3, seed=0).astype(float)
    assert abs(uniform.mean() - 127.5) < 1
    assert abs(uniform.std() - 73.9) < 1  # of the uniform distribution on 0..255
    smooth = synthetic.smooth_noise(10, 32, 3, seed=0)
    assert smooth.reshape(10, -1).min(1).tolist() == [0] * 10
    assert smooth.reshape(10, -1).max(1).tolist() == [255] * 10
    rough = np.abs(np.diff(uniform, axis=2)).mean()
    assert np.abs(np.diff(smooth.astype(float), axis=2)).mean() < rough / 2


def test_generated_sets_depend_on_the_seed_alone() -> None:
    for source in ("noise:uniform", "noise:smooth", "photos:china"):
        first, again, other = (out_distribution.load([source], 8, 1, seed=s, count=5) for s in (1, 1, 2))
        assert first.fingerprint == again.fingerprint != other.fingerprint


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(SourceError, match="noise:uniform"):
        out_distribution.load(["noise:gaussian"], 8)


# --- augmentation --------------------------------------------------------------------------------------


def test_crops_are_padded_with_the_mean_color_on_request() -> None:
    """The same windows as with black padding, and every pixel that is padding has the mean color."""
    x, mean = some(40, size=6).clamp(min=1), torch.tensor([10, 20, 30], dtype=torch.uint8)
    black, filled = crop(x, 2, seeded()), crop(x, 2, seeded(), mean)
    padding = (black == 0).all(1, keepdim=True).expand_as(black)
    assert 0.1 < padding.float().mean() < 0.5
    assert torch.equal(filled, torch.where(padding, mean.view(1, 3, 1, 1), black))
    spec = Augment(crop=2, crop_fill="mean")
    assert torch.equal(augment(x, spec, seeded(), mean), filled)


def test_every_crop_is_a_window_of_the_padded_image() -> None:
    x = some(40, size=6)
    moved = crop(x, 2, seeded())
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    shifts = set()
    for k in range(len(x)):
        matches = [
            (i, j)
            for i in range(5)
            for j in range(5)
            if torch.equal(padded[k, :, i : i + 6, j : j + 6], moved[k])
        ]
        assert matches
        shifts.update(matches)
    assert len(shifts) > 12, "positions vary"


def test_flip_mirrors_about_half() -> None:
    x = some(400, size=4)
    flipped = flip(x, seeded())
    same = (flipped == x).flatten(1).all(1)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


@pytest.mark.parametrize("side", [1, 4, 5, 16])
def test_cutout_paints_one_square(side: int) -> None:
    x = torch.full((200, 3, 16, 16), 7, dtype=torch.uint8)
    y = cutout(x, side, seeded(), FILL)
    painted = (y == FILL.view(1, 3, 1, 1)).all(1)
    assert ((y == 7).all(1) | painted).all()
    heights, widths = painted.any(2).sum(1), painted.any(1).sum(1)
    assert (painted.sum((1, 2)) == heights * widths).all(), "a rectangle"
    assert int(heights.max()) == min(side, 16)
    assert int(widths.max()) == min(side, 16)


def test_autoaugment_tables_are_whole() -> None:
    for name in ("cifar10", "svhn", "imagenet"):
        assert len(policies(name)) == 25  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_autoaugment_is_a_function_of_its_seed(channels: int) -> None:
    x = some(60, channels=channels)
    before = torch.get_rng_state()
    first = autoaugment(x, "cifar10", seeded(5), FILL[:channels])
    assert torch.equal(first, autoaugment(x, "cifar10", seeded(5), FILL[:channels]))
    assert not torch.equal(first, autoaugment(x, "cifar10", seeded(6), FILL[:channels]))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    assert first.dtype == torch.uint8
    assert float((first != x).flatten(1).any(1).float().mean()) > 0.5, "most images change"


def test_autoaugment_matches_torchvision_operation_by_operation() -> None:
    from torchvision.transforms import AutoAugment, InterpolationMode
    from torchvision.transforms import autoaugment as tv

    space = AutoAugment()._augmentation_space(10, (16, 16))
    x = some(3)
    for name, (magnitudes, signed) in space.items():
        level = 6 if magnitudes.ndim else None
        m = float(magnitudes[6]) if magnitudes.ndim else 0.0
        ours = apply(x, name, level, False, [0.0, 0.0, 0.0])
        theirs = tv._apply_op(x, name, m, InterpolationMode.NEAREST, [0.0, 0.0, 0.0])
        assert (name in SIGNED) == bool(signed)
        # The two interfaces of torchvision round a blend differently, by one level at most.
        assert int((ours.int() - theirs.int()).abs().max()) <= 1, name


def test_augmentation_leaves_its_input() -> None:
    x = some()
    copy = x.clone()
    spec = Augment(crop=2, flip=True, autoaugment="cifar10", cutout=4, color_jitter=0.3, lighting=0.1)
    y = augment(x, spec, seeded(), FILL)
    assert torch.equal(x, copy)
    assert y.shape == x.shape
    assert y.dtype == torch.uint8
    assert augment(x, Augment(resized_crop=0.3), seeded(), FILL).shape == x.shape


# --- batches -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 9))
def test_batches_walk_through_shuffled_epochs(n: int, batch: int, seed: int) -> None:
    drawn = np.concatenate([loader.indices(n, batch, k, seed, 1) for k in range(2 * n // batch + 2)])
    for epoch in range(len(drawn) // n):
        assert sorted(drawn[epoch * n : (epoch + 1) * n]) == list(range(n)), "each image once an epoch"


def tiny_recipe() -> recipes.Recipe:
    return recipes.load(
        "digits-ratio", ["optim.batch_size=8", "optim.batch_size_out=4", 'data.outside="noise:uniform"']
    )


def test_a_batch_is_a_function_of_its_number() -> None:
    recipe = tiny_recipe()
    splits = loader.load(recipe)
    fill = torch.tensor([60], dtype=torch.uint8)
    once = list(loader.stream(recipe, splits.train, splits.outside, fill, start=0, stop=6))
    later = list(loader.stream(recipe, splits.train, splits.outside, fill, start=4, stop=6))
    for a, b in zip(once[4:], later, strict=True):
        assert torch.equal(a.x_in, b.x_in)
        assert torch.equal(a.y_in, b.y_in)
        assert a.x_out is not None
        assert b.x_out is not None
        assert torch.equal(a.x_out, b.x_out)
    assert once[0].x_in.shape == (8, 1, 8, 8)
    assert once[0].x_out is not None
    assert once[0].x_out.shape == (4, 1, 8, 8)
    assert float(once[0].x_in.max()) <= 1


def test_held_out_images_are_never_trained_on() -> None:
    recipe = tiny_recipe()
    splits = loader.load(recipe)
    train = {p.tobytes() for p in splits.train.pixels}
    assert not any(p.tobytes() in train for p in splits.held_out.pixels)
    again = loader.held_out(recipe, splits.train.label_names)
    assert again.fingerprint == splits.held_out.fingerprint, "calibrate finds the same images"


def test_test_split_with_other_classes_is_refused_before_training(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"cat": 12, "dog": 12})
    b = folder(tmp_path / "b", {"cat": 2, "bird": 2})
    recipe = recipes.parse(
        {"name": "x", "data": {"train": str(a), "test": str(b), "size": 8, "validation": 4}}
    )
    with pytest.raises(SourceError, match="bird"):
        loader.load(recipe)


def test_leaks_are_counted() -> None:
    import dataclasses

    splits = loader.load(tiny_recipe())
    assert loader.leaks(splits)["outside.exact"] == 0
    assert splits.outside is not None
    dirty = splits.outside.pixels.copy()
    dirty[[3, 5]] = splits.held_out.pixels[:2]
    train = splits.train.pixels.copy()
    train[0] = splits.held_out.pixels[7]
    leaky = dataclasses.replace(
        splits,
        outside=dataclasses.replace(splits.outside, pixels=dirty),
        train=dataclasses.replace(splits.train, pixels=train),
    )
    found = loader.leaks(leaky)
    assert found["outside.exact"] == 2
    assert found["train.exact"] == 1
    assert found["held_out"] == len(splits.held_out)


def test_a_class_that_the_test_split_lacks(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {"cat": 12, "dog": 12})
    b = folder(tmp_path / "b", {"cat": 2})
    recipe = recipes.parse(
        {"name": "x", "data": {"train": str(a), "test": str(b), "size": 8, "validation": 4}}
    )
    with pytest.raises(SourceError, match='lacks the class folder "dog"'):
        loader.load(recipe)


def test_a_stuck_batch_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    """The thread that prepares batches is inside an endless one when the main thread is interrupted."""
    program = (
        "import os, signal, threading, time, torch\n"
        "from ratioctl import recipe\n"
        "from ratioctl.data import in_distribution, loader\n"
        "from ratioctl.utils import ordered_pool\n"
        "ordered_pool._END_SECONDS = 0.1\n"
        "loader.batch_at = lambda *a: time.sleep(3600)\n"
        "images = in_distribution.load('digits:test', 8, 1)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "next(loader.stream(recipe.load('digits-plain'), images, None, None, start=0, stop=9))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "KeyboardInterrupt" in done.stderr
