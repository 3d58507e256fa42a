"""Image classifiers that report when they do not know: training, OOD scores, visual counterfactuals.

    import ratioctl

    clf = ratioctl.Classifier.from_pretrained("cifar10-ratio")
    clf.predict("cat.jpg").is_ood
    clf.explain("cat.jpg", target="dog", eps="0.5..3").image

The commands of the command line are functions with the same names, options and defaults. Importing this
package loads neither torch nor numpy; names are imported when they are first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ratioctl._version import __version__

if TYPE_CHECKING:
    from ratioctl.api import (
        calibrate,
        counterfactual,
        evaluate,
        export,
        load_model,
        ood_score,
        package_checkpoint,
        train,
    )
    from ratioctl.attacks import goals
    from ratioctl.attacks.engine import perturb
    from ratioctl.classifier import Classifier, ImageExplanation, Predictions
    from ratioctl.errors import (
        DiskError,
        ImageError,
        Interrupted,
        OutputError,
        PackageError,
        RatioctlError,
        RecipeError,
        SourceError,
        TrainingError,
        UncalibratedError,
        UsageError,
    )
    from ratioctl.recipe import Attack, Ball
    from ratioctl.types import (
        Counterfactual,
        Evaluation,
        Explanation,
        Measurement,
        Prediction,
        Report,
        ScoreRow,
    )

_NAMES = {
    "ratioctl.api": "calibrate counterfactual evaluate export load_model ood_score package_checkpoint train",
    "ratioctl.attacks.engine": "perturb",
    "ratioctl.attacks.goals": "goals",
    "ratioctl.classifier": "Classifier ImageExplanation Predictions",
    "ratioctl.errors": "DiskError ImageError Interrupted OutputError PackageError RatioctlError RecipeError "
    "SourceError TrainingError UncalibratedError UsageError",
    "ratioctl.recipe": "Attack Ball",
    "ratioctl.types": "Counterfactual Evaluation Explanation Measurement Prediction Report ScoreRow",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "Attack",
    "Ball",
    "Classifier",
    "Counterfactual",
    "DiskError",
    "Evaluation",
    "Explanation",
    "ImageError",
    "ImageExplanation",
    "Interrupted",
    "Measurement",
    "OutputError",
    "PackageError",
    "Prediction",
    "Predictions",
    "RatioctlError",
    "RecipeError",
    "Report",
    "ScoreRow",
    "SourceError",
    "TrainingError",
    "UncalibratedError",
    "UsageError",
    "__version__",
    "calibrate",
    "counterfactual",
    "evaluate",
    "export",
    "goals",
    "load_model",
    "ood_score",
    "package_checkpoint",
    "perturb",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULE_OF[name])
    value = module if module.__name__.endswith(f".{name}") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
