"""The bf16 weight gradient of a wide 3x3 convolution on a CPU, as matrix products.

oneDNN's bf16 weight gradient takes two to six times as long as the input gradient of the same convolution
where there are many channels and few pixels. Unrolled into patches (im2col) it is one matrix product, which
takes as long as the other passes. Narrow layers stay with oneDNN: there the unrolling costs more than it
saves.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_CHANNELS = 128  # of the input
_MOST_PIXELS = 64  # of an output image
_PATCHES_AT_A_TIME = 8 << 20  # elements of the unrolled input: 16 MiB


class MatmulWeightGradient(torch.autograd.Function):
    """`conv2d(x, weight, stride=stride, padding=1)` in bf16, with this weight gradient.

    Shapes: x (B, C, H, W) bf16, weight (D, C, 3, 3) fp32; the result is (B, D, H', W') bf16, the weight's
    gradient fp32. It can be differentiated once.
    """

    @staticmethod
    def pays(x: Tensor, weight: Tensor, stride: int) -> bool:
        """Whether the convolution is computed in bf16, and this weight gradient is needed and the faster."""
        pixels = math.ceil(x.shape[2] / stride) * math.ceil(x.shape[3] / stride)
        return (
            weight.requires_grad
            and torch.is_grad_enabled()
            and x.device.type == "cpu"
            and torch.is_autocast_enabled("cpu")
            and torch.get_autocast_dtype("cpu") == torch.bfloat16
            and weight.shape[1] >= _LEAST_CHANNELS
            and 1 < pixels <= _MOST_PIXELS
            and not torch.compiler.is_compiling()
        )

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        rounded = weight.bfloat16()
        ctx.save_for_backward(x, rounded)
        ctx.stride = stride
        return F.conv2d(x, rounded, stride=stride, padding=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        d_x = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation = [ctx.stride] * 2, [1, 1], [1, 1]
            d_x, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False]
            )
        return d_x, _weight_gradient(x, gradient, ctx.stride), None


def _weight_gradient(x: Tensor, gradient: Tensor, stride: int) -> Tensor:
    """(D, C, 3, 3) in fp32 from x (B, C, H, W) and the output's gradient (B, D, H', W')."""
    rows = gradient.permute(0, 2, 3, 1)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    images, height, width, features = rows.shape
    channels = x.shape[1]
    total = x.new_zeros((features, 9 * channels), dtype=torch.float32)
    at_a_time = max(1, _PATCHES_AT_A_TIME // (height * width * 9 * channels))
    by_image, by_row, by_pixel, _ = padded.stride()
    for start in range(0, images, at_a_time):
        part = padded[start : start + at_a_time]
        shape = (len(part), height, width, 3, 3 * channels)  # three pixels beside each other are contiguous
        strides = (by_image, by_row * stride, by_pixel * stride, by_row, 1)
        patches = part.as_strided(shape, strides, part.storage_offset()).reshape(-1, 9 * channels)
        total += rows[start : start + at_a_time].reshape(-1, features).t() @ patches
    return total.view(features, 3, 3, channels).permute(0, 3, 1, 2)
