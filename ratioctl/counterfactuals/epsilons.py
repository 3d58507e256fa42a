"""The RANGE of the command line: budgets written as text. Imports nothing heavy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from ratioctl.errors import UsageError

SPACED = 6  # budgets of `a..b`, as in the paper's ladders
MOST = 100  # budgets of one question; more is a typing error
HELP = "Use 2, or 8/255, or 0.5,1,2, or 0.5..3 (six budgets), or 0.5..3:0.25."


def parse_range(text: str, option: str = "--eps") -> tuple[float, ...]:
    """The budgets that `text` names: `2`; `8/255`; `0.5,1,2`; `0.5..3` (six); `0.5..3:0.25` (a step).

    Raises:
        UsageError: not a number, zero, negative, infinite, not ascending, or more than MOST.
    """
    if ".." not in text:
        return check_budgets([_number(part, text, option) for part in text.split(",")], option)
    ends, colon, step_text = text.partition(":")
    first_text, _, last_text = ends.partition("..")
    first, last = (_number(part, text, option) for part in (first_text, last_text))
    if not first < last:
        raise UsageError(f"{option} {text}", "the range does not increase", HELP)
    if not colon:
        step, count = (last - first) / (SPACED - 1), SPACED
    else:
        step = _number(step_text, text, option)
        if step > last - first:
            raise UsageError(f"{option} {text}", "the step is larger than the range", HELP)
        steps = (last - first) / step
        if steps >= MOST:
            raise UsageError(f"{option} {text}", f"has more than {MOST} budgets", "Use a larger step.")
        count = math.floor(steps + 1e-9) + 1
    # Ten digits hide the rounding of repeated addition: 0.5 + 2 * 0.05 is meant to be 0.6.
    spaced = [float(f"{first + k * step:.10g}") for k in range(count)]
    return check_budgets(spaced, option)


def check_budgets(budgets: Sequence[float], option: str = "--eps") -> tuple[float, ...]:
    """`budgets` as floats, checked.

    Raises:
        UsageError: none, zero, negative, not finite, not growing, more than MOST, or two that have the same
            name in files (six digits).
    """
    values = tuple(float(value) for value in budgets)
    shown = ",".join(f"{value:g}" for value in values[:8]) + (",..." if len(values) > 8 else "")
    if not values:
        raise UsageError(option, "names no budget", HELP)
    if len(values) > MOST:
        raise UsageError(f"{option} {shown}", f"has more than {MOST} budgets", HELP)
    for value in values:
        if not math.isfinite(value) or value <= 0:
            raise UsageError(f"{option} {shown}", f"{value:g} is not a positive, finite number", HELP)
    for before, after in itertools.pairwise(values):
        if not before < after:
            raise UsageError(
                f"{option} {shown}", f"the budgets do not increase: {after:g} follows {before:g}", HELP
            )
        if f"{before:g}" == f"{after:g}":
            raise UsageError(
                f"{option} {shown}",
                f"{before!r} and {after!r} cannot be told apart in file names",
                "They must differ within six digits.",
            )
    return values


def _number(part: str, text: str, option: str) -> float:
    above, slash, below = part.partition("/")
    try:
        value = float(above) / float(below) if slash else float(part)
    except (ValueError, ZeroDivisionError):
        what = f'"{part.strip()}" is not a number' if part.strip() else "a number is missing"
        raise UsageError(f"{option} {text}", what, HELP) from None
    if not math.isfinite(value) or value <= 0:
        raise UsageError(f"{option} {text}", f"{part.strip()} is not a positive, finite number", HELP)
    return value
