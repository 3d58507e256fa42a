"""A look at photographs before training: what is there, and what would go wrong."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from ratioctl import images
from ratioctl.data import in_distribution, registry
from ratioctl.data.content_split import groups_of
from ratioctl.data.in_distribution import Images
from ratioctl.errors import ImageError, SourceError
from ratioctl.images import labelled
from ratioctl.utils.frame import Size
from ratioctl.utils.text import nfc, shown

SAMPLE = 400  # images whose files are looked at
COMPARED = 2000  # test and OOD images compared with the training images for duplicates
FEW = 30  # training images of a class, below which it is mentioned
UNEVEN = 3  # ratio of the largest to the smallest class, from which classes are balanced
MUCH_CUT = 0.2  # share of a picture outside of the centre square, from which padding is proposed
_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation", "dev", "eval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of a sample of the files.

    Attributes:
        short_side: median in pixels; cut: median share of the pixels outside of the centre square.
        channels: 1 where every file is gray, else 3.
        bit_depth: bits that images with 16 bits per pixel fill, where none of them fills over 14; else None.
        notes: findings, in sentences.
    """

    short_side: int
    cut: float
    channels: int
    bit_depth: int | None = None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """What the photographs hold at the size of training.

    Attributes:
        train, test: SOURCEs; parts of the photographs where they have no split of their own.
        labels, counts: of the training images.
        excluded: class folders of the OOD sources that have the name of a class.
        findings: in sentences; nothing of it prevents training.
    """

    train: str
    test: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    excluded: tuple[str, ...]
    findings: tuple[str, ...]

    @property
    def uneven(self) -> bool:
        return max(self.counts) >= UNEVEN * min(self.counts)


def parts(photos: str) -> tuple[str, str]:
    """The training and test SOURCEs of photographs: their splits, or parts by content where there are none.

    Raises:
        SourceError: missing, or splits without a training split.
    """
    if registry.find(photos) is not None:
        if photos.endswith(":train"):
            return photos, photos.removesuffix("train") + "test"
        return f"split:train:{photos}", f"split:test:{photos}"
    splits = images.splits_of(photos)
    if not splits:
        return f"split:train:{photos}", f"split:test:{photos}"
    by_name = {name.lower(): name for name in reversed(splits)}
    train = next((by_name[name] for name in _TRAIN if name in by_name), None)
    test = next((by_name[name] for name in _TEST if name in by_name), None)
    if train is None or test is None:
        step = f"Name the folder to train on, for example {photos}:{splits[0]}."
        raise SourceError(photos, f"has the splits {', '.join(splits)}, no pair of train and test", step)
    return f"{photos}:{train}", f"{photos}:{test}"


def shapes(source: str) -> Shapes:
    """Sizes, channels and bit depth of a sample of the files of a SOURCE. Raises SourceError."""
    if registry.find(source) is not None:
        some = in_distribution.load(source, 64, 3).pixels[:SAMPLE]
        no_color = bool((some.max(axis=3) == some.min(axis=3)).all())
        return Shapes(short_side=64, cut=0.0, channels=1 if no_color else 3, notes=())
    sides, cuts, gray_of, deep = [], [], collections.defaultdict(list), 0
    bits: list[int] = []
    for name, data in labelled.sample(source, SAMPLE):
        try:
            found = images.decode(data, 16, name=name)
        except ImageError:
            continue  # reported where all are read
        short, long = sorted((found.width, found.height))
        sides.append(short)
        cuts.append(1 - short / long)
        flat = found.pixels.max(axis=2).astype(int) - found.pixels.min(axis=2) <= 2
        gray_of[name.split("/", 1)[0]].append(bool(flat.all()))
        bits += [int(m[1]) for note in found.notes if (m := re.search(images.NARROW + r" (\d+)", note))]
        deep += any("scaled from 1" in note for note in found.notes)
    if not sides:
        raise SourceError(source, "has no readable image among the first ones", "Check the files.")
    share = {name: float(np.mean(values)) for name, values in gray_of.items()}
    gray = float(np.mean([value for values in gray_of.values() for value in values]))
    notes = []
    if 0 < gray < 1:
        notes.append(f"{gray:.0%} of the images are gray and the others in color; all are read as RGB")
        if max(share.values()) - min(share.values()) > 0.5:
            most, least = max(share, key=lambda k: share[k]), min(share, key=lambda k: share[k])
            notes.append(
                f"{share[most]:.0%} of {shown(most)} are gray and {share[least]:.0%} of {shown(least)}: "
                "a model may learn the color instead of the class"
            )
    if deep:
        notes.append(f"{deep} of {len(sides)} images have 16 bits per pixel; they are scaled to 8")
    bit_depth = max(bits) if bits and len(bits) == deep else None
    if bit_depth is not None:
        notes.append(
            f"they fill {bit_depth} bits only, which are scaled to the full range (data.bit_depth); the "
            "window of a viewer may suit them better"
        )
    elif bits:
        notes.append(
            f"{len(bits)} of them fill fewer bits and look nearly black: convert them to 8 bits with the "
            "window that a viewer uses"
        )
    return Shapes(
        short_side=int(np.median(sides)),
        cut=float(np.median(cuts)),
        channels=1 if gray == 1 else 3,
        bit_depth=bit_depth,
        notes=tuple(notes),
    )


