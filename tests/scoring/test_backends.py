"""Opening a model."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ratioctl.errors import PackageError
from ratioctl.onnx import runtime
from ratioctl.scoring.backends import open_model


def test_the_process_waits_for_the_thread_that_creates_the_session(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends while a daemon is inside onnxruntime aborts: after Ctrl-C with 134, not 130."""
    threads = []

    def load(*_: object, **options: object) -> None:
        threads.append(threading.current_thread())
        raise PackageError("tiny.onnx", "is damaged", "Export it again.")

    monkeypatch.setattr(runtime, "load", load)
    with pytest.raises(PackageError, match="is damaged"):
        open_model(str(tiny_onnx), None)
    (thread,) = threads
    assert thread is not threading.main_thread()
    assert not thread.daemon
    assert not thread.is_alive()
