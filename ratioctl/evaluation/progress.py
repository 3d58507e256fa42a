"""Remaining time of an evaluation: estimated beforehand, corrected by measured times during the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

Callback = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(kw_only=True)
class Phase:
    """One kind of computation on one set.

    Attributes:
        what: its name, as in progress events.
        kind: phases of a kind share the ratio of measured to estimated time ("square", "search").
        seconds: estimate for the whole phase.
        share: finished fraction, in [0, 1].
        planned, spent: estimated and measured seconds of the batches computed so far.
    """

    model: str
    what: str
    kind: str
    seconds: float
    share: float = 0.0
    planned: float = 0.0
    spent: float = 0.0


class Plan:
    """Phases of an evaluation, their progress, and the callback that receives it."""

    def __init__(self, phases: Iterable[Phase], tell: Callback) -> None:
        self.phases: dict[tuple[str, str], Phase] = {}
        self.tell = tell
        self.model = ""
        self.add(phases)

    def add(self, phases: Iterable[Phase]) -> None:
        self.phases |= {(phase.model, phase.what): phase for phase in phases}

    def start(self, model: str) -> None:
        """The following phases belong to this model."""
        self.model = model

    def announce(self) -> None:
        """Send the "plan" event."""
        total = sum(phase.seconds for phase in self.phases.values())
        self.tell({"event": "plan", "seconds": total, "phases": len(self.phases)})

    def advance(self, what: str, share: float, seconds: float | None) -> None:
        """A batch is done: `share` of its phase's images; `seconds` is None for a cached batch."""
        phase = self.phases.setdefault(
            (self.model, what), Phase(model=self.model, what=what, kind=what, seconds=0.0)
        )
        phase.share = min(phase.share + share, 1.0)
        if seconds is not None:
            phase.planned += share * phase.seconds
            phase.spent += seconds
        self.tell(
            {
                "event": "batch",
                "model": self.model,
                "what": what,
                "share": self.share(),
                "seconds_left": self.left(),
            }
        )

    def skip(self, what: str) -> None:
        """Mark a phase without images as finished."""
        if (self.model, what) in self.phases:
            self.phases[self.model, what].share = 1.0

    def share(self) -> float:
        """Finished fraction of all work, in [0, 1]; never decreases."""
        total = sum(phase.seconds for phase in self.phases.values())
        if not total:
            return 1.0
        return min(sum(phase.seconds * phase.share for phase in self.phases.values()) / total, 1.0)

    def left(self) -> float:
        """Seconds left: estimates times measured/estimated of the phase, else its kind, else all phases."""
        everything = _ratio(self.phases.values(), 1.0)
        kinds: dict[str, list[Phase]] = {}
        for phase in self.phases.values():
            kinds.setdefault(phase.kind, []).append(phase)
        left = 0.0
        for phase in self.phases.values():
            remaining = phase.seconds * (1 - phase.share)
            if remaining > 0:
                left += remaining * _ratio([phase], _ratio(kinds[phase.kind], everything))
        return left


def _ratio(phases: Any, otherwise: float) -> float:
    """Measured over estimated time of the computed batches."""
    planned, spent = math.fsum(p.planned for p in phases), math.fsum(p.spent for p in phases)
    return spent / planned if planned > 0 else otherwise
