"""The page of counterfactuals as text; what it does in a browser is in tests/browser."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
from typing import Any

import pytest

from ratioctl.report import counterfactual_page

EVIL = "</script><script>alert(1)</script><!-- \x1b[31m \u202e"


def document(path: str = "cat.jpg", target: str = "dog", model: str = "tiny") -> dict[str, Any]:
    answer = {
        "target": target,
        "flip_eps": 0.4,
        "flip_png": "cat/dog/flip.png",
        "budgets": [
            {
                "eps": 0.5,
                "png": "cat/dog/eps-0.5.png",
                "confidence": 0.1 + 0.2,
                "confidence_float": 0.3,
                "predicted": target,
                "probabilities": [0.1 + 0.2, 0.7],
                "distance": {"l1": 1.0, "l1.5": 0.7, "l2": 0.5, "linf": 0.2},
            }
        ],
    }
    original = {"label": "cat", "confidence": 0.7, "probabilities": [0.7, 0.3], "is_ood": False}
    entry = {
        "path": path,
        "sha256": "ab",
        "model": 0,
        "input_png": "cat/input.png",
        "original": original,
        "targets": [answer],
    }
    one = {"name": model, "digest": "0123", "temperature": 0.5, "threshold": 0.28, "labels": ["cat", target]}
    return {
        "schema": "ratioctl/counterfactuals/1",
        "norm": "2",
        "steps": 5,
        "restarts": 1,
        "seed": 2**62 + 1,
        "models": [one],
        "images": [entry],
        "errors": [],
    }


PICTURES = {"cat/input.png": b"one", "cat/dog/eps-0.5.png": b"two", "cat/dog/flip.png": b"two"}


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[tuple[str, str]] = []
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = str(dict(attrs).get("id") or tag)
            self.blocks.append((self.inside, ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            name, text = self.blocks[-1]
            self.blocks[-1] = (name, text + data)


def test_the_document_is_inside_unrounded_and_every_picture_once() -> None:
    asked = document()
    blocks = dict(Elements(counterfactual_page.page(asked, PICTURES, notes=[["cut"]])).blocks)
    assert json.loads(blocks["document"]) == asked
    assert "0.30000000000000004" in blocks["document"]
    extra = json.loads(blocks["extra"])
    assert [base64.b64decode(data) for data in extra["data"]] == [b"one", b"two"]
    assert extra["files"] == {"cat/input.png": 0, "cat/dog/eps-0.5.png": 1, "cat/dog/flip.png": 1}
    assert extra["notes"] == [["cut"]]


def test_nothing_from_outside_becomes_markup() -> None:
    asked = document(path=f"{EVIL}.jpg", target=EVIL, model=EVIL)
    asked["errors"] = [{"path": EVIL, "error": EVIL}]
    asked["images"][0]["original"]["label"] = EVIL
    text = counterfactual_page.page(
        asked, PICTURES, notes=[[EVIL]], cards=[f"# {EVIL}\n\n[a](javascript:alert(1))"]
    )
    parsed = Elements(text)
    assert [name for name, _ in parsed.blocks] == ["style", "document", "extra", "script"]
    plain = Elements(
        counterfactual_page.page(
            {**document(), "errors": [{"path": "x", "error": "y"}]}, PICTURES, cards=["# x\n\na"]
        )
    )
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in plain.tags]
    assert "<!--" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert json.loads(dict(parsed.blocks)["document"]) == asked


def test_only_its_own_script_may_run_and_nothing_may_be_fetched() -> None:
    parsed = Elements(
        counterfactual_page.page(document(), PICTURES, cards=["![a](https://example.org/a.png)"])
    )
    blocks = dict(parsed.blocks)
    policy = next(
        str(a["content"]) for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    )

    def hashed(name: str) -> str:
        return base64.b64encode(hashlib.sha256(blocks[name].encode()).digest()).decode()

    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{hashed('style')}'",
        f"script-src 'sha256-{hashed('script')}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "img" not in [tag for tag, _ in parsed.tags]
    assert not [attrs for _, attrs in parsed.tags if "src" in attrs]
    assert [attrs["href"] for tag, attrs in parsed.tags if tag == "link"] == ["data:,"]


def test_the_card_is_markdown_without_its_front_matter() -> None:
    card = (
        "---\ntags: [x]\n---\n# Tiny\n\n| a | b |\n|---|---|\n| 1 | <i>2</i> |\n\n<script>alert(1)</script>\n"
    )
    made = counterfactual_page.card_html(card)
    assert "tags" not in made
    assert "<h3>Tiny</h3>" in made
    assert "<td>&lt;i&gt;2&lt;/i&gt;</td>" in made
    assert "<script" not in made


def test_models_of_one_name_are_distinguished() -> None:
    twins = document()
    twins["models"].append({**twins["models"][0], "digest": "456789ab"})
    made = counterfactual_page.page(twins, PICTURES)
    assert '<b>tiny</b> <span class="quiet">456789</span>' in made
    assert "<b>tiny</b></summary>" in counterfactual_page.page(document(), PICTURES)


def test_absolute_paths_become_relative_to_their_folder() -> None:
    one, two = document()["images"][0], document()["images"][0]
    found = document() | {
        "images": [{**one, "path": "/home/me/a/x.png"}, {**two, "path": "/home/me/b/x.png"}],
        "errors": [{"path": "/home/me/y.png", "error": "is empty"}],
    }
    text = counterfactual_page.page(found, PICTURES)
    assert "/home" not in text
    shown = json.loads(dict(Elements(text).blocks)["document"])
    assert [entry["path"] for entry in shown["images"] + shown["errors"]] == ["a/x.png", "b/x.png", "y.png"]
    assert found["images"][0]["path"] == "/home/me/a/x.png"
    single = document(path="/home/me/cat.jpg")
    assert "/home" not in counterfactual_page.page(single, PICTURES)


@pytest.mark.parametrize("seed", [0, 2**62 + 1])
def test_a_seed_of_any_size_is_shown_exactly(seed: int) -> None:
    asked = document() | {"seed": seed}
    assert f'<data value="{seed}">{seed}</data>' in counterfactual_page.page(asked, PICTURES)


def test_page_without_answers() -> None:
    asked = document() | {"images": [], "errors": [{"path": "x.png", "error": "is <empty>"}]}
    text = counterfactual_page.page(asked, {})
    assert "No image could be read." in text
    assert "is &lt;empty&gt;" in text
