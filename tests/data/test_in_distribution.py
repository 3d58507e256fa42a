"""Labelled sources and the held-out split."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratioctl.data import in_distribution, out_distribution
from ratioctl.errors import SourceError
from tests.data.helpers import folder


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
