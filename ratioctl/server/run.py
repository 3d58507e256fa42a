"""The process: listens, serves, and stops without losing a request that it has accepted."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from ratioctl.errors import Interrupted, UsageError
from ratioctl.server.guard import Guard
from ratioctl.server.routes import build
from ratioctl.server.service import Service
from ratioctl.server.settings import Settings

MAX_HEAD = 65536  # bytes of a request before its body
STOP = (signal.SIGINT, signal.SIGTERM)
_BUSY = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_SLOW = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def application(service: Service) -> Guard:
    """The complete ASGI application."""
    return Guard(build(service), service)


def listen(settings: Settings) -> socket.socket:
    """A listening socket. Raises UsageError where the address is not to be had."""
    thing = f"--host {settings.host} --port {settings.port}"
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise UsageError(thing, f"cannot be listened on: {reason}", "Choose another --port.") from None


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}/"


def serve(service: Service, listening: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then finish what runs, refuse what is new, and return.

    Raises:
        Interrupted: a second signal.
    """
    config = uvicorn.Config(
        application(service),
        http=_protocol(service.settings),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing depends on the client's address
        timeout_graceful_shutdown=2,
    )
    server = _Server(config, service)
    with _signals(server):
        server.run(sockets=[listening])
    if len(server.signals) > 1:
        number = server.signals[-1]
        raise Interrupted("serve", "stopped by a second signal, with requests unanswered", signum=number)


class _Server(uvicorn.Server):
    """Stops when nothing runs any more, instead of closing its sockets at the signal: results of searches
    that end meanwhile can still be fetched.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service, self.signals = service, list[int]()
        self.deadline = float("inf")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `_signals` handles them, without raising them again at the end

    def stop(self, number: int) -> None:
        self.signals.append(number)
        self.service.draining = True
        if len(self.signals) > 1:
            self.should_exit = self.force_exit = True
        self.deadline = time.monotonic() + self.service.settings.job_timeout

    async def on_tick(self, counter: int) -> bool:
        guard: Any = self.config.app
        if self.signals and not self.should_exit:
            idle = not guard.active and self.service.jobs.idle
            self.should_exit = idle or time.monotonic() > self.deadline
        return await super().on_tick(counter)


@contextlib.contextmanager
def _signals(server: _Server) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda got, _: server.stop(got)) for number in STOP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _protocol(settings: Settings) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with limits for heads of requests, which reach no application before their end."""
    base: Any
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as base  # noqa: N813
    except ImportError:  # no wheel for this platform
        from uvicorn.protocols.http.h11_impl import H11Protocol as base  # noqa: N813

    class Protocol(base):
        _timer: asyncio.TimerHandle | None = None
        _head = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._close(_BUSY)
                return
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._answering():
                self._forget()
                return
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._close(_LONG)
            elif self._timer is None:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(settings.header_timeout, self._close, _SLOW)

        def _forget(self) -> None:
            self._head = 0
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _close(self, said: bytes) -> None:
            self._timer = None
            if not self._answering() and not self.transport.is_closing():
                self.transport.write(said)
                self.transport.close()

    return Protocol
