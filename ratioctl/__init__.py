"""Image classifiers that can be trusted and questioned.

The commands of the command line are functions here, with the same names, options and defaults. Importing
this package loads neither torch nor numpy; names are imported when they are first used (PEP 562).

    import ratioctl

    package = ratioctl.train("digits-ratio")
    ratioctl.counterfactual(["cat.jpg"], target="dog", eps="0.5..3", model="cifar10-ratio")
    model = ratioctl.load_model("cifar10-ratio")    # pixels (N, C, H, W) in [0,1] -> logits (N, K)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ratioctl._version import __version__

if TYPE_CHECKING:
    from ratioctl.api import calibrate, counterfactual, evaluate, export, load_model, ood_score, train

_EXPORTS = {
    "calibrate": "ratioctl.api",
    "counterfactual": "ratioctl.api",
    "evaluate": "ratioctl.api",
    "export": "ratioctl.api",
    "load_model": "ratioctl.api",
    "ood_score": "ratioctl.api",
    "train": "ratioctl.api",
}

__all__ = [
    "__version__",
    "calibrate",
    "counterfactual",
    "evaluate",
    "export",
    "load_model",
    "ood_score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
