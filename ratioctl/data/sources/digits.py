"""scikit-learn's 1,797 handwritten digits, 8x8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ratioctl.data.registry import SourceRequest, register_source

if TYPE_CHECKING:
    from ratioctl.data.image_set import Images


@register_source(
    "digits", usage="digits, digits:train, digits:test", description="scikit-learn's handwritten digits, 8x8"
)
def digits(request: SourceRequest) -> Images:
    """Every fifth image of a class (in order) belongs to the test split."""
    import numpy as np
    from sklearn.datasets import load_digits

    split = request.choose("train", "test", "")
    data = load_digits()
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = data.target.astype(np.int64)
    position = np.zeros(len(labels), dtype=int)
    for c in range(10):
        position[labels == c] = np.arange((labels == c).sum())
    test = position % 5 == 4
    chosen = {"": np.ones(len(labels), bool), "train": ~test, "test": test}[split]
    return request.images(pixels[chosen], labels[chosen], tuple(str(c) for c in range(10)))
