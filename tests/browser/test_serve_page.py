"""The page of `ratioctl serve` in a real browser, from a real process."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef"
PHONE, WIDE = {"width": 380, "height": 800}, {"width": 1400, "height": 900}
TIMEOUT_MS = 240_000  # for a search of 500 steps, on a machine that has other things to do


class Visitor:
    """A browser without a past at a server's page, and everything that it complained about."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(TIMEOUT_MS)
        self.url, self.complaints, self.requests = url, list[str](), list[str]()

    def open(self, fragment: str = "") -> Page:
        page = self.context.new_page()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(f"{self.url}/{fragment}")
        return page

    def quiet(self) -> bool:
        """No error, and no request but to the server itself."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))] == []
        return True


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visitor]]:
    expect.set_options(timeout=TIMEOUT_MS)
    visitors = []

    def one(server: Any, **options: Any) -> Visitor:
        visitors.append(Visitor(browser, server.url, **{"viewport": WIDE, **options}))
        return visitors[-1]

    yield one
    for visitor in visitors:
        visitor.context.close()


def drop(page: Page, image: Path) -> None:
    """Drag a file from the desktop onto the page."""
    data = page.evaluate_handle(
        """([name, data]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
            transfer.items.add(new File([bytes], name, { type: "image/png" }));
            return transfer;
        }""",
        [image.name, base64.b64encode(image.read_bytes()).decode()],
    )
    for kind in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", kind, {"dataTransfer": data})


def accessible(page: Page) -> bool:
    found = Axe().run(page).response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
    return True


def test_drop_score_explain_and_download(
    serving: Callable[..., Any], visit: Callable[..., Visitor], small_package: Path, photographs: Path
) -> None:
    server = serving(small_package, small_package)
    visitor = visit(server, accept_downloads=True)
    page = visitor.open()
    expect(page.locator("#served")).to_have_text("small, small-2")
    assert accessible(page)
    drop(page, photographs / "wide.png")
    expect(page.locator(".prediction")).to_have_count(2)
    expect(page.locator("#caption")).to_have_text(
        "wide.png, 12 × 10 pixels, dashed: the square that the models see"
    )
    scale = page.locator(".scale-track").first
    assert "Out of distribution below 0.50 (tpr95); tpr99: 0.30." in str(scale.get_attribute("aria-label"))
    assert accessible(page)

    page.locator("#target").select_option("red panda")
    page.locator("#go").click()
    expect(page.locator("#previews figure")).to_have_count(2)
    expect(page.locator("#previews figcaption").first).to_contain_text("red panda")
    assert page.locator("#progress").evaluate("node => node.value") < 1
    expect(page.locator("#result")).to_be_visible()
    explorer = page.frame_locator("#explorer")
    expect(explorer.locator("figure.counterfactual")).to_have_count(2)
    slider = explorer.get_by_role("slider", name="Budget of change")
    assert slider.input_value() == "3"
    slider.press("ArrowLeft")
    assert slider.input_value() == "2"
    frame = page.locator("#explorer")
    inner = frame.evaluate("node => node.contentDocument.documentElement.scrollHeight")
    assert frame.evaluate("node => node.clientHeight") >= inner - 2, "the explorer has a second scroll bar"
    assert accessible(page)

    files = {}
    for number, link in enumerate(page.locator("#downloads a").all()):
        with page.expect_download() as waiting:
            link.click()
        files[number, waiting.value.suggested_filename] = Path(waiting.value.path()).read_bytes()
    assert [name for _, name in files] == ["wide.html", "wide.json", *["wide-red panda.png"] * 2]
    html, document, *grids = files.values()
    targets = [entry["targets"][0]["target"] for entry in json.loads(document)["images"]]
    assert targets == ["red panda"] * 2
    assert b'<meta name="generator" content="ratioctl">' in html
    assert all(grid.startswith(b"\x89PNG") for grid in grids)
    assert visitor.quiet()


def test_a_region_is_drawn_and_nothing_else_changes(
    serving: Callable[..., Any], visit: Callable[..., Visitor], small_package: Path, photographs: Path
) -> None:
    visitor = visit(serving(small_package))
    page = visitor.open()
    drop(page, photographs / "one.png")
    page.locator("#region summary").click()
    page.locator("#draw").click()
    place = page.locator("#shown").bounding_box()
    assert place is not None
    step = place["width"] / 8
    page.mouse.move(place["x"] + 2 * step, place["y"] + 3 * step)
    page.mouse.down()
    page.mouse.move(place["x"] + 6 * step, place["y"] + 5 * step, steps=4)
    page.mouse.up()
    assert [page.locator(f"#{name}").input_value() for name in "xywh"] == ["2", "3", "4", "2"]
    page.locator("#w").fill("3")  # with the keyboard alone
    page.locator("#w").press("Tab")
    assert page.locator("#box").evaluate("node => node.style.width") == "37.5%"
    with page.expect_request("**/v1/counterfactual?*") as asked:
        page.locator("#go").click()
    assert "region=2%2C3%2C3%2C2&region_space=image" in asked.value.url
    expect(page.locator("#result")).to_be_visible()
    expect(page.frame_locator("#explorer").locator("figure.counterfactual")).to_have_count(1)
    assert visitor.quiet()


def test_two_tabs_wait_for_each_other_and_cancel(
    serving: Callable[..., Any], visit: Callable[..., Visitor], small_package: Path, photographs: Path
) -> None:
    visitor = visit(serving(small_package), viewport=PHONE, color_scheme="dark")
    first, second = visitor.open(), visitor.open()
    for page, name in ((first, "one.png"), (second, "two.png")):
        drop(page, photographs / name)
        expect(page.locator(".prediction")).to_have_count(1)
        page.locator("#norm").select_option("1.5")
    first.locator("#go").click()
    expect(first.locator("#state")).to_contain_text("Searching")
    second.locator("#go").click()
    expect(second.locator("#state")).to_contain_text("Waiting for another search")
    assert accessible(second)
    first.locator("#cancel").click()
    expect(first.locator("#running")).to_be_hidden()
    expect(first.locator("#said")).to_have_text("Cancelled")
    expect(first.locator("#go")).to_be_enabled()
    expect(second.locator("#result")).to_be_visible()
    expect(second.frame_locator("#explorer").locator("h2").first).to_have_text("two.png")
    for page in (first, second):
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert visitor.quiet()


def test_what_goes_wrong_is_said(
    serving: Callable[..., Any], visit: Callable[..., Visitor], tiny_onnx: Path, tmp_path: Path, colors: Path
) -> None:
    visitor = visit(serving(tiny_onnx, "--token", TOKEN))
    page = visitor.open()
    expect(page.locator("#token-form")).to_be_visible()
    assert accessible(page)
    page.locator("#token").fill(TOKEN)
    page.locator("#token").press("Enter")
    expect(page.locator("#work")).to_be_visible()
    other = visit(serving(tiny_onnx, "--token", TOKEN)).open(f"#token={TOKEN}")
    expect(other.locator("#work")).to_be_visible()
    assert TOKEN not in other.url
    (tmp_path / "notes.png").write_text("no image")
    drop(page, tmp_path / "notes.png")
    expect(page.locator("#error")).to_contain_text("image-0: is text, not an image. Images may be PNG")
    drop(page, colors / "red.png")
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator(".prediction .lead")).to_have_text("Predicted red 0.79 out of distribution")
    expect(page.locator("#no-explain")).to_contain_text("is an ONNX file that gives scores only")
    expect(page.locator("#form")).to_be_hidden()
    failed = [said for said in visitor.complaints if "Failed to load resource" not in said]
    assert failed == []  # the browser itself notes the 401 and the 422
