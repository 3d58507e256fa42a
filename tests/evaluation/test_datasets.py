"""The images of an evaluation: which are chosen, and which cannot be read."""

from __future__ import annotations

import types
from typing import Any

import numpy as np

from ratioctl.data import in_distribution
from ratioctl.evaluation.datasets import stratified_indices
from tests.evaluation.helpers import images


def test_a_choice_is_stratified_nested_and_reproducible() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    some = images(np.zeros((100, 1, 1, 1), np.uint8), labels)
    chosen = stratified_indices(some, 20, 7)
    assert len(chosen) == len(set(chosen.tolist())) == 20
    assert np.bincount(labels[chosen]).tolist() == [12, 6, 2]
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) <= set(stratified_indices(some, 40, 7))
    assert np.array_equal(chosen, stratified_indices(some, 20, 7))
    assert not np.array_equal(chosen, stratified_indices(some, 20, 8))
    assert len(stratified_indices(some, None, 0)) == len(stratified_indices(some, 1000, 0)) == 100
    assert len(stratified_indices(images(some.pixels), 13, 0)) == 13


def test_unreadable_images_are_counted() -> None:
    one: Any = types.SimpleNamespace(errors=(("x/broken.png", "is text, not an image"),))
    said = "images of a that could not be read and are left out: 1 (x/broken.png: is text, not an image)"
    assert in_distribution.unreadable({"a": one}) == [said]
    assert in_distribution.unreadable({"a": types.SimpleNamespace(errors=())}) == []  # type: ignore[dict-item]
