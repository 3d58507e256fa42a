"""8-bit images to logits with torch in fp32: the reference for every score that is shown."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratioctl.images import to_pixels
from ratioctl.models.certified import guaranteed_log_odds, head_of, upper_bound
from ratioctl.models.folding import fold_batchnorm
from ratioctl.models.network import Classifier, from_package
from ratioctl.package import ModelPackage

_CHUNK = 128


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A package's classifier for scoring."""

    network: Classifier
    device: torch.device

    def exact(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [0,1] on the device -> logits (B, K) in full fp32, differentiable.

        Every decision and every score is computed from these.
        """
        with _without_tf32(self.device):
            return self.network(x).float()

    @torch.inference_mode()
    def guaranteed_log_odds(self, x: Tensor, eps: float, temperature: float) -> np.ndarray:
        """Log-odds (B,) float64 that the confidence cannot exceed in linf balls, of a certified head.

        Args:
            x: pixels (B, C, H, W) in [0,1] on the device.
            eps: radius of the balls.
            temperature: of the package.
        """
        with _without_tf32(self.device):
            upper = upper_bound(self.network, x, eps)
        head = head_of(self.network)
        assert head is not None
        return guaranteed_log_odds(upper, head.num_classes, temperature).cpu().numpy()

    def guaranteed(self, images: np.ndarray, eps: float, temperature: float) -> np.ndarray:
        """Confidence (N,) float64 that nothing in the linf balls around uint8 (N, H, W, C) exceeds.

        Args: as of `guaranteed_log_odds`.
        """
        parts = []
        for start in range(0, len(images), _CHUNK):
            x = torch.from_numpy(to_pixels(images[start : start + _CHUNK])).to(self.device)
            parts.append(self.guaranteed_log_odds(x, eps, temperature))
        return 1 / (1 + np.exp(-np.concatenate(parts)))

    @torch.inference_mode()
    def predict(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, C) or float32 (N, C, H, W) in [0,1] -> logits (N, K) float32."""
        parts = []
        for start in range(0, len(images), _CHUNK):
            part = torch.from_numpy(np.ascontiguousarray(images[start : start + _CHUNK])).to(self.device)
            if part.dtype == torch.uint8:
                part = part.permute(0, 3, 1, 2).float().div_(255)
            parts.append(self.exact(part).cpu().numpy())
        if not parts:
            return np.empty((0, 0), np.float32)
        return np.concatenate(parts)


@contextlib.contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Full fp32 convolutions and products on a GPU: TF32, cuDNN's default, differs by more than 1e-4."""
    if device.type != "cuda":
        yield
        return
    if hasattr(torch.backends.cudnn, "conv"):  # torch 2.9 and later; the two interfaces must not be mixed
        holders: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
        name, exact = "fp32_precision", "ieee"
    else:
        holders, name, exact = [torch.backends.cudnn, torch.backends.cuda.matmul], "allow_tf32", False  # type: ignore[assignment]
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, exact)
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            setattr(holder, name, value)


def predictor(model: ModelPackage | Classifier, device: str | torch.device = "cpu") -> Predictor:
    """A `Predictor` of a package or a classifier, in fp32 regardless of the precision of attacks."""
    network = from_package(model, device) if isinstance(model, ModelPackage) else model
    return Predictor(network=fold_batchnorm(network).to(device), device=torch.device(device))
