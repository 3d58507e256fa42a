"""Pre-activation ResNet-18: size, identity path, activation, folding, and its way through packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.errors import UsageError
from ratioctl.models import build, fold_batchnorm, from_package
from ratioctl.training.loop import fit

PIXELS: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def test_its_size_is_the_published_one() -> None:
    # He et al. 2016 for CIFAR, as implemented by Rice et al. 2020: 11,172,170 parameters with 10 classes.
    assert (
        sum(p.numel() for p in build("preactresnet18", num_classes=10, **PIXELS).parameters()) == 11_172_170
    )


def test_without_residuals_the_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    network = build("preactresnet18", num_classes=3, width=4, **PIXELS).network.eval()
    block = network.layer1[0]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("activation", "negative"), [("relu", 0.0), ("silu", -0.2689414)])
def test_the_activation_is_the_one_asked_for(activation: str, negative: float) -> None:
    network = build("preactresnet18", num_classes=3, width=4, activation=activation, **PIXELS).network
    for module in (network, network.layer3[1]):
        assert float(module.activation(torch.tensor(-1.0))) == pytest.approx(negative)
    with pytest.raises(UsageError, match="Use relu or silu"):
        build("preactresnet18", num_classes=3, activation="gelu", **PIXELS)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_package_keeps_its_options_and_folding_its_function(
    activation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    options = {"width": 4, "stem_stride": 2, "activation": activation}
    torch.manual_seed(0)
    model = build("preactresnet18", num_classes=3, **options, **PIXELS).train()
    x = torch.rand(4, 3, 16, 16)
    for _ in range(3):
        model(x)
    model.eval()
    package = packages.write(
        tmp_path / "p",
        config={
            "architecture": "preactresnet18",
            "architecture_options": options,
            "label_names": ["a", "b", "c"],
            "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.25] * 3},
            "ratio": {},
        },
        weights={
            k: v.numpy()
            for k, v in model.network.state_dict().items()
            if not k.endswith("num_batches_tracked")
        },
    )
    again = from_package(package)
    assert torch.equal(again(x), model(x))
    assert again.network.conv1.stride == (2, 2)
    folded = fold_batchnorm(again)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules()) == 9  # the 8 bn1 and the last
    torch.testing.assert_close(folded(x), model(x), atol=1e-4, rtol=0)


def test_a_recipe_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    wanted = ["model.architecture=preactresnet18", "model.width=2", "model.options.activation=silu"]
    recipe = recipes.load("digits-plain", [*wanted, "optim.epochs=0.05"])
    assert recipe.digest != recipes.load("digits-plain", [*wanted[:2], "optim.epochs=0.05"]).digest
    package = fit(recipe, tmp_path / "run")
    assert package.architecture_options == {"width": 2, "activation": "silu"}
    assert package.recipe_text is not None
    assert recipes.loads(package.recipe_text) == recipe
    assert float(from_package(package).network.activation(torch.tensor(-1.0))) == pytest.approx(-0.2689414)
