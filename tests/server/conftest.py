"""A server in this process: the complete application, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ratioctl.server import Settings
from ratioctl.server.guard import Guard
from ratioctl.server.run import application
from ratioctl.server.service import Service


class Server:
    """`ask` sends one request and returns the answer; `together` runs coroutines of requests at once."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.app: Guard = application(service)

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, timeout=60, **options)

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return asyncio.run(self.send(method, path, **options))

    def together(self, *requests: Any) -> list[Any]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*requests)

        return asyncio.run(all_of_them())

    def score(self, *images: Path | bytes, **parameters: Any) -> httpx.Response:
        """/v1/score with these files as parts of a multipart body."""
        files = [
            ("image", (image.name, image.read_bytes()) if isinstance(image, Path) else ("bytes", image))
            for image in images
        ]
        return self.ask("POST", "/v1/score", files=files, params=parameters)


StartServer = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[StartServer]:
    """start(model, ..., **settings): a server, closed at the end of the test."""
    services = []

    def begin(*models: Path, **settings: Any) -> Server:
        live = settings.pop("live", None)
        names = [str(model) for model in models]
        services.append(Service(names, Settings(**settings), device="cpu", live=live and str(live)))
        return Server(services[-1])

    yield begin
    for service in services:
        service.close()
