"""Checkpoints from elsewhere: their names, their shapes, their normalization, and files that are none."""

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
from ratioctl.models import build, checkpoint_file, from_package, import_checkpoint, normalization
from ratioctl.utils.frame import Frame

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
    "behind a normalization": lambda s: {
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
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", DRESSED[kind](dict(state))))
    fitted = import_checkpoint.fit(checkpoint, "resnet18", **PLAIN)
    assert agree(fitted.classifier, narrow)
    assert fitted.options == {"width": 2}
    assert (
        fitted.notes
        == {
            "plain": (),
            "data parallel": ('removed the prefix "module." from its names',),
            "nested": ('removed the prefix "model." from its names',),
            "twice nested": ('removed the prefix "module.model." from its names',),
            "compiled": ('removed the prefix "_orig_mod." from its names',),
            "behind a normalization": ('removed the prefix "1." from its names',),
            "torchvision's names": ("renamed 17 of its tensors",),
            "half precision": (),
            "without counters": (),
        }[kind]
    )


def test_safetensors_and_wide_networks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    wide = network("wideresnet-10-1")
    save_file(wide.state_dict(), tmp_path / "w.safetensors")
    fitted = import_checkpoint.fit(
        checkpoint_file.read(tmp_path / "w.safetensors"), "wideresnet-10-1", **PLAIN
    )
    assert agree(fitted.classifier, wide)
    assert fitted.options == {}


def test_a_network_of_torchvision(tmp_path: Path) -> None:
    import torchvision

    theirs = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=3).eval()
    path = saved(tmp_path / "w.pth", theirs.state_dict())
    fitted = import_checkpoint.fit(checkpoint_file.read(path), "torchvision:squeezenet1_1", **PLAIN)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fitted.classifier(x), theirs(x))


