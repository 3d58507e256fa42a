"""Networks: shapes, folding, refusals, and that building leaves the global generator alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ratioctl.errors import PackageError, UsageError
from ratioctl.models import build, fold_batchnorm, load_weights, sync_folded
from ratioctl.models.device import select_device
from ratioctl.models.network import Classifier

SMALL = [
    ("resnet18", 4, 32, 3),
    ("resnet34", 4, 16, 1),
    ("resnet50", 4, 32, 3),
    ("wideresnet-10-1", None, 32, 3),
    ("wideresnet-16-2", None, 8, 1),
    ("torchvision:resnet18", None, 64, 3),
]


def lived(architecture: str, width: int | None, size: int, channels: int) -> tuple[Classifier, torch.Tensor]:
    """A network whose batch statistics and affine values are not the initial ones, and some images."""
    torch.manual_seed(0)
    model = build(
        architecture,
        num_classes=5,
        channels=channels,
        width=width,
        mean=(0.4,) * channels,
        std=(0.3,) * channels,
    )
    x = torch.rand(6, channels, size, size)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
    model.train()
    for _ in range(3):
        model(x)
    return model, x


@pytest.mark.parametrize(("architecture", "width", "size", "channels"), SMALL)
def test_folded_is_the_same_function(architecture: str, width: int | None, size: int, channels: int) -> None:
    model, x = lived(architecture, width, size, channels)
    twin = fold_batchnorm(model)
    model.eval()
    expected = model(x)
    assert expected.shape == (6, 5)
    assert torch.allclose(twin(x), expected, atol=1e-5 * float(expected.abs().max().detach()), rtol=1e-4)
    assert not any(p.requires_grad for p in twin.parameters())
    folded = sum(isinstance(m, torch.nn.BatchNorm2d) for m in twin.modules())
    whole = sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert folded < whole, "some batch norm was folded away"


@pytest.mark.parametrize(("architecture", "width", "size", "channels"), SMALL)
def test_sync_follows_an_update(architecture: str, width: int | None, size: int, channels: int) -> None:
    model, x = lived(architecture, width, size, channels)
    twin = fold_batchnorm(model)
    before = twin(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        model.train()(x)
    model.eval()
    sync_folded(twin, model)
    assert torch.allclose(twin(x), model(x), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(twin(x), before, atol=1e-2)


def test_folding_leaves_the_model_alone() -> None:
    model, x = lived("resnet18", 4, 32, 3)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fold_batchnorm(model)(x)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_normalization_is_inside() -> None:
    torch.manual_seed(0)
    plain = build("resnet18", num_classes=3, width=4, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    shifted = build("resnet18", num_classes=3, width=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).eval()
    shifted.network.load_state_dict(plain.network.state_dict())
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    by_hand = (x - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(shifted(x), plain(by_hand), atol=1e-5)


def test_known_sizes() -> None:
    # He et al. 2016 as used for CIFAR: 11.17 M and 23.52 M parameters with 10 classes.
    for name, parameters in (("resnet18", 11_173_962), ("resnet50", 23_520_842)):
        model = build(name, num_classes=10, mean=(0,) * 3, std=(1,) * 3)
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnet81", '"resnet18"'),
        ("wideresnet-11-2", "6n + 4"),
        ("torchvision:resnet19", "torchvision:resnet"),
        ("nonsense", "Use one of: resnet18"),
    ],
)
def test_unknown_architectures_are_named(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(name, num_classes=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    assert hint in str(caught.value)


def test_width_only_where_there_is_one() -> None:
    with pytest.raises(UsageError, match="no width option"):
        build("wideresnet-10-1", num_classes=2, width=8, mean=(0.5,), std=(0.5,))


def test_a_stem_of_stride_two_sees_every_other_pixel_of_the_plain_one() -> None:
    """On an image of twice the size: the same weights, the plain stem's output at even places."""
    torch.manual_seed(0)
    plain, strided = (
        build("resnet18", num_classes=3, width=4, stem_stride=s, mean=(0.0,) * 3, std=(1.0,) * 3).eval()
        for s in (None, 2)
    )
    load_weights(strided, {k: v.numpy() for k, v in plain.network.state_dict().items()}, where="x")
    x = torch.rand(2, 3, 16, 16)
    full, half = plain.network.conv1(x), strided.network.conv1(x)
    torch.testing.assert_close(half, full[:, :, ::2, ::2])
    torch.testing.assert_close(fold_batchnorm(strided)(x), strided(x), atol=1e-5, rtol=0)
    assert not torch.allclose(strided(x), plain(x), atol=1e-3)
    with pytest.raises(UsageError, match="no stem_stride option"):
        build("wideresnet-10-1", num_classes=2, stem_stride=2, mean=(0.5,), std=(0.5,))
    for stride in (0, 9, 1.5, "2"):
        with pytest.raises(UsageError, match=r"stem_stride .* Use a whole number"):
            build("resnet18", num_classes=2, stem_stride=stride, mean=(0.5,), std=(0.5,))


