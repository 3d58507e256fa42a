"""Pictures that stand for images of anything else: dead leaves, fractals, shuffled patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np


def dead_leaves(count: int, size: int, channels: int, seed: int) -> Iterator[np.ndarray]:
    """Dead leaves (Lee, Mumford, Huang 2001; as training images Baradad et al. 2021): opaque shapes, each
    over the earlier ones, radii with density r^-3, which gives the scale invariance of natural images.

    Shapes are disks, rotated rectangles and triangles. Half of them carry a texture of oriented noise. Colors
    of an image scatter around a common one, as under one light. Drawn at twice the size, then averaged.
    """
    rng = np.random.default_rng([seed, 0x04])
    side = 2 * size
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    for _ in range(count):
        color = _palette(rng)
        picture = np.empty((side, side, 3), np.float32)
        picture[:] = color()
        low, high = side / 16, side / 1.5
        # Inverse of the distribution function of a density proportional to r^-3 on [low, high].
        u = rng.random(int(rng.integers(60, 200)))
        for r in (low**-2 - u * (low**-2 - high**-2)) ** -0.5:
            cx, cy = rng.uniform(-r / 2, side + r / 2, 2)
            left, right = max(0, int(cx - 1.5 * r)), min(side, int(cx + 1.5 * r) + 2)
            top, bottom = max(0, int(cy - 1.5 * r)), min(side, int(cy + 1.5 * r) + 2)
            dx, dy = x[top:bottom, left:right] - cx, y[top:bottom, left:right] - cy
            inside = _shape(dx, dy, r, rng)
            fill: np.ndarray = np.broadcast_to(color(), (*inside.shape, 3))
            if rng.random() < 0.5:
                fill = fill + _stripes(dx, dy, rng)[..., None]
            picture[top:bottom, left:right][inside] = fill[inside]
        yield _finished(picture * _shading(x, y, side, rng), size, channels)


def _palette(rng: np.random.Generator) -> Callable[[], np.ndarray]:
    """A generator of the colors of one picture: brightness varies most, hue around a common tint."""
    tint, contrast, chroma = rng.normal(0, 0.1, 3), rng.uniform(0.1, 0.35), rng.uniform(0.02, 0.15)
    middle = rng.uniform(0.3, 0.7)
    return lambda: np.clip(middle + rng.normal(0, contrast) + tint + rng.normal(0, chroma, 3), 0, 1).astype(
        np.float32
    )


def _shape(dx: np.ndarray, dy: np.ndarray, r: float, rng: np.random.Generator) -> np.ndarray:
    """Bool mask of a disk, a rectangle or a triangle of radius `r` around the origin, rotated at random."""
    angle, kind, squeeze = rng.uniform(0, 2 * np.pi), rng.integers(3), rng.uniform(0.3, 1)
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    if kind == 0:
        return np.asarray(u**2 + (v / squeeze) ** 2 <= r**2)
    if kind == 1:
        return (np.abs(u) <= 0.9 * r) & (np.abs(v) <= 0.9 * r * squeeze)
    return (v >= -0.5 * r) & (np.abs(u) * 1.732 <= r - v)


def _stripes(dx: np.ndarray, dy: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A texture around 0: three waves of random direction, frequency and phase."""
    texture = np.zeros_like(dx)
    for _ in range(3):
        angle, frequency, phase = rng.uniform(0, 2 * np.pi), rng.uniform(0.15, 1.5), rng.uniform(0, 2 * np.pi)
        texture += np.sin(frequency * (np.cos(angle) * dx + np.sin(angle) * dy) + phase)
    return texture * np.float32(rng.uniform(0.02, 0.12))


