"""Seeds of random generators, derived from what is computed and never from its place in a batch."""

from __future__ import annotations

import hashlib


def seed_from_key(*key: int) -> int:
    """A 63-bit seed from a key of non-negative integers; close keys give unrelated seeds."""
    import numpy as np

    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_from_bytes(*parts: bytes, bits: int = 63) -> int:
    """A seed from the leading `bits` (at most 64) of the SHA-256 of the joined parts."""
    digest = hashlib.sha256(b"".join(parts)).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)
