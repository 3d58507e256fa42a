"""`ratioctl cache`."""

from __future__ import annotations

from typing import Annotated

import typer

from ratioctl.cli._common import COMPUTE, Context, command, emit_json
from ratioctl.utils.text import safe_text


@command(unused=COMPUTE)
def cache(
    context: Context,
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove decoded images; they are decoded again when needed.")
    ] = False,
    downloads: Annotated[
        bool, typer.Option("--downloads", help="With --clear: remove downloaded data sets, too.")
    ] = False,
) -> int | None:
    """List or clear cached images and downloaded data."""
    import time

    from ratioctl.errors import UsageError
    from ratioctl.images import cache as decoded

    if downloads and not clear:
        raise UsageError("--downloads", "has no effect without --clear", "Add --clear.")
    folder = decoded.cache_dir()
    freed = decoded.clear(downloads) if clear else 0
    entries = decoded.entries()
    if context.json:
        emit_json({"folder": folder, "freed": freed, "entries": entries})
        return None
    if clear:
        context.out.print(f"{folder}: {_size(freed)} freed")
        return None
    if not entries:
        context.note(f"{folder} is empty.")
        return None
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("what", "of", "size", "last used"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for entry in entries:
        used = time.strftime("%Y-%m-%d", time.localtime(entry["used"]))
        table.add_row(entry["kind"], safe_text(entry["name"]), _size(entry["bytes"]), used)
    context.out.print(table)
    total = sum(entry["bytes"] for entry in entries)
    context.out.print(f"{folder}: {_size(total)}; `ratioctl cache --clear` removes decoded images")
    return None


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
