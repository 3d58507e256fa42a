"""Evaluation: clean, attacked, out of distribution, and the doubts about every number.

Reading order: `suites` (what is measured), `attack_batches` (one batch of it), `measurements` (arrays to
measurements), `sanity_checks` (an evaluation's checks of itself), `progress` (how long it takes),
`adversarial` (attacked images kept on request), `run` (an evaluation from end to end).
"""

from ratioctl.evaluation.run import run
from ratioctl.evaluation.suites import SUITES, Suite

__all__ = ["SUITES", "Suite", "run"]
