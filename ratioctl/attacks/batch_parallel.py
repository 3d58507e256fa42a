"""A network's passes in parts of the batch, one thread of this process to each part.

On a CPU, one thread a part beats all threads on one operator after the other: nothing waits for the slowest
at the end of each operator, and a part stays in its core's cache. Examples do not depend on each other, so
the result is the same up to rounding; the parts depend on the batch and the number of threads alone, so it is
repeatable.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

LogitsOf = Callable[[Tensor], Tensor]
_T = TypeVar("_T")

_MOST_ROWS = 64  # of a part: larger ones leave the cache (ResNet-18 of width 16 to 64, 1 MiB a core)


@contextmanager
def one_each(device: torch.device) -> Iterator[int]:
    """A context in which every operator uses one thread; yields how many threads may work side by side.

    1, and nothing changes, on a GPU and where torch has one thread, as it has inside another such context.
    """
    count = torch.get_num_threads() if device.type == "cpu" else 1
    if count == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        torch.set_num_threads(count)


def in_parts(logits_of: LogitsOf, count: int) -> LogitsOf:
    """`logits_of`, and its gradient with respect to the images, by `count` threads.

    Args:
        logits_of: images (B, ...) to logits (B, K), each example's depending on that example alone; may be
            called with any part of the batch, by several threads at once. Its parameters get no gradient.
        count: threads, of which the caller is one; with 1 `logits_of` itself is returned.
    """
    if count == 1:
        return logits_of

    def split(x: Tensor) -> Tensor:
        if x.shape[0] < 2:
            return logits_of(x)
        graph = torch.is_grad_enabled() and x.requires_grad
        return _Parts.apply(x, logits_of, count, graph)

    return split


class _Parts(torch.autograd.Function):
    """One graph to each part of the batch, from its images to its logits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_of: LogitsOf, count: int, graph: bool) -> Tensor:
        def forward(part: Tensor) -> tuple[Tensor, Tensor]:
            with torch.set_grad_enabled(graph):
                leaf = part.detach().requires_grad_(graph)
                return leaf, logits_of(leaf)

        size = math.ceil(len(x) / (count * math.ceil(len(x) / (count * _MOST_ROWS))))
        ctx.count, ctx.parts = count, _side_by_side(forward, x.split(size), count)
        return torch.cat([logits.detach() for _, logits in ctx.parts])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pieces = gradients[0].split([len(leaf) for leaf, _ in ctx.parts])

        def backward(job: tuple[tuple[Tensor, Tensor], Tensor]) -> Tensor:
            (leaf, logits), gradient = job
            return torch.autograd.grad(logits, leaf, gradient)[0]

        jobs = list(zip(ctx.parts, pieces, strict=True))
        return torch.cat(_side_by_side(backward, jobs, ctx.count)), None, None, None


def _side_by_side(work: Callable[[Any], _T], jobs: Any, count: int) -> list[_T]:
    """[work(job) for job in jobs], by the calling thread and `count` - 1 others; a part's error is raised."""
    waiting = deque(enumerate(jobs))
    done: dict[int, _T] = {}

    def run() -> None:
        while waiting:
            try:
                number, job = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            done[number] = work(job)

    helpers = [_helpers(count - 1).submit(run) for _ in range(min(count, len(waiting)) - 1)]
    try:
        run()
    finally:
        waiting.clear()
        for helper in helpers:
            helper.exception()  # waits
    for helper in helpers:
        helper.result()
    return [done[number] for number in sorted(done)]


@functools.cache
def _helpers(count: int) -> ThreadPoolExecutor:
    """Threads whose operators use one thread each. They are made inside `one_each`, so that what torch keeps
    as the number for threads to come, which the initializer sets, is set back by its end.
    """
    return ThreadPoolExecutor(count, "ratioctl", initializer=torch.set_num_threads, initargs=(1,))
