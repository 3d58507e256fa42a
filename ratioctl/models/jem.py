"""Wide residual networks without normalization, as in JEM (Grathwohl et al. 2020, arXiv 1912.03263).

SGLD follows the gradient of the energy, which must not depend on the other images of a batch, so there is no
batch norm; activations are leaky ReLUs. Unlike in `wideresnet`, the second convolution of a block has the
stride, the shortcut starts before the activation, and every convolution has a bias. Parameter names are those
of the checkpoints that the authors published ("f.layer1.0.conv1.weight", "class_output.weight").
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ratioctl.models.registry import register_architecture
from ratioctl.models.wideresnet import depth_and_width

LEAK = 0.2


def _conv(c_in: int, c_out: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2)


class JemBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(c_in, c_out)
        self.conv2 = _conv(c_out, c_out, stride)
        changes = stride != 1 or c_in != c_out
        self.shortcut = nn.Sequential(_conv(c_in, c_out, stride, 1)) if changes else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(x, LEAK))
        return self.conv2(F.leaky_relu(y, LEAK)) + self.shortcut(x)


class JemFeatures(nn.Module):
    """(N, C, H, W) -> (N, 64 widen): the last stage, averaged over space."""

    def __init__(self, depth: int, widen: int, channels: int) -> None:
        super().__init__()
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = _conv(channels, widths[0])
        stages = []
        for stage, stride in enumerate((1, 2, 2)):
            c_in, c_out = widths[stage], widths[stage + 1]
            rest = [JemBlock(c_out, c_out, 1) for _ in range((depth - 4) // 6 - 1)]
            stages.append(nn.Sequential(JemBlock(c_in, c_out, stride), *rest))
        self.layer1, self.layer2, self.layer3 = stages

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.leaky_relu(y, LEAK).mean(dim=(2, 3))


class Jem(nn.Module):
    """(N, C, H, W) normalized pixels -> (N, K) logits. Pixels were normalized to [-1, 1] in the publication.

    `unused` are tensors of published checkpoints that take no part in the logits.
    """

    unused = ("f.linear.", "energy_output.")

    def __init__(self, depth: int, widen: int, num_classes: int, channels: int) -> None:
        super().__init__()
        self.f = JemFeatures(depth, widen, channels)
        self.class_output = nn.Linear(64 * widen, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.class_output(self.f(x))


@register_architecture("jem-wideresnet-28-10", pattern=r"jem-wideresnet-\d+-\d+")
def jem(name: str, *, num_classes: int, channels: int = 3) -> Jem:
    """JEM's network, called jem-wideresnet-DEPTH-WIDEN. Raises UsageError for a depth that is not 6n + 4."""
    depth, widen = depth_and_width(name)
    return Jem(depth, widen, num_classes, channels)
