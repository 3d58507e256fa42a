"""Points of a ball as 8-bit pictures that are in the ball themselves, and their distances."""

from __future__ import annotations

import math

import numpy as np

_ROUNDING = 5e-7  # share of the radius kept free, so that no way of computing a distance finds it exceeded


def into_ball(z: np.ndarray, x0: np.ndarray, p: float, eps: float) -> np.ndarray:
    """A point of the box [0,1] moved into the ball around `x0`, float32: clipped for linf, else scaled.

    A millionth of the radius and of a pixel stay free, so that the fp32 point is inside.
    """
    change, inner = z.astype(np.float64) - x0, eps * (1 - 2e-6)
    if math.isinf(p):
        inner = max(inner - 1e-7, 0.0)
        return (x0 + np.clip(change, -inner, inner)).astype(np.float32)
    length = float(np.linalg.norm(change.ravel(), ord=p))
    inner = max(inner - 2e-7 * change.size ** (1 / p - 0.5), 0.0)
    return (x0 + change * min(1.0, inner / length if length else 0.0)).astype(np.float32).clip(0, 1)


def round_into_ball(x: np.ndarray, pixels: np.ndarray, p: float, eps: float) -> np.ndarray:
    """The 8-bit picture of a point of the ball, itself in the ball.

    To the nearest value; then, where that left the ball, pixels that were rounded away from the input go back
    by one, first those that rounding moved furthest, as few as are needed. (At the optimum of a smooth goal
    the loss of such a step is proportional to what it gains in the norm, so that only the rounding error
    tells the pixels apart.) With all of them back every pixel is at least as near to the input as in `x`, so
    this ends inside.

    Args:
        x: (C, H, W) float in [0,1], at most `eps` from `pixels` / 255 in the norm `p`.
        pixels: (H, W, C) uint8, the centre.
    Returns:
        (H, W, C) uint8, at most `eps` away, computed in float64.
    """
    centre = pixels.astype(np.int64)
    wanted = np.clip(x.astype(np.float64), 0, 1).transpose(1, 2, 0) * 255 - centre
    change = np.rint(wanted).astype(np.int64)
    sign, size = np.sign(change).ravel(), np.abs(change).ravel()
    if math.isinf(p):
        size = np.minimum(size, math.floor(min(eps, 1.0) * 255 * (1 + 1e-12)))
    else:
        limit = min(255 * eps * (1 - _ROUNDING), 1e6) ** p
        excess = (size**p).sum() - limit
        if excess > 0:
            up = size - np.abs(wanted).ravel()
            away = np.flatnonzero(up > 0)
            away = away[np.argsort(-up[away], kind="stable")]
            gains = (size[away] ** p - (size[away] - 1) ** p).cumsum()
            size[away[: np.searchsorted(gains, excess) + 1]] -= 1
        while size.any() and (size**p).sum() > limit:  # only where `x` itself was outside, by rounding
            size[size.argmax()] -= 1
    return (centre + (sign * size).reshape(centre.shape)).astype(np.uint8)


def distances(picture: np.ndarray, pixels: np.ndarray) -> dict[str, float]:
    """ "l1", "l1.5", "l2" and "linf" between two uint8 images of one shape, pixels in [0,1], in float64."""
    size = np.abs(picture.astype(np.int64) - pixels.astype(np.int64)).ravel()
    return {
        "l1": float(size.sum() / 255),
        "l1.5": float((size**1.5).sum() ** (2 / 3) / 255),
        "l2": float(math.sqrt(int((size**2).sum())) / 255),
        "linf": float(size.max(initial=0) / 255),
    }
