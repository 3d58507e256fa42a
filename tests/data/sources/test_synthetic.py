"""Noise and crops of photographs."""

from __future__ import annotations

import numpy as np
import pytest

from ratioctl.data import out_distribution
from ratioctl.data.sources import synthetic
from ratioctl.errors import SourceError


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
