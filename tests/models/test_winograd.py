"""The quick convolution against torch's own in fp64, and where it stands aside."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ratioctl.models import build, frozen, winograd
from ratioctl.models.network import refresh


def _pair(c_in: int, c_out: int, bias: bool = True) -> tuple[nn.Conv2d, winograd.Conv3x3]:
    conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=bias).requires_grad_(False)
    quick = winograd.quicken(nn.Sequential(copy.deepcopy(conv)))[0]
    assert isinstance(quick, winograd.Conv3x3)
    return conv, quick


def _both(module: nn.Module, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, weight.to(y.dtype))[0]


@pytest.mark.parametrize(
    ("c_in", "c_out", "size", "rows"),
    [(128, 128, (8, 8), 4), (128, 160, (7, 9), 3), (160, 128, (4, 4), 13), (128, 128, (1, 5), 9)],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient_are_those_of_the_direct_convolution(
    c_in: int,
    c_out: int,
    size: tuple[int, int],
    rows: int,
    memory_format: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "_BLOCK", 2 * 160 * size[0] * size[1])  # two images at once
    torch.manual_seed(0)
    conv, quick = _pair(c_in, c_out)
    x = torch.randn(rows, c_in, *size).relu().to(memory_format=memory_format)
    weight = torch.randn(rows, c_out, *size)
    exact = copy.deepcopy(conv).double()
    for found, wanted in zip(_both(quick, x, weight), _both(exact, x.double(), weight), strict=True):
        assert (found - wanted).abs().max() <= 5e-5 * wanted.abs().max()
    assert type(quick(x.clone().requires_grad_()).grad_fn).__name__ == "_WinogradBackward"


def test_new_weights_count_at_once() -> None:
    torch.manual_seed(0)
    conv, quick = _pair(128, 128, bias=False)
    x = torch.randn(4, 128, 8, 8)
    quick(x)
    with torch.no_grad():
        quick.weight.mul_(2)
    torch.testing.assert_close(quick(x), 2 * conv(x), rtol=1e-3, atol=1e-4)


def test_small_batches_other_types_and_trained_layers_take_the_direct_road() -> None:
    torch.manual_seed(0)
    conv, quick = _pair(128, 128)
    x = torch.randn(1, 128, 8, 8)
    assert torch.equal(quick(x), conv(x))
    wide = x.expand(8, -1, -1, -1).double()
    assert torch.equal(copy.deepcopy(quick).double()(wide), conv.double()(wide))
    for other in (
        nn.Conv2d(128, 128, 3, padding=1),  # with gradients of its weights
        nn.Conv2d(128, 128, 3, stride=2, padding=1).requires_grad_(False),
        nn.Conv2d(64, 128, 3, padding=1).requires_grad_(False),
        nn.Conv2d(128, 128, 3, padding=1, groups=2).requires_grad_(False),
    ):
        assert type(winograd.quicken(nn.Sequential(other))[0]) is nn.Conv2d


def test_a_quickened_network_follows_its_model_and_can_be_copied() -> None:
    torch.manual_seed(0)
    model = build("resnet18", num_classes=10, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    twin = winograd.quicken(frozen(model))
    assert sum(isinstance(module, winograd.Conv3x3) for module in twin.modules()) == 3
    x = torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.02 * torch.randn_like(value))
    refresh(twin, model)
    for network in (twin, copy.deepcopy(twin)):
        torch.testing.assert_close(network(x), model.eval()(x), rtol=1e-3, atol=1e-3)
