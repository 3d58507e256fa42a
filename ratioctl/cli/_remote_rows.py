"""Rows at a URL: Parquet parts in `URL.partial/` while images are scored, then the file as one object.

A part is written when its rows are complete, so a run that was interrupted continues behind the last one. The
file appears under its name when all rows are there.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratioctl.cli import _rows
from ratioctl.cli._rows import Value
from ratioctl.errors import OutputError
from ratioctl.utils import remote

if TYPE_CHECKING:
    from ratioctl.images import Item
    from ratioctl.scoring.sources import Unreadable

PART_ROWS = 65_536
SCHEMA = "ratioctl/score-parts/1"
ENDING = ".partial"


class RemoteRows:
    """The parts of one output.

    Attributes:
        kept: rows of parts of an earlier run: "images", "out_of_distribution", "errors".
    """

    def __init__(self, url: str) -> None:
        self.url, self.folder = url, url + ENDING
        self.settings = b""
        self.kept = {"images": 0, "out_of_distribution": 0, "errors": 0}
        self._earlier: list[str] = []
        self._count = 0  # of parts that are valid
        self._held: list[Sequence[Value]] = []

    def begin(self, settings: dict[str, Any]) -> None:
        """Open the parts of an earlier run with the same settings, or start anew; before `skip` and `opened`.

        Raises:
            OutputError: the URL cannot be read or written.
        """
        self.settings = json.dumps({"schema": SCHEMA, **settings}, sort_keys=True).encode()
        with self._as_output():
            self._earlier = self._parts() if self._continues() else []
            if not self._earlier:
                remote.delete(self.folder)
                remote.write(self._at("settings.json"), self.settings)

    def skip(self, items: Iterator[Item | Unreadable]) -> Iterator[Item | Unreadable]:
        """The items behind the parts of an earlier run. Parts that do not hold these items are dropped."""
        for part in self._earlier:
            rows = self._read(part)
            drawn = list(itertools.islice(items, len(rows)))
            if [item.path for item in drawn] != [row[0] for row in rows]:  # the collection changed
                items = itertools.chain(drawn, items)
                break
            self._count += 1
            at = _rows.FIXED.index("is_ood"), _rows.FIXED.index("error")
            self.kept["images"] += len(rows)
            self.kept["out_of_distribution"] += sum(row[at[0]] is True for row in rows)
            self.kept["errors"] += sum(row[at[1]] is not None for row in rows)
        with self._as_output():
            for part in self._earlier[self._count :]:
                remote.delete(part)
        yield from items

    @contextlib.contextmanager
    def opened(
        self, kind: _rows.Format, names: Sequence[str], labels: Sequence[str], *, csv_safe: bool = False
    ) -> Iterator[_rows.Write]:
        """A function that writes rows; the file appears at the end of the block.

        Args:
            kind, names, labels, csv_safe: as for `_rows.opened`.

        Raises:
            OutputError, DiskError: the URL, or the temporary file it is built in, cannot be written.
        """

        def write(rows: Sequence[Any]) -> None:
            self._held.extend(_rows.values(row, names) for row in rows)
            while len(self._held) >= PART_ROWS:
                self._flush(names)

        yield write
        if self._held:
            self._flush(names)
        with (
            _rows.staged(self.url) as whole,
            _rows.opened_values(whole, kind, names, labels, csv_safe=csv_safe) as put,
        ):
            for number in range(self._count):
                put(self._read(self._part(number)))
        with self._as_output():
            remote.delete(self.folder)

    def _flush(self, names: Sequence[str]) -> None:
        stream = io.BytesIO()
        write, close = _rows.parquet_writer(stream, names)
        write(self._held[:PART_ROWS])
        close()
        with self._as_output():
            remote.write(self._part(self._count), stream.getvalue())
        del self._held[:PART_ROWS]
        self._count += 1

    def _continues(self) -> bool:
        """Whether an earlier run had the same settings."""
        try:
            return remote.read(self._at("settings.json")) == self.settings
        except remote.RemoteError as error:
            if error.missing:
                return False
            raise

    def _parts(self) -> list[str]:
        """URLs of the earlier parts, up to the first that is missing."""
        there = {entry.name for entry in remote.listing(self.folder)}
        parts: list[str] = []
        while Path(self._part(len(parts))).name in there:
            parts.append(self._part(len(parts)))
        return parts

    def _read(self, part: str) -> list[list[Value]]:
        import pyarrow.parquet as pq

        with self._as_output():
            table = pq.read_table(io.BytesIO(remote.read(part)))
        return [list(row) for row in zip(*(c.to_pylist() for c in table.columns), strict=True)]

    def _part(self, number: int) -> str:
        return self._at(f"part-{number:06d}.parquet")

    def _at(self, name: str) -> str:
        return f"{self.folder}/{name}"

    @contextlib.contextmanager
    def _as_output(self) -> Iterator[None]:
        try:
            yield
        except remote.RemoteError as error:
            raise error.of(OutputError, self.url) from None
