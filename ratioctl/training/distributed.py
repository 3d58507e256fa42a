"""The processes of one training run, as `torchrun` starts them, and how they agree.

Process 0 (rank 0) alone writes and reports. Decisions that depend on a clock, a signal or a file are taken
together, so that every process does the same collective operations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ratioctl.errors import RatioctlError, TrainingError, UsageError
from ratioctl.utils.shares import Share

T = TypeVar("T")
E = TypeVar("E", bound=RatioctlError)

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = datetime.timedelta(minutes=30)  # for a process that loads data or writes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, seen from one of them; by default there is one.

    Attributes:
        rank, world: number of this process and of all; local_rank, local_world: on this machine.
        restarts: how often `torchrun` has restarted the processes.
        members: (machine, process id) by rank.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    restarts: int = 0
    members: tuple[tuple[str, int], ...] = ()

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        return Share(rank=self.rank, world=self.world)

    def device(self, device: str) -> str:
        """`device` of this process: with "auto" and "cuda" every process has a GPU of its own.

        Raises:
            UsageError: more processes than GPUs on this machine.
        """
        if self.world == 1 or device not in ("auto", "cuda") or not torch.cuda.is_available():
            return device
        count = torch.cuda.device_count()
        if self.local_world > count:
            reason = f"this machine has {count} GPU(s), and {self.local_world} processes were started on it"
            step = f"Use torchrun --nproc-per-node {count}, or --device cpu."
            raise UsageError("torchrun", reason, step)
        return f"cuda:{self.local_rank}"

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises in process 0, in every process. Its value is pickled."""
        if self.world == 1:
            return work()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer = [work(), None]
            except RatioctlError as error:
                answer = [None, _packed(error)]
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise of_all(_unpacked(answer[1]))
        return answer[0]

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def highest(self, values: Sequence[float]) -> list[float]:
        """The largest of the processes' values, one by one."""
        return self._reduced(values, dist.ReduceOp.MAX) if self.world > 1 else list(values)

    def total(self, values: Sequence[float]) -> list[float]:
        """The sum of the processes' values, one by one."""
        return self._reduced(values, dist.ReduceOp.SUM) if self.world > 1 else list(values)

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        whole = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(whole, operation)
        return whole.tolist()

    def check_same(self, facts: Mapping[str, Any], step: str) -> None:
        """Raise UsageError, in every process, where one has another value of a fact; it is named."""
        everyone = self.gathered(dict(facts))
        for rank, theirs in enumerate(everyone):
            for name, expected in everyone[0].items():
                if theirs[name] != expected:
                    what = f"{_short(theirs[name])} instead of {_short(expected)}"
                    reason = f"has another {name} than rank 0: {what}"
                    raise of_all(UsageError(self.describe(rank), reason, step))

    def describe(self, rank: int) -> str:
        """ "rank 1 (process 4321 on HOST)"."""
        if rank >= len(self.members):
            return f"rank {rank}"
        machine, process = self.members[rank]
        return f"rank {rank} (process {process} on {machine})"

    def everywhere(self, work: Callable[[], T], *, in_turn: bool = False) -> T:
        """What `work` returns in each process; an error of one is raised in all, and names that one.

        Args:
            in_turn: the first process of each machine goes first, so that the others find the caches that it
                fills.
        """
        if self.world == 1:
            return work()
        value: Any = None
        failed: tuple[Any, ...] | None = None
        if in_turn and self.local_rank > 0:
            dist.barrier()
        try:
            value = work()
        except RatioctlError as error:
            failed = _packed(error)
        if in_turn and self.local_rank == 0:
            dist.barrier()
        for rank, packed in enumerate(self.gathered(failed)):
            if packed is not None:
                theirs = _unpacked(packed)
                if rank > 0:
                    theirs.thing = f"{self.describe(rank)}: {theirs.thing}"
                raise of_all(theirs)
        return value

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def watched(self, folder: Path) -> Iterator[None]:
        """A context of collective operations: a process that ends while others wait for it is named.

        Raises:
            TrainingError: another process has ended, or did not answer.
        """
        try:
            yield
        except RuntimeError as error:  # torch has no narrower class for all backends
            if self.world == 1 or isinstance(error, torch.OutOfMemoryError) or not _is_lost(error):
                raise
            if threading.current_thread() is threading.main_thread():
                # torchrun ends the others when one has ended; this must not come before the message.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise self._lost(folder, error) from error

    def _lost(self, folder: Path, error: RuntimeError) -> TrainingError:
        gone = [rank for rank in range(self.world) if rank != self.rank and self._ended(rank)]
        names = ", ".join(self.describe(rank) for rank in gone)
        detail = " ".join(str(error).split())
        reason = "ended during the run" if gone else f"cannot be reached: {detail[:200]}"
        lost = TrainingError(names or "another process", reason, "")
        kept = (folder / "checkpoint" / "state.json").exists()
        how = (
            f"{folder} keeps the last checkpoint: start torchrun again, with --resume."
            if kept
            else "There is no checkpoint yet: start torchrun again."
        )
        lost.next_step = f"See the message of that process, if any. {how}"
        speaker = next(rank for rank in range(self.world) if rank not in gone)
        return lost if self.rank == speaker else of_all(lost)

    def _ended(self, rank: int) -> bool:
        machine, process = self.members[rank]
        if machine != socket.gethostname():
            return False
        try:
            status = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return Path("/proc/self/stat").exists()
        return status.rpartition(")")[2].split()[0] in ("Z", "X")


