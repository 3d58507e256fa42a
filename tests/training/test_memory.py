"""The estimate of memory, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ratioctl import recipe as recipes
from ratioctl.cli import main
from ratioctl.errors import RecipeError
from ratioctl.training import memory
from ratioctl.utils import resources

CPU = torch.device("cpu")


def test_the_estimate_adds_up() -> None:
    """digits-plain: activations dominate and grow with the batch; weights count three times."""
    one, two = (
        memory.estimate(recipes.load("digits-plain", [f"optim.batch_size={n}"]), 10) for n in (1000, 2000)
    )
    assert one is not None
    assert two is not None
    weights = 4 * 3 * sum(p.numel() for p in _network().parameters())
    assert two - weights == 2 * (one - weights)
    averaged = memory.estimate(recipes.load("digits-plain", ["optim.batch_size=1000", "optim.ema=0.9"]), 10)
    assert averaged == one + weights // 3


def _network() -> torch.nn.Module:
    from ratioctl.models.registry import build_network

    return build_network("resnet18", num_classes=10, channels=1, width=16)


@pytest.mark.parametrize("name", recipes.available())
def test_no_bundled_recipe_is_refused_on_64_gib(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_limit", lambda: 64 * 2**30)
    memory.check(recipes.load(name), 10, CPU)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["optim.batch_size=1000000"], "optim.batch_size = 1,000,000: training needs about"),
        (["model.width=4096", "model.architecture=resnet50"], "Choose a smaller model.width"),
    ],
)
def test_what_cannot_fit_is_refused(
    settings: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resources, "memory_limit", lambda: 16 * 2**30)
    with pytest.raises(RecipeError) as caught:
        memory.check(recipes.load("digits-plain", settings), 10, CPU)
    assert says in str(caught.value)
    options = [part for setting in settings for part in ("--set", setting)]
    assert main(["train", "digits-plain", "--out", str(tmp_path / "run"), *options]) == 2
    assert not (tmp_path / "run").exists()
