"""Checkpoints from elsewhere: their names, their shapes, their normalisation, and files that are none."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ratioctl import package
from ratioctl.errors import PackageError, UsageError
from ratioctl.models import build, from_package, import_checkpoint

PLAIN: dict[str, Any] = {"num_classes": 3, "mean": [0.0], "std": [1.0]}


def network(architecture: str = "resnet18", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = build(architecture, num_classes=3, mean=[0.0] * 3, std=[1.0] * 3, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)  # type: ignore[operator,union-attr]
    return model.network


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return network(width=2)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def agree(ours: nn.Module, theirs: nn.Module) -> bool:
    return bool(torch.equal(ours(X), theirs(X)))


DRESSED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "plain": lambda s: s,
    "data parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "nested": lambda s: {"epoch": 7, "state_dict": {f"model.{k}": v for k, v in s.items()}, "best": 0.9},
    "twice nested": lambda s: {"model": {"state_dict": {f"module.model.{k}": v for k, v in s.items()}}},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "behind a normalisation": lambda s: {
        **{f"1.{k}": v for k, v in s.items()},
        "0.mean": torch.zeros(3),
        "0.std": torch.ones(3),
    },
    "torchvision's names": lambda s: {
        k.replace("shortcut", "downsample").replace("linear", "fc"): v for k, v in s.items()
    },
    "half precision": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("kind", DRESSED)
def test_usual_forms_of_checkpoints_load(narrow: nn.Module, tmp_path: Path, kind: str) -> None:
    state = narrow.state_dict()
    if kind == "half precision":
        state = {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()}
        narrow = network(width=2)
        narrow.load_state_dict(state)
    checkpoint = import_checkpoint.read(saved(tmp_path / "w.pt", DRESSED[kind](dict(state))))
    fitted = import_checkpoint.fit(checkpoint, "resnet18", **PLAIN)
    assert agree(fitted.classifier, narrow)
    assert fitted.options == {"width": 2}
    assert (
        fitted.notes
        == {
            "plain": (),
            "data parallel": ('took the prefix "module." off its names',),
            "nested": ('took the prefix "model." off its names',),
            "twice nested": ('took the prefix "module.model." off its names',),
            "compiled": ('took the prefix "_orig_mod." off its names',),
            "behind a normalisation": ('took the prefix "1." off its names',),
            "torchvision's names": ("translated 17 of its names",),
            "half precision": (),
            "without counters": (),
        }[kind]
    )


def test_safetensors_and_wide_networks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    wide = network("wideresnet-10-1")
    save_file(wide.state_dict(), tmp_path / "w.safetensors")
    fitted = import_checkpoint.fit(
        import_checkpoint.read(tmp_path / "w.safetensors"), "wideresnet-10-1", **PLAIN
    )
    assert agree(fitted.classifier, wide)
    assert fitted.options == {}


def test_a_network_of_torchvision(tmp_path: Path) -> None:
    import torchvision

    theirs = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=3).eval()
    path = saved(tmp_path / "w.pth", theirs.state_dict())
    fitted = import_checkpoint.fit(import_checkpoint.read(path), "torchvision:squeezenet1_1", **PLAIN)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fitted.classifier(x), theirs(x))


def test_what_does_not_fit_is_named(narrow: nn.Module, tmp_path: Path) -> None:
    state = dict(narrow.state_dict())
    del state["layer2.0.bn1.weight"]
    state["layer2.0.gate.weight"] = torch.ones(3)
    state["layer3.0.conv1.weight"] = torch.ones(5, 5, 3, 3)
    with pytest.raises(UsageError) as caught:
        import_checkpoint.fit(import_checkpoint.read(saved(tmp_path / "w.pt", state)), "resnet18", **PLAIN)
    text = str(caught.value)
    assert "missing layer2.0.bn1.weight" in text
    assert "unexpected layer2.0.gate.weight" in text
    assert "layer3.0.conv1.weight [5, 5, 3, 3] instead of [8, 4, 3, 3]" in text
    checkpoint = import_checkpoint.read(saved(tmp_path / "v.pt", narrow.state_dict()))
    with pytest.raises(UsageError, match="does not fit resnet34: missing"):
        import_checkpoint.fit(checkpoint, "resnet34", **PLAIN)
    with pytest.raises(UsageError, match="has 3 classes, and 4 labels were given"):
        import_checkpoint.fit(checkpoint, "resnet18", **{**PLAIN, "num_classes": 4})
    with pytest.raises(UsageError, match="unknown architecture"):
        import_checkpoint.fit(checkpoint, "resnet81", **PLAIN)
    with pytest.raises(UsageError, match="has 2 numbers for 3 channel"):
        import_checkpoint.fit(checkpoint, "resnet18", **{**PLAIN, "mean": [0.1, 0.2]})


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_files_that_are_no_checkpoints(
    narrow: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = saved(tmp_path / "whole.pt", narrow.state_dict()).read_bytes()
    cases: dict[str, tuple[bytes, type[Exception], str]] = {
        "cut.pt": (whole[: len(whole) // 2], PackageError, "is damaged or no PyTorch file"),
        "text.pth": (b"hello, I am text", PackageError, "is damaged or no PyTorch file"),
        "empty.pt": (b"", PackageError, "is damaged or no PyTorch file"),
        "evil.pt": (pickle.dumps(Evil(), protocol=2), PackageError, "holds more than tensors|damaged"),
        "short.safetensors": (b"abc", PackageError, "header too small"),
        "w.h5": (b"", UsageError, "unknown kind"),
    }
    for name, (data, kind, said) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(kind, match=said):
            import_checkpoint.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.save(narrow, tmp_path / "module.pt")
    with pytest.raises(PackageError, match="holds more than tensors"):
        import_checkpoint.read(tmp_path / "module.pt")
    with pytest.raises(PackageError, match="no table of weights; it has epoch, note"):
        import_checkpoint.read(saved(tmp_path / "other.pt", {"epoch": 3, "note": "x"}))
    with pytest.raises(PackageError, match="not a state dict"):
        import_checkpoint.read(saved(tmp_path / "list.pt", [1, 2]))
    broken = {**narrow.state_dict(), "bn1.weight": torch.tensor([1.0, float("nan")])}
    with pytest.raises(PackageError, match=r'not finite in "bn1\.weight"'):
        import_checkpoint.read(saved(tmp_path / "nan.pt", broken))
    os.mkfifo(tmp_path / "fifo.pt")
    for path in (tmp_path / "missing.pt", tmp_path, tmp_path / "fifo.pt"):
        with pytest.raises(UsageError):
            import_checkpoint.read(path)


def test_checkpoints_that_hold_more_than_their_file_does(tmp_path: Path) -> None:
    """A table inside itself, a terabyte of one number, and tensors that are no plain arrays."""
    loop: dict[str, Any] = {}
    loop["state_dict"] = loop
    with pytest.raises(PackageError, match="not a state dict"):
        import_checkpoint.read(saved(tmp_path / "loop.pt", loop))
    odd = {
        "wide": torch.zeros(1).expand(10**6, 10**6),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "nowhere": torch.zeros(3, device="meta"),
    }
    for name, tensor in odd.items():
        with pytest.raises(PackageError, match=f'holds "{name}" as .* in another form than plain numbers'):
            import_checkpoint.read(saved(tmp_path / "odd.pt", {name: tensor, "b": torch.zeros(2)}))
    state = {"a." * 30_000 + "w": torch.zeros(1), "b": torch.zeros(1)}
    checkpoint = import_checkpoint.read(saved(tmp_path / "deep.pt", state))
    with pytest.raises(UsageError, match="does not fit resnet18"):
        import_checkpoint.fit(checkpoint, "resnet18", **PLAIN)


def test_a_normalisation_must_be_given() -> None:
    import_checkpoint.checked_normalisation([0.5, 0.5, 0.5], [0.2, 0.2, 0.2])
    for mean, std, said in (
        (None, None, "is not given"),
        ([0.5], None, "without --std"),
        (None, [0.5], "without --mean"),
        ([0.5], [0.0], "above 0"),
        ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], "divide|0..255"),
        ([float("nan")], [1.0], "finite"),
    ):
        with pytest.raises(UsageError, match=said):
            import_checkpoint.checked_normalisation(mean, std)


def test_a_normalisation_in_the_checkpoint_is_found(narrow: nn.Module, tmp_path: Path) -> None:
    inside = {"normalize.mu": torch.tensor([0.4, 0.5, 0.6]), "normalize.sigma": torch.full((3,), 0.25)}
    state = {**{f"net.{k}": v for k, v in narrow.state_dict().items()}, **inside}
    checkpoint = import_checkpoint.read(saved(tmp_path / "w.pt", state))
    found = import_checkpoint.normalisation_inside(checkpoint)
    assert found is not None
    assert np.allclose(found, [[0.4, 0.5, 0.6], [0.25] * 3])
    fitted = import_checkpoint.fit(checkpoint, "resnet18", **PLAIN)
    assert "holds another normalisation, mean and std 0.4, 0.5, 0.6" in fitted.notes[0]
    assert (
        import_checkpoint.normalisation_inside(
            import_checkpoint.read(saved(tmp_path / "v.pt", narrow.state_dict()))
        )
        is None
    )


class Bright(nn.Module):
    """Class 1 where the normalised input is above 0 on average; else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def test_a_wrong_normalisation_shows_in_the_accuracy() -> None:
    from ratioctl.models import Classifier

    rng = np.random.default_rng(0)
    level = rng.integers(60, 190, 200)
    pixels = np.clip(level[:, None, None, None] + rng.integers(-9, 9, (200, 8, 8, 3)), 0, 255)
    pixels, labels = pixels.astype(np.uint8), (level > 127).astype(np.int64)
    for mean, std, wrong in (([0.5] * 3, [0.2] * 3, False), ([0.0] * 3, [1.0] * 3, True)):
        statistics, trials = import_checkpoint.measure(Classifier(Bright(), mean, std), pixels, labels)
        assert statistics[0] == pytest.approx((pixels.mean((0, 1, 2)) / 255 - mean) / np.array(std), abs=1e-5)
        found = import_checkpoint.doubts(statistics, trials)
        assert bool(found) is wrong
        if wrong:
            assert "with the one of [-1,1]: --mean 0.5,0.5,0.5" in found[0]
        assert (trials[0].accuracy or 0) > 0.9 or wrong
    statistics, trials = import_checkpoint.measure(Classifier(Bright(), [0.5] * 3, [0.01] * 3), pixels, None)
    assert trials[0].accuracy is None
    assert "where about 0 and 1 are usual" in import_checkpoint.doubts(statistics, trials)[0]


def test_the_package_computes_what_the_checkpoint_did(
    narrow: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    checkpoint = import_checkpoint.read(saved(tmp_path / "w.pt", narrow.state_dict()))
    mean, std = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
    fitted = import_checkpoint.fit(checkpoint, "resnet18", num_classes=3, mean=mean, std=std)
    written = import_checkpoint.write(
        fitted, checkpoint, "resnet18", ["a", "b", "c"], tmp_path / "p", input_size=8
    )
    read = package.read(written.path)
    assert read.input_size == (3, 8, 8)
    assert read.mean == tuple(mean)
    assert read.std == tuple(std)
    assert not read.calibrated
    assert read.temperature == 1.0
    assert read.config["ratio"]["provenance"]["weights_sha256"] == checkpoint.sha256
    with torch.no_grad():
        expected = narrow((X - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1))
        assert torch.equal(from_package(read)(X), expected)
