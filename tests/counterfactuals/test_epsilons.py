"""The RANGE of the command line."""

from __future__ import annotations

import pytest

from ratioctl.counterfactuals.epsilons import MOST, check_budgets, parse_range
from ratioctl.errors import UsageError


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("2", (2,)),
        ("0.5,1,2", (0.5, 1, 2)),
        (" 0.5, 1 ", (0.5, 1)),
        ("0.5..3", (0.5, 1, 1.5, 2, 2.5, 3)),
        ("3.5..21", (3.5, 7, 10.5, 14, 17.5, 21)),
        ("0.5..1:0.25", (0.5, 0.75, 1)),
        ("0.1..1:0.1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)),
        ("0.5..3:1", (0.5, 1.5, 2.5)),
        ("1e-3", (0.001,)),
    ],
)
def test_means(text: str, budgets: tuple[float, ...]) -> None:
    assert parse_range(text) == budgets


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "0 is not a positive, finite number"),
        ("-1", "-1 is not a positive"),
        ("nan", "nan is not a positive"),
        ("0.5..inf", "inf is not a positive"),
        ("0..3", "0 is not a positive"),
        ("1,-2", "-2 is not a positive"),
        ("3..0.5", "the range does not increase"),
        ("1..1", "the range does not increase"),
        ("2,1", "the budgets do not increase: 1 follows 2"),
        ("1,1", "the budgets do not increase"),
        ("1,1.0000001", "cannot be told apart in file names"),
        ("", "a number is missing"),
        ("1,,2", "a number is missing"),
        ("..3", "a number is missing"),
        ("1..3:", "a number is missing"),
        ("much", '"much" is not a number'),
        ("1..2..3", "is not a number"),
        ("0.5..3:0", "0 is not a positive"),
        ("0.5..3:4", "the step is larger than the range"),
        ("0.5..3:1e-9", f"has more than {MOST} budgets"),
        ("1e-300..1e300:1e-300", f"has more than {MOST} budgets"),
        (",".join(str(n) for n in range(1, MOST + 2)), f"has more than {MOST} budgets"),
    ],
)
def test_refuses(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_range(text)
    assert reason in caught.value.reason
    assert caught.value.exit_code == 2
    assert caught.value.thing.startswith("--eps")


def test_numbers_are_checked_alike() -> None:
    assert check_budgets([1, 2.5]) == (1.0, 2.5)
    with pytest.raises(UsageError):
        check_budgets([])


def test_radii_may_be_fractions() -> None:
    assert parse_range("8/255") == (8 / 255,)
    assert parse_range("1/255,2/255") == (1 / 255, 2 / 255)
    assert parse_range("1/255..6/255")[-1] == pytest.approx(6 / 255, abs=1e-9)
    for text in ("8/0", "8/", "/255", "1/2/3"):
        with pytest.raises(UsageError, match=r"not a number|positive"):
            parse_range(text)
