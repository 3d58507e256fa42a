"""Out-distributions: folders and archives without labels, noise, crops of sample photographs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ratioctl.data import in_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError, UsageError

BUILT_IN = {"uniform noise": "noise:uniform", "smooth noise": "noise:smooth"}  # where none is named
NOISE = ("uniform", "smooth")
PHOTOS = ("china", "flower")
_NOISE_IMAGES = 2000  # of a noise set where the caller names no number
_PHOTO_CROPS = 4000


def load(
    sources: Sequence[str],
    size: int,
    channels: int = 3,
    *,
    exclude: Sequence[str] = (),
    must_exclude: bool = True,
    seed: int = 0,
    count: int | None = None,
    download: bool = False,
) -> Images:
    """One out-distribution from one or several SOURCEs, labels dropped.

    Args:
        sources: as on the command line; also "noise:uniform", "noise:smooth", "photos:china",
            "photos:flower" (random crops of scikit-learn's two sample photographs).
        exclude: class folders left out; each must exist in at least one of the sources where `must_exclude`.
        seed: of noise and crops.
        count: number of images of each generated set (noise, photos).

    Raises:
        SourceError: missing source or unknown name, an excluded class that no source has, or none left.
    """
    parts = [_one(source, size, channels, exclude, seed, count, download) for source in sources]
    if not parts:
        raise SourceError(
            "out-distribution", "no source given", "Name a folder, an archive or noise:uniform."
        )
    seen = {name for part in parts for name in part.label_names}
    missing = [name for name in exclude if name not in seen]
    if missing and must_exclude:
        raise SourceError(
            f'excluded class "{missing[0]}"',
            "is in none of the out-distribution's sources",
            "Class names are folder names; remove it or correct it.",
        )
    kept = [_without(part, exclude) for part in parts]
    if not any(len(part) for part in kept):
        raise SourceError(", ".join(sources), "has no images left", "Exclude fewer classes (data.exclude).")
    pixels = kept[0].pixels if len(kept) == 1 else np.concatenate([part.pixels for part in kept])
    digest = hashlib.sha256("".join(part.fingerprint for part in kept).encode()).hexdigest()
    return Images(
        pixels=pixels,
        labels=None,
        label_names=(),
        fingerprint=kept[0].fingerprint if len(kept) == 1 else digest,
        source=", ".join(sources),
        errors=tuple(error for part in kept for error in part.errors),
    )


def named(ood: Sequence[str] | Mapping[str, str], data: str) -> dict[str, str]:
    """Names to SOURCEs from "NAME=SOURCE" each, or a mapping; the built-in noise where none is given.

    Args:
        data: SOURCE of the in-images, whose short name is taken.

    Raises:
        UsageError: not NAME=SOURCE, or a name that is given twice or taken.
    """
    pairs = list(ood.items()) if isinstance(ood, Mapping) else [_pair(text) for text in ood]
    taken = {
        "mean": "is the name of the average",
        in_distribution.short_name(data): "is the name of the in-images",
    }
    for name, _ in pairs:
        if name in taken:
            raise UsageError(f"--ood {name}", taken[name], "Choose another name.")
        taken[name] = "is given twice"
    return dict(pairs) or dict(BUILT_IN)


def _pair(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    name = name.strip()
    if not equals or not name or not source:
        raise UsageError(f"--ood {text}", "is not NAME=SOURCE", "For example --ood svhn=svhn:test.")
    return name, source


def _one(
    source: str,
    size: int,
    channels: int,
    exclude: Sequence[str],
    seed: int,
    count: int | None,
    download: bool,
) -> Images:
    kind, _, name = source.partition(":")
    if Path(source).exists() or kind not in ("noise", "photos"):
        return in_distribution.load(source, size, channels, download=download)
    if kind == "noise":
        if name not in NOISE:
            raise SourceError(source, "no such noise", "Use noise:uniform or noise:smooth.")
        make = uniform_noise if name == "uniform" else smooth_noise
        pixels = make(count or _NOISE_IMAGES, size, channels, seed)
    else:
        if name not in PHOTOS:
            raise SourceError(source, "no such photograph", "Use photos:china or photos:flower.")
        pixels = photo_crops(name, count or _PHOTO_CROPS, size, channels, seed)
    return Images(
        pixels=pixels,
        labels=None,
        label_names=(),
        fingerprint=in_distribution.fingerprint(pixels, None),
        source=source,
    )


def _without(part: Images, exclude: Sequence[str]) -> Images:
    drop = [k for k, name in enumerate(part.label_names) if name in exclude]
    if not drop or part.labels is None:
        return part
    return part.subset(np.flatnonzero(~np.isin(part.labels, drop)))


def uniform_noise(count: int, size: int, channels: int, seed: int) -> np.ndarray:
    """(count, size, size, channels) uint8, every value drawn uniformly: the paper's "Uni. Noise"."""
    rng = np.random.default_rng([seed, 0x01])
    return rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def smooth_noise(count: int, size: int, channels: int, seed: int) -> np.ndarray:
    """Low-frequency noise (Hein et al. 2019): uniform noise, Gaussian blur of 1 to 2.5 pixels at 32x32,
    stretched to the full range of each image.

    The paper smooths uniform noise and permuted training pixels; permuted pixels need a training set,
    so the built-in set is the uniform half.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng([seed, 0x02])
    out = np.empty((count, size, size, channels), np.uint8)
    for k in range(count):
        noise = rng.random((size, size, channels))
        sigma = rng.uniform(1.0, 2.5) * size / 32
        noise = gaussian_filter(noise, sigma=(sigma, sigma, 0), mode="wrap")
        low, high = noise.min(), noise.max()
        out[k] = np.rint((noise - low) / max(high - low, 1e-12) * 255)
    return out


def photo_crops(name: str, count: int, size: int, channels: int, seed: int) -> np.ndarray:
    """Random square crops of a scikit-learn sample photograph, side `size` to 240 pixels, resized."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
    photo = photo.convert("RGB" if channels == 3 else "L")
    rng = np.random.default_rng([seed, 0x03])
    out = np.empty((count, size, size, channels), np.uint8)
    largest = min(240, *photo.size)
    for k in range(count):
        side = int(np.exp(rng.uniform(np.log(min(size, largest)), np.log(largest))))
        left = int(rng.integers(0, photo.width - side + 1))
        top = int(rng.integers(0, photo.height - side + 1))
        crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[k] = np.asarray(crop).reshape(size, size, channels)
    return out
