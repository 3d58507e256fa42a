"""Ordered parallel map over a stream: bounded memory, results in the order of the items."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_END_SECONDS = 5.0  # a closed pool waits this long for the batches that are being worked on


def map_batches(
    items: Iterable[Item],
    work: Callable[[Sequence[Item]], Result],
    *,
    batch: int,
    workers: int,
    weigh: Callable[[Item], int] = lambda item: 0,
    max_weight: int = 0,
    ahead: int | None = None,
    name: str = "pool",
) -> Generator[Result, None, None]:
    """Apply `work` to batches of `items` in `workers` threads and yield results in the order of the items.

    A batch is made of the items that are available, at most `batch` of them, so a slow iterator delays
    nothing. One more thread draws the items; it stops while `2 * batch * workers` of them, or more than
    `max_weight` of what `weigh` returns, wait. At most `ahead` batches (2 * workers by default) are begun
    before the reader asks for them. Threads start with the first `next` and end with the generator; they are
    daemons, so one blocked inside `items` or `work` never keeps the process alive.

    Raises:
        Whatever `items` or `work` raises, at its place in the order.
    """
    pool = _Pool(items, work, batch, workers, weigh, max_weight, 2 * workers if ahead is None else ahead)
    serving = [threading.Thread(target=pool.serve, daemon=True, name=f"{name}-{k}") for k in range(workers)]
    threading.Thread(target=pool.feed, daemon=True, name=f"{name}-feed").start()
    for thread in serving:
        thread.start()
    try:
        while (result := pool.take()) is not None:
            yield result[0]
    finally:
        pool.stop()
        for thread in serving:
            thread.join(_END_SECONDS)


class _Pool(Generic[Item, Result]):
    """State shared by the threads of `map_batches`; every attribute is guarded by `lock`."""

    def __init__(
        self,
        items: Iterable[Item],
        work: Callable[[Sequence[Item]], Result],
        batch: int,
        workers: int,
        weigh: Callable[[Item], int],
        max_weight: int,
        ahead: int,
    ) -> None:
        self.items, self.work, self.weigh = items, work, weigh
        self.batch, self.workers, self.max_weight, self.ahead = batch, workers, max_weight, ahead
        self.lock = threading.Lock()
        self.space, self.filled, self.finished = (threading.Condition(self.lock) for _ in range(3))
        self.waiting: deque[Item] = deque()
        self.results: dict[int, tuple[Result] | BaseException] = {}
        self.weight = self.begun = self.taken = 0  # of what waits; batches begun; results taken
        self.ended = self.stopped = False
        self.failure: BaseException | None = None

    def feed(self) -> None:
        """Draw the items until they end or the reader stops."""
        most = 2 * self.batch * self.workers
        try:
            for item in self.items:
                with self.lock:
                    while not self.stopped and (len(self.waiting) >= most or self.weight > self.max_weight):
                        self.space.wait()
                    if self.stopped:
                        return
                    self.waiting.append(item)
                    self.weight += self.weigh(item)
                    self.filled.notify()
        except BaseException as error:
            self.failure = error
        finally:
            with self.lock:
                self.ended = True
                self.filled.notify_all()
                self.finished.notify()

    def serve(self) -> None:
        """Work on one batch after the other, at most `ahead` in front of the reader."""
        while True:
            with self.lock:
                while not self.stopped and (
                    self.begun - self.taken > self.ahead or not (self.waiting or self.ended)
                ):
                    self.filled.wait()
                if self.stopped or not self.waiting:
                    return
                mine = [self.waiting.popleft() for _ in range(min(self.batch, len(self.waiting)))]
                self.weight -= sum(map(self.weigh, mine))
                number, self.begun = self.begun, self.begun + 1
                self.space.notify()
                if self.waiting:
                    self.filled.notify()
            result: tuple[Result] | BaseException
            try:
                result = (self.work(mine),)
            except BaseException as error:
                result = error
            del mine
            with self.lock:
                self.results[number] = result
                self.finished.notify()

    def take(self) -> tuple[Result] | None:
        """The next result in order, None after the last."""
        with self.lock:
            while self.taken not in self.results:
                if self.ended and not self.waiting and self.taken == self.begun:
                    if self.failure is not None:
                        raise self.failure
                    return None
                self.finished.wait()
            result = self.results.pop(self.taken)
            self.taken += 1
            self.filled.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            self.space.notify_all()
            self.filled.notify_all()