def _shading(x: np.ndarray, y: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """(side, side, 1) factors of a light that falls off in one direction."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0, 0.5) * (np.cos(angle) * (x / side - 0.5) + np.sin(angle) * (y / side - 0.5))
    return np.asarray(1 + slope, np.float32)[..., None]


def fractals(count: int, size: int, channels: int, seed: int) -> Iterator[np.ndarray]:
    """Flames of iterated function systems of 2 to 4 affine maps (Kataoka et al. 2020), on smooth backgrounds.

    Points are colored by the map that produced them; a map whose picture fills less than 2 % is drawn anew.
    """
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng([seed, 0x05])
    side = 2 * size
    for _ in range(count):
        palette = _palette(rng)
        for _ in range(8):
            density, color = _flame(side, palette, rng)
            if (density > 0).mean() >= 0.02:
                break
        alpha = np.clip(np.log1p(density) / np.log1p(np.quantile(density[density > 0], 0.9)), 0, 1)[..., None]
        noise = gaussian_filter(rng.standard_normal((side, side, 3)), (side / 8, side / 8, 0), mode="wrap")
        background = palette() + rng.uniform(0, 0.15) * noise / max(float(noise.std()), 1e-9)
        yield _finished((1 - alpha) * background + alpha * color, size, channels)


def _flame(
    side: int, color_of: Callable[[], np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(side, side) counts of the points that a random system visits, and their colors (side, side, 3)."""
    maps = int(rng.integers(2, 5))
    matrices = rng.uniform(-1, 1, (maps, 2, 2))
    # Singular values below 1: every map contracts.
    left, scale, right = np.linalg.svd(matrices)
    matrices = left * (np.clip(scale, 0.2, 0.85) * rng.uniform(0.8, 1, (maps, 1)))[:, None, :] @ right
    shifts, palette = rng.uniform(-1, 1, (maps, 2)), np.stack([color_of() for _ in range(maps)])
    weight = np.abs(np.linalg.det(matrices)) + 0.05
    walkers, steps = 256, 60
    at, color = rng.uniform(-1, 1, (walkers, 2)), np.repeat(palette[:1], walkers, axis=0)
    places, colors = [], []
    for step in range(steps):
        chosen = rng.choice(maps, walkers, p=weight / weight.sum())
        at = np.einsum("nij,nj->ni", matrices[chosen], at) + shifts[chosen]
        color = (color + palette[chosen]) / 2
        if step >= 10:
            places.append(at)
            colors.append(color)
    points, tints = np.concatenate(places), np.concatenate(colors)
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    cell = ((points - low) / np.maximum(high - low, 1e-9) * 0.9 + 0.05) * side
    inside = ((cell >= 0) & (cell < side)).all(1)
    index = cell[inside].astype(int) @ [1, side]
    density = np.bincount(index, minlength=side**2)
    sums = [np.bincount(index, weights=tints[inside, c], minlength=side**2) for c in range(3)]
    mean = np.stack(sums, axis=1) / np.maximum(density, 1)[:, None]
    return density.reshape(side, side).astype(float), mean.reshape(side, side, 3)


def _finished(picture: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Means over 2x2 pixels of a picture (2 size, 2 size, 3) in [0, 1], as (size, size, channels) uint8."""
    small = picture.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
    if channels == 1:
        small = small @ np.array([[0.299], [0.587], [0.114]])
    return np.rint(np.clip(small, 0, 1) * 255).astype(np.uint8)


def shuffled_patches(pixels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count, H, W, C) uint8: images cut into 2x2, 4x4 or 8x8 tiles, shuffled; every second one takes
    half of its tiles from another image. Local statistics stay those of the images, objects do not: at
    most a quarter of the tiles stay where they are.

    Tiles along the right and lower border that are cut short stay where they are.
    """
    rng = np.random.default_rng([seed, 0x06])
    height, width = pixels.shape[1:3]
    out = np.empty((count, *pixels.shape[1:]), np.uint8)
    for k in range(count):
        first, second = pixels[rng.integers(0, len(pixels), 2)]
        tiles = int(rng.choice([2, 4, 8]))
        h, w = max(1, height // tiles), max(1, width // tiles)
        rows, columns = height // h, width // w
        out[k] = first
        order = rng.permutation(rows * columns)
        while (order == np.arange(len(order))).sum() > len(order) // 4 and len(order) > 1:
            order = rng.permutation(rows * columns)  # one in 24 would leave four tiles where they are
        for place, taken in enumerate(order):
            origin = second if k % 2 and rng.random() < 0.5 else first
            (i, j), (a, b) = divmod(place, columns), divmod(int(taken), columns)
            out[k, i * h : (i + 1) * h, j * w : (j + 1) * w] = origin[
                a * h : (a + 1) * h, b * w : (b + 1) * w
            ]
    return out
