"""Evaluation: accuracy, calibration, OOD detection, attacks, explanations, and checks of the numbers.

Reading order: `suites` (what is measured), `datasets`, `attack_batches` (one batch of one attack), `context`
(what a stage receives and returns), `stages` (one module per part of a suite), `measurements` (arrays to
measurements), `sanity_checks`, `progress`, `driver` (`run`: an evaluation from end to end), `compare`
(significance between models). Names are imported on first use, so that `compare` loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ratioctl.evaluation.driver import run
    from ratioctl.evaluation.suites import SUITES, Suite

_HOME = {"run": "driver", "SUITES": "suites", "Suite": "suites"}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        return getattr(importlib.import_module(f"ratioctl.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
