"""The page of counterfactuals: one self-contained HTML file.

It contains counterfactuals.json, every picture once (the bytes of the saved PNG) and the models' cards. A
script (`templates/explorer.js`) draws the page from them, so numbers on the page are numbers of the document,
rounded for display only. The content security policy allows that script by its hash and forbids requests.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ratioctl.report.html import TEMPLATES, safe_lines, templates
from ratioctl.report.live import Live


def page(
    document: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    *,
    notes: Sequence[Sequence[str]] = (),
    cards: Sequence[str | None] = (),
    live: Live | None = None,
) -> str:
    """`index.html` of a folder of counterfactuals.

    Args:
        document: counterfactuals.json, plain JSON values.
        pictures: PNG bytes by the names that the document uses for them.
        notes: for each entry of the document's images the notes about its conversion.
        cards: for each of the document's models its card in Markdown, or None.
        live: what the page needs to search itself.
    """
    from markupsafe import Markup

    names = ("explorer.css", "explorer.js", "live.js")
    style, script, live_script = ((TEMPLATES / name).read_text("utf-8") for name in names)
    data: list[str] = []  # each picture once, also where several names have it
    places: dict[bytes, int] = {}
    for content in pictures.values():
        if places.setdefault(content, len(data)) == len(data):
            data.append(base64.b64encode(content).decode("ascii"))
    document = without_folders(document)
    extra = {
        "notes": [list(lines) for lines in notes],
        "files": {name: places[content] for name, content in pictures.items()},
        "data": data,
    }
    return (
        templates()
        .get_template("explorer.html")
        .render(
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
            live=live,
            live_script=Markup(live_script),
            live_hash=_hash(live_script),
        )
    )


def without_folders(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with absolute paths relative to their common folder: the page may be sent to others."""
    entries = [*document["images"], *document["errors"]]
    folders = [os.path.dirname(entry["path"]) for entry in entries if os.path.isabs(entry["path"])]
    if not folders:
        return dict(document)
    common = os.path.commonpath(folders)

    def relative(entry: Mapping[str, Any]) -> dict[str, Any]:
        path = entry["path"]
        return {**entry, "path": os.path.relpath(path, common) if os.path.isabs(path) else path}

    return {**document, **{key: list(map(relative, document[key])) for key in ("images", "errors")}}


def card_html(card: str) -> str:
    """A model card as HTML, without raw HTML and images; headings start at level 3."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = markdown.parse(re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL))
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 2, 6)}"
    made = safe_lines(markdown.renderer.render(tokens, markdown.options, {}))
    return made.replace("<th></th>", "<td></td>")  # Markdown tables always have a head


def _json(value: Any) -> str:
    """JSON that cannot end a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _hash(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode("ascii") + "'"
