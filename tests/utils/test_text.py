"""Text from outside is shown without control characters."""

from __future__ import annotations

from ratioctl.utils.text import safe_text


def test_safe_text() -> None:
    assert safe_text("Größe 猫 \x1b[31m\x07\r\n\u202e\ud800") == (
        "Größe 猫 \\x1b[31m\\x07\\r\\n\\u202e\\ud800"
    )
