"""Errors of the command line as answers over HTTP: thing, reason, next step, and the status that fits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ratioctl.errors import ImageError, RatioctlError, UncalibratedError, UsageError
from ratioctl.utils.text import safe_text


class HttpError(RatioctlError):
    """An error with its HTTP status, and headers of the answer."""

    def __init__(
        self,
        status: int,
        thing: object,
        reason: str,
        next_step: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(thing, reason, next_step)
        self.status, self.headers = status, dict(headers or {})


def too_many(thing: str, reason: str) -> HttpError:
    """429: the server is busy."""
    return HttpError(429, thing, reason, "Try again later.", {"Retry-After": "1"})


def answer(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, JSON document and headers. A fault of the server's says nothing about the server."""
    headers: dict[str, str] = {}
    if isinstance(error, HttpError):
        status, headers = error.status, error.headers
    elif isinstance(error, ImageError):
        status = 422
    elif isinstance(error, UsageError | UncalibratedError):
        status = 400
    else:
        status, error = 500, RatioctlError("internal error", "the server failed", "Its log says why.")
    return status, {"error": document(error)}, headers


def document(error: RatioctlError) -> dict[str, Any]:
    """As the command line's --json, with parameters instead of options."""
    parts = {name: _parameters(getattr(error, name)) for name in ("thing", "reason", "next_step")}
    return {"type": type(error).__name__, **parts, "message": str(RatioctlError(**parts))}


def _parameters(text: str) -> str:
    """Options as parameters of a request: "--eps 7" as "eps 7", but not in a command to run."""
    kept = re.split(r"(`[^`]*`)", safe_text(text))
    return "".join(part if part.startswith("`") else re.sub(r"(?<!\S)--(?=[a-z])", "", part) for part in kept)
