"""Where the rows of `ood-score` go: stdout, a file or a URL; and the record of a shard beside it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ratioctl.cli import _remote_rows, _row_shards, _rows
from ratioctl.errors import UsageError

if TYPE_CHECKING:
    from ratioctl.scoring.listing import Listing


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOutput:
    """The output of one run.

    Attributes:
        target: a file or URL; None for stdout.
        listing: what the pipeline numbers the images with; None where nobody needs it.
        shard: the record beside the file, of a shard.
        parts: of a URL.
    """

    target: _rows.Target | None
    kind: _rows.Format
    names: Sequence[str]
    labels: Sequence[str]
    csv_safe: bool
    listing: Listing | None
    shard: _row_shards.ShardOutput | None
    parts: _remote_rows.RemoteRows | None
    settings: Callable[[], dict[str, Any]]

    @classmethod
    def of(
        cls,
        target: _rows.Target | None,
        kind: _rows.Format,
        names: Sequence[str],
        labels: Sequence[str],
        *,
        csv_safe: bool,
        shard: _row_shards.ShardOutput | None,
        settings: Callable[[], dict[str, Any]],
    ) -> RowOutput:
        """Nothing is written before `opened`.

        Args:
            names: of the columns; labels: of the model.
            settings: what determines the rows besides the images, see `_row_shards.settings_of`.

        Raises:
            UsageError: a table at a URL. OutputError: a file that ood-score did not write.
        """
        from ratioctl.scoring.listing import Listing

        parts = None
        if isinstance(target, str):
            if kind == "table":
                raise UsageError(
                    f"--output {target}", "is not a format of rows", "Use .csv, .jsonl or .parquet."
                )
            parts = _remote_rows.RemoteRows(target)
        _rows.refuse_foreign(target)
        listing = None
        if shard is not None or parts is not None:
            listing = Listing(None if shard is None else shard.shard, None if parts is None else parts.skip)
        return cls(
            target=target,
            kind=kind,
            names=names,
            labels=labels,
            csv_safe=csv_safe,
            listing=listing,
            shard=shard,
            parts=parts,
            settings=settings,
        )

    @contextlib.contextmanager
    def opened(self) -> Iterator[_rows.Write]:
        """A function that writes rows. The file or object is complete at the end of the block."""
        if self.shard is not None:
            self.shard.begin()
        if self.parts is None:
            assert not isinstance(self.target, str), "a URL has parts"
            with _rows.opened(
                self.target, self.kind, self.names, self.labels, csv_safe=self.csv_safe
            ) as write:
                yield write
            return
        about = {"shard": self.shard and str(self.shard.shard), "columns": list(self.names)}
        self.parts.begin({**self.settings(), **about})
        with self.parts.opened(self.kind, self.names, self.labels, csv_safe=self.csv_safe) as write:
            yield write

    def finish(self, images: int) -> None:
        """Record that the rows of a shard are complete, after `opened`."""
        if self.shard is not None and self.listing is not None:
            self.shard.finish(images, self.listing, self.settings())

    def kept(self) -> str:
        """Where the rows of an interrupted run are, as a sentence; empty where they are nowhere."""
        from ratioctl.utils.atomic_files import partial

        if self.target is None:
            return ""
        if isinstance(self.target, str):
            return "Finished parts are kept, and the same command continues. "
        file = partial(self.target)  # pipes and devices have none
        return f"Their rows are in {file}. " if file.exists() else ""
