"""Where commands compute is chosen in one place, which says so; a precision asked for overrules it."""

import logging

import pytest

from ratioctl.nets.hardware import choose, has_bf16


def test_the_choice_and_its_reason_are_logged_for_verbose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ratioctl"):
        place = choose("cpu")
    assert caplog.messages == [f"Computing on {place.why}"]
    assert "thread" in place.why
    assert place.bf16 == has_bf16(place.device)
    assert ("bf16" if place.bf16 else "fp32") in place.why


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_asked_for_overrules(precision: str) -> None:
    place = choose("cpu", precision)
    assert place.bf16 == (precision == "bf16")
    assert f"{precision}: asked for" in place.why
