"""The plan of an evaluation and its estimate."""

from __future__ import annotations

from typing import Any

import pytest

from ratioctl.evaluation.progress import Phase, Plan
from ratioctl.types import Evaluation


def test_the_plan_corrects_itself_and_its_share_never_falls() -> None:
    events: list[dict[str, Any]] = []
    phases = [
        Phase(model="m", what="a", kind="x", seconds=10.0),
        Phase(model="m", what="b", kind="x", seconds=30.0),
        Phase(model="m", what="c", kind="y", seconds=60.0),
    ]
    plan = Plan(phases, events.append)
    plan.announce()
    assert events[0]["seconds"] == 100
    plan.start("m")
    plan.advance("a", 0.5, 20.0)  # four times slower than thought
    assert events[-1]["seconds_left"] == pytest.approx(4 * 95)
    assert events[-1]["share"] == pytest.approx(0.05)
    plan.advance("a", 0.5, 20.0)
    plan.advance("c", 0.5, 15.0)  # another kind goes twice as fast as thought
    assert events[-1]["seconds_left"] == pytest.approx(4 * 30 + 0.5 * 30)
    plan.advance("b", 1.0, None)  # cached: no time was measured
    plan.advance("c", 0.7, 15.0)
    assert events[-1]["share"] == 1
    assert events[-1]["seconds_left"] == 0
    shares = [event["share"] for event in events[1:]]
    assert shares == sorted(shares)


def test_the_estimate_knows_that_few_survive(plain: tuple[Evaluation, list[dict[str, Any]]]) -> None:
    """What is estimated for an attack is what its survivors cost, not what all images would."""
    _, events = plain
    assert events[0]["event"] == "plan"
    assert events[0]["seconds"] > 0
    assert [event for event in events if event["event"] == "batch"][-1]["share"] == pytest.approx(1)
    assert events[-1]["seconds_left"] == 0
