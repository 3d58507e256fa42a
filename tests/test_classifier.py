"""The object API: predictions in every form, explanations, notebooks, and its types in a consumer's code."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl import images, package
from ratioctl.classifier import Classifier, ImageExplanation, Predictions
from ratioctl.errors import ImageError, OutputError, PackageError, UncalibratedError, UsageError
from ratioctl.types import Prediction

SURE = math.exp(2) / (math.exp(2) + 2)  # logits (1, 0, 0) at temperature 1/2


@pytest.fixture
def tiny(tiny_package: Path) -> Classifier:
    return Classifier.from_pretrained(tiny_package)


@pytest.fixture(scope="module")
def small(small_package: Path) -> Classifier:
    return Classifier.from_pretrained(small_package)


@pytest.fixture(scope="module")
def explained(small: Classifier) -> ImageExplanation:
    picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return small.explain(picture, target="dog", eps="0.25,0.5", steps=4)


def test_one_image_in_every_form(tiny: Classifier, colors: Path) -> None:
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    path = colors / "red.png"
    for image in (path, str(path), path.read_bytes(), Image.open(path), red, images.to_pixels(red[None])[0]):
        found = tiny.predict(image)  # type: ignore[call-overload]
        assert isinstance(found, Prediction)
        assert (found.label, found.is_ood) == ("red", True)
        assert found.confidence == pytest.approx(SURE, abs=1e-6)
        assert found.ood_score == pytest.approx(1 - SURE, abs=1e-6)
        assert found.probabilities.tolist() == pytest.approx([SURE, (1 - SURE) / 2, (1 - SURE) / 2], abs=1e-6)
    assert json.loads(json.dumps(found.to_dict()))["probabilities"]["red"] == pytest.approx(SURE, abs=1e-6)


def test_several_images_agree_with_ood_score(tiny: Classifier, tiny_package: Path, colors: Path) -> None:
    paths = sorted(colors.glob("*.png"))
    found = tiny.predict(paths, threshold="tpr99")
    rows = list(ratioctl.ood_score(paths, model=tiny_package, threshold="tpr99", probabilities=True))
    assert isinstance(found, Predictions)
    assert found.label == tuple(row.label for row in rows) == ("blue", "red", "red")
    assert found.confidence.tolist() == [row.confidence for row in rows]
    assert found.is_ood == (False, True, False)
    assert found.probabilities.tolist() == [list(row.probabilities or ()) for row in rows]
    assert [one.label for one in found] == ["blue", "red", "red"]
    assert found[1:].label == ("red", "red")
    assert found.to_dict()[0] == found[0].to_dict()
    assert repr(found) == "<Predictions of 3 images, 1 out of distribution>"
    assert len(tiny.predict([])) == 0


def test_a_batch_and_a_mixture_keep_their_order(tiny: Classifier, colors: Path) -> None:
    batch = np.zeros((100, 4, 4, 3), np.uint8)
    batch[np.arange(100), ..., np.arange(100) % 3] = 255
    names = [("red", "green", "blue")[k % 3] for k in range(100)]
    found = tiny.predict(batch)
    assert isinstance(found, Predictions)
    assert list(found.label) == names
    floats = images.to_pixels(batch)
    mixed = tiny.predict([floats[0], colors / "blue.png", batch[1], floats[2:5], Image.fromarray(batch[5])])
    assert list(mixed.label) == ["red", "blue", "green", *names[2:5], "blue"]


def test_floats_of_the_models_size_are_not_rounded(tiny: Classifier) -> None:
    x = np.full((3, 4, 4), 0.2, np.float32)
    x[0] = 0.2004  # to 8 bits it would be the same as the others
    found = tiny.predict(x)
    assert isinstance(found, Prediction)
    assert found.probabilities[0] == pytest.approx(1 / (1 + 2 * math.exp(-0.0008)), abs=1e-6)
    larger = tiny.predict(np.full((3, 8, 8), 0.2))
    assert isinstance(larger, Prediction)
    assert larger.confidence == pytest.approx(1 / 3, abs=1e-6)


def test_thresholds(
    tiny: Classifier, colors: Path, tiny_package: Path, tiny_graph: Callable[..., bytes]
) -> None:
    path = colors / "red.png"
    assert tiny.predict(path, threshold=0.5).is_ood is False
    assert tiny.predict(path, threshold="tpr99").is_ood is False
    with pytest.raises(UsageError, match="no such threshold"):
        tiny.predict(path, threshold="tpr97")
    read = package.read(tiny_package)
    bare = package.update(read, config_changes={"ratio": {"thresholds": {}}}, onnx=tiny_graph())
    uncalibrated = Classifier.from_pretrained(bare)
    assert uncalibrated.predict(path).is_ood is None
    assert uncalibrated.predict(path, threshold=0.9).is_ood is True
    with pytest.raises(UncalibratedError, match="ratioctl calibrate"):
        uncalibrated.predict(path, threshold="tpr95")


def test_what_cannot_be_predicted(tiny: Classifier, colors: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        tiny.predict("missing.png")
    with pytest.raises(ImageError, match="is a folder"):
        tiny.predict(colors)
    with pytest.raises(UsageError, match="PIL images"):
        tiny.predict(7)  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="has the type int"):
        tiny.predict([colors / "red.png", 7])  # type: ignore[list-item]


def test_what_it_knows_of_itself(tiny: Classifier) -> None:
    assert tiny.labels == ("red", "green", "blue")
    assert tiny.temperature == 0.5
    assert tiny.thresholds == {"tpr95": 0.9, "tpr99": 0.7}
    assert (tiny.name, tiny.input_size) == ("tiny", (3, 4, 4))
    assert repr(tiny) == "Classifier('tiny', channel-means, 3 classes, 3x4x4, onnx)"
    assert tiny.verify()[0] == ("config.json", None)
    assert "cifar10-ratio" in Classifier.available()


def test_an_onnx_file_predicts_and_nothing_else(tiny_onnx: Path, colors: Path, tmp_path: Path) -> None:
    clf = Classifier.from_pretrained(tiny_onnx)
    assert clf.predict(colors / "blue.png").label == "blue"
    for use in (
        lambda: clf.explain(colors / "blue.png", target="red"),
        lambda: clf.module,
        lambda: clf.export(),
        lambda: clf.save_pretrained(tmp_path / "x"),
        lambda: clf.verify(),
    ):
        with pytest.raises(UsageError, match="needs a package: an ONNX file has no weights"):
            use()
    with pytest.raises(PackageError):
        Classifier.from_pretrained("no-such-model")


def test_it_predicts_without_torch(tiny_package: Path, tiny_onnx: Path, colors: Path) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import ratioctl\n"
        f"for model in ({str(tiny_package)!r}, {str(tiny_onnx)!r}):\n"
        "    clf = ratioctl.Classifier.from_pretrained(model)\n"
        f"    print(clf.predict({str(colors / 'green.png')!r}.replace('green', 'blue')).label)\n"
        "try:\n"
        f"    clf = ratioctl.Classifier.from_pretrained({str(tiny_package)!r})\n"
        f"    clf.explain({str(colors / 'blue.png')!r}, target='red')\n"
        "except ratioctl.UsageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *("blue", "blue"),
        'ratioctl.explain: needs torch, which is not installed. Run: pip install "ratioctl[torch]"',
    ]


def test_the_module_gives_the_logits(small: Classifier) -> None:
    import torch

    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = torch.softmax(small.module(x) / small.temperature, 1)
    found = small.predict(x)
    assert isinstance(found, Predictions)
    np.testing.assert_allclose(found.probabilities, p.numpy(), atol=1e-5)


def test_an_explanation(small: Classifier, explained: ImageExplanation, tmp_path: Path) -> None:
    assert explained.target == "dog"
    assert [one.eps for one in explained.counterfactuals] == [0.25, 0.5]
    assert explained.array.shape == (8, 8, 3)
    assert np.array_equal(np.asarray(explained.image), explained.array)
    again = small.predict(explained.image)
    assert again.probabilities[small.labels.index("dog")] == pytest.approx(explained.confidence, abs=1e-4)
    saved = explained.save(tmp_path / "answers")
    document = json.loads((tmp_path / "answers" / "counterfactuals.json").read_text(encoding="utf-8"))
    assert document["images"][0]["targets"][0]["budgets"][1]["confidence"] == explained.confidence
    png = tmp_path / "answers" / str(saved.targets[0].budgets[1].png)
    assert np.array_equal(np.asarray(Image.open(png)), explained.array)
    assert (tmp_path / "answers" / "index.html").is_file()


def test_notebooks_show_a_picture_and_words(explained: ImageExplanation) -> None:
    assert explained._repr_png_().startswith(b"\x89PNG")
    page = explained._repr_html_()
    assert page.startswith('<figure><img src="data:image/png;base64,')
    assert "towards &#x27;dog&#x27;, confidence at l2 0.25: " in page
    assert repr(explained).startswith("<ImageExplanation of '")
    assert "ImageExplanation" not in page
    assert len(repr(explained)) < 200


def test_explaining_equals_the_verb(small: Classifier, small_package: Path, photographs: Path) -> None:
    path = photographs / "one.png"
    ours = small.explain(path, target="dog", eps=0.5, steps=3, seed=7)
    (theirs,) = ratioctl.counterfactual(path, target="dog", eps=0.5, steps=3, seed=7, model=small_package)
    assert np.array_equal(ours.array, theirs.targets[0].budgets[0].image)
    with pytest.raises(UsageError, match="holds 3 images"):
        small.explain(sorted(photographs.glob("*.png")), target="dog")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no such class"):
        small.explain(path, target="horse")


def test_saving_and_loading_again(small: Classifier, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "copy")
    again = Classifier.from_pretrained(tmp_path / "copy")
    assert isinstance(again.spec, package.ModelPackage)
    assert isinstance(small.spec, package.ModelPackage)
    assert again.spec.digest == small.spec.digest
    assert again.name == small.name
    with pytest.raises(OutputError, match="is not empty"):
        small.save_pretrained(tmp_path / "copy")


CONSUMER = """
import numpy as np
from PIL import Image

