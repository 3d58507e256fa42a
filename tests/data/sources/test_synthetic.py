"""Noise and crops of photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ratioctl.data import in_distribution, out_distribution
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


@pytest.mark.parametrize("name", ["synthetic:dead-leaves", "synthetic:fractal"])
def test_synthetic_pictures_are_deterministic_and_differ(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ratioctl.images import cache

    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path))
    first = in_distribution.load(name, 16, 3, count=4)
    again = in_distribution.load(name, 16, 3, count=4)
    other = in_distribution.load(name, 16, 3, count=4, seed=1)
    assert first.pixels.shape == (4, 16, 16, 3)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len({image.tobytes() for image in first.pixels}) == 4
    assert in_distribution.load(name, 16, 1, count=2).pixels.shape == (2, 16, 16, 1)
    monkeypatch.setattr(cache, "CACHE_FROM_BYTES", 0)
    filed = in_distribution.load(name, 16, 3, count=4)
    monkeypatch.setattr(cache, "Rows", None)  # the next one comes from the file
    assert in_distribution.load(name, 16, 3, count=4).fingerprint == filed.fingerprint == first.fingerprint


def test_dead_leaves_have_the_spectrum_of_natural_images() -> None:
    """Power falls with frequency, as f^-2 for natural images; that of noise is flat."""
    from ratioctl.data import generated

    pictures = np.stack([*generated.dead_leaves(12, 64, 1, 0)])[..., 0].astype(float)
    power = (np.abs(np.fft.fft2(pictures - pictures.mean((1, 2), keepdims=True))) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    ring = (frequency > 0.03) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[ring]), np.log(power[ring]), 1)[0]
    assert -3.0 < slope < -1.2


def test_patches_are_tiles_of_the_images() -> None:
    from ratioctl.data.generated import shuffled_patches

    pixels = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16, 1), np.full((16, 16, 1), 7, np.uint8)])
    found = shuffled_patches(pixels, 40, 3)
    assert found.shape == (40, 16, 16, 1)
    assert set(np.unique(found)) <= set(range(256))
    alone = shuffled_patches(pixels[:1], 600, 0)
    assert (alone != pixels[0]).any(axis=(1, 2, 3)).all(), "one permutation of four in 24 moves none"
    for image in alone:
        assert sorted(image.ravel()) == list(range(256)), "a permutation of its tiles"
    np.testing.assert_array_equal(found, shuffled_patches(pixels, 40, 3))
    with pytest.raises(SourceError, match="names no images"):
        in_distribution.load("patches", 8, 3)
