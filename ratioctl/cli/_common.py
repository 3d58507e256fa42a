"""Shared by all commands: common options, output, and the one place where errors become messages.

A command file `cli/<command>.py` holds one function decorated with `@command`:

    @command
    def inspect(context: Context, model: Annotated[str, typer.Argument(help="...")] = DEFAULT_MODEL) -> None:
        '''One line of help.'''
        from ratioctl import package  # heavy imports only inside the body
        ...

Its first parameter is the `Context`; the common options are added to the others by the decorator. It
returns None or an exit code; it raises `ratioctl.errors` for everything else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import json as jsonlib
import os
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ratioctl import scores
from ratioctl.errors import DiskError, Interrupted, OutputError, RatioctlError, UsageError
from ratioctl.utils.text import reason_of, safe_text

if TYPE_CHECKING:
    from rich.console import Console

MODEL_HELP = "A package folder or the name of a bundled model (see `ratioctl models`)."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print more on stderr.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
BitDepth = Annotated[
    int | None,
    typer.Option(
        "--bit-depth",
        min=9,
        max=16,
        metavar="N",
        help="Bits in use of images with 16 bits per pixel, for example 12 of a scanner. Default: 16.",
    ),
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--precision", metavar="PRECISION", help="auto, fp32 or bf16, for training and searches."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, metavar="N", help="Random seed.")]
Score = Annotated[
    str | None,
    typer.Option(
        "--score",
        metavar="NAME",
        help=f"OOD score: {', '.join(scores.names())}. Default: the model's own.",
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Download named data sets that are not in the cache folder.")
]

COMMON: dict[str, tuple[Any, Any]] = {
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, False),
    "device": (Device, "auto"),
    "precision": (Precision, "auto"),
    "seed": (Seed, 0),
}


COMPUTE = ("device", "precision", "seed")  # unused by commands that compute nothing


def registered(module: str, function: str) -> str:
    """Names of a registry as the metavar of an option: "a|b|c". The module must be light to import."""
    names: list[str] = getattr(importlib.import_module(module), function)()
    return "|".join(names)


SOURCE_HELP = (
    "a folder, .tar, .tar.gz, .tar.xz or .zip, also with :SPLIT, a .csv or .parquet of path,label, or a "
    "named source, also with :ARGUMENT: " + registered("ratioctl.data.registry", "names").replace("|", ", ")
)


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Handled like Ctrl-C; `signum` tells them apart."""

    signum = 15


