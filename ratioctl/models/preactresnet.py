"""CIFAR-style pre-activation ResNets (He et al. 2016, "Identity Mappings in Deep Residual Networks").

Batch norm and activation come before each convolution, so the identity path is unchanged by either. With
`activation = "silu"` (Elfwing et al. 2018; Rice et al. 2020 and Gowal et al. 2020 find smooth activations
more robust) the logits are smooth functions of the pixels. Parameter names are those of the usual
implementations (conv1, layer1.0.bn1, shortcut.0, bn, linear).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ratioctl.models.registry import InputSize, register_architecture
from ratioctl.models.resnet import Pointwise, ambiguous_stem, checked_stride, conv3x3, width_of

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


class PreActBlock(nn.Module):
    folds = (("conv1", "bn2"),)  # bn1 follows an addition, so it stays

    def __init__(self, c_in: int, c_out: int, stride: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        changes = stride != 1 or c_in != c_out
        self.shortcut = nn.Sequential(Pointwise(c_in, c_out, stride)) if changes else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        a = self.activation(self.bn1(x))
        y = self.conv2(self.activation(self.bn2(self.conv1(a))))
        return y + (self.shortcut(a) if len(self.shortcut) else x)


class PreActResNet(nn.Module):
    """(N, C, H, W) normalized pixels -> (N, K) logits; the last stage is averaged over space."""

    folds: tuple[tuple[str, str], ...] = ()

    def __init__(
        self, *, num_classes: int, channels: int, width: int, stem_stride: int, activation: str
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = conv3x3(channels, width, stem_stride)
        c_in, stages = width, []
        for c_out, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
            first = PreActBlock(c_in, c_out, stride, activation)
            stages.append(nn.Sequential(first, PreActBlock(c_out, c_out, 1, activation)))
            c_in = c_out
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(c_in)
        self.linear = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.activation(self.bn(y)).mean(dim=(2, 3)))


def _ambiguous(option: str, input_size: InputSize) -> str | None:
    if option == "activation":
        return "networks with ReLU and with SiLU have the same weights"
    return ambiguous_stem(option, input_size)


@register_architecture(
    "preactresnet18", infer=width_of, undetermined=("stem_stride", "activation"), ambiguous=_ambiguous
)
def preactresnet18(
    name: str,
    *,
    num_classes: int,
    channels: int = 3,
    width: int = 64,
    stem_stride: int = 1,
    activation: Literal["relu", "silu"] = "relu",
) -> PreActResNet:
    """A pre-activation ResNet-18; `width` and `stem_stride` as for `resnet18`."""
    return PreActResNet(
        num_classes=num_classes,
        channels=channels,
        width=width,
        stem_stride=checked_stride(stem_stride),
        activation=activation,
    )
