"""`--shard I/N`: one of N parts of an input, the same part on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from ratioctl.errors import SourceError, UsageError

MAX_COUNT = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "I/N". Raises UsageError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        step = "Use I/N with I from 1 to N, for example 2/8."
        if not found:
            raise UsageError(f"--shard {text}", "is not a shard", step)
        index, count = map(int, found.groups())
        if not 1 <= index <= count <= MAX_COUNT:
            raise UsageError(f"--shard {text}", f"is not one of {count} parts", step)
        return cls(index=index, count=count)

    def owns(self, key: str, offset: int = 0) -> bool:
        """Whether this part holds `key`: SHA-256 of its UTF-8 bytes, plus `offset`, modulo the count."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return (int.from_bytes(digest[:8], "big") + offset) % self.count == self.index - 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class HasShard(Protocol):
    """What one shard wrote."""

    @property
    def shard(self) -> Shard: ...


_Part = TypeVar("_Part", bound=HasShard)


def in_order(
    parts: Sequence[_Part],
    *,
    place: Callable[[_Part], object],
    compare: Callable[[_Part, _Part], None],
    foreign_step: str,
    missing_step: str,
) -> list[_Part]:
    """The parts in the order of their shards.

    Args:
        place: where a part stands, as messages name it.
        compare: is called with each part and the first one; raises SourceError where they do not belong
            together.
        foreign_step, missing_step: the next step where the number of shards differs, and where a shard is
            missing.

    Raises:
        SourceError: a shard that is missing, given twice or of another number of shards; as `compare`.
    """
    first = parts[0]
    seen: dict[int, _Part] = {}
    for part in parts:
        if part.shard.count != first.shard.count:
            reason = f"is shard {part.shard}, but {place(first)} is shard {first.shard}"
            raise SourceError(place(part), reason, foreign_step)
        if part.shard.index in seen:
            reason = f"is shard {part.shard}, as {place(seen[part.shard.index])} is"
            raise SourceError(place(part), reason, "Give every shard once.")
        seen[part.shard.index] = part
        compare(part, first)
    missing = [k for k in range(1, first.shard.count + 1) if k not in seen]
    if missing:
        named = ", ".join(f"{k}/{first.shard.count}" for k in missing[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise SourceError("merge", f"shard {named}{more} is missing", missing_step)
    return [seen[k] for k in sorted(seen)]