class _Carried(Exception):  # noqa: N818 - not an error of its own
    """Carries its cause past Typer's main function, which handles some exceptions itself, to `guard`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The common options of one run, and where its output goes.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N", checked (`models.device.select_device` chooses).
        precision: "auto", "fp32" or "bf16".
        seed: for every random number of the run.
        args: the arguments as they were typed, the command first.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    args: tuple[str, ...] = ()

    def typed(self, *added: str) -> str:
        """The command line as it was typed, quoted for a shell, with the options in `added` that it lacks."""
        return _typed(self.args, *added)

    @cached_property
    def console(self) -> Console:
        """A rich console on stderr, for progress and logs; silent with --quiet."""
        from rich.console import Console

        return Console(stderr=True, quiet=self.quiet, highlight=False, markup=False, emoji=False)

    @cached_property
    def out(self) -> Console:
        """A rich console on stdout, for results; silent with --json.

        Lines are not wrapped unless stdout is a terminal, so that tools can search and cut them.
        """
        from rich.console import Console

        class Out(Console):
            def on_broken_pipe(self) -> None:
                """Rich would exit with 1; `guard` ends a run whose reader has left with 0."""
                raise BrokenPipeError

        width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000
        return Out(quiet=self.json, highlight=False, markup=False, emoji=False, width=width)

    def note(self, text: str) -> None:
        """One line on stderr unless --quiet."""
        if not self.quiet:
            typer.echo(safe_text(text), err=True)

    def warn(self, text: str) -> None:
        """One line on stderr, always."""
        typer.echo(_colored("Warning:", "33", sys.stderr) + " " + safe_text(text), err=True)

    def alert(self, title: str, *lines: str) -> None:
        """A block on stderr, always: a result that must not be used as it is."""
        rule = "-" * 78
        head = _colored(f"WARNING: {safe_text(title)}", "1;31", sys.stderr)
        typer.echo("\n".join(["", rule, head, *map(safe_text, lines), rule]), err=True)


def command(
    body: Callable[..., int | None] | None = None, *, unused: Sequence[str] = ()
) -> Callable[..., Any]:
    """`body(context, **own_options)` as a function Typer can register: the common options are appended.

    A common option that the body declares itself is passed to it and keeps its default in the context.
    An option --out is also spelled --output, and the other way round.

    Args:
        unused: common options that have no effect on this command; accepted, but not shown by --help.
    """
    if body is None:
        return functools.partial(command, unused=unused)
    hints = typing.get_type_hints(body, include_extras=True)
    own = list(inspect.signature(body).parameters.values())[1:]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword, annotation=_with_both_spellings(hints[p.name])) for p in own]
    common = {name: option for name, option in COMMON.items() if name not in {p.name for p in own}}
    parameters += [
        inspect.Parameter(name, keyword, annotation=shown, default=default)
        for name, (annotation, default) in common.items()
        for shown in [_changed(annotation, hidden=True) if name in unused else annotation]
    ]

    def wrapper(**values: Any) -> int | None:
        context = Context(**{name: values.pop(name) for name in common}, args=_args)
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", context.device):
            raise UsageError(f"--device {context.device}", "no such device", "Use auto, cpu, cuda or cuda:N.")
        _set_up_logging(context)
        try:
            return body(context, **values)
        except (KeyboardInterrupt, EOFError, OSError) as error:
            raise _Carried from error

    wrapper.__name__ = body.__name__
    wrapper.__doc__ = body.__doc__
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return wrapper


def _changed(annotation: Any, **changes: Any) -> Any:
    """`Annotated[type, typer.Option(...)]` with other attributes of the option."""
    kind, option = typing.get_args(annotation)
    option = copy.copy(option)
    vars(option).update(changes)
    return Annotated[kind, option]


def _with_both_spellings(annotation: Any) -> Any:
    option = typing.get_args(annotation)[1]
    other = {"--out": "--output", "--output": "--out"}.get(option.default)  # Typer's name of the first one
    if other is None:
        return annotation
    return _changed(annotation, param_decls=(*(option.param_decls or ()), other))


_emitted = False
_args: tuple[str, ...] = ()  # of the present run


def _typed(args: tuple[str, ...], *added: str) -> str:
    end = args.index("--") if "--" in args else len(args)
    missing = [option for option in added if option not in args[:end]]
    return shlex.join(["ratioctl", *args[:end], *missing, *args[end:]])


def emit_json(document: object) -> None:
    """Print the one JSON document of a run on stdout.

    Dataclasses, paths and numpy values are written as plain JSON; numbers that are not finite become
    null. ASCII only, so that no label or path can send a terminal an escape code.
    """
    global _emitted
    text = jsonlib.dumps(_plain(document), indent=2, allow_nan=False)
    _emitted = True
    typer.echo(text)


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    for method in ("tolist", "model_dump"):  # numpy and torch values, pydantic models
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def guard(run: Callable[[], object], *, args: Sequence[str] = (), json: bool = False) -> int:
    """Run a command line and turn whatever happens into an exit code; the one place that prints errors.

    With `json` an error is also the JSON document on stdout, unless one was printed already:
    `{"error": {"type", "thing", "reason", "next_step", "message", "exit_code"}}`.
    A reader that closes the pipe early (`| head`) is no error: exit code 0. `args` is the command line as it
    was typed, for the message of an interrupted run.
    """
    global _args, _emitted
    _args, _emitted = tuple(args), False
    try:
        try:
            code = run()
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except _Carried as carried:
            raise (carried.__cause__ or carried) from None
    except BrokenPipeError:
        _abandon_stdout()
        return 0
    except SystemExit as stop:  # shell completion ends this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        return _report(error, json=json)


def _report(error: BaseException, *, json: bool) -> int:
    if os.environ.get("RATIOCTL_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exception(error)
    known = _as_known(error)
    try:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(str(error), err=True)
        else:
            head = ("Interrupted:", "33") if isinstance(known, Interrupted) else ("Error:", "1;31")
            typer.echo(_colored(*head, sys.stderr) + " " + _lines(str(known)), err=True)
        if json and not _emitted:
            emit_json(
                {
                    "error": {
                        "type": type(known).__name__,
                        "thing": known.thing,
                        "reason": known.reason,
                        "next_step": known.next_step,
                        "message": str(known),
                        "exit_code": known.exit_code,
                    }
                }
            )
        sys.stdout.flush()
    except OSError:  # stdout is what failed
        _abandon_stdout()
    return known.exit_code


def _as_known(error: BaseException) -> RatioctlError:
    """Any exception as a RatioctlError, with a message and an exit code."""
    if isinstance(error, RatioctlError):
        return error
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        signum = getattr(error, "signum", 2)
        how = "stopped by " + ("SIGTERM" if signum == 15 else "Ctrl-C")
        step = f"Nothing is half-written. Start again with: {_typed(_args)}"
        known = Interrupted(" ".join(["ratioctl", *_args[:1]]), how, step, signum=signum)
        known.headline = how
        return known
    if callable(getattr(error, "show", None)) and callable(getattr(error, "format_message", None)):
        return _parser_error(error)
    if isinstance(error, ImportError):
        from ratioctl.utils.optional import missing_package

        if (missing := missing_package(error, " ".join(["ratioctl", *_args[:1]]))) is not None:
            return missing
    if isinstance(error, OSError) and error.errno is not None:
        from ratioctl.utils.atomic_files import DISK_ERRORS

        thing = error.filename if error.filename is not None else "output"
        reason = (error.strerror or "failed").lower()
        if error.errno in DISK_ERRORS:
            return DiskError(thing, reason, "Free some space, or write somewhere else.")
        if error.filename is not None:
            return OutputError(thing, reason, "Check the path and its permissions.")
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return RatioctlError("memory", "is exhausted", "Use smaller batches, or --device cpu.")
    detail = f"{type(error).__name__}: {error}".rstrip(": ")
    return RatioctlError("internal error", detail, "Please report it; RATIOCTL_DEBUG=1 shows the traceback.")


def _parser_error(error: Any) -> UsageError:
    """An error of the command line's parser as a UsageError."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    program = "ratioctl" if context is None else context.command_path
    step = "" if context is None else f"See `{program} --help`."
    reason = getattr(error, "message", None) or error.format_message()
    if parameter is None:
        thing = getattr(error, "option_name", None) or program
        near = getattr(error, "possibilities", None)
        if near:
            step = f"Did you mean {' or '.join(sorted(near))}? {step}"
        for head in (f"Option {thing!r} ", f": {thing}"):
            reason = reason.replace(head, "")
    else:
        is_option = parameter.param_type_name == "option"
        spellings = [option for option in parameter.opts if option.startswith("--")]
        thing = spellings[0] if is_option else parameter.metavar or parameter.name
        if type(error).__name__ == "MissingParameter":
            kind = "option" if is_option else "argument"
            missing = UsageError(thing, "is missing", step)
            missing.headline = f"Missing {kind} {thing}"
            return missing
        errors = getattr(error.__cause__, "errors", None)
        if callable(errors):
            found = errors()[0]
            thing, reason = f"{thing} {found['input']}", reason_of(found)
    return UsageError(thing, reason[:1].lower() + reason[1:], step)


def _lines(text: str) -> str:
    return "\n".join(safe_text(line) for line in text.split("\n"))


def _colored(text: str, code: str, stream: Any) -> str:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def _abandon_stdout() -> None:
    """Point stdout at the null device, so that the interpreter's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def own_the_process() -> None:
    """Set up signals, warnings and encodings; only when ratioctl is the program that was started."""
    import warnings

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name outside the locale's encoding must not end a run
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions and os.environ.get("RATIOCTL_DEBUG", "0") in ("", "0"):
        warnings.simplefilter("ignore")  # of libraries, for developers

    def terminate(signum: int, frame: object) -> None:
        raise Terminated

    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, terminate)


def _set_up_logging(context: Context) -> None:
    import logging

    logger = logging.getLogger("ratioctl")
    logger.setLevel("DEBUG" if context.verbose else "ERROR" if context.quiet else "WARNING")
    for handler in [handler for handler in logger.handlers if handler.name == "ratioctl"]:
        logger.removeHandler(handler)  # of an earlier `main` in this process, which holds the old stderr
    ours = logging.StreamHandler()
    ours.name = "ratioctl"
    ours.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(ours)
