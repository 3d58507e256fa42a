"""Generated images without labels: noise, crops of photographs, synthetic pictures, shuffled patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ratioctl.data.registry import SourceRequest, register_source
from ratioctl.errors import SourceError

if TYPE_CHECKING:
    import numpy as np

    from ratioctl.data.image_set import Images

NOISE_IMAGES = 2000  # where the caller names no number
PHOTO_CROPS = 4000
SYNTHETIC_IMAGES = 2000
NOISE = ("uniform", "smooth")
PHOTOS = ("china", "flower")
SYNTHETIC = ("dead-leaves", "fractal")


@register_source("noise", usage="noise:uniform, noise:smooth", description="uniform or smoothed noise")
def noise(request: SourceRequest) -> Images:
    make = {"uniform": uniform_noise, "smooth": smooth_noise}[request.choose(*NOISE)]
    return request.images(make(request.count or NOISE_IMAGES, request.side, request.channels, request.seed))


@register_source(
    "photos",
    usage="photos:china, photos:flower",
    description="random crops of scikit-learn's two sample photographs",
)
def photos(request: SourceRequest) -> Images:
    name = request.choose(*PHOTOS)
    count = request.count or PHOTO_CROPS
    return request.images(photo_crops(name, count, request.side, request.channels, request.seed))


def uniform_noise(count: int, size: int, channels: int, seed: int) -> np.ndarray:
    """(count, size, size, channels) uint8, every value drawn uniformly: the paper's "Uni. Noise"."""
    import numpy as np

    rng = np.random.default_rng([seed, 0x01])
    return rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def smooth_noise(count: int, size: int, channels: int, seed: int) -> np.ndarray:
    """Low-frequency noise (Hein et al. 2019): uniform noise, Gaussian blur of 1 to 2.5 pixels at 32x32,
    stretched to the full range of each image.

    The paper smooths uniform noise and permuted training pixels; permuted pixels need a training set,
    so the built-in set is the uniform half.
    """
    import numpy as np
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng([seed, 0x02])
    out = np.empty((count, size, size, channels), np.uint8)
    for k in range(count):
        noise = rng.random((size, size, channels))
        sigma = rng.uniform(1.0, 2.5) * size / 32
        noise = gaussian_filter(noise, sigma=(sigma, sigma, 0), mode="wrap")
        low, high = noise.min(), noise.max()
        out[k] = np.rint((noise - low) / max(high - low, 1e-12) * 255)
    return out


def photo_crops(name: str, count: int, size: int, channels: int, seed: int) -> np.ndarray:
    """Random square crops of a scikit-learn sample photograph, side `size` to 240 pixels, resized."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
    photo = photo.convert("RGB" if channels == 3 else "L")
    rng = np.random.default_rng([seed, 0x03])
    out = np.empty((count, size, size, channels), np.uint8)
    largest = min(240, *photo.size)
    for k in range(count):
        side = int(np.exp(rng.uniform(np.log(min(size, largest)), np.log(largest))))
        left = int(rng.integers(0, photo.width - side + 1))
        top = int(rng.integers(0, photo.height - side + 1))
        crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out[k] = np.asarray(crop).reshape(size, size, channels)
    return out


@register_source(
    "synthetic",
    usage="synthetic:dead-leaves, synthetic:fractal",
    description="generated pictures: overlapping shapes, or fractals",
)
def synthetic(request: SourceRequest) -> Images:
    from ratioctl.data import generated
    from ratioctl.images import cache

    name = request.choose(*SYNTHETIC)
    make = {"dead-leaves": generated.dead_leaves, "fractal": generated.fractals}[name]
    count, shape = request.count or SYNTHETIC_IMAGES, (request.side, request.side, request.channels)
    facts = ["synthetic", 1, name, count, shape, request.seed]
    pictures = make(count, request.side, request.channels, request.seed)
    return request.images(cache.generated(facts, shape, request.source, pictures))


@register_source(
    "patches",
    usage="patches:SOURCE",
    description="images of a SOURCE cut into tiles that are shuffled, within an image or between two",
)
def patches(request: SourceRequest) -> Images:
    from ratioctl.data import generated, in_distribution

    if not request.argument:
        raise SourceError(
            request.source, "names no images", "Use patches:SOURCE, for example patches:photos."
        )
    inner = in_distribution.load(
        request.argument, request.size, request.channels, seed=request.seed, download=request.download
    )
    return request.images(
        generated.shuffled_patches(inner.pixels, request.count or SYNTHETIC_IMAGES, request.seed)
    )
