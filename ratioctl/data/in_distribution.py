"""In-distribution: labelled SOURCEs as uint8 arrays, and the held-out split."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ratioctl import images
from ratioctl.errors import SourceError
from ratioctl.utils.suggest import did_you_mean

# Named sets of torchvision: class, whether the split is an argument called `split` (else `train=`).
_TORCHVISION = {
    "cifar10": ("CIFAR10", False),
    "cifar100": ("CIFAR100", False),
    "svhn": ("SVHN", True),
    "mnist": ("MNIST", False),
    "fashionmnist": ("FashionMNIST", False),
}
SETS = ("digits", *_TORCHVISION)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Images of one or several sources at the model's size.

    Attributes:
        pixels: (N, H, W, C) uint8; a memory map where the source is large.
        labels: (N,) int64, or None for unlabelled images.
        label_names: names by label; empty where there are no labels.
        fingerprint: SHA-256 over pixels and labels.
        source: as the user wrote it.
        errors: (name, reason) of images that could not be read.
    """

    pixels: np.ndarray
    labels: np.ndarray | None
    label_names: tuple[str, ...]
    fingerprint: str
    source: str
    errors: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def subset(self, index: np.ndarray) -> Images:
        """The images at `index` (n,), copied; the fingerprint names the parent and the selection."""
        index = np.asarray(index)
        digest = hashlib.sha256(self.fingerprint.encode() + index.astype("<i8").tobytes()).hexdigest()
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, pixels=self.pixels[index], labels=labels, fingerprint=digest)


def load(source: str, size: int, channels: int = 3, *, download: bool = False) -> Images:
    """A SOURCE as an array: a folder or archive (labelled where it has class folders) or a named set.

    Args:
        source: as on the command line, with an optional ":split".
        size, channels: of the model's input; other sizes are converted as `images` documents.
        download: whether a named set may be fetched into the cache folder.

    Raises:
        SourceError: missing, empty or unreadable source, unknown split, or a set that is not downloaded.
    """
    name, _, split = source.partition(":")
    if name in SETS and not Path(source).exists():
        if name == "digits":
            pixels, labels, names = _digits(split, size, channels)
        else:
            pixels, labels, names = _torchvision(name, split, size, channels, download)
        return Images(
            pixels=pixels,
            labels=labels,
            label_names=names,
            fingerprint=fingerprint(pixels, labels),
            source=source,
        )
    loaded = images.load_source(source, size, channels)
    return Images(
        pixels=loaded.images,
        labels=loaded.labels,
        label_names=tuple(loaded.label_names),
        fingerprint=loaded.fingerprint,
        source=source,
        errors=tuple((str(name), str(reason)) for name, reason in loaded.errors),
    )


def load_labelled(
    source: str, size: int, channels: int, label_names: Sequence[str] | None = None, *, download: bool = False
) -> Images:
    """Like `load`, but labels are required, and are matched by name to `label_names` where given.

    Raises:
        SourceError: no class folders, fewer than two classes, or a folder that is no label of the model.
    """
    loaded = load(source, size, channels, download=download)
    if loaded.labels is None:
        raise SourceError(
            source, "has no class folders", "Arrange it as CLASS/image.png, one folder a class."
        )
    if label_names is None:
        if len(loaded.label_names) < 2:
            raise SourceError(
                source,
                f"has {len(loaded.label_names)} class ({', '.join(loaded.label_names)})",
                "A classifier needs at least two.",
            )
        return loaded
    known = {name: k for k, name in enumerate(label_names)}
    unknown = [name for name in loaded.label_names if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known) or f"The model knows {', '.join(label_names)}."
        raise SourceError(source, f'its class "{unknown[0]}" is no label of the model', hint)
    table = np.array([known[name] for name in loaded.label_names], dtype=np.int64)
    labels = table[loaded.labels] if len(table) else loaded.labels
    return dataclasses.replace(loaded, labels=labels, label_names=tuple(label_names))


