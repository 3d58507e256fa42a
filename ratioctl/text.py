"""Text from outside (names, labels, paths), made safe to show. Open to every room, imports nothing."""


def safe_text(text: object) -> str:
    """`text` with everything a terminal could obey written out: control characters, escape codes,
    direction marks, line separators and lone surrogates become `\\x1b`, `\\u202e` and the like.
    """
    return "".join(
        ch if ch.isprintable() else ch.encode("unicode_escape").decode("ascii") for ch in str(text)
    )
