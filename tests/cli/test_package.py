"""`ratioctl package`: from a state dict to a package that scores, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ratioctl
from ratioctl import package
from ratioctl.cli import main
from ratioctl.models import build
from ratioctl.scoring import backends


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    torch.manual_seed(0)
    network = build("resnet18", num_classes=3, width=2, mean=[0.0] * 3, std=[1.0] * 3).network
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    return path


def run(*line: str | Path) -> int:
    return main(["package", *map(str, line)])


def test_a_packaged_model_scores(
    weights: Path, tmp_path: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("\ufeffcat\n dog, the small one \n\nfrog\n", encoding="utf-8")
    out = tmp_path / "pets"
    line = [weights, "--arch", "resnet18", "--labels", labels, "--out", out, "--input-size", "8"]
    assert run(*line, "--mean", "0.5,0.5,0.5", "--std", "0.25") == 0
    captured = capsys.readouterr()
    assert f"Package: {out} (digest {package.read(out).digest[:12]})" in captured.out
    assert 'removed the prefix "module." from its names' in captured.err
    assert f"ratioctl calibrate {out}" in captured.err
    read = package.read(out)
    assert read.label_names == ("cat", "dog, the small one", "frog")
    assert (read.mean, read.std) == ((0.5,) * 3, (0.25,) * 3)
    rows = list(ratioctl.ood_score([colors], model=out, threshold=0.5, probabilities=True))
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    with torch.no_grad():
        expected = torch.softmax(ratioctl.load_model(out)(red), 1)[0]
    assert rows[3].probabilities == pytest.approx(expected.tolist(), abs=1e-6)
    assert main(["ood-score", str(colors), "--model", str(out)]) == 5
    assert "not calibrated" in capsys.readouterr().err
    assert main(["ood-score", str(colors), "--model", str(out), "--threshold", "0.2"]) == 0
    captured = capsys.readouterr()
    assert "exporting it would be faster" in captured.err
    assert "is not calibrated" in captured.err


@pytest.fixture
def hurried(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """A package made by the command, whose worst case is searched in few steps."""
    monkeypatch.setattr(backends, "WORST_CASE_STEPS", 4)
    out = tmp_path / "pets"
    line = [weights, "--arch", "resnet18", "--labels", "cat,dog,frog", "--out", out, "--input-size", "8"]
    assert run(*line, "--mean", "0", "--std", "1") == 0
    capsys.readouterr()
    return out


def test_worst_case_is_at_least_the_clean_confidence(
    hurried: Path, colors: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = [str(colors), "--model", str(hurried), "--threshold", "0.5", "--format", "jsonl"]
    assert main(["ood-score", *scored, "--worst-case", "0.5"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"^This takes about \d+ s: 4 images, \d\S* s each\.$", captured.err, re.M)
    rows = [json.loads(text) for text in captured.out.splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["worst_case_confidence"] > row["confidence"]
        assert row["worst_case_is_ood"] is (row["worst_case_confidence"] < 0.5)
        assert list(row)[-2:] == ["worst_case_confidence", "worst_case_is_ood"]
    monkeypatch.setattr("ratioctl.scoring.pipeline.MAX_BATCH", 1)
    assert main(["ood-score", *scored, "--worst-case", "0.5"]) == 0
    err = capsys.readouterr().err
    assert re.findall(r"^(\d+%) \((\d) of 4 images, \d OOD\), \d+ s left$", err, re.M) == [
        *(("25%", "1"), ("50%", "2"), ("75%", "3"))
    ]
    for quiet in ([*scored, "--worst-case", "0.5", "-q"], scored):
        assert main(["ood-score", *quiet]) == 0
        err = capsys.readouterr().err
        assert "takes about" not in err
        assert "left" not in err


def test_a_list_on_stdin_reports_the_pace_of_its_worst_case(
    hurried: Path, colors: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = io.BytesIO(f"{colors}/red.png\n".encode())
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=listed))
    assert main(["ood-score", "-", "--model", str(hurried), "--threshold", "0.5", "--worst-case", "0.5"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"^The worst case takes about \S+ s an image\.$", captured.err, re.M)
    assert "red.png" in captured.out


def test_the_data_tell_a_wrong_normalization(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for label in ("cat", "dog", "frog"):
        (data / label).mkdir(parents=True)
        for k in range(3):
            pixels = rng.integers(100, 156, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / label / f"{k}.png")
    line = [weights, "--arch", "resnet18", "--labels", "cat,dog,frog", "--input-size", "8", "--data", data]
    assert run(*line, "--out", tmp_path / "p", "--mean", "0.1", "--std", "0.05", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["package"] == str(tmp_path / "p")
    assert min(document["normalised"]["mean"]) > 5
    assert 0 <= document["accuracy"] <= 1
    assert any("where about 0 and 1 are usual" in text for text in document["warnings"])
    (data / "horse").mkdir()
    Image.new("RGB", (8, 8)).save(data / "horse" / "0.png")
    assert run(*line, "--out", tmp_path / "q", "--mean", "0", "--std", "1") == 2
    assert "horse" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_network_of_timm_does_what_ours_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    pixels = timm.data.resolve_model_data_config(theirs)
    size = pixels["input_size"][1]
    mean, std = (",".join(map(str, pixels[key])) for key in ("mean", "std"))
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for k in range(60):
        folder = data / ("cat", "dog", "frog")[k % 3]
        folder.mkdir(parents=True, exist_ok=True)
        light = rng.integers(0, 200, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(light).resize((size, size)).save(folder / f"{k:02d}.png")
    out = tmp_path / "pets"
    line = [tmp_path / "weights.pth", "--arch", f"timm:{name}", "--labels", "cat,dog,frog", "--out", out]
    assert run(*line, "--input-size", str(size), "--mean", mean, "--std", std, "--data", data) == 0
    assert main(["calibrate", str(out), "--data", str(data)]) == 0
    assert package.read(out).calibrated
    eager = list(ratioctl.ood_score([data], model=out, probabilities=True))
    assert main(["export", str(out)]) == 0
    read = package.read(out)
    assert read.onnx_path is not None
    exported = list(ratioctl.ood_score([data], model=read.onnx_path, probabilities=True))
    assert [(row.path, row.label) for row in exported] == [(row.path, row.label) for row in eager]
    ours, ort = (np.array([row.probabilities for row in rows]) for rows in (eager, exported))
    assert np.abs(ours - ort).max() < 1e-4
    first = np.asarray(Image.open(eager[0].path)).astype(np.float32).transpose(2, 0, 1)[None] / 255
    normal = (torch.from_numpy(first) - torch.tensor(pixels["mean"]).view(3, 1, 1)) / torch.tensor(
        pixels["std"]
    ).view(3, 1, 1)
    with torch.no_grad():
        expected = torch.softmax(theirs(normal) / read.temperature, 1)[0]
    assert eager[0].probabilities == pytest.approx(expected.tolist(), abs=1e-4)
    capsys.readouterr()


def test_an_unknown_name_of_timm(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    line = [weights, "--arch", "timm:test_resnett", "--labels", "cat,dog,frog", "--out", tmp_path / "p"]
    assert run(*line, "--mean", "0", "--std", "1") == 2
    assert 'Did you mean "timm:test_resnet"' in " ".join(capsys.readouterr().err.split())


def test_what_is_refused(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "p"]
    good = ["--arch", "resnet18", "--labels", "cat,dog,frog", "--mean", "0", "--std", "1", *out]
    for line, code, said in (
        ([weights, "--arch", "resnet18", "--labels", "cat,dog,frog", *out], 2, "--mean 0 --std 1"),
        ([weights, *good, "--std", "0"], 2, "above 0"),
        ([weights, *good, "--mean", "a,b"], 2, "not a list of numbers"),
        ([weights, *good, "--labels", "cat,dog"], 2, "has 3 classes, and 2 labels"),
        ([weights, *good, "--labels", "cat"], 2, "fewer than two"),
        ([weights, *good, "--labels", "cat,cat,dog"], 2, "twice"),
        ([weights, *good, "--labels", "no/such.txt"], 2, "no such file"),
        ([weights, *good, "--labels", f"cat,dog,{'x' * 201}"], 2, 'a name of 201 characters, "xxxxxxxxxx'),
        ([weights, *good, "--arch", "resnet81"], 2, 'Did you mean "resnet18"'),
        ([weights, *good, "--arch", "resnet50"], 2, "does not fit resnet50: missing"),
        ([tmp_path / "none.pt", *good], 2, "does not exist"),
    ):
        assert run(*line) == code, said
        assert said in " ".join(capsys.readouterr().err.split())
    (tmp_path / "text.pt").write_text("text")
    assert run(tmp_path / "text.pt", *good) == 5
    assert not (tmp_path / "p").exists()
    assert run(weights, *good) == 0
    before = (tmp_path / "p" / "config.json").read_bytes()
    capsys.readouterr()
    assert run(weights, *good, "--labels", "a,b,c") == 2
    assert "holds a package. Name another folder, or replace it with --force" in capsys.readouterr().err
    assert (tmp_path / "p" / "config.json").read_bytes() == before
    assert run(weights, *good, "--labels", f"a,b,{'c' * 200}", "--force") == 0
    assert run(weights, *good, "--labels", "a,b,c", "--force") == 0
    assert package.read(tmp_path / "p").label_names == ("a", "b", "c")
    shutil.rmtree(tmp_path / "p")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").touch()
    assert run(weights, *good) == 2
    capsys.readouterr()


@pytest.mark.slow
def test_a_real_checkpoint_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pyautoattack's example: a plain ResNet-18 of CIFAR-10, on pixels as they are."""
    import pyautoattack

    from ratioctl.utils import resources

    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    weights = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"
    labels = package.read(package.find("cifar10-ratio")).label_names
    out = tmp_path / "theirs"
    line = [weights, "--arch", "resnet18", "--labels", ",".join(labels), "--out", out]
    assert run(*line) == 2
    assert "--mean 0 --std 1" in " ".join(capsys.readouterr().err.split())
    assert run(*line, "--mean", "0", "--std", "1") == 0
    samples = resources.folder("assets") / "samples"
    shown = {"cat": "cat", "kitten": "cat", "dog": "dog", "horse": "horse", "moose": "deer", "duck": "bird"}
    paths = [samples / f"{name}.jpg" for name in (*shown, "kingfisher")]
    rows = list(ratioctl.ood_score(paths, model=out, threshold=0.5))
    right = [row.label == label for row, label in zip(rows, [*shown.values(), "bird"], strict=True)]
    assert sum(right) >= 5, [(row.path, row.label) for row in rows]
