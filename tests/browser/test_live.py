"""`counterfactual --live`: the page searches by itself, offline, and finds what Python finds."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from ratioctl import package
from ratioctl.cli import main
from ratioctl.onnx import explainer
from ratioctl.onnx.graph import explain, graph
from ratioctl.utils import resources

pytestmark = pytest.mark.slow

LABELS = ["cat", "dog", "red panda", "air/plane"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory, npm_install: Callable[..., None]) -> Path:
    """onnxruntime-web's folder of built files."""
    folder = tmp_path_factory.mktemp("web")
    npm_install(folder, "onnxruntime-web@^1.20")
    return folder / "node_modules" / "onnxruntime-web" / "dist"


@pytest.fixture(scope="module")
def live(library: Path, small_explain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an image of the small model; beside it another image, other.png."""
    folder = tmp_path_factory.mktemp("live")
    generator = np.random.default_rng(5)
    for name in ("one", "other"):
        Image.fromarray(generator.integers(40, 215, (8, 8, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    line = [str(folder / "one.png"), "--target", "dog", "--eps", "0.5,1", "--steps", "3", "--quiet"]
    line += ["--model", str(small_explain), "--live", str(library), "--out", str(folder / "out")]
    assert main(["counterfactual", *line]) == 0
    return folder / "out" / "index.html"


def search(opened: Any, **fields: Any) -> str:
    """Fill in the form and search; the status at the end."""
    for name, value in fields.items():
        if name in ("image", "target"):
            opened.page.select_option(f"#live-{name}", label=value)
        else:
            opened.page.fill(f"#live-{name}", str(value))
    opened.page.click("#live [type=submit]")
    return ended(opened)


def ended(opened: Any) -> str:
    opened.page.locator("#live [type=submit]:not([disabled])").wait_for()
    return str(opened.page.inner_text("#live [role=status]"))


def found(opened: Any, group: int, target: str) -> dict[str, Any]:
    expression = "([group, target]) => answerOf(groups[group].columns[0], target)"
    answer: dict[str, Any] = opened.evaluate(expression, [group, target])
    return answer


def test_other_classes_and_images_are_searched_in_the_page(
    live: Path, small_explain: Path, open_page: Callable[..., Any]
) -> None:
    opened, file = open_page(live), explainer.load(small_explain)
    other = np.array(Image.open(live.parents[1] / "other.png"))
    assert search(opened, target="cat", radii="0.25, 1", steps=12).startswith("Found in ")
    opened.page.select_option("#live-image", label="an image of yours")
    assert search(opened, target="red panda") == "Choose a file."
    opened.page.set_input_files("#live-file", str(live.parents[1] / "other.png"))
    assert search(opened, target="red panda").startswith("Found in ")
    assert opened.page.inner_text("#detail-title") == "other.png"

    one = np.array(Image.open(live.parents[1] / "one.png"))
    for group, pixels, target in ((0, one, "cat"), (1, other, "red panda")):
        theirs, k = found(opened, group, target), LABELS.index(target)
        ours = file.search(pixels[None], [k], [0.25, 1], 12)
        assert theirs.keys() == found(opened, 0, "dog").keys()
        for row, budget in enumerate(theirs["budgets"]):
            assert budget.keys() == found(opened, 0, "dog")["budgets"][0].keys()
            assert budget["probabilities"] == pytest.approx(ours["probabilities"][row].tolist(), abs=1e-3)
            assert budget["confidence"] == pytest.approx(float(ours["confidence"][row]), abs=1e-3)
            assert budget["confidence_float"] == pytest.approx(float(ours["confidence_float"][row]), abs=1e-3)
            assert budget["distance"]["l2"] <= budget["eps"]
            assert budget["predicted"] == LABELS[int(ours["probabilities"][row].argmax())]
        shown = opened.evaluate(
            "name => pixels(name).then(image => Array.from(image.data))", theirs["budgets"][1]["png"]
        )
        picture = np.reshape(shown, (8, 8, 4))[..., :3].astype(float)
        assert np.linalg.norm((picture - pixels).ravel() / 255) == pytest.approx(
            theirs["budgets"][1]["distance"]["l2"], abs=1e-9
        )
    assert all(url.startswith("blob:") for url in opened.requests[1:]), "nothing is requested"
    assert opened.complaints == []
    assert Axe().run(opened.page).violations_count == 0


def test_wrong_radii_and_cancelling(live: Path, open_page: Callable[..., Any]) -> None:
    opened = open_page(live)
    for radii in ("", "1, 0.5", "0", "x", "99"):
        assert search(opened, radii=radii).startswith("Radii are numbers above 0 that grow, up to 13.9")
    many = ", ".join(f"{0.001 * k:.3f}" for k in range(1, 400))
    for name, value in (("radii", many), ("steps", "10000")):
        opened.page.fill(f"#live-{name}", value)
    opened.page.click("#live [type=submit]")
    opened.page.get_by_text("Searching:").wait_for()
    time.sleep(0.5)
    opened.page.get_by_role("button", name="Cancel").click()
    assert ended(opened) == "Canceled"
    assert search(opened, target="cat", radii="0.5", steps=2).startswith("Found in ")
    assert len(found(opened, 0, "cat")["budgets"]) == 1


def test_the_page_of_the_small_bundled_model_is_below_10_mb(library: Path, tmp_path: Path) -> None:
    found = package.read(package.find("cifar10-ratio-small"))
    limit = package.threshold(found)
    file = tmp_path / "explain.onnx"
    file.write_bytes(explain(graph(found, threshold=limit), found, threshold=limit, p=2.0))
    photo = resources.folder("assets") / "samples" / "cat.jpg"
    line = [str(photo), "--target", "dog", "--eps", "1", "--steps", "1", "--quiet", "--model", str(file)]
    assert main(["counterfactual", *line, "--live", str(library), "--out", str(tmp_path / "out")]) == 0
    assert 5e6 < (tmp_path / "out" / "index.html").stat().st_size < 10e6