ALONE = Processes()


def of_all(error: E) -> E:
    """Marks an error that every process raises, or that another one reports."""
    error.reported_by_another = True  # type: ignore[attr-defined]
    return error


def _packed(error: RatioctlError) -> tuple[type[RatioctlError], tuple[Any, ...], dict[str, Any]]:
    return type(error), (error.thing, error.reason, error.next_step), vars(error)


def _unpacked(packed: tuple[type[RatioctlError], tuple[Any, ...], dict[str, Any]]) -> RatioctlError:
    kind, args, state = packed
    error = kind(*args)
    vars(error).update(state)
    return error


def silent(error: BaseException, processes: Processes) -> bool:
    """Whether this process leaves the message about `error` to another one."""
    return not processes.first and getattr(error, "reported_by_another", False)


def _is_lost(error: RuntimeError) -> bool:
    text = str(error).lower()
    signs = ("connection closed", "connection reset", "broken pipe", "timed out", "timeout", "nccl", "gloo")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def launched() -> bool:
    """Whether a launcher with the variables of `torchrun` has started this process as one of several."""
    return all(name in os.environ for name in _NEEDED) and os.environ["WORLD_SIZE"] != "1"


def _connect(backend: str, processes: Processes) -> None:
    """As `dist.init_process_group(backend)`, with keys of its own after each restart.

    torchrun keeps its store when it starts the processes of one machine again, and the addresses of those
    that have ended with it. On several machines their counts of restarts can differ, so they share one key.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=_PATIENCE))
    if processes.world == processes.local_world:
        store = dist.PrefixStore(f"restart {processes.restarts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes of this run, connected until the end of the context; `ALONE` without a launcher.

    Raises:
        UsageError: no connection, or more processes than GPUs.
    """
    if not launched():
        yield ALONE
        return
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    processes = Processes(
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world=local_world,
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )
    where = processes.device(device)
    backend = "gloo"
    if where.startswith("cuda"):
        torch.cuda.set_device(where)
        if device in ("auto", "cuda"):  # a GPU for each; NCCL refuses processes that share one
            backend = "cpu:gloo,cuda:nccl"
    try:
        _connect(backend, processes)
        members = tuple(processes.gathered((socket.gethostname(), os.getpid())))
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = (
            f"{processes.world} processes cannot connect at {address}: {' '.join(str(error).split())[:200]}"
        )
        step = (
            "See that the machines reach each other; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the "
            "network interface."
        )
        raise UsageError("torchrun", reason, step) from None
    try:
        yield dataclasses.replace(processes, members=members)
    finally:
        dist.destroy_process_group()
