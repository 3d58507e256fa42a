"""The nearest known name for a misspelled one."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The entry of `known` closest to `name`, or None if no similarity ratio reaches `cutoff` (0 to 1)."""
    import difflib  # 4 ms that only errors need

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """`Did you mean "<prefix><nearest>"?`, or an empty string if nothing is close."""
    found = nearest(name, known, cutoff=cutoff)
    return "" if found is None else f'Did you mean "{prefix}{found}"?'


def one_of(name: str, known: Iterable[str]) -> str:
    """The next step after an unknown name: the nearest known name, where one is close, and all of them."""
    known = list(known)
    return f"{did_you_mean(name, known)} Use one of: {', '.join(known)}.".lstrip()