def survey(
    photos: str, outside: Sequence[str], size: Size, channels: int, *, download: bool = False
) -> Survey:
    """Classes, duplicates and overlaps, from all images at the size of training (which fills the cache).

    Raises:
        SourceError: one class only, a class with too few images, or labels that differ by case or spaces.
    """
    train, test = parts(photos)
    everything = None
    if train.startswith("split:"):
        everything = in_distribution.load_labelled(photos, size, channels, download=download)
        check_classes(photos, everything, least=4)
    inside = in_distribution.load_labelled(train, size, channels, download=download)
    check_classes(train, inside, least=2)
    held = in_distribution.load_labelled(test, size, channels, inside.label_names, download=download)
    assert inside.labels is not None
    counts = np.bincount(inside.labels, minlength=len(inside.label_names))
    findings = in_distribution.unreadable({train: everything or inside})
    few = [f"{shown(inside.label_names[c])} ({n})" for c, n in enumerate(counts) if n < FEW]
    if few:
        findings.append(
            f"classes with fewer than {FEW} training images: {', '.join(few[:8])}"
            + (f" and {len(few) - 8} more" if len(few) > 8 else "")
        )
    if max(counts) >= UNEVEN * min(counts):
        findings.append(f"the largest class has {max(counts)} images, the smallest {min(counts)}")
    if everything is not None:
        findings += _duplicates(everything)
    else:
        findings += _across(inside, held)
    excluded: list[str] = []
    for source in outside:
        same, notes = _overlap(source, inside, size, channels, download)
        excluded += same
        findings += notes
    return Survey(
        train=train,
        test=test,
        labels=inside.label_names,
        counts=tuple(int(n) for n in counts),
        excluded=tuple(dict.fromkeys(excluded)),
        findings=tuple(findings),
    )


def check_classes(source: str, found: Images, *, least: int) -> None:
    """Raise SourceError for class names that differ by case or spaces only, and for too small classes."""
    assert found.labels is not None
    by_key: dict[str, str] = {}
    for name in found.label_names:
        other = by_key.setdefault(_key(name), name)
        if other != name:
            reason = f"has the classes {other!r} and {name!r}, which differ by case or spaces only"
            raise SourceError(source, reason, "Merge them, or rename one.")
    counts = np.bincount(found.labels, minlength=len(found.label_names))
    small = [f"{shown(found.label_names[c])!r} has {n}" for c, n in enumerate(counts) if n < least]
    if small:
        reason = f"has too few images of a class: {', '.join(small[:5])}"
        step = f"At least {least} are needed to train, calibrate and test. Add images or remove the class."
        raise SourceError(source, reason, step)


def _key(name: str) -> str:
    return " ".join(nfc(name).casefold().split())


def _duplicates(everything: Images) -> list[str]:
    """Near duplicates within photographs that are parted here."""
    groups = groups_of(everything)
    labels = everything.labels
    assert labels is not None
    copies = [int(k) for k in np.flatnonzero(groups != np.arange(len(groups)))]
    if not copies:
        return []

    def pair(k: int) -> str:
        names = everything.names
        return f"for example {shown(names[k])} and {shown(names[groups[k]])}" if names else f"number {k}"

    found = [
        f"{len(copies)} images are near duplicates of others ({pair(copies[0])}); each stays with its copies "
        "on one side of the split"
    ]
    mixed = [k for k in copies if labels[k] != labels[groups[k]]]
    if mixed:
        found.append(f"{len(mixed)} near duplicates have two labels ({pair(mixed[0])})")
    return found


def _across(inside: Images, held: Images) -> list[str]:
    """Near duplicates of training images among test images."""
    some = held.subset(_some(len(held)))
    pairs = images.near_duplicates(inside.pixels, some.pixels)
    if not pairs:
        return []
    example = (
        f" (for example {shown(some.names[pairs[0].second])} and {shown(inside.names[pairs[0].first])})"
        if some.names and inside.names
        else ""
    )
    return [
        f"{len(pairs)} of {len(some)} test images duplicate a training image{example}: test figures will be "
        "too good"
    ]


def _overlap(
    source: str, inside: Images, size: Size, channels: int, download: bool
) -> tuple[list[str], list[str]]:
    """(class folders of an OOD source to exclude, findings)."""
    other = in_distribution.load(source, size, channels, download=download)
    known = {_key(name) for name in inside.label_names}
    same = [name for name in other.label_names if _key(name) in known]
    findings = in_distribution.unreadable({source: other})
    if same:
        findings.append(
            f"{source} has folders with the names of classes ({', '.join(map(shown, same[:8]))}): they are "
            "excluded"
        )
        if len(same) == len(other.label_names):
            step = "Name images of anything else, or leave it out."
            raise SourceError(source, "holds images of your classes only, which are no OOD images", step)
    some = inside.subset(_some(len(inside)))
    pairs = images.near_duplicates(other.pixels, some.pixels)
    if pairs:
        where = f", for example {shown(some.names[pairs[0].second])}" if some.names else ""
        findings.append(
            f"{len(pairs)} of {len(some)} training images have a near duplicate in {source}{where}: remove "
            "these there, or the model learns to be unsure of its own classes"
        )
    return same, findings


def _some(n: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(n)[:COMPARED])