import ratioctl
from ratioctl import Attack, Ball, Classifier, Prediction, Predictions, ScoreRow, UsageError, goals, perturb

clf = Classifier.from_pretrained("cifar10-ratio")
one: Prediction = clf.predict("cat.jpg")
two: Prediction = clf.predict(Image.new("RGB", (4, 4)))
many: Predictions = clf.predict(["cat.jpg", np.zeros((4, 4, 3), np.uint8)])
flags: list[bool | None] = [p.is_ood for p in many]
table: dict[str, object] = one.to_dict()
answer = clf.explain("cat.jpg", target="dog", eps="0.5..3")
picture: Image.Image = answer.image
sure: float = answer.confidence
rows: list[ScoreRow] = list(ratioctl.ood_score("photos", model="cifar10-ratio"))
ball = Ball(p=2.0, eps=0.5)
reveal_type(clf.labels)
one.confidense
clf.predict(3)
"""


@pytest.mark.slow
def test_a_consumers_file_is_type_checked(tmp_path: Path) -> None:
    """Against the shipped types (py.typed): what is right passes, what is wrong is found."""
    file = tmp_path / "consumer.py"
    file.write_text(CONSUMER)
    line = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context", str(file)]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = [text.partition("consumer.py:")[2] for text in done.stdout.splitlines() if "consumer.py:" in text]
    found = [text for text in said if ": error:" in text]
    number = CONSUMER.splitlines().index("one.confidense") + 1
    assert [text.split(":")[0] for text in found] == [str(number), str(number + 1)], done.stdout
    assert 'Revealed type is "tuple[str, ...]"' in "\n".join(said).replace("builtins.", "")


def test_the_methods_have_the_parameters_of_the_verbs() -> None:
    def parameters(function: Callable[..., object], without: set[str]) -> dict[str, object]:
        given = inspect.signature(function).parameters
        assert without <= set(given)
        return {name: p.default for name, p in given.items() if name not in without}

    ours = parameters(Classifier.explain, {"self", "image"})
    assert ours == parameters(ratioctl.counterfactual, {"images", "model", "limit", "device", "out"})
    assert parameters(Classifier.export, {"self"}) == parameters(ratioctl.export, {"model"})