def test_wrong_weights_name_the_keys() -> None:
    model = build("resnet18", num_classes=3, width=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    weights = {k: v.numpy() for k, v in model.network.state_dict().items()}
    del weights["conv1.weight"]
    weights["head.weight"] = np.zeros(3)
    weights["linear.bias"] = np.zeros(7, np.float32)
    with pytest.raises(PackageError) as caught:
        load_weights(model, weights, where="x.safetensors")
    message = str(caught.value)
    assert "missing conv1.weight" in message
    assert "unexpected head.weight" in message
    assert "linear.bias has shape (7,) instead of (3,)" in message


def test_half_precision_weights_are_computed_in_single() -> None:
    model = build("resnet18", num_classes=3, width=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    half = {k: v.half().numpy() for k, v in model.network.state_dict().items() if v.is_floating_point()}
    load_weights(model, half, where="x")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model.network.conv1.weight, torch.from_numpy(half["conv1.weight"]).float())


def test_devices_that_are_not_there() -> None:
    assert select_device("cpu", "fp32").bf16 is False
    assert select_device("cpu", "bf16").bf16 is True
    with pytest.raises(UsageError):
        select_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            select_device("cuda")


@pytest.mark.parametrize("c_in", [2, 4, 5, 8])
@pytest.mark.parametrize("size", [7, 8])
def test_strided_pointwise_gradients_are_right(c_in: int, size: int) -> None:
    from ratioctl.models.resnet import Pointwise

    torch.manual_seed(0)
    conv = Pointwise(c_in, 2 * c_in, 2)
    x = torch.randn(32, c_in, size, size).contiguous(memory_format=torch.channels_last)
    out = conv.to(memory_format=torch.channels_last)(x)  # type: ignore[call-overload]
    picked = x[:, :, ::2, ::2].double()
    assert torch.allclose(
        out.double(), torch.einsum("nchw,dc->ndhw", picked, conv.weight[:, :, 0, 0].double()), atol=1e-5
    )
    upstream = torch.randn_like(out)
    out.backward(upstream)
    by_hand = torch.einsum("nchw,ndhw->dc", picked, upstream.double())
    assert conv.weight.grad is not None
    assert torch.allclose(conv.weight.grad[:, :, 0, 0].double(), by_hand, atol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_bf16_weight_gradients_of_a_strided_3x3_convolution_are_right(size: int) -> None:
    """On one pixel oneDNN's own are made of uninitialized memory, which holds NaN here."""
    from ratioctl.models.resnet import conv3x3

    torch.manual_seed(0)
    conv = conv3x3(32, 64, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(32, 32, size, size).contiguous(memory_format=torch.channels_last)
    for _ in range(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = conv(x)
        upstream = torch.randn_like(out)
        rubbish = [torch.full((1 << bits,), torch.nan) for bits in (12, 16, 18, 20)]
        del rubbish
        conv.zero_grad()
        out.backward(upstream)
        right = torch.nn.grad.conv2d_weight(
            x.double(), conv.weight.shape, upstream.double(), stride=2, padding=1
        )
        assert conv.weight.grad is not None
        assert (conv.weight.grad.double() - right).abs().max() < 0.02 * right.abs().max()


def test_the_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: str) -> str:
        return str(select_device(device, "fp32").device)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen("auto") == chosen("cpu") == "cpu"
    with pytest.raises(UsageError, match="no CUDA device"):
        chosen("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("auto") == chosen("cuda") == "cuda:0"
    assert chosen("cuda:1") == "cuda:1"
    with pytest.raises(UsageError, match=r"2 CUDA device\(s\)"):
        chosen("cuda:2")
