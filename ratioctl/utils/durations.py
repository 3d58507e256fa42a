"""Durations as people write them: 90s, 8m, 2h, 1h30m."""

from __future__ import annotations

import math
import re

from ratioctl.errors import UsageError

_PARTS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?", re.IGNORECASE)


def seconds_of(duration: str | float, what: str) -> float:
    """Seconds of a duration such as "8m" or "1h30m", or of a number of seconds.

    Args:
        what: option or parameter, for messages.

    Raises:
        UsageError: not a duration above 0.
    """
    if isinstance(duration, str):
        found = _PARTS.fullmatch(duration.strip())
        parts = found.groups() if found else ()
        seconds = sum(
            float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False) if part is not None
        )
    elif isinstance(duration, (int, float)) and not isinstance(duration, bool):
        seconds = float(duration)
    else:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{what} {duration}", "is not a duration", "Use a value such as 90s, 8m or 1h30m.")
    return seconds


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "2 h 5 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
