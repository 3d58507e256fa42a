"""Data sets that torchvision downloads into the cache folder."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from ratioctl.data.registry import SourceRequest, register_source
from ratioctl.errors import SourceError

if TYPE_CHECKING:
    from ratioctl.data.image_set import Images


def _load(request: SourceRequest, class_name: str) -> Images:
    import numpy as np
    import torchvision.datasets as sets

    from ratioctl.images import cache_dir

    split = request.choose("train", "test")
    name = request.source.partition(":")[0]
    root = cache_dir() / "torchvision" / name
    options = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        if request.download:
            root.mkdir(parents=True, exist_ok=True)
        data = getattr(sets, class_name)(root=str(root), download=request.download, **options)
    except (RuntimeError, OSError) as error:
        reason = f"could not be downloaded: {error}" if request.download else f"is not in {root}"
        step = "Check the connection and try again." if request.download else "Add --download to fetch it."
        raise SourceError(request.source, reason, step) from None
    pixels = np.asarray(data.data)
    if name == "svhn":
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    labels = np.asarray(data.labels if name == "svhn" else data.targets, dtype=np.int64)
    return request.images(
        pixels, labels, tuple(getattr(data, "classes", None) or [str(c) for c in range(10)])
    )


for _class in ("CIFAR10", "CIFAR100", "SVHN", "MNIST", "FashionMNIST"):
    _name = _class.lower()
    register_source(
        _name, usage=f"{_name}:train, {_name}:test", description=f"torchvision's {_class} (--download)"
    )(functools.partial(_load, class_name=_class))
