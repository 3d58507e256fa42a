"""Processes of the real command line, forked from one that has imported everything, whose disk fails.

    python -m tools.fault_injection    # reads orders from stdin, one JSON document per line

`tools.faults` starts this. Faults are injected by replacing functions of `os` and `io` in the forked process;
`ratioctl` itself knows nothing of them.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PATH_CALLS = ("replace", "rename", "link", "unlink", "remove", "mkdir", "rmdir", "truncate")
FILE_CALLS = ("fsync", "ftruncate")
# What commands import when they need it, besides the modules of ratioctl.
IMPORTED = (
    *("torchvision", "torch._dynamo", "torch.onnx._internal.exporter._core", "sklearn.datasets"),
    *("pyarrow.parquet", "jinja2", "rich.progress", "rich.table"),
)
REAL = {name: getattr(os, name) for name in (*PATH_CALLS, *FILE_CALLS, "write")}


class Interposed:
    """Versions of the functions that change the disk which count write points below `root` and fail at one.

    Args:
        fault: {"at": number of the write point, from 1; 0 for none; "kind": "kill", "torn" (kill after half
            of the bytes), "signal" ("signum" to itself), "gone" (the folder "what" is removed), "slow" (every
            point sleeps "seconds"), "quota" (set by `become`), or the name of an errno: this point and all
            later ones that need space fail; "once": only this one fails}.
        trace: descriptor that receives a line "number call path" for each point.
    """

    def __init__(self, root: str, fault: Mapping[str, Any], trace: int) -> None:
        self.root, self.fault, self.trace = os.path.realpath(root), fault, trace
        self.kind, self.at, self.number = str(fault.get("kind", "none")), int(fault.get("at", 0)), 0
        for name in (*PATH_CALLS, *FILE_CALLS):
            setattr(os, name, self.counted(name))
        self.real_open = io.open
        io.open = builtins.open = self.open  # type: ignore[assignment]

    def below(self, path: Any) -> str | None:
        """The path of a file or descriptor relative to the root; None outside of it."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        full = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))
        full = os.path.join(full, os.path.basename(os.fsdecode(path)))
        inside = full == self.root or full.startswith(self.root + "/")
        return os.path.relpath(full, self.root) if inside else None

    def point(self, call: str, where: str, half: Callable[[], object] = lambda: None) -> None:
        """A write point; `half` writes half of the bytes."""
        self.number += 1
        REAL["write"](self.trace, f"{self.number} {call} {where}\n".encode())
        here = self.number == self.at
        if self.kind == "slow":
            time.sleep(float(self.fault["seconds"]))
        elif self.kind.startswith("E"):
            # A full disk still removes, renames and syncs; a failing one does nothing.
            needs = call in ("open", "write", "mkdir", "link") or self.kind in ("EIO", "EROFS")
            if needs and (here or (self.number > self.at > 0 and not self.fault.get("once"))):
                half()
                code = getattr(errno, self.kind)
                raise OSError(code, os.strerror(code), os.path.join(self.root, where))
        elif here and self.kind in ("kill", "torn"):
            if self.kind == "torn":
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        elif here and self.kind == "signal":
            os.kill(os.getpid(), int(self.fault["signum"]))
        elif here and self.kind == "gone":
            subprocess.run(["rm", "-rf", str(self.fault["what"])], check=True)

    def counted(self, name: str) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            where = None if options.get("dir_fd") is not None else self.below(target)
            if where is not None:
                self.point(name, where)
            return REAL[name](target, *args, **options)

        return call

    def open(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        where = self.below(file) if set(mode) & set("wax+") and not isinstance(file, int) else None
        if where is None:
            return self.real_open(file, mode, *args, **options)
        self.point("open", where)
        return _Writing(self, self.real_open(file, mode, *args, **options), where)


class _Writing:
    """A file opened for writing whose writes are write points."""

    def __init__(self, disk: Interposed, stream: Any, where: str) -> None:
        self._disk, self._stream, self._where = disk, stream, where

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()

        self._disk.point("write", self._where, half)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> Any:
        self._stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> Any:
        return self._stream.__exit__(*exc)


def serve() -> None:
    """Import everything once, then fork a process for each line on stdin and report how it ended."""
    import ratioctl

    ours = [module.name for module in pkgutil.walk_packages(ratioctl.__path__, "ratioctl.")]
    for name in (*ours, *IMPORTED):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    threads = [name for name in names if not name.startswith("jemalloc")]  # which handles forks itself
    assert len(threads) == 1, f"a fork would lose threads: {threads}"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order, began = json.loads(line), time.monotonic()
        child = os.fork()
        if child == 0:
            become(order)
        print(json.dumps({"pid": child}), file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        ended = {"returncode": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began}
        print(json.dumps(ended), file=answers, flush=True)


def become(order: Mapping[str, Any]) -> None:
    """Run `python -m ratioctl ARGS` in the order's folder; never returns."""
    code = 70
    try:
        os.setsid()
        log, trace = (os.open(order[n], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for n in ("log", "trace"))
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
        os.chdir(order["root"])
        sys.argv = ["ratioctl", *order["args"]]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if order["fault"].get("kind") == "quota":  # the system truncates the write that crosses it
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (order["fault"]["bytes"],) * 2)
        Interposed(order["root"], order["fault"], trace)
        from ratioctl.cli import main

        code = main()
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    serve()
