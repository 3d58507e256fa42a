"""The page of `ratioctl counterfactual` in a real browser: what people see, press and hear of it."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Page
from safetensors.numpy import load_file

import ratioctl
from ratioctl import package
from ratioctl.cli import main
from ratioctl.report import counterfactual_page, pictures
from ratioctl.utils import resources

SAMPLES = resources.folder("assets") / "samples"
PHONE, WIDE = {"width": 380, "height": 800}, {"width": 1600, "height": 1000}
QUICK = ("--steps", "4", "--quiet")
EVIL = "<img src=x onerror='hacked=1'><script>hacked=1</script> \x1b[31m\u202e"

OpenPage = Callable[..., Any]


def ask(out: Path, *line: str | Path) -> Path:
    model = [] if "--model" in line else ["--model", "cifar10-ratio-small"]
    assert main(["counterfactual", *map(str, line), *model, *QUICK, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kitten on its way to a dog: one image, one target, six budgets, the bundled model."""
    return ask(tmp_path_factory.mktemp("one"), SAMPLES / "kitten.jpg", "--target", "dog", "--eps", "0.5..3")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, one of them out of distribution, with two targets."""
    images = [SAMPLES / f"{name}.jpg" for name in ("coffee", "horse", "duck")]
    return ask(tmp_path_factory.mktemp("several"), *images, "--target", "dog,ship", "--eps", "0.1,1,3")


@pytest.fixture(scope="module")
def models(small_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of different input sizes and classes."""
    line = [
        SAMPLES / "kitten.jpg",
        "--model",
        "cifar10-ratio-small",
        "--model",
        small_package,
        "--target",
        "dog",
    ]
    return ask(tmp_path_factory.mktemp("models"), *line, "--eps", "0.5,1,2")


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "counterfactuals.json").read_text())


def index(folder: Path) -> Path:
    return folder / "index.html"


def bytes_of(url: str) -> bytes:
    return base64.b64decode(url.removeprefix("data:image/png;base64,"))


def pixels(folder: Path, name: str) -> np.ndarray:
    return np.asarray(Image.open(folder / name).convert("RGB")).astype(int)


def shown(page: Page, selector: str) -> tuple[str, str]:
    """A number on the page: as it is, and as people read it."""
    found = page.locator(selector).first
    return str(found.get_attribute("value")), str(found.text_content())


