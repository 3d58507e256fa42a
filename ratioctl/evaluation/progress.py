"""How long an evaluation takes: an estimate before it, corrected by what has been seen during it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

Callback = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(kw_only=True)
class Phase:
    """One search on one set.

    Attributes:
        what: its name, as steps announce it.
        kind: phases of a kind go at the same pace ("square", "worst case").
        seconds: estimated for all of it.
        share: of it that is done, in [0, 1].
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
    """How much is to do, how fast it goes, and who wants to know."""

    def __init__(self, phases: Sequence[Phase], tell: Callback) -> None:
        self.phases = {(phase.model, phase.what): phase for phase in phases}
        self.tell = tell
        self.model = ""

    def start(self, model: str) -> None:
        """The next phases are this model's."""
        self.model = model

    def announce(self) -> None:
        """Say what is ahead, before it begins."""
        total = sum(phase.seconds for phase in self.phases.values())
        self.tell({"event": "plan", "seconds": total, "phases": len(self.phases)})

    def advance(self, what: str, share: float, seconds: float | None) -> None:
        """A batch is done: `share` of its phase's images; `seconds` None where it came from the journal."""
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
        """Nothing is left to do in a phase."""
        if (self.model, what) in self.phases:
            self.phases[self.model, what].share = 1.0

    def share(self) -> float:
        """Of the work, in [0, 1]; never falls."""
        total = sum(phase.seconds for phase in self.phases.values())
        if not total:
            return 1.0
        return min(sum(phase.seconds * phase.share for phase in self.phases.values()) / total, 1.0)

    def left(self) -> float:
        """Seconds left: each phase at its own pace where that is known, else its kind's, else that of all."""
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
    """Measured over estimated time of what was computed."""
    planned, spent = math.fsum(p.planned for p in phases), math.fsum(p.spent for p in phases)
    return spent / planned if planned > 0 else otherwise
