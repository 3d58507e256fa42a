"""Starts of training: packages with other labels and sizes, and weights of timm and torchvision networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ratioctl import recipe as recipes
from ratioctl.errors import UsageError
from ratioctl.models import libraries
from ratioctl.package import ModelPackage, read_weights
from ratioctl.recipe import Recipe
from ratioctl.training import starts
from ratioctl.training.loop import fit


def photographs(folder: Path, classes: tuple[str, ...] = ("ant", "bee"), side: int = 16) -> Path:
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(8):
            pixels = rng.integers(0, 128, (side, side, 3)) + 100 * number
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{k}.png")
    return folder


def recipe_for(folder: Path, architecture: str = "resnet18", size: int = 16, **model: Any) -> Recipe:
    return recipes.parse(
        {
            "name": "mine",
            "data": {"train": str(folder), "size": size, "validation": 4},
            "model": {"architecture": architecture, **model},
            "optim": {"epochs": 1, "batch_size": 4, "lr": 1e-9, "weight_decay": 0.0, "schedule": "cosine"},
        }
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> ModelPackage:
    folder = tmp_path_factory.mktemp("start")
    data = photographs(folder / "data", ("ant", "bee", "cow"), 8)
    return fit(recipe_for(data, size=8, width=2), folder / "run")


def events(found: list[dict[str, Any]]) -> str:
    return next(event["text"] for event in found if event["event"] == "start")


def test_other_labels_another_size_and_stride_keep_all_but_the_head(
    start: ModelPackage, tmp_path: Path
) -> None:
    data = photographs(tmp_path / "data")
    found: list[dict[str, Any]] = []
    recipe = recipe_for(data, size=16, width=2, stem_stride=2)
    tuned = fit(recipe, tmp_path / "run", init=start, callback=found.append)
    said = "the head is new; 3 classes of the start (cow only there), 2 classes of the data"
    assert events(found) == f"--init {start.name}: {said}"
    before, after = read_weights(start), read_weights(tuned)
    assert after["linear.weight"].shape == (2, 16)
    for key in before.keys() - {"linear.weight", "linear.bias"}:
        if "running" not in key:
            np.testing.assert_allclose(after[key], before[key], atol=1e-5)
    assert (tuned.mean, tuned.std) == (start.mean, start.std), "the normalization belongs to the weights"
    assert tuned.config["ratio"]["provenance"]["init"]["head"] == "new"


def test_weights_that_do_not_fit_name_the_architecture_that_does(start: ModelPackage, tmp_path: Path) -> None:
    data = photographs(tmp_path / "data")
    with pytest.raises(UsageError) as caught:
        fit(recipe_for(data, "resnet34", width=4), tmp_path / "run", init=start)
    text = str(caught.value)
    assert "missing" in text
    assert "layer1.2.bn1.bias" in text
    assert "--set model.architecture=resnet18 --set model.width=2" in text


def test_a_thousand_labels_are_one_line() -> None:
    many = [f"class {k}" for k in range(1000)]
    assert starts._difference(many, ["class 1", "dog"]) == (
        "1000 classes of the start (class 0, class 2, class 3 and 996 more only there), "
        "2 classes of the data (dog only there)"
    )
    assert 'number 1 is "b" and "c"' in starts._difference(["a", "b", "c"], ["a", "c", "b"])


@pytest.mark.parametrize("name", ["timm:test_resnet", "torchvision:squeezenet1_1"])
def test_weights_of_a_library_s_network(name: str, tmp_path: Path) -> None:
    from ratioctl import models

    torch.manual_seed(0)
    network = models.build_network(name, num_classes=1000, channels=3)
    path = tmp_path / "weights.safetensors"
    save_file({f"module.{k}": v.contiguous() for k, v in network.state_dict().items()}, path)
    opened = starts.resolve(f"{name}={path}")
    assert opened.label_names is None
    mean, std = libraries.published_normalization(name)
    assert (opened.mean, opened.std) == (pytest.approx(mean), pytest.approx(std))
    data = photographs(tmp_path / "data", side=32)
    found: list[dict[str, Any]] = []
    tuned = fit(recipe_for(data, name, 32), tmp_path / "run", init=opened, callback=found.append)
    assert events(found).endswith("the data have 2 classes, those of the start are not known")
    assert tuned.mean == opened.mean
    head = models.head_keys(name)
    after = read_weights(tuned)
    kept = {k: v for k, v in network.state_dict().items() if v.is_floating_point() and k not in head}
    assert len(kept) == len(after) - len(head)
    for key, value in kept.items():
        if "running" not in key:
            np.testing.assert_allclose(after[key], value.numpy(), atol=1e-5)


def test_weights_without_a_head_are_a_start_too(tmp_path: Path) -> None:
    from ratioctl import models

    head = models.head_keys("timm:test_resnet")
    state = models.build_network("timm:test_resnet", num_classes=5, channels=3).state_dict()
    path = tmp_path / "backbone.safetensors"
    save_file({k: v.contiguous() for k, v in state.items() if k not in head}, path)
    opened = starts.resolve(f"timm:test_resnet={path}")
    assert head <= opened.weights.keys()


def test_weights_of_another_network_name_the_nearest(tmp_path: Path) -> None:
    from ratioctl import models

    state = models.build_network("resnet18", num_classes=5, channels=3, width=4).state_dict()
    path = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    with pytest.raises(UsageError, match=r'does not fit.*The nearest architecture is "resnet18"'):
        starts.resolve(f"timm:test_vit={path}")


def test_published_weights_are_loaded_only_with_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    from ratioctl import models

    with pytest.raises(UsageError, match="--download"):
        starts.resolve("timm:test_resnet")
    state = dict(models.build_network("timm:test_resnet", num_classes=10, channels=3).state_dict())
    monkeypatch.setattr(libraries, "published_weights", lambda name: state)
    opened = starts.resolve("timm:test_resnet", download=True)
    assert torch.equal(torch.as_tensor(opened.weights["conv1.0.weight"]), state["conv1.0.weight"])
    with pytest.raises(UsageError, match="does not exist"):
        starts.resolve("timm:test_resnet=missing.safetensors")
