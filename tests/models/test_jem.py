"""JEM's network: its size, its formula, and checkpoints of the authors' form."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ratioctl
from ratioctl.models import build

PIXELS = {"mean": (0.5,) * 3, "std": (0.5,) * 3}


class Published(nn.Module):
    """The form of the public code: features under `f`, an unused head in them, and two heads."""

    def __init__(self, depth: int, widen: int, classes: int) -> None:
        super().__init__()
        self.f, last = nn.Module(), 16
        self.f.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        for stage, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2)), 1):
            blocks = nn.Sequential()
            for number in range((depth - 4) // 6):
                block, s = nn.Module(), stride if number == 0 else 1
                block.conv1 = nn.Conv2d(last, width * widen, 3, padding=1)
                block.conv2 = nn.Conv2d(width * widen, width * widen, 3, stride=s, padding=1)
                block.shortcut = nn.Sequential()
                if s != 1 or last != width * widen:
                    block.shortcut.append(nn.Conv2d(last, width * widen, 1, stride=s))
                blocks.append(block)
                last = width * widen
            setattr(self.f, f"layer{stage}", blocks)
        self.f.linear = nn.Linear(last, 10)
        self.energy_output = nn.Linear(last, 1)
        self.class_output = nn.Linear(last, classes)

    def classify(self, x: Tensor) -> Tensor:
        y = self.f.conv1(x)
        for layer in (self.f.layer1, self.f.layer2, self.f.layer3):
            for block in layer:
                z = block.conv2(F.leaky_relu(block.conv1(F.leaky_relu(y, 0.2)), 0.2))
                y = z + block.shortcut(y)
        return self.class_output(F.avg_pool2d(F.leaky_relu(y, 0.2), 8).flatten(1))


def test_a_published_checkpoint_becomes_a_package(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Published(16, 2, 4).eval()
    content = {"model_state_dict": theirs.state_dict(), "replay_buffer": torch.rand(8, 3, 32, 32)}
    torch.save(content, tmp_path / "CIFAR10_MODEL.pt")
    made = ratioctl.package_checkpoint(
        tmp_path / "CIFAR10_MODEL.pt",
        arch="jem-wideresnet-16-2",
        labels=["a", "b", "c", "d"],
        mean=0.5,
        std=0.5,
        out=tmp_path / "package",
    )
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        ours, expected = ratioctl.load_model(made.package.path)(x), theirs.classify(2 * x - 1)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not any("energy_output" in note for note in made.notes)


def test_its_size_is_that_of_the_published_network() -> None:
    """Counted over `Published(28, 10, 10)` without its two unused heads."""
    with torch.device("meta"):
        theirs = Published(28, 10, 10)
        ours = build("jem-wideresnet-28-10", num_classes=10, **PIXELS)
    unused = [*theirs.f.linear.parameters(), *theirs.energy_output.parameters()]
    expected = sum(p.numel() for p in theirs.parameters()) - sum(p.numel() for p in unused)
    assert sum(p.numel() for p in ours.parameters()) == expected


def test_an_image_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    network = build("jem-wideresnet-10-1", num_classes=3, **PIXELS).train()
    x = torch.rand(4, 3, 8, 8)
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-6)
