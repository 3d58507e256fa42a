"""`ratioctl figures`: which figures there are, what they show, and that both formats show the same."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratioctl import package
from ratioctl.cli import main
from ratioctl.errors import UsageError
from ratioctl.evaluation import paper_figures as computed
from ratioctl.evaluation.paper_figures import PaperFigures, collect
from ratioctl.report import paper_figures
from ratioctl.report.drawing import Drawing


@pytest.fixture(scope="module")
def models(small_package: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models, the second trained plainly, as its config says."""
    one = package.read(small_package)
    ratio = {**one.config["ratio"], "objective": {"inside": {"clean": 1.0, "robust": 0.0}}}
    config = {key: one.config[key] for key in ("architecture", "architecture_options", "label_names")}
    config |= {"pretrained_cfg": one.config["pretrained_cfg"], "ratio": ratio}
    folder = tmp_path_factory.mktemp("models") / "small-plain"
    package.write(folder, config=config, weights=package.read_weights(one))
    return [small_package, folder]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("test")
    for k, name in enumerate(("cat", "dog", "red panda")):
        (folder / name).mkdir()
        for j in range(3):
            pixels = np.random.default_rng([k, j]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{j}.png")
    return str(folder)


@pytest.fixture(scope="module")
def found(models: list[Path], labelled: str) -> PaperFigures:
    return collect(models, data=labelled, ood=["uni=noise:uniform"], eps="0.5,1", steps=2, device="cpu")


def test_panels_show_what_the_paper_s_do(found: PaperFigures) -> None:
    assert found.failure is not None
    assert {row.model for row in found.failure.rows} == {"small-2"}
    assert len(found.counterfactuals) == len(found.features) == 2
    for panel in found.counterfactuals:
        assert [row.model for row in panel.rows] == ["small", "small", "small-2", "small-2"]
        label, other = (row.target.target for row in panel.rows[:2])
        assert label == panel.label
        predicted = panel.rows[0].explanation.original.label
        assert other != label
        assert predicted in (label, other), "the true class, and the predicted or the second one"
        assert [budget.eps for budget in panel.rows[0].target.budgets] == [0.5, 1.0]
    for panel in found.features:
        assert panel.label is None
        for row in panel.rows:
            assert row.target.target == row.explanation.original.label
    assert set(found.curves) == {"small", "small-2"}
    assert found.about["ood_images_of"] == "uni"


def test_the_images_are_those_that_most_models_misclassify() -> None:
    logits = np.zeros((2, 4, 3))
    labels = np.array([0, 0, 1, 2])
    logits[:, :, 0] = 1  # everything is predicted as class 0
    logits[1, 3] = (0, 0, 9)  # apart from the last image, by the second model
    assert computed._misclassified(logits, labels, (1.0, 1.0), 2) == [2, 3]
    assert computed._misclassified(logits, labels, (1.0, 1.0), 4) == [2, 3, 0, 1]


def test_both_formats_are_written_and_stand_alone(found: PaperFigures, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    paths = paper_figures.write(found, out)
    names = {path.stem for path in paths} - {"figures"}
    assert names == {
        *("figure-1-plain-model", "figure-2-counterfactuals"),
        *("figure-5-confidence-over-radius", "figure-6-features-on-ood-images"),
    }
    for name in names:
        svg = (out / f"{name}.svg").read_text(encoding="utf-8")
        root = ElementTree.fromstring(svg)
        with Image.open(out / f"{name}.png") as picture:
            assert picture.size == (2 * int(root.get("width", "0")), 2 * int(root.get("height", "0")))
            assert len(np.unique(np.asarray(picture.convert("L")))) > 5, "not empty"
        assert not re.search(r"<script|href=\"(?!data:)|url\(", svg)
    shown = (out / "figure-2-counterfactuals.svg").read_text(encoding="utf-8")
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", shown)]
    rows = [row for panel in found.counterfactuals for row in panel.rows]
    assert len(pictures) == len(rows) * 3
    with Image.open(io.BytesIO(pictures[1])) as first:
        np.testing.assert_array_equal(np.asarray(first), rows[0].target.budgets[0].image)
    about = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert about["schema"] == "ratioctl/figures/1"
    assert [model["name"] for model in about["models"]] == ["small", "small-2"]


def test_a_drawing_puts_the_same_things_into_both_formats() -> None:
    drawing = Drawing(width=60, height=40)
    drawing.area([(0, 0), (10, 0), (10, 10), (0, 10)], (255, 0, 0))
    drawing.line([(0, 30), (60, 30)], (0, 0, 255), width=2, dashed=True)
    drawing.picture(20, 5, 8, np.full((2, 2, 3), (0, 255, 0), dtype=np.uint8))
    drawing.text(30, 38, "<a & b>")
    with Image.open(io.BytesIO(drawing.to_png(1))) as picture:
        pixels = np.asarray(picture)
    assert tuple(pixels[5, 5]) == (255, 0, 0)
    assert tuple(pixels[9, 24]) == (0, 255, 0)
    blue = (pixels[30] == (0, 0, 255)).all(1)
    assert 0.4 < blue.mean() < 0.8, "dashes of 6 and gaps of 4"
    svg = drawing.to_svg().decode()
    assert "&lt;a &amp; b&gt;" in svg
    assert 'stroke-dasharray="6 4"' in svg


def test_the_command_writes_once_and_refuses_files_of_others(
    models: list[Path], labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures"
    line = ["figures", str(models[0]), "--data", labelled, "--ood", "uni=noise:uniform", "--eps", "0.5"]
    line += ["--steps", "1", "--count", "1", "--device", "cpu", "--out", str(out), "--json"]
    assert main(line) == 0
    document = json.loads(capsys.readouterr().out)
    assert [Path(path).name for path in document["files"]][-1] == "figures.json"
    assert not list(out.glob("figure-1-*")), "no plain model was given"
    assert main(line) == 0, "its own files are replaced"
    (out / "figures.json").write_text("{}", encoding="utf-8")
    assert main(line) == 2
    assert "was not written by ratioctl figures" in capsys.readouterr().err


def test_models_of_other_labels_are_refused(models: list[Path], tiny_package: Path, labelled: str) -> None:
    with pytest.raises(UsageError, match="other labels or another input size"):
        collect([models[0], tiny_package], data=labelled)