def test_what_does_not_fit_is_named(narrow: nn.Module, tmp_path: Path) -> None:
    state = dict(narrow.state_dict())
    del state["layer2.0.bn1.weight"]
    state["layer2.0.gate.weight"] = torch.ones(3)
    state["layer3.0.conv1.weight"] = torch.ones(5, 5, 3, 3)
    with pytest.raises(UsageError) as caught:
        import_checkpoint.fit(checkpoint_file.read(saved(tmp_path / "w.pt", state)), "resnet18", **PLAIN)
    text = str(caught.value)
    assert "missing layer2.0.bn1.weight" in text
    assert "unexpected layer2.0.gate.weight" in text
    assert "layer3.0.conv1.weight [5, 5, 3, 3] instead of [8, 4, 3, 3]" in text
    checkpoint = checkpoint_file.read(saved(tmp_path / "v.pt", narrow.state_dict()))
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
        "cut.pt": (whole[: len(whole) // 2], PackageError, "is damaged or not a PyTorch file"),
        "text.pth": (b"hello, I am text", PackageError, "is damaged or not a PyTorch file"),
        "empty.pt": (b"", PackageError, "is damaged or not a PyTorch file"),
        "evil.pt": (pickle.dumps(Evil(), protocol=2), PackageError, "holds more than tensors|damaged"),
        "short.safetensors": (b"abc", PackageError, "header too small"),
        "w.h5": (b"", UsageError, "unknown kind"),
    }
    for name, (data, kind, said) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(kind, match=said):
            checkpoint_file.read(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.save(narrow, tmp_path / "module.pt")
    with pytest.raises(PackageError, match="holds more than tensors"):
        checkpoint_file.read(tmp_path / "module.pt")
    with pytest.raises(PackageError, match="no table of weights; it has epoch, note"):
        checkpoint_file.read(saved(tmp_path / "other.pt", {"epoch": 3, "note": "x"}))
    with pytest.raises(PackageError, match="not a state dict"):
        checkpoint_file.read(saved(tmp_path / "list.pt", [1, 2]))
    broken = {**narrow.state_dict(), "bn1.weight": torch.tensor([1.0, float("nan")])}
    with pytest.raises(PackageError, match=r'not finite in "bn1\.weight"'):
        checkpoint_file.read(saved(tmp_path / "nan.pt", broken))
    os.mkfifo(tmp_path / "fifo.pt")
    for path in (tmp_path / "missing.pt", tmp_path, tmp_path / "fifo.pt"):
        with pytest.raises(UsageError):
            checkpoint_file.read(path)


def test_checkpoints_that_hold_more_than_their_file_does(tmp_path: Path) -> None:
    """A table inside itself, a terabyte of one number, and tensors that are no plain arrays."""
    loop: dict[str, Any] = {}
    loop["state_dict"] = loop
    with pytest.raises(PackageError, match="not a state dict"):
        checkpoint_file.read(saved(tmp_path / "loop.pt", loop))
    odd = {
        "wide": torch.zeros(1).expand(10**6, 10**6),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "nowhere": torch.zeros(3, device="meta"),
    }
    for name, tensor in odd.items():
        with pytest.raises(PackageError, match=f'holds "{name}" as .* in another form than plain numbers'):
            checkpoint_file.read(saved(tmp_path / "odd.pt", {name: tensor, "b": torch.zeros(2)}))
    state = {"a." * 30_000 + "w": torch.zeros(1), "b": torch.zeros(1)}
    checkpoint = checkpoint_file.read(saved(tmp_path / "deep.pt", state))
    with pytest.raises(UsageError, match="does not fit resnet18"):
        import_checkpoint.fit(checkpoint, "resnet18", **PLAIN)


def test_a_normalization_must_be_given() -> None:
    normalization.check_normalization([0.5, 0.5, 0.5], [0.2, 0.2, 0.2])
    for mean, std, said in (
        (None, None, "is not given"),
        ([0.5], None, "without --std"),
        (None, [0.5], "without --mean"),
        ([0.5], [0.0], "above 0"),
        ([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], "divide|0..255"),
        ([float("nan")], [1.0], "finite"),
    ):
        with pytest.raises(UsageError, match=said):
            normalization.check_normalization(mean, std)


def test_a_normalization_in_the_checkpoint_is_found(narrow: nn.Module, tmp_path: Path) -> None:
    inside = {"normalize.mu": torch.tensor([0.4, 0.5, 0.6]), "normalize.sigma": torch.full((3,), 0.25)}
    state = {**{f"net.{k}": v for k, v in narrow.state_dict().items()}, **inside}
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", state))
    found = import_checkpoint.stored_normalization(checkpoint)
    assert found is not None
    assert np.allclose(found, [[0.4, 0.5, 0.6], [0.25] * 3])
    fitted = import_checkpoint.fit(checkpoint, "resnet18", **PLAIN)
    assert "holds another normalization, mean and std 0.4, 0.5, 0.6" in fitted.notes[0]
    assert (
        import_checkpoint.stored_normalization(
            checkpoint_file.read(saved(tmp_path / "v.pt", narrow.state_dict()))
        )
        is None
    )


class Bright(nn.Module):
    """Class 1 where the normalized input is above 0 on average; else class 0."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], dim=1)


def test_a_wrong_normalization_shows_in_the_accuracy() -> None:
    from ratioctl.models import Classifier

    rng = np.random.default_rng(0)
    level = rng.integers(60, 190, 200)
    pixels = np.clip(level[:, None, None, None] + rng.integers(-9, 9, (200, 8, 8, 3)), 0, 255)
    pixels, labels = pixels.astype(np.uint8), (level > 127).astype(np.int64)
    for mean, std, wrong in (([0.5] * 3, [0.2] * 3, False), ([0.0] * 3, [1.0] * 3, True)):
        statistics, trials = normalization.measure(Classifier(Bright(), mean, std), pixels, labels)
        assert statistics[0] == pytest.approx((pixels.mean((0, 1, 2)) / 255 - mean) / np.array(std), abs=1e-5)
        found = normalization.find_problems(statistics, trials)
        assert bool(found) is wrong
        if wrong:
            assert "with the one of [-1,1]: --mean 0.5,0.5,0.5" in found[0]
        assert (trials[0].accuracy or 0) > 0.9 or wrong
    statistics, trials = normalization.measure(Classifier(Bright(), [0.5] * 3, [0.01] * 3), pixels, None)
    assert trials[0].accuracy is None
    assert "where about 0 and 1 are usual" in normalization.find_problems(statistics, trials)[0]


def test_the_package_computes_what_the_checkpoint_did(
    narrow: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", narrow.state_dict()))
    mean, std = [0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616]
    fitted = import_checkpoint.fit(checkpoint, "resnet18", num_classes=3, mean=mean, std=std)
    written = import_checkpoint.write(
        fitted, checkpoint, "resnet18", ["a", "b", "c"], tmp_path / "p", input_size=Frame(8, 8)
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


def saved_network(name: str, path: Path, **options: Any) -> Path:
    import torchvision

    torch.manual_seed(0)
    return saved(
        path, torchvision.models.get_model(name, weights=None, num_classes=3, **options).state_dict()
    )


def peers(state: dict[str, Tensor]) -> dict[str, object]:
    """One network as several tools save it."""
    pixels = {"new_mean": torch.full((3, 1, 1), 0.4), "new_std": torch.full((3, 1, 1), 0.2)}
    halved = {k: v / 2 if v.is_floating_point() else v for k, v in state.items()}
    return {
        "MadryLab": {
            "model": {
                **{f"module.model.{k}": v for k, v in state.items()},
                **{f"module.attacker.model.{k}": v for k, v in state.items()},
                **{f"module.normalizer.{k}": v for k, v in pixels.items()},
                **{f"module.attacker.normalize.{k}": v for k, v in pixels.items()},
            },
            "epoch": 3,
        },
        "AveragedModel": {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in state.items()}},
        "Lightning": {
            "state_dict": {**{f"model.{k}": v for k, v in state.items()}, "criterion.weight": torch.ones(3)}
        },
        "tensors beside": {"best_acc1": torch.tensor(71.2), "epoch": torch.tensor(3), "state_dict": state},
        "timm": {"state_dict": halved, "state_dict_ema": state, "arch": "resnet18"},
    }


@pytest.mark.parametrize(
    ("tool", "note"),
    [
        ("MadryLab", "left out 102: module.attacker.model"),
        ("AveragedModel", 'removed the prefix "module."'),
        ("Lightning", "left out criterion.weight, which the network does not use"),
        ("tensors beside", None),
        ("timm", None),
    ],
)
def test_checkpoints_of_other_tools(narrow: nn.Module, tmp_path: Path, tool: str, note: str | None) -> None:
    path = saved(tmp_path / "w.pt", peers(narrow.state_dict())[tool])
    checkpoint = checkpoint_file.read(path, ema=True if tool == "timm" else None)
    fitted = import_checkpoint.fit(checkpoint, "resnet18", **PLAIN)
    assert agree(fitted.classifier, narrow)
    if note is not None:
        assert any(note in text for text in fitted.notes), fitted.notes
    if tool == "MadryLab":
        mean, std = import_checkpoint.stored_normalization(checkpoint) or ((), ())
        assert (mean, std) == (pytest.approx([0.4] * 3), pytest.approx([0.2] * 3))


def test_two_sets_of_weights_are_named_and_chosen(narrow: nn.Module, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", peers(narrow.state_dict())["timm"])
    both = 'holds two sets of weights: used "state_dict"; --ema takes the averaged ones, "state_dict_ema"'
    for ema, nest, notes in (
        (None, "state_dict", (both,)),
        (False, "state_dict", ()),
        (True, "state_dict_ema", ()),
    ):
        checkpoint = checkpoint_file.read(path, ema=ema)
        assert (checkpoint.nest, checkpoint.notes) == (nest, notes)
    plain = saved(tmp_path / "plain.pt", narrow.state_dict())
    with pytest.raises(UsageError, match="holds no averaged weights"):
        checkpoint_file.read(plain, ema=True)
    only = saved(tmp_path / "only.pt", {"model_ema": narrow.state_dict(), "epoch": 1})
    assert checkpoint_file.read(only).nest == "model_ema"


def test_another_architecture_is_advised_only_where_layers_do_not_fit(
    narrow: nn.Module, tmp_path: Path
) -> None:
    path = saved(tmp_path / "w.pt", {**narrow.state_dict(), "gate.weight": torch.ones(3)})
    with pytest.raises(UsageError, match=r"unexpected gate\.weight\. Save the network's own state dict"):
        import_checkpoint.fit(checkpoint_file.read(path), "resnet18", **PLAIN)
    other = {**narrow.state_dict(), "module.attacker.conv1.weight": torch.ones(2, 3, 3, 3)}
    with pytest.raises(UsageError, match=r"unexpected module\.attacker"):  # a copy with other values
        import_checkpoint.fit(checkpoint_file.read(saved(tmp_path / "v.pt", other)), "resnet18", **PLAIN)


def test_compressed_members_are_refused_unread(narrow: nn.Module, tmp_path: Path) -> None:
    import zipfile

    path = saved(tmp_path / "w.pt", narrow.state_dict())
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    with pytest.raises(PackageError, match="holds compressed members") as caught:
        checkpoint_file.read(tmp_path / "b.pt")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("architecture", "size", "options", "said"),
    [
        (
            "resnet18",
            64,
            {},
            r"--arch-option stem_stride: is needed for resnet18: a CIFAR-style stem for images of 64 pixels",
        ),
        ("resnet18", 64, {"stem_stride": 2}, None),
        ("resnet18", 32, {}, None),
        ("preactresnet18", 32, {}, r"--arch-option activation: is needed .*ReLU and with SiLU"),
        ("preactresnet18", 32, {"activation": "silu"}, None),
    ],
)
def test_what_the_weights_do_not_say_is_asked_for_and_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    size: int,
    options: dict[str, Any],
    said: str | None,
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", network(architecture, width=2).state_dict()))
    if said is not None:
        with pytest.raises(UsageError, match=said):
            import_checkpoint.fit(checkpoint, architecture, input_size=size, options=options, **PLAIN)
        return
    fitted = import_checkpoint.fit(checkpoint, architecture, input_size=size, options=options, **PLAIN)
    labels = ["a", "b", "c"]
    written = import_checkpoint.write(
        fitted, checkpoint, architecture, labels, tmp_path / "p", input_size=Frame(size, size)
    )
    assert written.architecture_options == {"width": 2, "stem_stride": 1, **options}
    again = from_package(written)
    x = torch.rand(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(x), fitted.classifier(x))


@pytest.mark.parametrize("aux", [False, True])
def test_googlenets_heads_are_inferred_and_its_input_transform_is_asked_for(
    tmp_path: Path, aux: bool
) -> None:
    path = saved_network("googlenet", tmp_path / "w.pt", aux_logits=aux, init_weights=False)
    checkpoint = checkpoint_file.read(path)
    with pytest.raises(UsageError, match="--arch-option transform_input=false"):
        import_checkpoint.fit(checkpoint, "torchvision:googlenet", **PLAIN)
    with pytest.raises(UsageError, match="--arch-option transform_input=false"):
        import_checkpoint.resolve_size(checkpoint, "torchvision:googlenet", 3, {})
    for transform in (False, True):
        fitted = import_checkpoint.fit(
            checkpoint, "torchvision:googlenet", options={"transform_input": transform}, **PLAIN
        )
        assert fitted.options == {"aux_logits": aux, "transform_input": transform}
        assert fitted.classifier.network.transform_input is transform


def test_a_versioned_state_dict_survives_folding(tmp_path: Path) -> None:
    from ratioctl.models import fold_batchnorm

    path = saved_network("mnasnet0_5", tmp_path / "w.pt")
    fitted = import_checkpoint.fit(checkpoint_file.read(path), "torchvision:mnasnet0_5", **PLAIN)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fold_batchnorm(fitted.classifier)(x), fitted.classifier(x))


def test_vision_transformers_take_the_size_of_their_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", theirs.state_dict()))
    fitted = import_checkpoint.fit(checkpoint, "timm:test_vit", input_size=64, **PLAIN)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fitted.classifier(x), theirs(x))
    with pytest.raises(UsageError, match=r"for images of 64 pixels\. Give --input-size 64"):
        import_checkpoint.fit(checkpoint, "timm:test_vit", input_size=160, **PLAIN)
    assert import_checkpoint.resolve_size(checkpoint, "timm:test_vit", 3, {})[0] == 64


def test_a_network_of_timm_with_one_channel(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("test_resnet", num_classes=3, in_chans=1).eval()
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", theirs.state_dict()))
    fitted = import_checkpoint.fit(checkpoint, "timm:test_resnet", input_size=32, **PLAIN)
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(fitted.classifier(x), theirs(x))
    with pytest.raises(UsageError, match=r"takes images of several sizes.*published weights take 160"):
        import_checkpoint.resolve_size(checkpoint, "timm:test_resnet", 3, {})


def test_a_network_of_torchvision_with_one_channel(tmp_path: Path) -> None:
    import torchvision

    theirs = torchvision.models.resnet18(num_classes=3).eval()
    theirs.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", theirs.state_dict()))
    fitted = import_checkpoint.fit(checkpoint, "torchvision:resnet18", input_size=32, **PLAIN)
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(fitted.classifier(x), theirs(x))


def test_a_size_that_the_network_cannot_take_is_refused_with_what_it_takes(tmp_path: Path) -> None:
    path = saved_network("inception_v3", tmp_path / "w.pt", aux_logits=False, init_weights=False)
    checkpoint = checkpoint_file.read(path)
    arch, options = "torchvision:inception_v3", {"transform_input": False}
    fitted = import_checkpoint.fit(checkpoint, arch, input_size=32, options=options, **PLAIN)
    with pytest.raises(
        UsageError, match=r"--input-size 32x32: .* cannot take it: .* It takes, for example, 96, 128"
    ):
        import_checkpoint.check_forward(fitted, checkpoint, arch, 3, Frame(32, 32))
    import_checkpoint.check_forward(fitted, checkpoint, arch, 3, Frame(96, 96))


def test_weights_that_overflow_are_refused_before_anything_is_written(
    narrow: nn.Module, tmp_path: Path
) -> None:
    state = {
        k: v * 3e38 if k in ("bn1.weight", "linear.weight") else v for k, v in narrow.state_dict().items()
    }
    checkpoint = checkpoint_file.read(saved(tmp_path / "w.pt", state))
    fitted = import_checkpoint.fit(checkpoint, "resnet18", input_size=8, **PLAIN)
    with pytest.raises(PackageError, match="logits that are not finite"):
        import_checkpoint.check_forward(fitted, checkpoint, "resnet18", 3, Frame(8, 8))


def test_labels_in_another_order_are_named() -> None:
    names = [str(k + 1) for k in range(10)]
    by_text = [names.index(name) for name in sorted(names)]  # output k stands for class by_text[k]
    labels = np.random.default_rng(0).integers(0, 10, 500)
    predicted = np.array([by_text.index(k) for k in labels])
    predicted[:20] = 0
    said = normalization.other_order(predicted, labels, names)
    assert said is not None
    assert "--labels 1,10,2,3,4,5,6,7,8,9, the order of their text," in said
    assert normalization.other_order(labels, labels, names) is None
    assert normalization.other_order(np.zeros(500, int), labels, names) is None
    assert normalization.near_chance(0.105, 10, 600)
    assert not normalization.near_chance(0.3, 10, 600)
