"""The verbs of `import ratioctl`: images as values, errors in terms of Python, lazy names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl import api
from ratioctl.errors import UsageError


def test_ood_score_takes_images_as_values(tiny_onnx: Path, colors: Path) -> None:
    path = colors / "blue.png"
    blue = np.zeros((2, 4, 4, 3), np.uint8)
    blue[..., 2] = 255
    given = [path, Image.open(path), path.read_bytes(), blue[0], blue]
    rows = list(ratioctl.ood_score(given, model=tiny_onnx))
    assert [row.path for row in rows] == [
        *(str(path), "image-1", "image-2", "image-3", "image-4-0", "image-4-1")
    ]
    assert {row.label for row in rows} == {"blue"}
    assert {row.confidence for row in rows} == {rows[0].confidence}
    for alone in (Image.open(path), path.read_bytes(), blue[0]):
        (row,) = ratioctl.ood_score(alone, model=tiny_onnx)
        assert (row.path, row.label) == ("image-0", "blue")
    (broken,) = ratioctl.ood_score(b"no image", model=tiny_onnx)
    assert broken.error == "is text, not an image"
    assert [row.label for row in ratioctl.ood_score(colors, model=tiny_onnx, limit=2)] == ["blue", "green"]
    with pytest.raises(UsageError, match="limit 0: must be at least 1"):
        ratioctl.ood_score(colors, model=tiny_onnx, limit=0)


def test_counterfactual_takes_images_as_values(small_package: Path, photographs: Path) -> None:
    path = photographs / "wide.png"
    pixels = np.asarray(Image.open(path))
    floats = pixels.transpose(2, 0, 1).astype(np.float32) / 255
    given = [path, Image.open(path), path.read_bytes(), pixels, floats]
    found = ratioctl.counterfactual(given, target="dog", eps=0.5, steps=2, model=small_package)
    assert [one.path for one in found] == [str(path), "image-1", "image-2", "image-3", "image-4"]
    pictures = [one.targets[0].budgets[0].image for one in found]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    for wrong in (3, None, [path, 3], pixels.astype(np.int32)):
        with pytest.raises(UsageError, match=r"PIL images|Convert it to uint8"):
            ratioctl.counterfactual(wrong, target="dog", model=small_package)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ratioctl.ood_score(3), "paths: cannot be read from int. Give file names, PIL images"),
        (lambda: ratioctl.ood_score([None]), "image-0: has the type NoneType, which is not an image"),
        (lambda: ratioctl.ood_score("x", model=3), "model: cannot be a value of type int. Give a package"),
        (lambda: ratioctl.ood_score("x", threshold=[0.5]), "threshold: cannot be a value of type list"),
        (lambda: ratioctl.ood_score("x", worst_case="0.5"), "worst_case: cannot be a value of type str"),
        (lambda: ratioctl.counterfactual("x", target=5), "target: cannot be a value of type int"),
        (lambda: ratioctl.counterfactual("x", target=["a", 5]), "target: cannot be a value of type int"),
        (lambda: ratioctl.counterfactual("x", target="dog", eps={"a": 1}), "eps: cannot be a value of type"),
        (lambda: ratioctl.counterfactual("x", target="dog", eps=object()), 'a range such as "0.5..3"'),
        (lambda: ratioctl.train(3), "recipe: cannot be a value of type int. Give a TOML file"),
        (lambda: ratioctl.evaluate(data=3), "data: cannot be a value of type int. Give a folder"),
        (lambda: ratioctl.load_model([3]), "model: cannot be a value of type"),
    ],
)
def test_a_wrong_type_names_the_parameter_and_what_it_takes(call: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    assert said in str(caught.value)


def test_messages_name_parameters_instead_of_options(tiny_onnx: Path, colors: Path) -> None:
    with pytest.raises(UsageError) as caught:
        ratioctl.ood_score([colors], model=tiny_onnx, worst_case=0.5)
    assert str(caught.value).startswith("worst_case: needs a package")
    for keywords in ({"eps": "0.5;1"}, {"norm": "3"}, {"until": 2.0}, {"target": "horsee"}):
        with pytest.raises(UsageError) as caught:
            ratioctl.counterfactual(colors / "red.png", **{"target": "dog", **keywords})  # type: ignore[arg-type]
        assert "--" not in str(caught.value)
        assert str(caught.value).startswith(next(iter(keywords)))
    known = {"settings": 0, "worst_case": 0, "input_type": 0}
    for text, expected in (
        ("--set x=1", "settings x=1"),
        ("give --worst-case EPS", "give worst_case EPS"),
        ("--input uint8 or --no-such", "input_type uint8 or --no-such"),
        ("a--set", "a--set"),
    ):
        assert api._with_parameters(text, known) == expected


def test_a_missing_package_is_named_in_python_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @api.verb
    def export(model: str) -> None:
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    with pytest.raises(UsageError) as caught:
        export("x")
    said = 'ratioctl.export: needs onnx, which is not installed. Run: pip install "ratioctl[torch]"'
    assert str(caught.value) == said

    @api.verb
    def other() -> None:
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")

    with pytest.raises(ModuleNotFoundError):
        other()


def test_every_public_name_is_loaded_from_where_it_is_listed() -> None:
    assert set(ratioctl.__all__) == {*ratioctl._MODULE_OF, "__version__"}
    for name, module in ratioctl._MODULE_OF.items():
        found = getattr(ratioctl, name)
        whole = importlib.import_module(module)
        assert found is (whole if name == "goals" else getattr(whole, name))
    assert set(dir(ratioctl)) == set(ratioctl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ratioctl.nothing
