"""A real browser for tests: Debian's Chromium, headless, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

TIMEOUT_MS = 120_000  # for what takes a second, on a machine that has other things to do
Opener = Callable[..., "Opened"]


class Opened:
    """A loaded page: the requests it made, what it wrote to the console, and Playwright's own handle."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []  # those inside the page (data:) left out
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._asked(request.url))

    def _asked(self, url: str) -> None:
        if not url.startswith("data:"):
            self.requests.append(url)

    def evaluate(self, expression: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression (a promise is awaited) in the page."""
        return self.page.evaluate(expression, argument)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Without one it skips, except in continuous integration."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium on this machine; .ci/run installs it")
        pytest.skip("no chromium on this machine")
    options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options, timeout=TIMEOUT_MS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    """Opens a local file in a browser without a past; options are those of Playwright's contexts."""
    contexts = []

    def open_file(path: Path, *, fragment: str = "", **options: Any) -> Opened:
        context = browser.new_context(**options)
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.goto(path.as_uri() + fragment, wait_until="load")
        return opened

    yield open_file
    for context in contexts:
        context.close()