def hold_out(
    labels: np.ndarray, amount: float, seed: int, where: str = "data.validation"
) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of the indices 0..N-1 into (kept, held out), each ascending.

    Args:
        labels: (N,) int.
        amount: a fraction below 1, or a number of images.

    Raises:
        SourceError: fewer than one image per class would be held out or kept.
    """
    n = len(labels)
    wanted = round(amount * n) if amount < 1 else int(amount)
    classes = np.unique(labels)
    if wanted < len(classes) or wanted > n - len(classes):
        raise SourceError(
            where,
            f"holding out {wanted} of {n} images does not leave one per class on both sides",
            "Choose another amount.",
        )
    rng = np.random.default_rng([seed, 0x5EED])
    # The shares of the classes, largest remainders first, add up to exactly `wanted`.
    counts = np.array([(labels == c).sum() for c in classes])
    exact = counts * wanted / n
    share = np.floor(exact).astype(int)
    for k in np.argsort(share - exact, kind="stable")[: wanted - share.sum()]:
        share[k] += 1
    share = np.clip(share, 1, counts - 1)
    held = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:m] for c, m in zip(classes, share, strict=True)]
    )
    held = np.sort(held)
    return np.setdiff1d(np.arange(n), held), held


def short_name(source: str) -> str:
    """How reports and cards name a SOURCE: a path's folders are nobody's business."""
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1] or source


def described(sets: Mapping[str, Images]) -> list[dict[str, Any]]:
    """What reports say about named sets: plain JSON values."""
    return [
        {
            "name": name,
            "source": images.source,
            "role": "inside" if images.labels is not None else "outside",
            "n": len(images),
            "unreadable": len(images.errors),
            "fingerprint": images.fingerprint,
        }
        for name, images in sets.items()
    ]


def unreadable(sets: Mapping[str, Images]) -> list[str]:
    """A sentence for every set of which images could not be read."""
    return [
        f"images of {name} that could not be read and are left out: {len(images.errors)} "
        f"({images.errors[0][0]}: {images.errors[0][1]}{', ...' if len(images.errors) > 1 else ''})"
        for name, images in sets.items()
        if images.errors
    ]


def fingerprint(pixels: np.ndarray, labels: np.ndarray | None) -> str:
    """SHA-256 over shape, pixels and labels."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    for start in range(0, len(pixels), 4096):
        digest.update(np.ascontiguousarray(pixels[start : start + 4096]).tobytes())
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    return digest.hexdigest()


def resize(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
    """(N, H, W, C) uint8 to the model's size and channels, Pillow bicubic; unchanged where they fit."""
    if pixels.shape[1:] == (size, size, channels):
        return pixels
    mode = "RGB" if channels == 3 else "L"
    out = np.empty((len(pixels), size, size, channels), np.uint8)
    for k, image in enumerate(pixels):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert(mode)
        if picture.size != (size, size):
            picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        out[k] = np.asarray(picture).reshape(size, size, channels)
    return out


def _digits(split: str, size: int, channels: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """scikit-learn's 1,797 handwritten digits, 8x8; every fifth of a class (in order) is the test split."""
    from sklearn.datasets import load_digits

    if split not in ("", "train", "test"):
        raise SourceError(f"digits:{split}", "no such split", "Use digits:train, digits:test or digits.")
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = data.target.astype(np.int64)
    position = np.zeros(len(labels), dtype=int)
    for c in range(10):
        position[labels == c] = np.arange((labels == c).sum())
    test = position % 5 == 4
    chosen = {"": np.ones(len(labels), bool), "train": ~test, "test": test}[split]
    return resize(pixels[chosen], size, channels), labels[chosen], tuple(str(c) for c in range(10))


def _torchvision(
    name: str, split: str, size: int, channels: int, download: bool
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    import torchvision.datasets as sets

    if split not in ("train", "test"):
        raise SourceError(f"{name}:{split}".rstrip(":"), "needs a split", f"Use {name}:train or {name}:test.")
    kind, by_split = _TORCHVISION[name]
    root = images.cache_dir() / "torchvision" / name
    options = {"split": split} if by_split else {"train": split == "train"}
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        data = getattr(sets, kind)(root=str(root), download=download, **options)
    except (RuntimeError, OSError) as error:
        reason = f"could not be downloaded: {error}" if download else f"is not in {root}"
        step = "Check the connection and try again." if download else "Add --download to fetch it."
        raise SourceError(f"{name}:{split}", reason, step) from None
    pixels = np.asarray(data.data)
    if name == "svhn":
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    labels = np.asarray(data.labels if name == "svhn" else data.targets, dtype=np.int64)
    names = tuple(getattr(data, "classes", None) or [str(c) for c in range(10)])
    return resize(pixels, size, channels), labels, names
