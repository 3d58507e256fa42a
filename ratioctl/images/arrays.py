"""Conversions between 8-bit images and float pixels."""

from __future__ import annotations

import hashlib

import numpy as np


def to_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], contiguous: exactly value / 255."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"expected uint8 (N, H, W, C), got {images.dtype} {images.shape}")
    out = np.empty((images.shape[0], images.shape[3], *images.shape[1:3]), dtype=np.float32)
    np.divide(images.transpose(0, 3, 1, 2), np.float32(255), out=out)
    return out


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float (N, C, H, W) in [0, 1] -> uint8 (N, H, W, C), rounded to nearest, values outside clipped.

    Raises:
        ValueError: NaN, or not four axes.
    """
    if pixels.ndim != 4:
        raise ValueError(f"expected (N, C, H, W), got {pixels.shape}")
    if np.isnan(pixels).any():
        raise ValueError("pixels hold NaN")
    scaled = np.rint(np.clip(pixels, 0, 1) * 255)
    return np.ascontiguousarray(scaled.transpose(0, 2, 3, 1).astype(np.uint8))


def pixels_sha256(pixels: np.ndarray) -> str:
    """SHA-256 over shape and bytes of an image's 8-bit input: what seeds its random numbers."""
    if pixels.dtype != np.uint8:
        raise ValueError(f"expected uint8, got {pixels.dtype}")
    head = "x".join(str(n) for n in pixels.shape) + "\n"
    return hashlib.sha256(head.encode("ascii") + np.ascontiguousarray(pixels).tobytes()).hexdigest()
