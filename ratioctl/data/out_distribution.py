"""Out-of-distribution (OOD) images: any SOURCE, labels dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from ratioctl.data import in_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError, UsageError
from ratioctl.images.rows import joined
from ratioctl.utils.frame import Size
from ratioctl.utils.text import nfc

BUILT_IN = {"uniform noise": "noise:uniform", "smooth noise": "noise:smooth"}  # the default sets
GENERATED = ("photos:china", "photos:flower", "noise:uniform", "noise:smooth")  # what is always available


def load(
    sources: Sequence[str],
    size: Size,
    channels: int = 3,
    *,
    exclude: Sequence[str] = (),
    must_exclude: bool = True,
    seed: int = 0,
    count: int | None = None,
    download: bool = False,
) -> Images:
    """OOD images of one or several SOURCEs.

    Args:
        sources: as on the command line.
        exclude: class folders to leave out; each must exist in at least one source if `must_exclude`.
        seed, count: of generated images (noise, photos).

    Raises:
        SourceError: missing source or unknown name, an excluded class that no source has, or none left.
    """
    parts = [
        in_distribution.load(source, size, channels, seed=seed, count=count, download=download)
        for source in sources
    ]
    if not parts:
        raise SourceError("OOD images", "no source given", "Name a folder, an archive or noise:uniform.")
    exclude = [nfc(name) for name in exclude]
    seen = {nfc(name) for part in parts for name in part.label_names}
    missing = [name for name in exclude if name not in seen]
    if missing and must_exclude:
        raise SourceError(
            f'excluded class "{missing[0]}"',
            "is in none of the OOD sources",
            "Class names are folder names; remove it or correct it.",
        )
    kept = [_without(part, exclude) for part in parts]
    if not any(len(part) for part in kept):
        raise SourceError(", ".join(sources), "has no images left", "Exclude fewer classes (data.exclude).")
    pixels = joined([part.pixels for part in kept])
    digest = hashlib.sha256("".join(part.fingerprint for part in kept).encode()).hexdigest()
    return Images(
        pixels=pixels,
        labels=None,
        label_names=(),
        fingerprint=kept[0].fingerprint if len(kept) == 1 else digest,
        source=", ".join(sources),
        errors=tuple(error for part in kept for error in part.errors),
        names=tuple(name for part in kept for name in part.names) if all(p.names for p in kept) else (),
    )


def named(ood: Sequence[str] | Mapping[str, str], data: str) -> dict[str, str]:
    """SOURCEs by name, from "NAME=SOURCE" each or a mapping; the built-in noise if there are none.

    Args:
        data: SOURCE of the ID images, whose short name is reserved.

    Raises:
        UsageError: not NAME=SOURCE, or a name that is given twice or reserved.
    """
    pairs = list(ood.items()) if isinstance(ood, Mapping) else [_pair(text) for text in ood]
    taken = {
        "mean": "is the name of the average",
        in_distribution.short_name(data): "is the name of the ID images",
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


def _without(part: Images, exclude: Sequence[str]) -> Images:
    drop = [k for k, name in enumerate(part.label_names) if nfc(name) in exclude]
    if not drop or part.labels is None:
        return part
    return part.subset(np.flatnonzero(~np.isin(part.labels, drop)))
