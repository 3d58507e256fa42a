"""`--shard I/N`: one of N parts of an input, the same part on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import re

from ratioctl.errors import UsageError

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
            raise UsageError(f"--shard {text}", "is no shard", step)
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
