"""One piece of work in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Starts `work` in a thread. It pays where `work` releases Python's global lock.

    The thread is a daemon: work that nobody waits for does not keep the process alive.
    """

    def __init__(self, work: Callable[[], T], name: str = "background") -> None:
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True, name=name)
        self._thread.start()

    def result(self) -> T:
        """What `work` returns, as soon as it does. Raises what `work` raises."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._found.append(work())
        except BaseException as error:
            self._error = error
