"""CIFAR-style residual networks (He et al. 2016): 3x3 stem, no pooling, four stages, any width and size.

Parameter names are the usual ones of CIFAR ResNets (conv1, bn1, layer1.0.conv1, shortcut.0, linear), so
that checkpoints of other implementations load. `folds` names the convolutions that a batch norm follows
directly: in eval mode the pair is one convolution (`models.folding`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ratioctl.errors import UsageError
from ratioctl.models.matmul_gradient import MatmulWeightGradient
from ratioctl.models.registry import InputSize, register_architecture


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1; on a single pixel, where its stride changes nothing, without stride.

    oneDNN's bf16 weight gradient of a strided one on 1x1 inputs reads uninitialized memory (torch 2.14 on a
    CPU: values up to 1e35, and NaN).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__(c_in, c_out, 3, stride, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride = 1 if x.shape[2] == x.shape[3] == 1 else self.stride[0]
        if self.bias is None and MatmulWeightGradient.pays(x, self.weight, stride):
            return MatmulWeightGradient.apply(x.bfloat16(), self.weight, stride)
        return F.conv2d(x, self.weight, self.bias, stride, padding=1)


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return Conv3x3(c_in, c_out, stride)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution with a stride, computed as subsampling and a 1x1 convolution without: equal.

    oneDNN's weight gradient of the strided one, channels last, below 8 input channels and at even sizes,
    reads uninitialized memory (torch 2.15 on a CPU: wrong values that change from call to call).
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        if rows > 1 or columns > 1:
            x = x[:, :, ::rows, ::columns]
        return F.conv2d(x, self.weight, self.bias)


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(Pointwise(c_in, c_out, stride), nn.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    expansion = 1
    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("shortcut.0", "shortcut.1"))

    def __init__(self, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(c_in, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(c_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        # In place: batch norm and convolution need their inputs for the backward pass, not their outputs.
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    expansion = 4
    folds = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("shortcut.0", "shortcut.1"))

    def __init__(self, c_in: int, channels: int, stride: int) -> None:
        super().__init__()
        c_out = self.expansion * channels
        self.conv1 = Pointwise(c_in, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = Pointwise(channels, c_out, 1)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """(N, C, H, W) normalized pixels -> (N, K) logits; the last stage is averaged over space."""

    folds = (("conv1", "bn1"),)

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
        channels: int,
        width: int,
        stem_stride: int,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, width, stem_stride)
        self.bn1 = nn.BatchNorm2d(width)
        self._c_in = width
        self.layer1 = self._stage(block, width, blocks[0], 1)
        self.layer2 = self._stage(block, 2 * width, blocks[1], 2)
        self.layer3 = self._stage(block, 4 * width, blocks[2], 2)
        self.layer4 = self._stage(block, 8 * width, blocks[3], 2)
        self.linear = nn.Linear(self._c_in, num_classes)

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], channels: int, count: int, stride: int
    ) -> nn.Sequential:
        layers: list[nn.Module] = []
        for s in (stride, *[1] * (count - 1)):
            layers.append(block(self._c_in, channels, s))
            self._c_in = channels * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.linear(y.mean(dim=(2, 3)))


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}


def width_of(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The option `width` of a checkpoint, the channels of its stem, where they are not the usual 64."""
    stem = next((v for v in state.values() if v.ndim == 4 and v.shape[1] in (1, 3)), None)
    return {} if stem is None or stem.shape[0] == 64 else {"width": int(stem.shape[0])}


def ambiguous_stem(option: str, input_size: InputSize) -> str | None:
    """Why `stem_stride` has no safe default: at 64 pixels and above both 1 and 2 are common."""
    if option != "stem_stride" or input_size is None or _least(input_size) < 64:
        return None
    side = _least(input_size)
    return f"a CIFAR-style stem for images of {side} pixels has stride 1 or 2, with the same weights"


def _least(input_size: int | tuple[int, int]) -> int:
    return input_size if isinstance(input_size, int) else min(input_size)


def checked_stride(stem_stride: int) -> int:
    """Raises UsageError unless `stem_stride` is 1 to 8."""
    if not 1 <= stem_stride <= 8:
        raise UsageError(f"stem_stride {stem_stride}", "is out of range", "Use a whole number from 1 to 8.")
    return stem_stride


@register_architecture(*DEPTHS, infer=width_of, undetermined=("stem_stride",), ambiguous=ambiguous_stem)
def resnet(
    depth: str, *, num_classes: int, channels: int = 3, width: int = 64, stem_stride: int = 1
) -> ResNet:
    """A CIFAR ResNet of `DEPTHS`.

    Args:
        width: channels of the first stage (64 in the paper).
        stem_stride: of the first convolution, 1 to 8. With 2 an image of 64x64 costs what 32x32 costs with 1.
    """
    block, blocks = DEPTHS[depth]
    return ResNet(block, blocks, num_classes, channels, width, checked_stride(stem_stride))
