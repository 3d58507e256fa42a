"""Deterministic batches: batch k is a function of (data, seed, k), so training can resume at any update."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from ratioctl import images
from ratioctl.data import in_distribution, out_distribution, registry
from ratioctl.data.augment import augment
from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError
from ratioctl.images.cache import CACHE_FROM_BYTES, remembered
from ratioctl.recipe import Augment, Recipe
from ratioctl.utils.ordered_pool import map_batches
from ratioctl.utils.seeding import seed_from_key
from ratioctl.utils.shares import WHOLE, PartOfBatch, Share

Held = np.ndarray | Tensor  # pixels (N, H, W, C) uint8 in host memory or on a device

_IN, _OUT, _CLASSES = 1, 2, 16  # independent streams of random numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Images of one update, float32 in [0, 1], not normalized.

    Attributes:
        x_in, y_in: ID images (B, C, H, W) and labels (B,) int64.
        x_out: OOD images (M, C, H, W), or None if the objective has no OOD term.
    """

    x_in: Tensor
    y_in: Tensor
    x_out: Tensor | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
    """The data of a recipe: training and held-out images, ID and OOD.

    `source_fingerprint` is that of `data.train` before the split into `train` and `held_out`.
    """

    source_fingerprint: str
    train: Images
    held_out: Images
    outside: Images | None
    outside_test: Images | None


def held_out(recipe: Recipe, label_names: tuple[str, ...] | None = None, *, download: bool = False) -> Images:
    """The labelled images to calibrate on: `data.calibration`, else the images held out of training."""
    data = recipe.data
    if data.calibration is not None:
        return in_distribution.load_labelled(
            data.calibration, data.frame, data.channels, label_names, download=download
        )
    everything = in_distribution.load_labelled(
        data.train, data.frame, data.channels, label_names, download=download
    )
    assert everything.labels is not None
    split = in_distribution.hold_out(
        everything.labels, data.validation, recipe.seed, groups=everything.groups
    )
    return everything.subset(split[1])


def load(recipe: Recipe, *, download: bool = False) -> Splits:
    """All images that a recipe trains and selects weights on.

    Weights are selected on images held out of `data.train`; `data.calibration` may be test images.

    Raises:
        SourceError: missing data, fewer than two classes, or class folders of the test split that differ.
    """
    data = recipe.data
    everything = in_distribution.load_labelled(data.train, data.frame, data.channels, download=download)
    assert everything.labels is not None
    keep, held = in_distribution.hold_out(
        everything.labels, data.validation, recipe.seed, groups=everything.groups
    )
    if data.calibration is not None:  # errors in it are reported now, not after the training
        held_out(recipe, everything.label_names, download=download)
    if data.test is not None:
        _same_classes(recipe, everything.label_names, download)
    has_ood_term = recipe.objective.uses_ood
    load_out = functools.partial(
        out_distribution.load, size=data.frame, channels=data.channels, seed=recipe.seed, download=download
    )
    out = load_out(data.outside, exclude=data.exclude) if has_ood_term else None
    out_test = None
    if data.outside_test:
        out_test = load_out(data.outside_test, exclude=data.exclude, must_exclude=False)
    return Splits(
        source_fingerprint=everything.fingerprint,
        train=everything.subset(keep),
        held_out=everything.subset(held),
        outside=out,
        outside_test=out_test,
    )


def leaks(splits: Splits) -> dict[str, int]:
    """Counts of held-out ID images that duplicate a training image, exactly or nearly (`near_duplicates`).

    Returns:
        "held_out": number of images compared; "outside.exact" and "outside.near": of these, the number with
        a copy among the OOD training images; "train.exact": with a copy in the training split.
    """
    sets = [splits.train, splits.held_out, *([splits.outside] if splits.outside is not None else [])]
    if sum(part.pixels.nbytes for part in sets) < CACHE_FROM_BYTES:
        return _leaks(splits)
    return remembered(["leaks", *(part.fingerprint for part in sets)], lambda: _leaks(splits))


def _leaks(splits: Splits) -> dict[str, int]:
    held = splits.held_out.pixels
    found = {"held_out": len(held)}
    if splits.outside is not None:
        pairs = images.near_duplicates(splits.outside.pixels, held)
        found["outside.exact"] = sum(pair.exact for pair in pairs)
        found["outside.near"] = sum(not pair.exact for pair in pairs)
    trained = {hashlib.sha256(image.tobytes()).digest() for image in splits.train.pixels}
    found["train.exact"] = sum(hashlib.sha256(image.tobytes()).digest() in trained for image in held)
    return found


def _same_classes(recipe: Recipe, names: tuple[str, ...], download: bool) -> None:
    """Raise SourceError if the class folders of the test split differ from those of the training split."""
    assert recipe.data.test is not None
    source = recipe.data.test
    if registry.find(source) is not None:
        return
    found = set(images.list_source(source).label_names)
    extra, missing = sorted(found - set(names)), sorted(set(names) - found)
    if found and (extra or missing):
        reason = (
            f'its class folder "{extra[0]}" is not in the training data ({recipe.data.train})'
            if extra
            else f'it lacks the class folder "{missing[0]}" of the training data ({recipe.data.train})'
        )
        raise SourceError(source, reason, "Training and test need the same class folders.")


