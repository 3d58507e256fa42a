"""Names made safe to show, to compare and to write under."""

from __future__ import annotations

import os

import pytest

from ratioctl.utils.text import milliseconds, nfc, readable, safe_stem, shown, threshold_text

LONG = os.fsdecode("Фотография_серой_кошки_на_подоконнике_в_старом_доме_у_реки".encode("cp1251") * 2)


def test_composed_and_decomposed_names_are_equal() -> None:
    assert nfc("cafe\u0301") == "caf\u00e9" == nfc("caf\u00e9")


@pytest.mark.parametrize("name", ["cat", "a b", "猫", "x" * 100])
def test_short_stems_stay(name: str) -> None:
    assert safe_stem(name) == name


@pytest.mark.parametrize("name", ["x" * 101, "猫" * 34, readable(LONG), "a" * 10_000])
def test_long_stems_are_cut_and_distinguished(name: str) -> None:
    stem = safe_stem(name)
    assert 90 <= len(stem.encode()) <= 100
    assert stem != safe_stem(name + "2")
    assert stem.isprintable()


def test_stems_have_no_separators_and_no_escapes() -> None:
    assert safe_stem("a/b\\c\x1b[31m") == "a_b_c_x1b[31m"


def test_shown_bytes() -> None:
    assert shown(b"\xff\n.png") == "\\xff\\n.png"
    assert shown("\ud800") == "?"


def test_times_have_three_digits_and_no_exponent() -> None:
    shown = [milliseconds(value) for value in (0.0412, 9.999, 12.34, 123.4, 1234.5)]
    assert shown == ["0.04 ms", "10.00 ms", "12.3 ms", "123 ms", "1,234 ms"]


def test_a_threshold_below_1_does_not_read_as_1() -> None:
    assert [threshold_text(value) for value in (0.32648, 0.9999998, 1.0)] == ["0.3265", "0.9999998", "1"]
    assert threshold_text(0.326484, ".6f") == "0.326484"
    assert threshold_text(-3.25) == "-3.25"
