"""The images of a request: the body itself, or the files of a multipart body. In memory only."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ratioctl.server.problems import HttpError

HOW = "Send the file as the body, or as multipart/form-data (curl -F image=@cat.jpg)."


class _InMemory(MultiPartParser):
    spool_max_size = 0  # a SpooledTemporaryFile with this never moves to the disk; the body's size is limited


async def uploads(request: Request, most: int) -> list[tuple[str, bytes]]:
    """Names and bytes of the images; the name of a raw body is "image-0", as in Python.

    Raises:
        HttpError: 400, a damaged body or one without images; 413, more than `most` of them.
    """
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().casefold()
    if kind != "multipart/form-data":
        if not body:
            raise HttpError(400, "the request", "has no body", HOW)
        return [("image-0", body)]

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await _InMemory(
            request.headers, stream(), max_files=most, max_fields=100, max_part_size=65536
        ).parse()
    except MultiPartException as error:
        many = "Too many files" in error.message
        reason = f"is no valid multipart body: {error.message[:1].lower()}{error.message[1:].rstrip('.')}"
        raise HttpError(413 if many else 400, "the request", reason, HOW) from None
    found: list[tuple[str, bytes]] = []
    for _, value in form.multi_items():
        if not isinstance(value, str):
            data = value.file.read()
            value.file.close()
            found.append((value.filename or f"image-{len(found)}", data))
    if not found:
        raise HttpError(400, "the request", "holds no file", HOW)
    return found
