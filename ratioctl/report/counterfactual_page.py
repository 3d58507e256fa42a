"""The page of counterfactuals: one HTML file with everything inside, for a disk without a network.

It holds counterfactuals.json as it is, every picture once (the bytes of the saved PNG) and the models' cards.
All that is shown is drawn in the browser from these (`templates/explorer.js`), so that a number on the page
is a number of the document, rounded for display only. Nothing can run in it but that one script: its hash
stands in the content security policy, which also forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ratioctl.utils.text import safe_text


def page(
    document: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    *,
    notes: Sequence[Sequence[str]] = (),
    cards: Sequence[str | None] = (),
) -> str:
    """`index.html` of a folder of counterfactuals.

    Args:
        document: counterfactuals.json, plain JSON values.
        pictures: PNG bytes by the names that the document uses for them.
        notes: for each entry of the document's images what its reader is told about it.
        cards: for each of the document's models its card in Markdown, None where it has none.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("ratioctl.report", "templates")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(safe_text=safe_text)
    style, script = (loader.get_source(environment, f"explorer.{kind}")[0] for kind in ("css", "js"))
    data: list[str] = []  # each picture once, also where several names have it
    places: dict[bytes, int] = {}
    for content in pictures.values():
        if places.setdefault(content, len(data)) == len(data):
            data.append(base64.b64encode(content).decode("ascii"))
    extra = {
        "notes": [list(lines) for lines in notes],
        "files": {name: places[content] for name, content in pictures.items()},
        "data": data,
    }
    return environment.get_template("explorer.html").render(
        document=document,
        models=[
            (model, None if card is None else Markup(card_html(card)))
            for model, card in itertools.zip_longest(document["models"], cards)
        ],
        embedded=Markup(_json(document)),
        extra=Markup(_json(extra)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def card_html(card: str) -> str:
    """A model card as HTML: no markup of its own comes through, no image, headings from the third level."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = markdown.parse(re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    made = safe_lines(markdown.renderer.render(tokens, markdown.options, {}))
    return made.replace("<th></th>", "<td></td>")  # a table without a head still has an empty one in Markdown


def safe_lines(text: str) -> str:
    """`text` made safe line by line, so that the lines stay."""
    return "\n".join(safe_text(line) for line in text.split("\n"))


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for the end of a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _hash(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode("ascii") + "'"
