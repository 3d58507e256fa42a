"""The weight gradient of wide convolutions on a CPU: exact, used only where it is meant to be, repeatable."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.errors import Interrupted
from ratioctl.models import matmul_gradient
from ratioctl.models.resnet import Conv3x3
from ratioctl.training.loop import fit
from tests.signals import deliver

BF16 = torch.autocast("cpu", torch.bfloat16)


def layer(c_in: int, c_out: int, stride: int) -> Conv3x3:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(c_in + stride)
        return Conv3x3(c_in, c_out, stride).to(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the inputs whose weight gradient was a matrix product."""
    seen: list[torch.Size] = []
    exact = matmul_gradient._weight_gradient

    def counted(x: torch.Tensor, gradient: torch.Tensor, stride: int) -> torch.Tensor:
        seen.append(x.shape)
        return exact(x, gradient, stride)

    monkeypatch.setattr(matmul_gradient, "_weight_gradient", counted)
    return seen


@pytest.mark.parametrize(
    ("images", "c_in", "c_out", "height", "width", "stride"),
    [
        (5, 128, 16, 4, 4, 1),
        (3, 130, 8, 5, 3, 1),
        (4, 128, 24, 8, 8, 2),
        (3, 160, 8, 7, 5, 2),
        (2, 128, 4, 2, 1, 1),
    ],
)
@pytest.mark.parametrize("patches", [1, 40_000, 8 << 20])
def test_gradients_are_those_of_a_convolution_in_double_precision(
    images: int,
    c_in: int,
    c_out: int,
    height: int,
    width: int,
    stride: int,
    patches: int,
    calls: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul_gradient, "_PATCHES_AT_A_TIME", patches)
    generator = torch.Generator().manual_seed(7)
    conv = layer(c_in, c_out, stride)
    x = torch.randn(images, c_in, height, width, generator=generator)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    with BF16:
        y = conv(x)
    direction = torch.randn(y.shape, generator=generator)
    d_x, d_weight = torch.autograd.grad((y.float() * direction).sum(), [x, conv.weight])
    assert calls == [x.shape]

    exact_x, exact_weight = (
        x.detach().double().requires_grad_(),
        conv.weight.detach().double().requires_grad_(),
    )
    exact = F.conv2d(exact_x, exact_weight, stride=stride, padding=1)
    expected = torch.autograd.grad((exact * direction.double()).sum(), [exact_x, exact_weight])
    for ours, theirs in zip((y, d_x, d_weight), (exact, *expected), strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()
    assert d_weight.dtype == torch.float32


def test_other_convolutions_keep_torch_s_gradient(
    calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(conv: Conv3x3, size: int) -> None:
        x = torch.rand(2, conv.in_channels, size, size, requires_grad=True)
        conv(x).float().sum().backward()

    wide, narrow = layer(128, 4, 1), layer(64, 4, 1)
    backward(wide, 4)  # fp32
    with BF16:
        backward(narrow, 4)
        backward(wide, 9)  # too many pixels
        backward(wide, 1)
        backward(layer(128, 4, 2), 17)
        wide.requires_grad_(False)
        backward(wide, 4)  # an attack's pass
        wide.requires_grad_(True)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            backward(wide, 4)
        with torch.no_grad():
            wide(torch.rand(2, 128, 4, 4))
    assert calls == []
    with BF16:
        backward(wide, 4)
    assert len(calls) == 1


def test_a_resumed_run_ends_with_the_same_weights(
    tmp_path: Path, calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul_gradient, "_LEAST_CHANNELS", 8)
    small = [
        "model.width=4",
        "optim.batch_size=32",
        "optim.epochs=0.1",
        "optim.validate_every=0.03",
        "optim.validate_images=8",
    ]
    recipe = recipes.load("digits-plain", small)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "validation":
            deliver(signal.SIGTERM)

    whole = packages.read_weights(fit(recipe, tmp_path / "whole", precision="bf16"))
    with pytest.raises(Interrupted):
        fit(recipe, tmp_path / "stopped", precision="bf16", callback=stop)
    resumed = packages.read_weights(fit(recipe, tmp_path / "stopped", precision="bf16", resume=True))
    assert len(calls) > 10
    assert all(np.array_equal(whole[key], resumed[key]) for key in whole)
