"""A second model that scores the counterfactuals of the evaluated ones (transfer)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ratioctl import metrics
from ratioctl.data import image_set
from ratioctl.errors import UsageError
from ratioctl.package import ModelPackage

if TYPE_CHECKING:
    from ratioctl.models.device import ComputeConfig


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """`predict` maps images (N, H, W, C) uint8 to logits (N, K); classes are matched by name."""

    package: ModelPackage
    predict: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, package: ModelPackage, judged: Sequence[ModelPackage], compute: ComputeConfig) -> Judge:
        """Raises UsageError where a judged model has a class that the judge does not have."""
        from ratioctl.models.predict import predictor

        for one in judged:
            unknown = [label for label in one.label_names if label not in package.label_names]
            if unknown:
                raise UsageError(
                    f"--judge {package.name}",
                    f'does not know the class "{unknown[0]}" of {one.name}',
                    "Use a judge that was trained on the same classes.",
                )
        return cls(package=package, predict=predictor(package, compute.device).predict)

    def confidences(self, pictures: np.ndarray, label: str) -> tuple[np.ndarray, np.ndarray]:
        """p_label (N,) of pictures (N, H, W, C) uint8, and whether `label` is the judge's prediction (N,)."""
        channels, size = self.package.input_size[0], self.package.frame
        logits = self.predict(image_set.resize(pictures, size, channels))
        p = metrics.softmax(logits, self.package.temperature)
        at = self.package.label_names.index(label)
        return p[:, at], p.argmax(1) == at
