"""Dynamic batching: images of several requests share a batch, as those of a folder do in `ood-score`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from ratioctl.images import Item
from ratioctl.scoring import pipeline
from ratioctl.server.problems import too_many
from ratioctl.types import ScoreRow
from ratioctl.utils import resources


class _Request:
    """The rows of one request; cancelling `future` takes what still waits out of the queue."""

    def __init__(self, count: int) -> None:
        self.rows: list[ScoreRow | None] = [None] * count
        self.left = count
        self.future: Future[list[ScoreRow]] = Future()


_Entry = tuple[_Request, int, Item]


class ScoreQueue:
    """Scores images in threads. A free thread takes what waits, at most a batch of it, so nothing waits for
    a batch to fill.

    Args:
        max_waiting: images; more are refused.
        observe: is called with the number of images of each batch.
    """

    def __init__(
        self,
        model: pipeline.Model,
        *,
        max_waiting: int,
        max_pixels: int,
        observe: Callable[[int], None] = lambda images: None,
        workers: int | None = None,
    ) -> None:
        self.model, self.max_waiting, self.max_pixels = model, max_waiting, max_pixels
        self.batch = pipeline.batch_size(model.spec.frame.area)
        self.observe, self.closed = observe, False
        # By threshold: a batch has one. All are guarded by `ready`.
        self.waiting: dict[float, deque[_Entry]] = {}
        self.ready = threading.Condition()
        count = workers or resources.processors()
        self.threads = [
            threading.Thread(target=self._work, daemon=True, name=f"score-{k}") for k in range(count)
        ]
        for thread in self.threads:
            thread.start()

    def __len__(self) -> int:
        """How many images wait."""
        with self.ready:
            return sum(map(len, self.waiting.values()))

    def submit(self, items: Sequence[Item], threshold: float) -> Future[list[ScoreRow]]:
        """The rows of images, in their order, with probabilities.

        Raises:
            HttpError: 429, too many images wait.
        """
        request = _Request(len(items))
        with self.ready:
            if self._full(len(items)):
                self._drop_cancelled()
            if self._full(len(items)):
                raise too_many("the queue", f"holds {self.max_waiting} images, and no more are accepted")
            entries = self.waiting.setdefault(threshold, deque())
            entries.extend((request, index, item) for index, item in enumerate(items))
            self.ready.notify(-(-len(items) // self.batch))
        return request.future

    def close(self) -> None:
        """End the threads; what waits is cancelled."""
        with self.ready:
            self.closed = True
            left = [entry for entries in self.waiting.values() for entry in entries]
            self.waiting.clear()
            self.ready.notify_all()
        for request, _, _ in left:
            request.future.cancel()
        for thread in self.threads:
            thread.join(5)

    def _full(self, more: int) -> bool:
        return sum(map(len, self.waiting.values())) + more > self.max_waiting

    def _drop_cancelled(self) -> None:
        """Make room where clients have left."""
        for threshold, entries in list(self.waiting.items()):
            left = deque(entry for entry in entries if not entry[0].future.done())
            self.waiting[threshold] = left
            if not left:
                del self.waiting[threshold]

    def _take(self) -> tuple[float, list[_Entry]] | None:
        """The next batch, of the threshold that has waited longest; None at the end."""
        with self.ready:
            while not self.waiting:
                if self.closed:
                    return None
                self.ready.wait()
            threshold = next(iter(self.waiting))
            entries = self.waiting.pop(threshold)
            taken: list[_Entry] = []
            while entries and len(taken) < self.batch:
                entry = entries.popleft()
                if not entry[0].future.done():  # cancelled, or another image of it failed
                    taken.append(entry)
            if entries:
                self.waiting[threshold] = entries  # at the end
                self.ready.notify()
        return threshold, taken

    def _work(self) -> None:
        while (found := self._take()) is not None:
            threshold, batch = found
            if not batch:
                continue
            self.observe(len(batch))
            try:
                rows = pipeline.rows_of(
                    [item for _, _, item in batch],
                    self.model,
                    threshold=threshold,
                    probabilities=True,
                    max_pixels=self.max_pixels,
                )
            except BaseException as error:
                for request, _, _ in batch:
                    _finish(request.future, error)
                continue
            with self.ready:
                for (request, index, _), row in zip(batch, rows, strict=True):
                    request.rows[index] = row
                    request.left -= 1
            for request in {id(request): request for request, _, _ in batch}.values():
                if not request.left:
                    _finish(request.future, request.rows)


def _finish(future: Future[list[ScoreRow]], result: object) -> None:
    """Set the result unless the client has left, or another part of the request has failed."""
    try:
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)  # type: ignore[arg-type]
    except Exception:  # InvalidStateError: it was cancelled, or finished by another thread
        return
