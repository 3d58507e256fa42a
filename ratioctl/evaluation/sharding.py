"""Evaluation in shards: what each records in its folder, and which belong together.

Shards compute batches for the result cache and nothing else. `merging.merge` is the unsharded run, which
finds these batches in the folders of the shards, so its report is the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ratioctl.errors import SourceError, UsageError
from ratioctl.utils.atomic_files import write_file
from ratioctl.utils.sharding import Shard, in_order

SCHEMA = "ratioctl/evaluation-shard/1"
RECORD = "shard.json"
WHERE = ("models", "data", "ood", "judge", "device", "download")  # may differ: digests are compared instead
AGAIN = "Run `ratioctl evaluate --shard` for it again."


def is_shard(folder: Path) -> bool:
    """Whether it is the folder of a shard of an evaluation, finished or not."""
    return folder.is_dir() and ((folder / RECORD).exists() or (folder / ".result-cache").exists())


def begin(folder: Path) -> None:
    """Remove the record of an earlier run."""
    (folder / RECORD).unlink(missing_ok=True)


def finish(
    folder: Path,
    shard: Shard,
    arguments: Mapping[str, Any],
    facts: Sequence[Mapping[str, Any]],
    fingerprints: Mapping[str, str],
) -> None:
    """Record that a shard's batches are complete.

    Args:
        arguments: of `ratioctl.evaluation.run`, as JSON values.
        facts: what determines batches besides images and settings, one for each model.
        fingerprints: of the sets by name.
    """
    record = {
        "schema": SCHEMA,
        "shard": str(shard),
        "arguments": dict(arguments),
        "facts": [dict(fact) for fact in facts],
        "fingerprints": dict(fingerprints),
    }
    write_file(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The folder of a finished shard."""

    folder: Path
    shard: Shard
    arguments: dict[str, Any]
    facts: list[dict[str, Any]]
    fingerprints: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Part:
        """Raises SourceError: no folder of a finished shard."""
        path = folder / RECORD
        try:
            record = json.loads(path.read_bytes())
            if record["schema"] != SCHEMA:
                raise ValueError(record["schema"])
            return cls(
                folder=folder,
                shard=Shard.parse(record["shard"]),
                arguments=dict(record["arguments"]),
                facts=list(record["facts"]),
                fingerprints=dict(record["fingerprints"]),
            )
        except FileNotFoundError:
            raise SourceError(folder, f"holds no finished shard: {RECORD} is missing", AGAIN) from None
        except (OSError, ValueError, KeyError, TypeError, UsageError, RecursionError):
            raise SourceError(path, "cannot be read", AGAIN) from None

    def settings(self) -> dict[str, Any]:
        """What must be the same in all shards, by the name that a message gives it."""
        found = {name: value for name, value in self.arguments.items() if name not in WHERE}
        found |= {f"set {name}": text for name, text in self.fingerprints.items()}
        for number, facts in enumerate(self.facts):
            found |= {f"{name} of model {number + 1}": value for name, value in facts.items()}
        return found


def complete(parts: Sequence[Part]) -> list[Part]:
    """The parts in the order of their shards.

    Raises:
        SourceError: a shard that is missing, given twice, or of another model, other data or settings.
    """
    return in_order(
        parts,
        place=lambda part: part.folder,
        compare=_compare,
        foreign_step="Merge the shards of one evaluation.",
        missing_step="Run it, or add its folder to the command.",
    )


def _compare(part: Part, first: Part) -> None:
    mine, others = part.settings(), first.settings()
    for name in dict.fromkeys([*others, *mine]):
        if mine.get(name) != others.get(name):
            reason = f"has {name} {mine.get(name)!r}, but {first.folder} has {others.get(name)!r}"
            raise SourceError(part.folder, reason, "Run all shards on the same data with the same settings.")


def check(parts: Sequence[Part], facts: Sequence[Mapping[str, Any]], fingerprints: Mapping[str, str]) -> None:
    """Refuse to merge where batches would have other keys. Raises SourceError.

    Args:
        facts, fingerprints: of this run, as for `finish`.
    """
    if not parts:
        return
    here = dataclasses.replace(parts[0], facts=[dict(f) for f in facts], fingerprints=dict(fingerprints))
    mine, theirs = here.settings(), parts[0].settings()
    for name in dict.fromkeys([*theirs, *mine]):
        if mine.get(name) != theirs.get(name):
            reason = f"have {name} {theirs.get(name)!r}, but here it is {mine.get(name)!r}"
            step = "Merge on a machine with the same data, versions and kind of device."
            raise SourceError("the shards", reason, step)
