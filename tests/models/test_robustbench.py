"""Checkpoints of MadryLab/robustness, and RobustBench's networks by name."""

from __future__ import annotations

import enum
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ratioctl
from ratioctl.errors import UsageError
from ratioctl.models import build, robustbench

MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("new_mean", MEAN[:, None, None])
        self.register_buffer("new_std", STD[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x.clamp(0, 1) - self.new_mean) / self.new_std


class AttackerModel(nn.Module):
    """The form of that library: the network twice, as `model` and inside `attacker`, under DataParallel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.normalizer, self.model, self.attacker = Normalize(), network, nn.Module()
        self.attacker.normalize, self.attacker.model = Normalize(), network

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalizer(x))


@pytest.mark.parametrize("nest", ["model", "state_dict"])
def test_a_checkpoint_of_the_robustness_library(nest: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build("resnet18", num_classes=4, width=4, mean=(0.0,) * 3, std=(1.0,) * 3).network
    theirs = nn.DataParallel(AttackerModel(network))
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    content = {nest: theirs.state_dict(), "optimizer": optimizer.state_dict(), "schedule": None, "epoch": 3}
    torch.save({**content, "amp": None, "nat_prec1": 90.0}, tmp_path / "cifar_l2_0_5.pt")
    made = ratioctl.package_checkpoint(
        tmp_path / "cifar_l2_0_5.pt", arch="resnet18", labels=list("abcd"), out=tmp_path / "package"
    )
    assert made.package.mean == pytest.approx(MEAN.tolist())
    assert made.package.std == pytest.approx(STD.tolist())
    assert made.prefix == "module.model."
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ratioctl.load_model(made.package.path)(x), theirs.module.eval()(x), atol=1e-5)


class Dataset(enum.Enum):
    cifar_10 = "cifar10"
    cifar_100 = "cifar100"


class Threat(enum.Enum):
    Linf = "Linf"
    L2 = "L2"


class Net(nn.Module):
    """A network that normalizes its pixels itself, by buffers, as RobustBench's do."""

    def __init__(self, classes: int = 4, width: int = 2) -> None:
        super().__init__()
        self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.4))
        self.register_buffer("sigma", torch.full((1, 3, 1, 1), 0.2))
        self.conv = nn.Conv2d(3, width, 3)
        self.logits = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.conv((x - self.mu) / self.sigma).relu().mean((2, 3)))


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the library's table of models."""
    table: dict[Any, Any] = {
        Dataset.cifar_10: {
            Threat.Linf: {"Twice2020": {"model": lambda: Net(width=3), "gdrive_id": "0"}},
            Threat.L2: {"Twice2020": {"model": Net}, "Once2020Adversarial": {"model": Net, "gdrive_id": "0"}},
        },
        Dataset.cifar_100: {Threat.Linf: {"Hundred2021": {"model": lambda: Net(100)}}},
    }
    package, models = types.ModuleType("robustbench"), types.ModuleType("robustbench.model_zoo.models")
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    models.model_dicts = table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "robustbench", package)
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo.models", models)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save({"state_dict": {f"module.{k}": v for k, v in Net().state_dict().items()}}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def package(weights: Path, name: str, labels: str = "abcd", **options: Any) -> Any:
    out = weights.parent / "package"
    return ratioctl.package_checkpoint(
        weights, arch=f"robustbench:{name}", labels=list(labels), input_size=16, out=out, **options
    )


@pytest.mark.usefixtures("zoo")
def test_a_network_of_robustbench_takes_pixels_as_they_are(weights: Path) -> None:
    made = package(weights, "Once2020Adversarial")
    assert (made.package.mean, made.package.std) == ((0.0,) * 3, (1.0,) * 3)
    assert any("normalizes them itself" in note for note in made.notes)
    assert not any("holds another normalization" in note for note in made.notes)
    theirs = Net()
    theirs.load_state_dict({k[7:]: v for k, v in torch.load(weights)["state_dict"].items()})
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(ratioctl.load_model(made.package.path)(x), theirs(x), atol=1e-6)


@pytest.mark.usefixtures("zoo")
def test_an_ambiguous_name_is_settled_by_options(weights: Path) -> None:
    with pytest.raises(UsageError, match=r"several models of that name \(cifar10/Linf, cifar10/L2\)"):
        package(weights, "Twice2020")
    made = package(weights, "Twice2020", arch_options=["threat=L2"])
    assert made.package.architecture_options["threat"] == "L2"


@pytest.mark.usefixtures("zoo")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Once2020Adversarail", {}, "no such model.*Once2020Adversarial"),
        ("Once2020Adversarial", {"arch_options": ["threat=Linf"]}, "for dataset any and threat Linf"),
        ("Once2020Adversarial", {"mean": 0.5, "std": 0.25}, "normalizes its pixels itself"),
        ("Once2020Adversarial", {"labels": "abc"}, "names 3 classes, and .* has 4 outputs"),
        ("Hundred2021", {}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_named(weights: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        package(weights, name, **options)


def test_without_the_library_the_message_says_how_to_install_it(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustbench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"RobustBench is not installed.*pip install --no-deps robustbench"):
        package(weights, "Once2020Adversarial")


def test_a_library_that_cannot_be_imported_is_reported(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = types.ModuleType("robustbench")  # no package: it has no model_zoo
    broken.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "robustbench", broken)
    with pytest.raises(UsageError, match="RobustBench cannot be imported"):
        package(weights, "Once2020Adversarial")
    assert "autoattack" not in sys.modules


def test_the_installed_library(tmp_path: Path) -> None:
    """Runs where RobustBench is installed: one of its networks, by its own class."""
    pytest.importorskip("torchdiffeq")
    with robustbench._earlier_name():
        zoo = pytest.importorskip("robustbench.model_zoo.cifar10")
    torch.manual_seed(0)
    theirs = zoo.Hendrycks2020AugMixWRNNet().eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pt")
    out = tmp_path / "package"
    arch = "robustbench:Hendrycks2020AugMix_WRN"
    options = ["dataset=cifar10"]
    made = ratioctl.package_checkpoint(
        tmp_path / "w.pt", arch=arch, labels=list("abcdefghij"), input_size=32, arch_options=options, out=out
    )
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ratioctl.load_model(made.package.path)(x), theirs(x), atol=1e-5)
