"""The outermost layer: what is refused before it reaches a route, and what every answer carries.

For each request, in this order: the number of requests at the same time, the Host and Origin headers, the
token, the size of the body and the time it takes to arrive. Then the route runs until it has answered, its
time is over, or the client has left.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratioctl.report.html import TEMPLATES
from ratioctl.server.problems import HttpError, answer, too_many
from ratioctl.server.service import Service
from ratioctl.utils.text import safe_text

# Without a token: the page's files hold nothing of the models, and it asks for the token itself.
OPEN = ("/", "/app.css", "/app.js", "/explorer.css", "/openapi.json", "/health/live", "/health/ready")
DISCARD_SECONDS, DISCARD_FACTOR = 2.0, 4  # of a body that is refused, so that its sender reads the answer
COMMON = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}
NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def page_policy(live: bool) -> str:
    """The policy of the page. Its frame shows the explorer from a blob, whose policy is this one as well:
    hence the hashes of the explorer's style and scripts, and with `live` what searches in the browser need.
    """

    def hashed(name: str) -> str:
        digest = hashlib.sha256((TEMPLATES / name).read_text("utf-8").encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"

    more = f" {hashed('live.js')} 'wasm-unsafe-eval' blob:; worker-src blob:" if live else ""
    return (
        f"default-src 'none'; script-src 'self' {hashed('explorer.js')}{more}; "
        f"style-src 'self' {hashed('explorer.css')}; img-src 'self' data: blob:; connect-src 'self'; "
        "frame-src blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


def _common(policy: str) -> list[tuple[bytes, bytes]]:
    return [(k.encode(), v.encode()) for k, v in {**COMMON, "content-security-policy": policy}.items()]


class Guard:
    """The ASGI application around `app`."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service, self.settings = app, service, service.settings
        self.active = self.held = 0  # requests, and bytes of their bodies
        self.log = logging.getLogger(__name__)
        self.page_headers, self.headers = _common(page_policy(service.live)), _common(NOTHING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            return
        began, status, started = time.perf_counter(), 0, False
        headers = self.page_headers if scope["path"] == "/" else self.headers

        async def answered(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                own = list(message.get("headers", ()))
                if self.service.draining and (b"connection", b"close") not in own:
                    own.append((b"connection", b"close"))
                message["headers"] = [*own, *headers]
            await send(message)

        self.active += 1
        try:
            await self._handle(scope, receive, answered)
        except HttpError as error:
            if not started:
                await _refuse(error, answered)
        except Exception as error:  # the application has answered, and passes it on
            if not started:
                self.log.error("%s failed", safe_text(scope["path"]), exc_info=error)
                await _refuse(error, answered)
        finally:
            self.active -= 1
            self._count(scope, status, time.perf_counter() - began)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        length = _length(headers)
        try:
            self._check(scope, headers, length)
        except HttpError as error:
            await self._discard(receive, length)
            error.headers["Connection"] = "close"
            raise
        held = 0
        try:
            body = bytearray()
            async for part in self._parts(receive, headers, length):
                held += len(part)
                body += part
            await self._run(scope, bytes(body), receive, send)
        finally:
            self.held -= held

    def _check(self, scope: Scope, headers: dict[str, str], length: int) -> None:
        """Raises HttpError for a request that is refused whatever its body holds."""
        host, path = headers.get("host", ""), scope["path"]
        if not self.settings.accepts_host(host):
            step = "Use the server's address, or start it with `--allow-host`."
            raise HttpError(403, f"host {host[:80]}", "is not a name of this server", step)
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].casefold() != host.casefold():
            raise HttpError(403, f"origin {origin[:80]}", "is another site", "Use the page of this server.")
        if path != "/" and headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise HttpError(403, "the request", "comes from another site", "Use the page of this server.")
        if self.settings.token is not None and path not in OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode(), self.settings.token.encode())
            if scheme.casefold() != "bearer" or not right:
                how = {"WWW-Authenticate": "Bearer"}
                step = "Send the header Authorization: Bearer TOKEN."
                raise HttpError(401, "token", "is missing or wrong", step, how)
        if path.startswith("/health/"):
            return
        if self.active > self.settings.max_requests:
            raise too_many("the server", f"answers {self.settings.max_requests} requests already")
        if self.service.draining and scope["method"] == "POST":
            again = {"Retry-After": "5"}
            raise HttpError(503, "the server", "is stopping", "Send the request again.", again)
        if length > self.settings.max_body:
            raise self._too_large(f"{length:,}")

    def _too_large(self, length: str) -> HttpError:
        reason = f"has {length} bytes, more than the {self.settings.max_body:,} that are accepted"
        return HttpError(413, "the body", reason, "Send smaller images, or fewer.", {"Connection": "close"})

    async def _parts(self, receive: Receive, headers: dict[str, str], length: int) -> AsyncIterator[bytes]:
        """The body as it arrives, within the limits of size and time."""
        if not length and "transfer-encoding" not in headers:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise HttpError(499, "the client", "has left")
            if body := message.get("body", b""):
                self.held += len(body)
                yield body
            if not message.get("more_body"):
                return
        total, ends = 0, asyncio.get_running_loop().time() + self.settings.timeout
        while True:
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                reason = f"has not arrived within {self.settings.timeout:g} s"
                close = {"Connection": "close"}
                raise HttpError(408, "the body", reason, "Send it faster, or less.", close) from None
            if message["type"] == "http.disconnect":
                raise HttpError(499, "the client", "has left")
            part = message.get("body", b"")
            total += len(part)
            if total > self.settings.max_body:
                await self._discard(receive, total)
                raise self._too_large(f"at least {total:,}")
            if self.held + len(part) > self.settings.max_held:
                await self._discard(receive, length)
                error = too_many("the server", f"holds {self.held:,} bytes of requests already")
                error.headers["Connection"] = "close"
                raise error
            self.held += len(part)
            yield part
            if not message.get("more_body"):
                return

    async def _discard(self, receive: Receive, length: int) -> None:
        """Read on for a moment: a client that is still sending would not see the answer."""
        left = DISCARD_FACTOR * self.settings.max_body
        if not length or length > left:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """The route, ended when its time is over or the client has left."""
        given, gone = False, asyncio.Event()

        async def again() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.current_task()

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if task is not None:
                task.cancel()

        watcher = asyncio.create_task(watch())
        stream = scope["path"].endswith("/events")
        try:
            async with asyncio.timeout(None if stream else self.settings.timeout):
                await self.app(scope, again, send)
        except TimeoutError:
            reason = f"was not answered within {self.settings.timeout:g} s"
            again_later = {"Retry-After": "5"}
            raise HttpError(503, "the request", reason, "Try again later.", again_later) from None
        except asyncio.CancelledError:
            if not gone.is_set():
                raise
            if task is not None:
                task.uncancel()
            raise HttpError(499, "the client", "has left") from None
        finally:
            watcher.cancel()

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.service.metrics.requests.labels(route, str(status or 499)).inc()
        self.service.metrics.seconds.labels(route).observe(seconds)
        if self.log.isEnabledFor(logging.DEBUG):
            client = (scope.get("client") or ("-",))[0]
            said = f"{client} {scope['method']} {safe_text(scope['path'])} {status or 499}"
            self.log.debug("%s %.1f ms", said, 1000 * seconds)


def _headers(scope: Scope) -> dict[str, str]:
    """The request's headers; of repeated ones that matter here, the first decides, and a second Host none."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1")
        found[key] = "" if key == "host" and key in found else found.get(key, value.decode("latin-1"))
    return found


def _length(headers: dict[str, str]) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


async def _refuse(error: Exception, send: Send) -> None:
    status, said, extra = answer(error)
    body = json.dumps(said).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **extra}
    raw = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
    with contextlib.suppress(Exception):  # a client that has left
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})
