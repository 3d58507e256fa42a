"""AutoAugment (Cubuk et al. 2019) of a whole batch on its device.

The learned sub-policies are torchvision's tables and the operations its functions. All random numbers are
drawn from one generator, so a batch depends on its seed alone and not on the global generator.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torchvision.transforms.v2.functional as ops
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode

from ratioctl.data.draws import Draws, Numbers

Policy = Literal["cifar10", "svhn", "imagenet"]
SIGNED = frozenset(
    {
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
        "Brightness",
        "Color",
        "Contrast",
        "Sharpness",
    }
)


@functools.cache
def policies(name: Policy) -> list[tuple[tuple[str, float, int | None], ...]]:
    """The 25 sub-policies: two (operation, probability, magnitude 0..9) each."""
    return list(AutoAugment(AutoAugmentPolicy(name)).policies)


def autoaugment(x: Tensor, name: Policy, generator: Numbers, fill: Tensor) -> Tensor:
    """One random sub-policy per image.

    Args:
        x: (N, C, H, W) uint8, C 1 or 3.
        fill: (C,) uint8, the color of pixels that a geometric operation leaves empty.
    """
    table = policies(name)
    n = x.shape[0]
    numbers = Draws(generator, n)
    chosen, draws = numbers.integers(len(table)), numbers.uniform(2)
    negative = numbers.uniform(2) < 0.5
    out = x.clone()
    paint = [float(v) for v in fill]
    for policy in range(len(table)):
        for slot, (operation, probability, magnitude) in enumerate(table[policy]):
            due = (chosen == policy) & (draws[:, slot] < probability)
            for sign in (False, True) if operation in SIGNED else (None,):
                mask = due if sign is None else due & (negative[:, slot] == sign)
                index = mask.nonzero().flatten()
                if len(index):
                    out[index] = apply(out[index], operation, magnitude, bool(sign), paint)
    return out


def apply(x: Tensor, operation: str, magnitude: int | None, negative: bool, fill: list[float]) -> Tensor:
    """One operation on (N, C, H, W) uint8; magnitudes 0..9 span the ranges of the paper's appendix A."""
    m = 0.0 if magnitude is None else magnitude / 9
    sign = -1.0 if negative else 1.0
    height, width = x.shape[-2:]
    if operation == "Rotate":
        return ops.rotate(x, 30 * m * sign, interpolation=InterpolationMode.NEAREST, fill=fill)
    if operation in ("ShearX", "ShearY", "TranslateX", "TranslateY"):
        shear = torch.rad2deg(torch.atan(torch.tensor(0.3 * m * sign))).item()
        move = 150 / 331 * m * sign
        return ops.affine(
            x,
            angle=0.0,
            translate=[
                int(move * width) if operation == "TranslateX" else 0,
                int(move * height) if operation == "TranslateY" else 0,
            ],
            scale=1.0,
            shear=[shear if operation == "ShearX" else 0.0, shear if operation == "ShearY" else 0.0],
            interpolation=InterpolationMode.NEAREST,
            fill=fill,
            center=[0.0, 0.0] if operation.startswith("Shear") else None,  # about the corner, as Pillow does
        )
    factor = 1 + 0.9 * m * sign
    if operation == "Brightness":
        return ops.adjust_brightness(x, factor)
    if operation == "Color":
        return ops.adjust_saturation(x, factor) if x.shape[1] == 3 else x
    if operation == "Contrast":
        return ops.adjust_contrast(x, factor)
    if operation == "Sharpness":
        return ops.adjust_sharpness(x, factor)
    if operation == "Posterize":
        return ops.posterize(x, 8 - round(4 * m))
    if operation == "Solarize":
        return ops.solarize(x, 255 * (1 - m))
    if operation == "AutoContrast":
        return ops.autocontrast(x)
    if operation == "Equalize":
        return ops.equalize(x)
    if operation == "Invert":
        return ops.invert(x)
    raise ValueError(f"unknown operation {operation}")