def updates_per_epoch(count: int, batch_size: int) -> float:
    """Updates in which every ID image is used once; batches continue over the end of an epoch."""
    return count / batch_size


@functools.lru_cache(maxsize=2048)
def _small_permutation(n: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(n)


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(n)


def indices(n: int, batch: int, update: int, seed: int, stream: int) -> np.ndarray:
    """(batch,) indices of update number `update`: consecutive slices of endlessly many shuffled epochs."""
    first = update * batch
    parts, wanted = [], batch
    while wanted:
        epoch, at = divmod(first, n)
        part = _permutation(n, seed, stream, epoch)[at : at + wanted]
        parts.append(part)
        first, wanted = first + len(part), wanted - len(part)
    return np.concatenate(parts)


def balanced_indices(labels: np.ndarray, batch: int, update: int, seed: int) -> np.ndarray:
    """(batch,) indices of update number `update`, every class equally often.

    The classes follow each other in shuffled rounds; the k-th turn of a class takes the k-th image of its own
    endlessly repeated, shuffled images.
    """
    order = np.argsort(labels, kind="stable")
    classes, sizes = np.unique(labels, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    positions = np.arange(update * batch, (update + 1) * batch)
    out = np.empty(batch, dtype=np.int64)
    for place, position in enumerate(positions):
        turn, at = divmod(int(position), len(classes))
        c = int(_small_permutation(len(classes), seed, _CLASSES, turn)[at])
        epoch, k = divmod(turn, int(sizes[c]))
        out[place] = order[starts[c] + _small_permutation(int(sizes[c]), seed, _CLASSES + 1 + c, epoch)[k]]
    return out


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes,) float32: N / (K n_c) for n_c images of class c, so that the mean over images is 1."""
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))).astype(np.float32)


def to_float(pixels: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32 in [0, 1], channels_last in memory."""
    x = torch.as_tensor(np.ascontiguousarray(pixels) if isinstance(pixels, np.ndarray) else pixels)
    return x.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def batch_at(
    update: int,
    recipe: Recipe,
    train: Images,
    out: Images | None,
    fill: Tensor,
    device: torch.device | str = "cpu",
    held: tuple[Held, Held | None] | None = None,
    share: Share = WHOLE,
) -> Batch:
    """The batch of one update, or a process's share of it: the same images, joined in order of the ranks.

    Args:
        fill: (C,) uint8, the mean color, for padding and Cutout.
        held: the pixels of `train` and `out` where they are held (`hold`); by default in `train` and `out`.
    """
    optim, spec = recipe.optim, recipe.data.augment
    assert train.labels is not None
    inside, outside = held or (train.pixels, None if out is None else out.pixels)
    if recipe.data.balance == "sampling":
        picked = balanced_indices(train.labels, optim.batch_size, update, recipe.seed)
    else:
        picked = indices(len(train), optim.batch_size, update, recipe.seed, _IN)
    x_in = _view(inside, picked, spec, (recipe.seed, update, _IN), fill, device, share)
    y_in = torch.from_numpy(train.labels[picked[share.rows(len(picked))]]).to(device)
    x_out = None
    if out is not None:
        assert outside is not None
        chosen = indices(len(out), optim.batch_size_out, update, recipe.seed, _OUT)
        x_out = _view(outside, chosen, spec, (recipe.seed, update, _OUT), fill, device, share)
    return Batch(x_in=x_in, y_in=y_in, x_out=x_out)


def hold(pixels: np.ndarray, device: torch.device) -> Held:
    """8-bit pixels in the memory of a GPU if they take less than half of what is free, else as they are.

    Then an update moves indices to the GPU instead of images.
    """
    if device.type != "cuda" or pixels.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return pixels
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(device)


def _view(
    pixels: Held,
    index: np.ndarray,
    spec: Augment,
    key: tuple[int, ...],
    fill: Tensor,
    device: torch.device | str,
    share: Share,
) -> Tensor:
    count, rows = len(index), share.rows(len(index))
    index = index[rows]
    if isinstance(pixels, Tensor):
        picked = pixels[torch.from_numpy(index).to(pixels.device, non_blocking=True)]
    else:
        picked = torch.from_numpy(np.ascontiguousarray(pixels[index]))
    x = picked.to(device).permute(0, 3, 1, 2)
    generator = torch.Generator(device=device).manual_seed(seed_from_key(*key))
    x = augment(x.contiguous(), spec, PartOfBatch(generator=generator, count=count, rows=rows), fill)
    return x.to(memory_format=torch.channels_last).float().div_(255)


def stream(
    recipe: Recipe,
    train: Images,
    out: Images | None,
    fill: Tensor,
    *,
    start: int,
    stop: int,
    device: torch.device | str = "cpu",
    share: Share = WHOLE,
) -> Generator[Batch, None, None]:
    """Batches `start` to `stop - 1`, the next one prepared in a thread while the current one is used."""

    where = torch.device(device)
    held = hold(train.pixels, where), None if out is None else hold(out.pixels, where)

    def make(updates: Sequence[int]) -> Batch:
        return batch_at(updates[0], recipe, train, out, fill, device, held, share)

    # A daemon thread: a batch that takes forever does not keep an interrupted process alive.
    batches = map_batches(range(start, stop), make, batch=1, workers=1, ahead=0, name="batches")
    with contextlib.closing(batches):
        yield from batches
