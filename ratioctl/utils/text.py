"""Text from outside (names, labels, paths, messages of libraries), made safe to show and to compare."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping
from typing import Any


def safe_text(text: object) -> str:
    """`text` with everything a terminal could interpret escaped: control characters, escape codes,
    direction marks, line separators and lone surrogates become `\\x1b`, `\\u202e` and the like.
    """
    return "".join(
        ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in str(text)
    )


def shown(name: str | bytes | os.PathLike[str]) -> str:
    r"""A file name that is safe in a message: invalid UTF-8 as `\xff`, control characters as `\n`, `\x1b`."""
    return safe_text(readable(os.fspath(name)))


def nfc(name: str) -> str:
    """`name` in Unicode normalization form C: how labels, folders and split names are compared."""
    return unicodedata.normalize("NFC", name)


def safe_stem(name: str, limit: int = 100) -> str:
    """`name` as the stem of a file or folder: safe to show, no separators, at most `limit` bytes of UTF-8.

    A longer name is cut and ends with eight hexadecimal digits of its hash.
    """
    stem = safe_text(name).replace("/", "_").replace("\\", "_")
    if len(stem.encode("utf-8")) <= limit:
        return stem
    digest = hashlib.sha256(stem.encode("utf-8")).hexdigest()[:8]
    return stem.encode("utf-8")[: limit - 9].decode("utf-8", "ignore") + "-" + digest


def readable(name: str | bytes) -> str:
    r"""`name` as valid Unicode; bytes that are not UTF-8 become `\xff`. Nothing else changes."""
    if isinstance(name, str):
        surrogates = [c for c in name if 0xD800 <= ord(c) <= 0xDFFF]
        if not surrogates:
            return name
        escaped_bytes = all(0xDC80 <= ord(c) <= 0xDCFF for c in surrogates)
        name = name.encode("utf-8", "surrogateescape" if escaped_bytes else "replace")
    return name.decode("utf-8", "backslashreplace")


def clipped(text: object, width: int = 40) -> str:
    """`safe_text(text)` cut to `width` characters, for a column."""
    shown = safe_text(text)
    return shown if len(shown) <= width else shown[: width - 3] + "..."


def milliseconds(value: float) -> str:
    """ "0.04 ms", "12.3 ms", "1,234 ms": never with an exponent."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def threshold_text(value: float, form: str = ".4g") -> str:
    """A threshold as `form` writes it, with nine digits where that would round it to 1."""
    text = format(value, form)
    return f"{value:.9g}" if float(text) == 1 else text


_FINDINGS = {
    "int_parsing": "is not a whole number",
    "int_from_float": "is not a whole number",
    "int_type": "is not a whole number",
    "float_parsing": "is not a number",
    "float_type": "is not a number",
    "finite_number": "is not a finite number",
    "bool_parsing": "is neither true nor false",
    "bool_type": "is neither true nor false",
    "string_type": "is not text",
    "literal_error": "is not one of {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}


def reason_of(finding: Mapping[str, Any]) -> str:
    """What is wrong with a value, in our words: one of the `errors()` of pydantic's ValidationError."""
    known = _FINDINGS.get(finding["type"])
    if known is not None:
        context = finding.get("ctx", {})
        return known.format(**{k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()})
    said = str(finding["msg"]).removeprefix("Value error, ").removeprefix(f"{finding['input']!r} ")
    return said[:1].lower() + said[1:]
