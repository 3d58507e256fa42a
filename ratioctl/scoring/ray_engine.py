"""`ood-score --engine ray`: the rows of the local engine, computed by actors of a Ray cluster, in any order.

    files, folders, archives -> table of units -> Ray Data -> [read -> decode -> predict -> score] x actors

A unit is an image, or an archive or table whose images one actor scores. Actors read the files themselves,
with the code of the local engine, so that one that cannot be read is a row with the same error and not a
failed job, and no reader of Ray's waits for a processor that the actors hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from ratioctl import images
from ratioctl.errors import RatioctlError, SourceError, UsageError
from ratioctl.images import Item, Member
from ratioctl.scoring.sources import Images, Unreadable
from ratioctl.types import ScoreRow
from ratioctl.utils import optional

BLOCK = 512  # units that an actor scores in one call, at most
CALLS = 4  # calls for each actor, at least, where there are enough units
ADDRESS = "RAY_ADDRESS"  # Ray's own variable: the cluster to use; without it one is started on this machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What an actor scores with: arguments of `backends.open_model` and `pipeline.score_items`.

    Attributes:
        model: a path that every node can read, or the name of a bundled model.
        version: of ratioctl, which must be the same on all nodes.
    """

    model: str
    threshold: str | float
    score: str | None = None
    probabilities: bool = False
    explain: bool = False
    bit_depth: int | None = None
    worst_case: float | None = None
    certified: bool = False
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
    version: str = dataclasses.field(default_factory=lambda: importlib.metadata.version("ratioctl"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """An image to be read from `file` and called `path`; or, without `file`, the argument `path`."""

    path: str
    file: str | None = None
    size: int | None = None
    error: str | None = None


def units_of(paths: Images, limit: int | None) -> list[Unit]:
    """What `paths` names, archives and tables unopened.

    Raises:
        SourceError: as `ratioctl.images.walk`. UsageError: a value that is not a path, or a limit beside an
            archive.
    """
    found: list[Unit] = []
    for argument in images.as_list(paths, "paths"):
        if not images.is_path(argument):
            raise UsageError("--engine ray", "takes paths and URLs only", "Use the engine local.")
        text = os.fspath(argument)
        if text == "-":
            raise UsageError(
                "--engine ray", "takes no list on stdin", "Name files, folders, archives or URLs."
            )
        if images.is_collection(text):
            if limit is not None:
                reason = "does not count images of archives with --engine ray"
                raise UsageError("--limit", reason, "Leave it out.")
            found.append(Unit(path=text))
            continue
        left = None if limit is None else limit - len(found)
        for item in itertools.islice(images.walk([text]), left):
            member = item.member
            found.append(Unit(path=item.path, file=member.file, size=member.size, error=member.error or None))
    if not found:
        raise UsageError("paths", "there are none", "Name images, folders or archives.")
    return found


def run(
    paths: Images,
    model: object,
    *,
    limit: int | None = None,
    workers: int | None = None,
    shard: str | None = None,
    checks: bool = False,
    **settings: Any,
) -> Generator[list[ScoreRow], None, None]:
    """`batches` of what `paths` names; listing ends before scoring begins.

    Args:
        settings: see `Settings`.

    Raises:
        UsageError: options that need the order of the images; as `units_of` and `batches`.
    """
    if shard is not None:
        step = "Use one of them: Ray distributes the images itself."
        raise UsageError("--shard", "has no effect with --engine ray", step)
    if checks:
        reason = "compares every image with the one before, and Ray has no order"
        raise UsageError("--checks", reason, "Use the engine local.")
    path = os.fspath(getattr(model, "path", model))  # type: ignore[call-overload]
    path = os.path.abspath(path) if os.path.exists(path) else path
    return batches(units_of(paths, limit), Settings(model=path, **settings), workers=workers)


def batches(
    units: Sequence[Unit], settings: Settings, *, workers: int | None = None
) -> Generator[list[ScoreRow], None, None]:
    """One row per image, in any order, in lists as they are finished.

    Args:
        workers: actors, each with one processor; None takes as many as the cluster has processors.

    Raises:
        UsageError: Ray is not installed, the cluster cannot be reached or runs other versions.
        RatioctlError: a worker that failed for another reason than an image, or rows that did not arrive.
    """
    import pyarrow as pa

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray, data = optional.load("ray", "--engine ray"), optional.load("ray.data", "--engine ray")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with _connected(ray):
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        size = max(1, min(BLOCK, -(-len(units) // (count * CALLS))))
        kinds = {"path": pa.string(), "file": pa.string(), "size": pa.int64(), "error": pa.string()}
        table = pa.table(
            {name: pa.array([getattr(unit, name) for unit in units], kind) for name, kind in kinds.items()}
        )
        table = table.append_column("unit", pa.array(range(len(units)), pa.int64()))
        blocks = [table.slice(k, size) for k in range(0, len(units), size)]
        rows = data.from_arrow(blocks).map_batches(
            Scorer,
            fn_constructor_args=(dataclasses.asdict(settings),),
            compute=data.ActorPoolStrategy(size=count),
            num_cpus=1,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        yield from _once(_received(rows, ray), len(units))


def _received(rows: Any, ray: Any) -> Iterator[list[tuple[int, int, ScoreRow]]]:
    try:
        for block in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            yield [
                (unit, place, _row(text))
                for unit, place, text in zip(
                    *(block.column(name).to_pylist() for name in ("unit", "place", "row")), strict=True
                )
            ]
    except ray.exceptions.RayError as error:
        raise _named(error) from None


def _once(
    found: Iterator[list[tuple[int, int, ScoreRow]]], units: int
) -> Generator[list[ScoreRow], None, None]:
    """The rows without those that a retried task computed again. Raises RatioctlError for missing ones."""
    seen = bytearray(units)  # whether the first row of a unit has come
    further: set[tuple[int, int]] = set()  # of archives
    for block in found:
        fresh = []
        for unit, place, row in block:
            if place == 0 and not seen[unit]:
                seen[unit] = 1
            elif place and (unit, place) not in further:
                further.add((unit, place))
            else:
                continue
            fresh.append(row)
        yield fresh
    missing = units - sum(seen)
    if missing:
        raise RatioctlError("--engine ray", f"returned no rows for {missing:,} inputs", "Run it again.")


@contextlib.contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """A connection to the cluster of RAY_ADDRESS, or to one that is started here and ends with the block."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get(ADDRESS)
    quiet = {"logging_level": "ERROR", "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(address="local", include_dashboard=False, **quiet)
    except (RuntimeError, ConnectionError, ValueError, OSError, TimeoutError) as error:
        text = " ".join(str(error).split())[:300]
        if "ersion mismatch" in text:
            step = "Use the versions of Python and Ray that the cluster has."
            raise UsageError("--engine ray", f"the cluster runs other versions: {text}", step) from None
        where = f"{ADDRESS}={address}" if address else "a local Ray"
        step = f"Check {ADDRESS}, or leave it out to use this machine."
        raise UsageError("--engine ray", f"cannot connect to {where}: {text}", step) from None
    try:
        yield
    finally:
        ray.shutdown()


def _named(error: Exception) -> RatioctlError:
    """An exception of Ray's; errors of ours keep their class."""
    cause: BaseException | None = getattr(error, "cause", None) or error.__cause__
    while cause is not None and not isinstance(cause, RatioctlError):
        cause = getattr(cause, "cause", None) or cause.__cause__
    if isinstance(cause, RatioctlError):
        return type(cause)(cause.thing, cause.reason, cause.next_step)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return RatioctlError("--engine ray", f"a worker failed: {(lines or ['unknown'])[-1][:300]}", "")


class Scorer:
    """An actor: units in, rows out. Loads the model once."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Raises PackageError, UsageError as `backends.open_model`; UsageError for another ratioctl."""
        from ratioctl.scoring.backends import open_model

        self.settings = Settings(**settings)
        here = importlib.metadata.version("ratioctl")
        if here != self.settings.version:
            reason = f"a node has ratioctl {here}, but {self.settings.version} started the run"
            raise UsageError("--engine ray", reason, "Install the same version on all nodes.")
        s = self.settings
        self.model = open_model(
            s.model,
            s.threshold,
            device=s.device,
            precision=s.precision,
            worst_case=s.worst_case,
            certified=s.certified,
            seed=s.seed,
            score=s.score,
        )

    def __call__(self, batch: Any) -> Any:
        """A table of units to a table of unit, place among its rows, and the row as JSON."""
        import pyarrow as pa

        from ratioctl.scoring.pipeline import score_items

        s = self.settings
        units = [
            (unit["unit"], Unit(**{name: unit[name] for name in ("path", "file", "size", "error")}))
            for unit in batch.to_pylist()
        ]
        places: list[tuple[int, int]] = []

        def items() -> Iterator[Item | Unreadable]:
            for number, unit in units:
                for place, item in enumerate(_items(unit)):
                    places.append((number, place))
                    yield item

        found = score_items(
            items(),
            self.model,
            threshold=s.threshold,
            probabilities=s.probabilities,
            explain=s.explain,
            bit_depth=s.bit_depth,
            workers=1,
        )
        with contextlib.closing(found):
            rows = [json.dumps(dataclasses.asdict(row)) for row in itertools.chain.from_iterable(found)]
        return pa.table(
            {
                "unit": pa.array([unit for unit, _ in places], pa.int64()),
                "place": pa.array([place for _, place in places], pa.int64()),
                "row": pa.array(rows, pa.string()),
            }
        )


def _items(unit: Unit) -> Iterator[Item | Unreadable]:
    if unit.error is not None:
        yield Unreadable(path=unit.path, reason=unit.error)
    elif unit.file is not None:
        yield Item(path=unit.path, member=Member(name=unit.path, file=unit.file, size=unit.size))
    else:
        try:
            yield from images.walk([unit.path])
        except SourceError as error:
            yield Unreadable(path=images.shown(unit.path), reason=error.reason)


def _row(text: str) -> ScoreRow:
    fields = json.loads(text)
    if fields["probabilities"] is not None:
        fields["probabilities"] = tuple(fields["probabilities"])
    return ScoreRow(**fields)
