"""Wide residual networks (Zagoruyko and Komodakis 2016), pre-activation, for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ratioctl.errors import UsageError
from ratioctl.models.registry import register_architecture
from ratioctl.models.resnet import Pointwise, conv3x3


class WideBlock(nn.Module):
    folds = (("conv1", "bn2"),)  # bn1 follows an addition, so it stays

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.equal = c_in == c_out
        self.convShortcut = None if self.equal else Pointwise(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(a)), inplace=True))
        y += x if self.convShortcut is None else self.convShortcut(a)
        return y


class WideResNet(nn.Module):
    """(N, C, H, W) normalized pixels -> (N, K) logits. Depth 6n + 4, channels 16k, 32k, 64k."""

    folds: tuple[tuple[str, str], ...] = ()

    def __init__(self, depth: int, widen: int, num_classes: int, channels: int) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"a WideResNet's depth is 6n + 4, not {depth}")
        count = (depth - 4) // 6
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv3x3(channels, widths[0])
        stages = []
        for stage, stride in enumerate((1, 2, 2)):
            c_in, c_out = widths[stage], widths[stage + 1]
            rest = [WideBlock(c_out, c_out, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(WideBlock(c_in, c_out, stride), *rest))
        self.block1, self.block2, self.block3 = stages
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block3(self.block2(self.block1(self.conv1(x))))
        y = F.relu(self.bn1(y), inplace=True)
        return self.fc(y.mean(dim=(2, 3)))


@register_architecture("wideresnet-28-10", "wideresnet-34-10", pattern=r"wideresnet-\d+-\d+")
def wideresnet(name: str, *, num_classes: int, channels: int = 3) -> WideResNet:
    """A WideResNet called wideresnet-DEPTH-WIDEN. Raises UsageError for a depth that is not 6n + 4."""
    return WideResNet(*depth_and_width(name), num_classes, channels)


def depth_and_width(name: str) -> tuple[int, int]:
    """Depth and width factor in "...-DEPTH-WIDEN". Raises UsageError for those that do not exist."""
    depth, widen = map(int, name.split("-")[-2:])
    if (depth - 4) % 6 or not 10 <= depth <= 1000 or not 1 <= widen <= 32:
        step = f"For example {name.rsplit('-', 2)[0]}-28-10; the width factor is 1 to 32."
        raise UsageError(name, "a WideResNet's depth is 6n + 4", step)
    return depth, widen