def numbers(value: Any) -> set[float]:
    if isinstance(value, dict):
        return set().union(*(numbers(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(numbers(item) for item in value), set())
    return {float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def radius(answer: dict[str, Any]) -> float:
    """The radius that the page states: of an image that is in distribution, where there is one."""
    if answer["flip_eps"] is None:
        return math.inf
    return max(answer["flip_eps"], answer["in_distribution_eps"] or 0)


def quiet(opened: Any) -> bool:
    """Nothing was written to the console and nothing but the page itself was asked for."""
    assert opened.complaints == []
    assert [url.split("#")[0] for url in opened.requests] == [opened.page.url.split("#")[0]]
    return True


def test_the_slider_moves_picture_confidences_and_curve_together(one: Path, open_page: OpenPage) -> None:
    opened = open_page(index(one), viewport=WIDE)
    page, found = opened.page, document(one)
    (image,) = found["images"]
    (target,) = image["targets"]
    labels = found["models"][0]["labels"]
    k = labels.index("dog")
    slider = page.get_by_role("slider", name="Budget of change")
    assert slider.input_value() == "6"
    slider.focus()
    heights = []
    for step in (6, 5, 4, 3, 2, 1, 0):
        if step < 6:
            page.keyboard.press("ArrowLeft")
        original = {**image["original"], "png": image["input_png"], "predicted": image["original"]["label"]}
        original["confidence"] = image["original"]["probabilities"][k]
        point = target["budgets"][step - 1] if step else original
        source = page.locator(".counterfactual img").get_attribute("src")
        assert bytes_of(str(source)) == (one / point["png"]).read_bytes()
        assert shown(page, ".counterfactual figcaption .line data") == (
            repr(point["confidence"]), pictures.two_digits(point["confidence"]),
        )  # fmt: skip
        bars = page.locator(".bars li")
        assert bars.locator(".label").all_text_contents() == labels
        values = bars.locator("data").evaluate_all(
            "nodes => nodes.map(node => [+node.value, node.textContent])"
        )
        assert values == [[p, pictures.two_digits(p)] for p in point["probabilities"]]
        widths = bars.locator(".fill").evaluate_all(
            "nodes => nodes.map(node => parseFloat(node.style.width))"
        )
        assert widths == pytest.approx([100 * p for p in point["probabilities"]], abs=1e-3)
        spoken = str(slider.get_attribute("aria-valuetext"))
        assert f"dog {pictures.two_digits(point['confidence'])}" in spoken
        assert f"predicted {point['predicted']}" in spoken
        assert ("original" in spoken) == (step == 0)
        heights.append(float(str(page.locator(".plot .now circle").get_attribute("cy"))))
        distances = (
            page.locator(".facts dd")
            .filter(visible=True)
            .evaluate_all("nodes => nodes.map(node => node.querySelector('data')?.value ?? null)")
        )
        expected = (
            [repr(point["distance"][f"l{p}"]) for p in ("1", "1.5", "2", "inf")] if step else [None] * 4
        )
        assert [None if d is None else float(d) for d in distances] == [
            None if e is None else float(e) for e in expected
        ]
    confidences = [b["confidence"] for b in reversed(target["budgets"])]
    confidences.append(image["original"]["probabilities"][k])
    fall = (heights[-1] - heights[0]) / (confidences[0] - confidences[-1])
    assert heights == pytest.approx([heights[0] + fall * (confidences[0] - c) for c in confidences], abs=0.01)
    assert quiet(opened)


@pytest.mark.slow
def test_every_number_is_one_of_the_document_and_only_its_display_is_rounded(
    several: Path, open_page: OpenPage
) -> None:
    known = numbers(document(several))
    rounded = (pictures.two_digits, lambda x: f"{x:.3g}", lambda x: f"{x:g}", lambda x: f"{x:.0f}")
    for fragment in ("", "#1/dog", "#2/ship", "#3/dog"):
        page = open_page(index(several), fragment=fragment).page
        found = page.evaluate("[...document.querySelectorAll('data')].map(d => [+d.value, d.textContent])")
        assert len(found) > 10
        for value, text in found:
            assert value in known
            assert text in {way(value) for way in rounded}, (value, text)
        # and no number hides from this: outside of <data>, names, axes, scales and the card there is none
        rest = page.evaluate(
            """() => {
              const copy = document.querySelector('main').cloneNode(true);
              const others = 'data, svg, .scale, h2, .path, .name, [hidden], noscript';
              copy.querySelectorAll(others).forEach(node => node.remove());
              return copy.textContent;
            }"""
        )
        assert re.findall(r"\d+", rest.replace("× ", "")) in (["3", "3"], [], [f"{fragment[1:2]}", "3"]), rest


def test_keyboard_alone_is_enough(several: Path, open_page: OpenPage) -> None:
    opened = open_page(index(several), viewport=WIDE)
    page = opened.page
    page.get_by_role("link", name="horse.jpg").focus()
    page.keyboard.press("Enter")
    heading = page.get_by_role("heading", name="horse.jpg")
    heading.wait_for()
    assert heading.evaluate("node => node === document.activeElement")
    answers = {t["target"]: t for t in document(several)["images"][1]["targets"]}
    original = (several / document(several)["images"][1]["input_png"]).read_bytes()

    def picture() -> bytes:
        return bytes_of(str(page.locator(".counterfactual img").get_attribute("src")))

    def saved(target: str, step: int) -> bytes:
        return (several / answers[target]["budgets"][step - 1]["png"]).read_bytes()

    assert picture() == saved("dog", 3)
    page.keyboard.press("ArrowLeft")  # wherever the focus is
    assert picture() == saved("dog", 2)
    page.keyboard.down(" ")
    assert picture() == original
    page.keyboard.up(" ")
    assert picture() == saved("dog", 2)
    page.get_by_role("tab", name="dog").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("tab", selected=True).text_content() == "ship"
    assert page.evaluate("document.activeElement.textContent") == "ship"
    assert picture() == saved("ship", 2), "the budget stays"
    assert page.url.endswith("#2/ship")
    page.keyboard.press("Home")
    assert page.get_by_role("tab", selected=True).text_content() == "dog"
    page.get_by_role("button", name="Hold to see the original").focus()
    page.keyboard.down("Enter")
    assert picture() == original
    page.keyboard.up("Enter")
    assert picture() == saved("dog", 2)
    page.get_by_role("button", name="Enlarge the counterfactual").focus()
    page.keyboard.press("Enter")
    large = page.locator("dialog img")
    assert bytes_of(str(large.get_attribute("src"))) == saved("dog", 2)
    box = large.bounding_box()
    assert box is not None
    assert box["width"] >= 700
    assert box["width"] % 32 == 0
    page.keyboard.press("ArrowRight")
    assert bytes_of(str(large.get_attribute("src"))) == saved("dog", 3)
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()
    page.get_by_role("link", name="All images").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="3 images").wait_for()
    assert quiet(opened)


def test_pressing_the_picture_shows_the_original(one: Path, open_page: OpenPage) -> None:
    page = open_page(index(one)).page
    picture, answer = page.locator(".counterfactual img"), document(one)["images"][0]
    hold = page.get_by_role("button", name="Hold to see the original")
    changed = (one / answer["targets"][0]["budgets"][5]["png"]).read_bytes()

    def seen() -> bytes:
        return bytes_of(str(picture.get_attribute("src")))

    hold.hover()
    page.mouse.down()
    assert seen() == (one / answer["input_png"]).read_bytes()
    assert hold.get_attribute("aria-pressed") == "true"
    page.mouse.move(0, 0)
    page.mouse.up()  # wherever that is
    assert seen() == changed
    for expected in ("true", "false"):  # what a screen reader does: a click without a press
        hold.evaluate("node => node.click()")
        assert hold.get_attribute("aria-pressed") == expected


def test_the_change_is_drawn_from_the_pixels(one: Path, open_page: OpenPage) -> None:
    page, (image,) = open_page(index(one)).page, document(one)["images"]
    before, after = pixels(one, image["input_png"]), pixels(one, image["targets"][0]["budgets"][5]["png"])

    def drawn(kind: str, gain: int) -> np.ndarray:
        canvas = page.locator(f".{kind} canvas[data-drawn$=',{gain}']")
        data = str(canvas.evaluate("node => node.toDataURL()"))
        return np.asarray(Image.open(io.BytesIO(bytes_of(data))).convert("RGB")).astype(int)

    far = image["targets"][0]["budgets"][5]["distance"]
    fitting = int(1 / min(far["linf"], 3 * far["l2"] ** 2 / far["l1"]))
    control = page.get_by_role("slider", name="Difference amplification")
    assert control.input_value() == str(fitting)
    for gain in (fitting, fitting + 2):
        control.fill(str(gain))
        signed = np.clip(128 + gain * (after - before) / 2, 0, 255)
        assert np.abs(drawn("signed", gain) - signed).max() <= 1
        size = np.minimum(gain * np.abs(after - before).max(2) / 255, 1)
        light = drawn("size", gain).sum(2)
        order = np.argsort(size.ravel())
        assert (np.diff(light.ravel()[order]) >= -2).all(), "lighter where more changed"
        assert light[size == size.min()].max() < light[size == size.max()].min()
        full = (
            f"{1 / gain:.3g}"  # the scales say what black, white and yellow stand for, and what lies beyond
        )
        more = "≥ " if gain * far["linf"] > 1.001 else ""
        assert page.locator(".size .ends span").all_text_contents() == ["0", more + full]
        signs = [f"−{full}", "0", f"{more}+{full}"]
        assert page.locator(".signed .ends span").all_text_contents()[1:] == signs[1:]
        assert str(page.locator(".signed .ends span").first.text_content()).endswith(signs[0])


def test_every_confidence_on_the_page_is_that_of_the_picture_beside_it(
    one: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    page = open_page(index(one)).page
    slider, labels = page.get_by_role("slider", name="Budget of change"), document(one)["models"][0]["labels"]
    shown_at, paths = [], []
    for step in range(7):
        slider.fill(str(step))
        paths.append(tmp_path / f"{step}.png")
        paths[-1].write_bytes(bytes_of(str(page.locator(".counterfactual img").get_attribute("src"))))
        values = page.locator(".bars data").evaluate_all("nodes => nodes.map(node => +node.value)")
        assert len(values) == len(labels)
        shown_at.append(values)
    files = [str(path) for path in paths]
    rows = list(ratioctl.ood_score(files, model="cifar10-ratio-small", probabilities=True))
    for row, values in zip(rows, shown_at, strict=True):
        assert row.probabilities == pytest.approx(values, abs=1e-4)


def test_what_moves_without_the_slider_is_announced(one: Path, open_page: OpenPage) -> None:
    page = open_page(index(one)).page
    said, image = page.locator("#said"), page.locator(".counterfactual img")
    assert said.get_attribute("aria-live") == "polite"
    page.keyboard.press("ArrowLeft")
    slider = page.get_by_role("slider", name="Budget of change")
    assert said.text_content() == slider.get_attribute("aria-valuetext")
    assert "at most 2.5" in str(said.text_content())
    page.keyboard.down(" ")
    assert said.text_content() == "The original"
    assert image.get_attribute("alt") == "The original, kitten.jpg"
    page.keyboard.up(" ")
    assert said.text_content() == "The counterfactual"
    assert "at most" in str(image.get_attribute("alt"))
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert said.text_content() == "The counterfactual", "a slider speaks for itself"


def test_a_touch_shows_the_original(one: Path, open_page: OpenPage) -> None:
    page = open_page(index(one), viewport=PHONE, has_touch=True, is_mobile=True).page
    hold = page.get_by_role("button", name="Hold to see the original")
    box = hold.bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    point = {"x": box["x"] + 40, "y": box["y"] + 40}
    session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    assert hold.get_attribute("aria-pressed") == "true"
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_function("document.querySelector('.hold').getAttribute('aria-pressed') === 'false'")


def test_the_overview_says_which_model_does_not_know(tmp_path: Path, open_page: OpenPage) -> None:
    images = [SAMPLES / f"{name}.jpg" for name in ("rocket", "horse")]
    line = ["--model", "cifar10-ratio-small", "--model", "cifar10-plain", "--target", "dog", "--eps", "1"]
    folder = ask(tmp_path, *images, *line)
    known = {
        (Path(entry["path"]).stem, entry["model"]): not entry["original"]["is_ood"]
        for entry in document(folder)["images"]
    }
    assert known == {("rocket", 0): False, ("rocket", 1): True, ("horse", 0): True, ("horse", 1): True}
    cards = open_page(index(folder), viewport=WIDE).page.locator(".cards li")
    rocket = cards.nth(0).locator(".saw .line").all_inner_texts()
    names = ["cifar10-ratio-small", "cifar10-plain"]
    assert cards.nth(0).locator(".line.model").all_inner_texts() == names
    captions = cards.nth(0).locator(".thumbs .small").all_inner_texts()
    assert captions == ["original", *names]
    assert ["OOD" in text for text in rocket] == [True, False]
    assert cards.nth(1).locator(".tag").count() == 0


def test_the_region_is_shown_on_the_original(
    small_package: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    line = [SAMPLES / "kitten.jpg", "--model", small_package, "--target", "dog", "--eps", "1"]
    boxed = ask(tmp_path / "box", *line, "--region", "2,1,4,3")
    assert document(boxed)["models"][0]["region"] == {"box": [2, 1, 4, 3], "pixels": 12}
    opened = open_page(index(boxed), viewport=WIDE)
    outline = opened.page.locator(".original .region").bounding_box()
    image = opened.page.locator(".original img").bounding_box()
    assert outline is not None
    assert image is not None
    pixel = image["width"] / 8
    found = [
        (outline["x"] - image["x"]) / pixel, (outline["y"] - image["y"]) / pixel,
        outline["width"] / pixel, outline["height"] / pixel,
    ]  # fmt: skip
    assert found == pytest.approx([2, 1, 4, 3], abs=0.05)
    assert "only 12 pixels may change" in str(opened.page.locator(".original figcaption").text_content())
    assert quiet(opened)
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = mask[3, 5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    masked = ask(tmp_path / "mask", *line, "--region", tmp_path / "mask.png")
    assert document(masked)["models"][0]["region"] == {"box": [0, 0, 6, 4], "pixels": 2}
    page = open_page(index(masked)).page
    assert page.locator(".region").count() == 0, "no box"
    assert "only 2 pixels may change" in str(page.locator(".original figcaption").text_content())


def test_any_size_of_picture(small_package: Path, tmp_path: Path, open_page: OpenPage) -> None:
    config = json.loads((small_package / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 64, 64]
    weights = load_file(small_package / "model.safetensors")
    package.write(tmp_path / "large", config=config, weights=weights)
    line = [SAMPLES / "kitten.jpg", "--model", tmp_path / "large", "--target", "dog"]
    folder = ask(tmp_path / "out", *line, "--region", "16,8,32,32")
    for viewport in (PHONE, WIDE):
        opened = open_page(index(folder), viewport=viewport)
        assert quiet(opened)
        image, canvas = opened.page.locator(".counterfactual img"), opened.page.locator(".signed canvas")
        opened.page.locator(".signed canvas[data-drawn]").wait_for()
        assert image.evaluate("node => node.naturalWidth") == canvas.evaluate("node => node.width") == 64
        box = image.bounding_box()
        assert box is not None
        assert box["width"] % 64 == 0
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_on_paper_are_pictures_and_numbers_and_no_controls(one: Path, open_page: OpenPage) -> None:
    page = open_page(index(one), color_scheme="dark").page
    page.emulate_media(media="print")
    for selector in (".control input", ".tools", "#theme", ".gaining", ".icon"):
        found = page.locator(selector).all()
        assert found, selector
        assert not any(node.is_visible() for node in found), selector
    for selector in (".original img", ".counterfactual img", ".plot svg", ".bars", ".film", ".facts"):
        assert page.locator(selector).first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 247)"


def test_nothing_moves_by_itself_for_those_who_asked(one: Path, open_page: OpenPage) -> None:
    page = open_page(index(one), reduced_motion="reduce").page
    moving = "getComputedStyle(document.querySelector('.fill')).transitionDuration"
    assert page.evaluate(moving) == "0s"
    assert open_page(index(one)).page.evaluate(moving) != "0s"


def test_what_the_model_does_not_know_is_said(several: Path, one: Path, open_page: OpenPage) -> None:
    found = document(several)
    coffee, threshold = found["images"][0], found["models"][0]["threshold"]
    assert coffee["original"]["is_ood"]
    assert coffee["original"]["confidence"] < threshold
    page = open_page(index(several), fragment="#1/ship").page
    notice = page.locator(".notice").text_content()
    assert notice == (
        f"Out of distribution. The highest confidence, {coffee['original']['confidence']:.2f} "
        f"({coffee['original']['label']}), is below the threshold of {threshold:.2f}."
    )
    slider = page.get_by_role("slider", name="Budget of change")
    told = []
    for step, budget in enumerate(coffee["targets"][1]["budgets"], 1):
        slider.fill(str(step))
        told.append(page.locator(".counterfactual .tag").count() == 1)
        assert told[-1] == (max(budget["probabilities"]) < threshold)
    assert True in told
    assert open_page(index(one)).page.locator(".notice, .tag").count() == 0


def test_a_turn_into_what_is_not_known_is_not_called_enough(
    one: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    """The same answers under their own threshold, and under one that no counterfactual reaches."""
    found = document(one)
    (answer,) = found["images"][0]["targets"]
    assert answer["flip_eps"]
    flip, inner = f"{answer['flip_eps']:.3g}", f"{answer['in_distribution_eps']:.3g}"
    inside = f"Flips to dog at l₂ {flip}" + ("." if inner == flip else f", in distribution from {inner} on.")
    assert inside in (open_page(index(one)).page.locator(".lead").text_content() or "")
    radius = f"Flips to dog at l₂ {flip}"
    found["models"][0]["threshold"] = 1.1
    names = [path.relative_to(one).as_posix() for path in one.rglob("*.png")]
    made = counterfactual_page.page(found, {name: (one / name).read_bytes() for name in names})
    (tmp_path / "index.html").write_text(made)
    page = open_page(tmp_path / "index.html").page
    lead = page.locator(".lead").text_content() or ""
    assert f"{radius}; out of distribution at every budget." in lead
    assert page.locator(".counterfactual .tag").text_content() == "OOD"


def test_the_radius_that_is_shown_is_in_distribution(one: Path, tmp_path: Path, open_page: OpenPage) -> None:
    """Predicted as the target from 0.4 on, with a confidence above the threshold from 0.9 on."""
    found = document(one)
    found["images"][0]["targets"][0] |= {"flip_eps": 0.4, "flip_is_ood": True, "in_distribution_eps": 0.9}
    names = [path.relative_to(one).as_posix() for path in one.rglob("*.png")]
    made = counterfactual_page.page(found, {name: (one / name).read_bytes() for name in names})
    (tmp_path / "index.html").write_text(made)
    page = open_page(tmp_path / "index.html").page
    lead = page.locator(".lead").text_content() or ""
    assert lead.endswith("Flips to dog at l₂ 0.4, in distribution from 0.9 on.")
    assert page.locator(".flip .tag").text_content() == "OOD"


def test_radii_of_the_overview(several: Path, tmp_path: Path, open_page: OpenPage) -> None:
    """In distribution at some budget, out of distribution at every budget, and the original already."""
    found = document(several)
    given = [
        ({"flip_eps": 0.4, "in_distribution_eps": 0.9}, 1.0, "ID radius l₂ 0.9"),
        ({"flip_eps": 0.4, "in_distribution_eps": None}, 0.1, "flip radius l₂ 0.4 (OOD)"),
        ({"flip_eps": 0, "in_distribution_eps": 0}, 1.0, "predicted in the original"),
    ]
    for image, (radii, p, _) in zip(found["images"], given, strict=True):
        for budget in image["targets"][0]["budgets"]:
            budget |= {"predicted": "dog", "probabilities": [p] * len(budget["probabilities"])}
        image["targets"][0] |= radii
    names = [path.relative_to(several).as_posix() for path in several.rglob("*.png")]
    made = counterfactual_page.page(found, {name: (several / name).read_bytes() for name in names})
    (tmp_path / "index.html").write_text(made)
    page = open_page(tmp_path / "index.html").page
    assert page.locator(".cards .line .quiet").all_inner_texts() == [said for _, _, said in given]
    page.get_by_label("Order").select_option("least")
    assert page.locator(".cards .name").all_text_contents() == ["duck.jpg", "horse.jpg", "coffee.jpg"]
    page.locator(".cards a").first.click()
    lead = page.locator(".lead").text_content() or ""
    assert lead.endswith("Already dog; the counterfactuals raise its confidence.")


def test_overview_filters_and_moves_together(several: Path, open_page: OpenPage) -> None:
    opened = open_page(index(several), viewport=PHONE)
    page, images = opened.page, document(several)["images"]
    names = page.locator(".cards .name")
    assert names.all_text_contents() == ["coffee.jpg", "horse.jpg", "duck.jpg"]
    slider = page.get_by_role("slider", name="Budget of change, all images")

    def second_pictures() -> list[bytes]:
        found = page.locator(".thumbs > :nth-child(2) img")
        return [bytes_of(url) for url in found.evaluate_all("nodes => nodes.map(node => node.src)")]

    for step in (3, 1):
        slider.fill(str(step))
        expected = [(several / i["targets"][0]["budgets"][step - 1]["png"]).read_bytes() for i in images]
        assert second_pictures() == expected
    page.get_by_label("Target").select_option("ship")
    assert second_pictures() == [
        (several / i["targets"][1]["budgets"][0]["png"]).read_bytes() for i in images
    ]
    page.get_by_label("Out of distribution").select_option("yes")
    assert names.all_text_contents() == [Path(i["path"]).name for i in images if i["original"]["is_ood"]]
    page.get_by_label("Out of distribution").select_option("")
    page.get_by_label("Predicted").select_option("horse")
    seen = [Path(i["path"]).name for i in images if i["original"]["label"] == "horse"]
    assert names.all_text_contents() == seen
    assert page.get_by_role("status").text_content() == f"{len(seen)} of 3 images"
    page.get_by_label("Predicted").select_option("")
    page.get_by_label("Order").select_option("least")
    radii = {Path(i["path"]).name: radius(i["targets"][1]) for i in images}
    in_order = sorted(radii, key=lambda name: radii[name])
    assert names.all_text_contents() == in_order
    page.get_by_label("Order").select_option("unsure")
    sure = {Path(i["path"]).name: i["original"]["confidence"] for i in images}
    assert names.all_text_contents() == sorted(sure, key=lambda name: sure[name])
    page.get_by_label("Order").select_option("")
    page.get_by_label("Predicted").select_option("horse")
    page.locator(".cards a").first.click()
    assert page.get_by_role("tab", selected=True).text_content() == "ship"
    page.go_back()
    assert names.all_text_contents() == seen, "the filters stay"
    assert quiet(opened)


def test_models_side_by_side_share_one_slider(models: Path, open_page: OpenPage) -> None:
    opened = open_page(index(models), viewport=WIDE)
    page, found = opened.page, document(models)
    assert page.get_by_role("slider", name="Budget of change").count() == 1
    assert page.locator(".original").count() == 2, "their inputs differ"
    seen = page.locator(".original figcaption .line:not(.quiet)").all_inner_texts()
    assert [text.partition(":")[0] for text in seen] == ["cifar10-ratio-small", "small"]
    for step in (3, 2, 0):
        page.get_by_role("slider", name="Budget of change").fill(str(step))
        sources = page.locator(".counterfactual img").evaluate_all("nodes => nodes.map(node => node.src)")
        names = [
            i["targets"][0]["budgets"][step - 1]["png"] if step else i["input_png"] for i in found["images"]
        ]
        assert [bytes_of(url) for url in sources] == [(models / name).read_bytes() for name in names]
    titles = page.locator(".counterfactual .what").all_text_contents()
    assert [title.removesuffix("⤢") for title in titles] == ["cifar10-ratio-small", "small"]
    left, right = (page.locator(".counterfactual").nth(n).bounding_box() for n in (0, 1))
    assert left is not None
    assert right is not None
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    assert quiet(opened)


def test_norms_side_by_side_where_the_document_has_several(
    one: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    found = document(one)
    other = json.loads(json.dumps(found["images"][0])) | {"norm": "1"}
    found["images"].append(other)
    names = [path.relative_to(one).as_posix() for path in one.rglob("*.png")]
    made = counterfactual_page.page(found, {name: (one / name).read_bytes() for name in names})
    (tmp_path / "index.html").write_text(made)
    page = open_page(tmp_path / "index.html").page
    titles = page.locator(".counterfactual .what").all_text_contents()
    assert [title.removesuffix("⤢") for title in titles] == ["l₂", "l₁"]
    assert page.locator(".original").count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [PHONE, WIDE], ids=["phone", "wide"])
def test_nothing_overflows(
    several: Path, models: Path, one: Path, tmp_path: Path, open_page: OpenPage, viewport: dict[str, int]
) -> None:
    found = json.loads((one / "counterfactuals.json").read_text().replace('"dog"', json.dumps("x" * 90)))
    found["images"][0]["path"] = "y" * 200 + ".jpg"
    names = [path.relative_to(one).as_posix() for path in one.rglob("*.png")]
    card = "| a | b |\n|---|---|\n| " + "z" * 300 + " | 2 |"
    made = counterfactual_page.page(
        found, {n: (one / n).read_bytes() for n in names}, cards=[card], notes=[["w" * 150]]
    )
    (tmp_path / "index.html").write_text(made)
    pages = [(several, ""), (several, "#1/dog"), (models, ""), (one, ""), (tmp_path, "")]
    for folder, fragment in pages:
        page = open_page(index(folder), fragment=fragment, viewport=viewport).page
        page.locator("details").evaluate_all("nodes => nodes.forEach(node => { node.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], (folder, fragment)
        cut = page.evaluate(
            """[...document.querySelectorAll('main *:not(svg *):not(.hidden)')].filter(node => {
              const box = node.getBoundingClientRect();
              const outside = box.width && (box.left < -1 || box.right > innerWidth + 1);
              return outside && !node.closest('.film-scroll, .track');
            }).map(node => node.outerHTML.slice(0, 80))"""
        )
        assert cut == []
        pictures_shown = page.locator(".picture img, .picture canvas").evaluate_all(
            "nodes => nodes.map(n => n.getBoundingClientRect().width / (n.naturalWidth ?? n.width))"
        )
        assert all(width == pytest.approx(round(width)) and width >= 4 for width in pictures_shown)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(several: Path, models: Path, open_page: OpenPage, scheme: str) -> None:
    for folder, fragment, viewport in ((several, "", PHONE), (several, "#1/ship", WIDE), (models, "", PHONE)):
        page = open_page(index(folder), fragment=fragment, viewport=viewport, color_scheme=scheme).page
        page.locator("details").evaluate_all("nodes => nodes.forEach(node => { node.open = true; })")
        if fragment:
            page.get_by_role("slider", name="Budget of change").fill("1")  # a picture that is still unknown
        violations = Axe().run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in violations] == []
        if fragment:
            page.get_by_role("button", name="Enlarge the original").click()
            violations = Axe().run(page, context="dialog").response["violations"]
            assert [(v["id"], v["nodes"][0]["html"][:200]) for v in violations] == []


@pytest.mark.slow
def test_light_and_dark(one: Path, open_page: OpenPage) -> None:
    def paper(page: Page) -> int:
        return sum(
            map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
        )

    for scheme, is_light in (("light", True), ("dark", False)):
        page = open_page(index(one), color_scheme=scheme).page
        assert (paper(page) > 600) == is_light
        page.locator("#theme").click()
        assert (paper(page) > 600) != is_light
        page.reload()
        assert (paper(page) > 600) != is_light, "remembered"


def test_smooth_or_nearest(one: Path, open_page: OpenPage) -> None:
    page = open_page(index(one)).page
    rendering = "getComputedStyle(document.querySelector('.counterfactual img')).imageRendering"
    assert page.evaluate(rendering) == "pixelated"
    page.get_by_role("button", name="Smooth").click()
    assert page.evaluate(rendering) == "auto"


def test_downloads_are_the_files(one: Path, open_page: OpenPage) -> None:
    page, (image,) = open_page(index(one)).page, document(one)["images"]
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download kitten").click()
    assert waiting.value.suggested_filename == "kitten-dog-eps-3.png"
    assert waiting.value.path().read_bytes() == (one / image["targets"][0]["budgets"][5]["png"]).read_bytes()
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download all numbers").click()
    numbers = document(one)
    numbers["images"][0]["path"] = "kitten.jpg"  # without the folder
    assert json.loads(waiting.value.path().read_text()) == numbers
    with page.expect_download() as waiting:
        page.get_by_role("link", name="counterfactuals.json").click()
    assert json.loads(waiting.value.path().read_text()) == numbers


def test_a_page_that_is_sent_alone_holds_no_path_and_still_gives_its_numbers(
    one: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    assert str(SAMPLES) in (one / "counterfactuals.json").read_text()
    assert str(SAMPLES) not in index(one).read_text()
    (tmp_path / "sent.html").write_bytes(index(one).read_bytes())
    opened = open_page(tmp_path / "sent.html")
    with opened.page.expect_download() as waiting:
        opened.page.get_by_role("link", name="counterfactuals.json").click()
    assert json.loads(waiting.value.path().read_text())["images"][0]["path"] == "kitten.jpg"
    assert opened.requests == [(tmp_path / "sent.html").as_uri()]


def test_a_target_shows_only_the_models_it_was_requested_of(
    one: Path, tmp_path: Path, open_page: OpenPage
) -> None:
    """Two models with the same classes, each with a target of its own, as with --target predicted."""
    found = document(one)
    found["models"].append({**found["models"][0], "name": "other", "digest": "f" * 64})
    other = json.loads(json.dumps(found["images"][0])) | {"model": 1}
    other["targets"][0]["target"] = "ship"
    found["images"] += [other, {**found["images"][0], "path": "second.jpg"}]
    names = [path.relative_to(one).as_posix() for path in one.rglob("*.png")]
    made = counterfactual_page.page(found, {name: (one / name).read_bytes() for name in names})
    (tmp_path / "index.html").write_text(made)
    page = open_page(tmp_path / "index.html").page
    values = page.locator(".cards li").first.locator("a > .line").all_inner_texts()
    assert values[0] == "cifar10-ratio-small"
    assert [text.partition(" ")[0] for text in values[1:]] == ["dog"]
    assert page.locator(".cards li").first.locator(".thumbs img").count() == 2
    for target, model in (("dog", "cifar10-ratio-small"), ("ship", "other")):
        page = open_page(tmp_path / "index.html", fragment=f"#1/{target}").page
        assert page.locator(".lead .model").all_text_contents() == [model]
        assert page.locator(".counterfactual").count() == 1


@pytest.mark.parametrize("viewport", [PHONE, WIDE], ids=["phone", "wide"])
def test_labels_of_the_axis_do_not_overlap(
    one: Path, tmp_path: Path, open_page: OpenPage, viewport: dict[str, int]
) -> None:
    """Of linf budgets in 255ths, of some with many digits, and of one near 0."""
    many = [0.0123456 * k for k in range(1, 7)]
    for budgets in ([k / 255 for k in range(2, 14, 2)], many, [0.0004, *many[1:]]):
        found = document(one) | {"norm": "inf"}
        for budget, eps in zip(found["images"][0]["targets"][0]["budgets"], budgets, strict=True):
            budget["eps"] = eps
        names = [path.relative_to(one).as_posix() for path in one.rglob("*.png")]
        made = counterfactual_page.page(found, {name: (one / name).read_bytes() for name in names})
        (tmp_path / "index.html").write_text(made)
        page = open_page(tmp_path / "index.html", viewport=viewport).page
        boxes = page.locator(".plot text").evaluate_all(
            "nodes => nodes.map(n => [n.textContent, n.getBoundingClientRect()])"
            ".map(([text, b]) => [text, b.left, b.right, b.top, b.bottom])"
        )
        axis = sorted((box for box in boxes if "/" in box[0] or box[0] == "0.0741"), key=lambda box: box[1])
        assert axis[-1][0] == ("12/255" if budgets[0] == 2 / 255 else "0.0741")
        for k, (_, left, right, top, bottom) in enumerate(boxes):
            for _, left2, right2, top2, bottom2 in boxes[k + 1 :]:
                assert right <= left2 or right2 <= left or bottom <= top2 + 3 or bottom2 <= top + 3, boxes


def test_originals_of_different_sizes_are_side_by_side(models: Path, open_page: OpenPage) -> None:
    page = open_page(index(models), viewport=WIDE).page
    first, second = (page.locator(".original").nth(k).bounding_box() for k in (0, 1))
    assert first is not None
    assert second is not None
    assert first["y"] == second["y"]
    assert first["x"] + first["width"] <= second["x"]


def test_names_from_outside_stay_inert(tmp_path: Path, one: Path, open_page: OpenPage) -> None:
    text = (one / "counterfactuals.json").read_text().replace('"dog"', json.dumps(EVIL))
    found = json.loads(text)
    found["images"][0]["path"] = f"{EVIL}.jpg"
    found["models"][0]["name"] = EVIL
    found["errors"] = [{"path": EVIL, "error": EVIL}]
    names = [path.relative_to(one).as_posix() for path in one.rglob("*.png")]
    made = counterfactual_page.page(
        found, {n: (one / n).read_bytes() for n in names}, cards=[f"# {EVIL}"], notes=[[EVIL]]
    )
    (tmp_path / "index.html").write_text(made)
    opened = open_page(tmp_path / "index.html")
    assert opened.evaluate("typeof hacked") == "undefined"
    assert quiet(opened)
    visible = opened.page.locator("body").inner_text()
    assert "\\x1b[31m\\u202e" in visible
    assert "\x1b" not in visible
    assert "\u202e" not in visible
    assert opened.page.locator(".bars .target .label").text_content() == EVIL.replace(
        "\x1b", "\\x1b"
    ).replace("\u202e", "\\u202e")


def test_without_scripts_it_leads_to_the_grids(several: Path, open_page: OpenPage) -> None:
    page = open_page(index(several), java_script_enabled=False).page
    links = page.locator("noscript a")
    assert links.count() == 6
    for n in range(6):
        assert (several / urllib.parse.unquote(str(links.nth(n).get_attribute("href")))).is_file()


@pytest.mark.slow
def test_it_is_small(one: Path, tmp_path: Path, open_page: OpenPage) -> None:
    assert index(one).stat().st_size < 400_000
    found, noise = document(one), np.random.default_rng(0)
    (image,), many, png = found["images"], [], {}
    for n in range(200):
        copy = json.loads(json.dumps(image).replace('"kitten/', f'"kitten-{n}/'))
        many.append(copy | {"path": f"kitten-{n}.jpg", "sha256": str(n)})
        names = [copy["input_png"], *(budget["png"] for budget in copy["targets"][0]["budgets"])]
        names.append(copy["targets"][0]["flip_png"])
        for name in names:  # noise: as large as PNGs get
            png[name] = pictures.png(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    made = counterfactual_page.page({**found, "images": many}, png)
    assert len(made) < 30_000_000
    (tmp_path / "index.html").write_text(made)
    opened = open_page(tmp_path / "index.html")
    assert opened.page.locator(".cards li").count() == 200
    assert quiet(opened)
