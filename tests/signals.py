"""Signals for runs inside the test's own process."""

from __future__ import annotations

import signal

import pytest


def deliver(signum: int) -> None:
    """Call the handler that the run installed; tests/cli/test_train.py signals real processes."""
    handler = signal.getsignal(signum)
    if not callable(handler) or handler is signal.default_int_handler:
        pytest.skip("this process does not handle signals")
    handler(signum, None)
