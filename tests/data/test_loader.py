"""The splits of a recipe and the determinism of batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ratioctl import recipe as recipes
from ratioctl.data import loader
from ratioctl.errors import SourceError
from tests.data.helpers import folder


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
    assert splits.outside is not None
    held = tuple(torch.from_numpy(np.asarray(each.pixels)) for each in (splits.train, splits.outside))
    on_device = loader.batch_at(4, recipe, splits.train, splits.outside, fill, held=held)
    assert torch.equal(on_device.x_in, once[4].x_in)
    assert on_device.x_out is not None
    assert once[4].x_out is not None
    assert torch.equal(on_device.x_out, once[4].x_out)
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
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may have it ignored
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "next(loader.stream(recipe.load('digits-plain'), images, None, None, start=0, stop=9))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "KeyboardInterrupt" in done.stderr


def test_balanced_batches_draw_every_class_equally_often_and_every_image() -> None:
    labels = np.repeat([0, 1, 2], [40, 5, 11])
    drawn = np.concatenate([loader.balanced_indices(labels, 8, k, seed=3) for k in range(60)])
    counts = np.bincount(labels[drawn])
    assert counts.max() - counts.min() <= 1
    assert set(drawn) == set(range(len(labels)))
    for c in range(3):
        own = np.bincount(drawn[labels[drawn] == c], minlength=len(labels))[labels == c]
        assert own.max() - own.min() <= 1, "images of a class take turns"
    np.testing.assert_array_equal(drawn[16:24], loader.balanced_indices(labels, 8, 2, seed=3))
    assert (drawn[:8] != loader.balanced_indices(labels, 8, 0, seed=4)).any()


def test_class_weights_have_mean_one_over_the_images() -> None:
    labels = np.repeat([0, 1, 2], [40, 5, 11])
    weights = loader.class_weights(labels, 3)
    assert weights[labels].mean() == pytest.approx(1)
    assert weights * np.bincount(labels) == pytest.approx([len(labels) / 3] * 3)
