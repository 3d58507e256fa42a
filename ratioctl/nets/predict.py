"""The fp32 road from 8-bit images to logits with torch: the reference every shown score comes from."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from ratioctl.nets.classifier import Classifier, from_package, frozen
from ratioctl.package import ModelPackage

_CHUNK = 128


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A package's classifier for scoring; `predict` is what `score` asks of any model."""

    network: Classifier
    device: torch.device

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, C) or float32 (N, C, H, W) in [0,1] -> logits (N, K) float32."""
        parts = []
        for start in range(0, len(images), _CHUNK):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + _CHUNK])).to(self.device)
            if part.dtype == torch.uint8:
                part = part.permute(0, 3, 1, 2).float().div_(255)
            parts.append(self.network(part).float().cpu().numpy())
        if not parts:
            return np.empty((0, 0), np.float32)
        return np.concatenate(parts)


def predictor(model: ModelPackage | Classifier, device: str | torch.device = "cpu") -> Predictor:
    """A `Predictor` of a package or a classifier, in fp32 whatever the precision of attacks."""
    network = from_package(model, device) if isinstance(model, ModelPackage) else model
    return Predictor(network=frozen(network).to(device), device=torch.device(device))
