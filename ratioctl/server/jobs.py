"""Counterfactual searches: one at a time, with progress for whoever watches, cancelled when nobody does."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from ratioctl.counterfactuals.request import PreparedRequest
from ratioctl.counterfactuals.search import Preview
from ratioctl.report.counterfactual_files import Rendered
from ratioctl.report.live import Live
from ratioctl.server.problems import HttpError, answer, too_many

State = Literal["queued", "running", "done", "failed", "cancelled"]
UNWATCHED = 60.0  # seconds after which a job about which nobody asks is cancelled
LEFT = 5.0  # the same after the last stream of events has been closed
KEPT, KEPT_SECONDS = 16, 900.0  # results that are kept, and for how long
FETCH_SECONDS = 10.0  # a server that stops waits so long for a result to be fetched
MAX_WATCHERS = 16  # streams of events of one job
ALIVE_SECONDS = 15.0  # between comments in a stream without events


class _Stopped(Exception):  # noqa: N818 - a request, not an error
    """Ends a search from its callback."""


class Job:
    """One search. Attributes are guarded by `lock`; `version` counts their changes."""

    def __init__(
        self, prepared: PreparedRequest, names: tuple[str, ...], path: str, live: Live | None = None
    ) -> None:
        self.id, self.path, self.names, self.live = secrets.token_urlsafe(16), path, names, live
        self.prepared: PreparedRequest | None = prepared
        self.lock = threading.Lock()
        self.state: State = "queued"
        self.progress, self.version = 0.0, 0
        self.previews: dict[tuple[int, str], tuple[int, dict[str, Any]]] = {}  # version, event
        self.error: dict[str, Any] | None = None
        self.rendered: Rendered | None = None
        self.cancelled = self.fetched = False
        self.ended = 0.0
        self.deadline = time.monotonic() + UNWATCHED  # where nobody watches
        self.watchers: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    @property
    def final(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def seen(self) -> None:
        """Somebody asked about the job."""
        self.deadline = max(self.deadline, time.monotonic() + UNWATCHED)

    def unwatched(self) -> bool:
        return not self.watchers and time.monotonic() > self.deadline

    def change(self, **values: Any) -> None:
        """Set attributes and wake those who watch."""
        with self.lock:
            self.version += 1
            for name, value in values.items():
                setattr(self, name, value)
            watchers = list(self.watchers.items())
        for event, loop in watchers:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(event.set)

    def show(self, preview: Preview) -> None:
        from ratioctl.report.pictures import png

        event = {
            "model": self.names[preview.model],
            "target": preview.target,
            "eps": preview.eps,
            "confidence": round(preview.confidence, 6),
            "png": base64.b64encode(png(preview.image)).decode("ascii"),
        }
        with self.lock:
            self.previews[preview.model, preview.target] = (self.version + 1, event)
        self.change()

    def to_json(self) -> dict[str, Any]:
        with self.lock:
            result = None if self.rendered is None else self.rendered.document
            return {
                "id": self.id,
                "state": self.state,
                "progress": round(self.progress, 4),
                "error": self.error,
                "result": result,
            }

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events: "progress", "preview", and one of "done", "failed" and "cancelled" at the end.

        The present state comes first, so a stream that was interrupted can simply be opened again.
        """
        woken, loop, sent = asyncio.Event(), asyncio.get_running_loop(), -1
        with self.lock:
            self.watchers[woken] = loop
        try:
            while True:
                woken.clear()
                with self.lock:
                    version, final, state = self.version, self.final, self.state
                    status = {"state": state, "progress": round(self.progress, 4)}
                    previews = [event for at, event in self.previews.values() if at > sent]
                    error = self.error
                if version > sent:
                    yield _event("progress", status)
                    for event in previews:
                        yield _event("preview", event)
                    sent = version
                if final:
                    yield _event(state, {"error": error} if error else {})
                    return
                try:
                    await asyncio.wait_for(woken.wait(), ALIVE_SECONDS)
                except TimeoutError:
                    yield ": waiting\n\n"
        finally:
            with self.lock:
                self.watchers.pop(woken, None)
                self.deadline = time.monotonic() + LEFT


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


