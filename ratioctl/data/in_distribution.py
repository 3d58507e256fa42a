"""SOURCEs as uint8 arrays, labels matched to a model's, and the held-out split."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ratioctl import images
from ratioctl.data import registry
from ratioctl.data.image_set import Images
from ratioctl.errors import SourceError
from ratioctl.images import labelled
from ratioctl.utils.frame import Size
from ratioctl.utils.suggest import did_you_mean
from ratioctl.utils.text import nfc


def load(
    source: str,
    size: Size,
    channels: int = 3,
    *,
    seed: int = 0,
    count: int | None = None,
    download: bool = False,
) -> Images:
    """A SOURCE as an array: a folder or archive (labelled if it has class folders) or a named source.

    Args:
        source: as on the command line, with an optional ":split".
        size, channels: of the model's input; other sizes are converted as `images` documents.
        seed, count: of generated images.
        download: whether a named set may be fetched into the cache folder.

    Raises:
        SourceError: missing, empty or unreadable source, unknown split, or a set that is not downloaded.
    """
    named = registry.find(source)
    if named is not None:
        return named.load(
            registry.SourceRequest(
                source=source,
                argument=source.partition(":")[2],
                size=size,
                channels=channels,
                seed=seed,
                count=count,
                download=download,
            )
        )
    try:
        loaded = images.load_source(source, size, channels)
    except SourceError as error:
        if error.reason != images.MISSING:
            raise
        name = source.partition(":")[0]
        hint = did_you_mean(name, registry.registered()) if "/" not in name else ""
        names = ", ".join(registry.registered())
        raise SourceError(
            error.thing, error.reason, f"{hint} {error.next_step} Named sources: {names}.".lstrip()
        ) from None
    return Images(
        pixels=loaded.images,
        labels=loaded.labels,
        label_names=tuple(loaded.label_names),
        names=loaded.names,
        fingerprint=loaded.fingerprint,
        source=source,
        errors=tuple((str(name), str(reason)) for name, reason in loaded.errors),
        digests=loaded.digests,
    )


def load_labelled(
    source: str,
    size: Size,
    channels: int,
    label_names: Sequence[str] | None = None,
    *,
    download: bool = False,
) -> Images:
    """Like `load`, but labels are required; they are matched by name to `label_names` if given.

    Raises:
        SourceError: no class folders, fewer than two classes, or a class that the model does not have.
    """
    loaded = load(source, size, channels, download=download)
    if loaded.labels is None:
        kind = None if registry.find(source) else images.foreign_layout(source)
        reason = "has no class folders" if kind is None else labelled.NOT_READ.format(kind)
        raise SourceError(source, reason, labelled.ARRANGE)
    if label_names is None:
        if len(loaded.label_names) < 2:
            raise SourceError(
                source,
                f"has {len(loaded.label_names)} class ({', '.join(loaded.label_names)})",
                "A classifier needs at least two.",
            )
        return loaded
    known = {nfc(name): k for k, name in enumerate(label_names)}
    unknown = [name for name in loaded.label_names if nfc(name) not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known) or f"The model knows {', '.join(label_names)}."
        raise SourceError(source, f'its class "{unknown[0]}" is not a label of the model', hint)
    table = np.array([known[nfc(name)] for name in loaded.label_names], dtype=np.int64)
    labels = table[loaded.labels] if len(table) else loaded.labels
    return dataclasses.replace(loaded, labels=labels, label_names=tuple(label_names))


def hold_out(
    labels: np.ndarray,
    amount: float,
    seed: int,
    where: str = "data.validation",
    *,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Stratified split of the indices 0..N-1 into (training, held out), each ascending.

    Args:
        labels: (N,) int.
        amount: a fraction below 1, or a number of images.
        groups: (N,) int; images with the same number stay on one side.

    Raises:
        SourceError: fewer than one image per class on one of the sides.
    """
    n = len(labels)
    few = [c for c in np.unique(labels) if (labels == c).sum() < 2]
    if few:
        reason = f"class number {few[0]} has one image, and one is needed on each side of the split"
        raise SourceError(where, reason, "Add images to that class, or remove it.")
    wanted = round(amount * n) if amount < 1 else int(amount)
    classes = np.unique(labels)
    if wanted < len(classes) or wanted > n - len(classes):
        raise SourceError(
            where,
            f"holding out {wanted} of {n} images does not leave one per class on both sides",
            "Choose another amount.",
        )
    rng = np.random.default_rng([seed, 0x5EED])
    # Largest remainder method: the shares of the classes add up to `wanted`.
    counts = np.array([(labels == c).sum() for c in classes])
    exact = counts * wanted / n
    share = np.floor(exact).astype(int)
    for k in np.argsort(share - exact, kind="stable")[: wanted - share.sum()]:
        share[k] += 1
    share = np.clip(share, 1, counts - 1)
    if groups is not None:
        held = whole_groups(labels, groups, rng.permutation(n), dict(zip(classes, share, strict=True)))
        return np.setdiff1d(np.arange(n), held), held
    held = np.concatenate(
        [rng.permutation(np.flatnonzero(labels == c))[:m] for c, m in zip(classes, share, strict=True)]
    )
    held = np.sort(held)
    return np.setdiff1d(np.arange(n), held), held


def whole_groups(
    labels: np.ndarray, groups: np.ndarray, rank: np.ndarray, share: Mapping[int, int]
) -> np.ndarray:
    """Indices, ascending, of whole groups: of each class the first ones, until `share` images are reached.

    Each class keeps at least one group on the other side, if it has two.

    Args:
        rank: (N,) numbers; groups are taken in the order of their smallest. A group counts for the class of
            the image that has it.
    """
    first: dict[int, int] = {}
    for k in np.argsort(rank, kind="stable"):
        first.setdefault(int(groups[k]), int(k))
    members: dict[int, list[int]] = {}
    for k, group in enumerate(groups):
        members.setdefault(int(group), []).append(k)
    taken: list[int] = []
    for c, wanted in share.items():
        own = [group for group, k in first.items() if labels[k] == c]
        count = 0
        for group in own[:-1]:
            if count >= wanted:
                break
            taken += members[group]
            count += len(members[group])
    return np.sort(np.array(taken, dtype=np.int64))


def short_name(source: str) -> str:
    """The name of a SOURCE in reports and cards: of a path only the last part is published."""
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1] or source


def described(sets: Mapping[str, Images]) -> list[dict[str, Any]]:
    """Named sets as reports list them: plain JSON values."""
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
    """A sentence for every set with unreadable images."""
    return [
        f"images of {name} that could not be read and are left out: {len(images.errors)} "
        f"({images.errors[0][0]}: {images.errors[0][1]}{', ...' if len(images.errors) > 1 else ''})"
        for name, images in sets.items()
        if images.errors
    ]
