"""Evaluation: clean, attacked, out of distribution, and the doubts about every number.

Reading order: `suites` (what is measured), `work` (one batch of it; finished ones are kept by
`ratioctl.journal`), `summary` (arrays to measurements), `doubts` (the self-checks), `plan` (how long it
takes), `adversarial` (attacked images kept on request), `run` (an evaluation from end to end).
"""

from ratioctl.evaluate.run import run
from ratioctl.evaluate.suites import SUITES, Suite

__all__ = ["SUITES", "Suite", "run"]