class Jobs:
    """The jobs of a server and the thread that works on them, one after the other."""

    def __init__(
        self,
        *,
        device: str = "auto",
        precision: str = "auto",
        max_waiting: int,
        timeout: float,
        count: Callable[[State], None] = lambda state: None,
    ) -> None:
        self.device, self.precision, self.max_waiting, self.timeout = device, precision, max_waiting, timeout
        self.count, self.closed = count, False
        self.known: dict[str, Job] = {}
        self.waiting: deque[Job] = deque()
        self.running: Job | None = None
        self.ready = threading.Condition()
        self.thread = threading.Thread(target=self._work, daemon=True, name="explain")
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Raises HttpError 429: too many jobs wait."""
        with self.ready:
            self._forget()
            if len(self.waiting) >= self.max_waiting:
                raise too_many("the queue", f"holds {self.max_waiting} searches, and no more are accepted")
            self.known[job.id] = job
            self.waiting.append(job)
            self.ready.notify()

    def find(self, name: str) -> Job:
        """Raises HttpError 404."""
        with self.ready:
            self._forget()
            job = self.known.get(name)
        if job is None:
            reason = "there is no such search, or its result is no longer kept"
            raise HttpError(404, "counterfactual", reason, "Request it again.")
        job.seen()
        return job

    def cancel(self, job: Job) -> None:
        """A search that waits ends at once, one that runs at its next step; a finished one is forgotten."""
        with self.ready:
            if job.final:
                self.known.pop(job.id, None)
                return
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)
                self._end(job, "cancelled")

    @property
    def idle(self) -> bool:
        """Nothing waits or runs, and finished results were fetched or have had time to be."""
        with self.ready:
            recent = time.monotonic() - FETCH_SECONDS
            left = [job for job in self.known.values() if job.state == "done" and not job.fetched]
            return not self.waiting and self.running is None and all(job.ended < recent for job in left)

    def close(self) -> None:
        with self.ready:
            self.closed = True
            if self.running is not None:
                self.running.cancelled = True
            for job in self.waiting:
                self._end(job, "cancelled")
            self.waiting.clear()
            self.ready.notify_all()
        self.thread.join(5)

    def _forget(self) -> None:
        """Drop old results."""
        ended = sorted((job for job in self.known.values() if job.final), key=lambda job: job.ended)
        old = time.monotonic() - KEPT_SECONDS
        for index, job in enumerate(ended):
            if job.ended < old or index < len(ended) - KEPT:
                del self.known[job.id]

    def _end(self, job: Job, state: State, **values: Any) -> None:
        job.prepared = None  # and with it the image
        job.change(previews={}, state=state, ended=time.monotonic(), **values)
        self.count(state)

    def _work(self) -> None:
        while True:
            with self.ready:
                self.running = None
                while not self.waiting:
                    if self.closed:
                        return
                    self.ready.wait()
                job = self.running = self.waiting.popleft()
            try:
                rendered = self._run(job)
            except _Stopped:
                self._end(job, "cancelled")
            except BaseException as error:
                status, said, _ = answer(error)
                if status == 500:
                    logging.getLogger(__name__).error("The search failed", exc_info=error)
                self._end(job, "failed", error=said["error"])
            else:
                self._end(job, "done", rendered=rendered, progress=1.0)

    def _run(self, job: Job) -> Rendered:
        from ratioctl import counterfactuals
        from ratioctl.report import counterfactual_files

        prepared = job.prepared
        if prepared is None or job.cancelled or job.unwatched():
            raise _Stopped
        began, total = time.monotonic(), len(prepared.models) * len(prepared.sources)
        job.change(state="running")

        def callback(done: float) -> None:
            if job.cancelled or job.unwatched():
                raise _Stopped
            if time.monotonic() - began > self.timeout:
                reason = f"took longer than {self.timeout:g} s and was ended"
                raise HttpError(503, "the search", reason, "Ask for fewer budgets, targets or steps.")
            if done / total >= job.progress + 0.002:
                job.change(progress=done / total)

        found = counterfactuals.explain(
            prepared,
            device=self.device,
            precision=self.precision,
            callback=callback,
            on_preview=job.show,
        )
        return counterfactual_files.render(prepared.header, list(found), live=job.live)
