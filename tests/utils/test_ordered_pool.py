"""The ordered pool: order, faults in their place, bounds, and threads that end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from ratioctl.utils.ordered_pool import map_batches


def test_results_come_in_order_whichever_batch_is_slow() -> None:
    def slow(batch: list[int]) -> list[int]:
        time.sleep(0.002 * (batch[0] % 3))
        return [n * n for n in batch]

    found = list(map_batches(range(100), slow, batch=4, workers=3))  # type: ignore[arg-type]
    assert list(itertools.chain(*found)) == [n * n for n in range(100)]
    assert max(map(len, found)) <= 4


def test_nothing_in_nothing_out() -> None:
    assert list(map_batches([], len, batch=4, workers=2)) == []


def test_a_failing_batch_raises_after_the_results_before_it() -> None:
    def work(batch: list[int]) -> int:
        if batch[0] == 3:
            raise ZeroDivisionError
        return batch[0]

    results = map_batches(range(9), work, batch=1, workers=2)  # type: ignore[arg-type]
    assert [next(results), next(results), next(results)] == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_failing_items_raise_after_all_results() -> None:
    def items() -> Iterator[int]:
        yield from (0, 1)
        raise OSError("gone")

    results = map_batches(items(), sum, batch=1, workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_weight_bounds_what_waits() -> None:
    drawn: list[int] = []
    gate = threading.Event()

    def items() -> Iterator[int]:
        for k in range(40):
            drawn.append(k)
            yield k

    def work(batch: object) -> None:
        gate.wait(30)

    results = map_batches(items(), work, batch=2, workers=1, weigh=lambda item: 10, max_weight=35)
    reader = threading.Thread(target=lambda: list(results))
    reader.start()
    time.sleep(0.2)
    assert len(drawn) <= 2 + 4 + 1, "a batch that is worked on, four that wait (40 > 35), one in the hand"
    gate.set()
    reader.join(30)
    assert drawn == list(range(40))


def test_closing_ends_the_threads() -> None:
    results = map_batches(itertools.count(), sum, batch=1, workers=3, name="closing")
    assert next(results) == 0
    results.close()
    left = [thread for thread in threading.enumerate() if thread.name.startswith("closing-")]
    assert {thread.name for thread in left} <= {"closing-feed"}, "workers are joined"
    for thread in left:
        thread.join(30)
        assert not thread.is_alive()
