"""The command line's frame: commands and options, errors and exit codes, streams and signals."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ratioctl import errors, package
from ratioctl.cli import COMMANDS, load, main
from ratioctl.cli._common import Context, emit_json

COMMON = {"--help", "--json", "--quiet", "--verbose", "--device", "--precision", "--seed"}
OPTIONS: dict[str, set[str]] = {
    "train": {"--out", "--set", "--resume", "--init", "--max-time", "--download", "--log"},
    "calibrate": {
        *("--data", "--objective", "--out", "--download", "--score", "--weights"),
        *("--ood", "--threshold", "--per-class", "--keep-temperature"),
    },
    "thresholds": {"--out"},
    "parity": {"--data", "--tolerance", "--limit", "--out", "--no-timing", "--download"},
    "evaluate": {
        *("--data", "--ood", "--suite", "--limit", "--resume", "--write", "--out", "--download"),
        *("--judge", "--backend", "--save-adversarial", "--score", "--protocol", "--shard", "--certified"),
    },
    "counterfactual": {
        *("--target", "--model", "--eps", "--norm", "--steps", "--restarts", "--until", "--region"),
        *("--region-space", "--limit", "--format", "--out", "--open", "--bit-depth", "--live"),
    },
    "ood-score": {
        *("--model", "--threshold", "--format", "--output", "--probabilities", "--worst-case"),
        *("--fail-on-ood", "--skip-errors", "--limit", "--csv-safe", "--bit-depth", "--score"),
        *("--explain", "--checks", "--save-flagged", "--shard", "--engine", "--workers", "--certified"),
    },
    "merge": {"--output"},
    "export": {
        *("--output", "--input", "--threshold", "--int8", "--layout", "--opset"),
        *("--data", "--download", "--explain", "--norm", "--weights", "--threshold-input"),
    },
    "serve": {
        *("--host", "--port", "--token", "--allow-host"),
        *("--max-body", "--max-pixels", "--max-queue", "--timeout", "--live"),
    },
    "package": {
        *("--arch", "--labels", "--mean", "--std", "--input-size", "--data", "--out", "--download"),
        *("--arch-option", "--ema", "--force", "--resize"),
    },
    "inspect": set(),
    "verify": {"--public-key", "--parity"},
    "sign": {"--key", "--new-key"},
    "models": set(),
    "cache": {"--clear", "--downloads"},
    "report": {"--data", "--ood", "--limit", "--out", "--download"},
    "figures": {"--data", "--ood", "--eps", "--steps", "--count", "--out", "--download"},
    "init": {"--outside", "--arch", "--size", "--out", "--download"},
}


def run(*line: str, program: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """`ratioctl LINE` in a process of its own, after `program`."""
    code = f"import sys; sys.argv = ['ratioctl', *{list(line)!r}]\n{program}\nfrom ratioctl.cli import main\n"
    return subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main())"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail() -> list[str]:
        raise error

    monkeypatch.setattr(package, "bundled", fail)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_the_contract(name: str) -> None:
    command = load(name)
    found = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    expected = OPTIONS[name]
    if expected & {"--out", "--output"}:  # both spellings wherever there is one
        expected = expected | {"--out", "--output"}
    assert found | {"--help"} == COMMON | expected
    short = {option for parameter in command.params for option in parameter.opts if re.match(r"-\w$", option)}
    assert short == {"-q", "-v"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = load(name)
    assert command.help
    assert len(command.help.splitlines()[0]) <= 60, "would be cut in `ratioctl --help`"
    assert all(parameter.help for parameter in command.params)
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"Usage: ratioctl {name} ")
    assert not re.search(r"<(str|path|list\[str\])>", shown), "types of Python"


COMPUTE = {"--device", "--precision", "--seed"}
NO_EFFECT = {"calibrate": {"--precision", "--seed"}}
NO_EFFECT |= dict.fromkeys(
    (
        "export",
        "package",
        "inspect",
        "verify",
        "sign",
        "models",
        "cache",
        "init",
        "thresholds",
        "parity",
        "merge",
    ),
    COMPUTE,
)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_without_effect_are_hidden_and_accepted(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert COMMON - shown == NO_EFFECT.get(name, set())
    assert main([name, "--device", "cpu", "--precision", "fp32", "--seed", "3", "--help"]) == 0


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = re.findall(r"^  ([a-z-]+) {2,}[A-Z]", capsys.readouterr().out.partition("Commands:")[2], re.M)
    assert listed == list(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from ratioctl import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ratioctl {__version__}\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["counterfactal"], "Did you mean 'counterfactual'?"),
        (["models", "--jsno"], "--jsno"),
        (["models", "extra"], "extra"),
        (["models", "--precision", "fp16"], "--precision"),
        (["models", "--device", "gpu"], "cuda:N"),
        (["models", "--seed", "-1"], "--seed"),
        (["counterfactual", "cat.png"], "--target"),
        (["counterfactual", "cat.png", "--target", "dog", "--steps", "0"], "--steps"),
    ],
)
def test_wrong_usage_exits_with_2(line: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.skipif(importlib.util.find_spec("typer._coercion") is None, reason="an older Typer's words")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "ood-score x J --format xml",
            "--format xml: is not one of 'table', 'csv', 'jsonl', 'parquet'. "
            "See `ratioctl ood-score --help`.",
        ),
        (
            "export J --layout x",
            "--layout x: unknown layout. Use one of: file, triton, kserve.",
        ),
        (
            "ood-score x J --worst-case abc",
            "--worst-case abc: is not a number. See `ratioctl ood-score --help`.",
        ),
        ("models J --seed 1.5", "--seed 1.5: is not a whole number. See `ratioctl models --help`."),
        (
            "counterfactual a J --target b --steps 0",
            "--steps 0: must be at least 1. See `ratioctl counterfactual --help`.",
        ),
        ("counterfactual J a", "Missing option --target. See `ratioctl counterfactual --help`."),
        ("ood-score J", "Missing argument PATH. See `ratioctl ood-score --help`."),
        ("models J --jsno", "--jsno: no such option. Did you mean --json? See `ratioctl models --help`."),
        ("inspect J --seed", "--seed: requires an argument."),
        (
            "models J extra",
            "ratioctl models: got unexpected extra argument(s) (extra). See `ratioctl models --help`.",
        ),
        (
            "counterfactal J",
            "ratioctl: no such command 'counterfactal'. Did you mean 'counterfactual'? "
            "See `ratioctl --help`.",
        ),
    ],
)
def test_the_parsers_errors_read_like_ours(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The thing as it was given, the reason, the next step: in one line, and not in pydantic's words."""
    assert main(["--json" if word == "J" else word for word in line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"Error: {says}\n"
    assert json.loads(captured.out)["error"]["message"] == says


def test_no_command_at_all_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: ratioctl [OPTIONS] COMMAND" in capsys.readouterr().err


def test_a_usage_error_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["counterfactual", "cat.png", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["exit_code"] == 2
    assert "--target" in document["error"]["message"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RatioctlError("it", "broke"), 1),
        (errors.UsageError("it", "is wrong"), 2),
        (errors.RecipeError("it", "is wrong"), 2),
        (errors.SourceError("it", "is missing"), 2),
        (errors.OutputError("it", "is not writable"), 2),
        (errors.ImageError("it", "is truncated"), 3),
        (errors.PackageError("it", "is damaged"), 5),
        (errors.UncalibratedError("it", "is not calibrated"), 5),
        (errors.DiskError("it", "is full"), 6),
        (errors.Interrupted("it", "was stopped"), 130),
        (errors.Interrupted("it", "was stopped", signum=15), 143),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "it"), 6),
        (OSError(errno.EIO, "Input/output error"), 6),
        (PermissionError(errno.EACCES, "Permission denied", "it"), 2),
        (MemoryError(), 1),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RATIOCTL_DEBUG", raising=False)
    fail_with(monkeypatch, error)
    assert main(["models", "--json"]) == code
    captured = capsys.readouterr()
    head = "Interrupted: " if code >= 128 else "Error: "
    assert captured.err.startswith(head)
    assert "Traceback" not in captured.err
    if isinstance(error, errors.RatioctlError):
        assert captured.err == f"{head}{error}\n"
    assert json.loads(captured.out)["error"]["exit_code"] == code


def test_an_unexpected_fault_names_the_switch_that_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RATIOCTL_DEBUG", raising=False)
    fail_with(monkeypatch, KeyError("lost"))
    assert main(["models"]) == 1
    captured = capsys.readouterr()
    assert "KeyError: 'lost'" in captured.err
    assert "RATIOCTL_DEBUG=1" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("module", ["torch", "torchvision.ops", "pyarrow", "onnx", "sklearn.metrics"])
def test_a_missing_package_names_the_extra_that_brings_it(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert main(["models", "--json"]) == 2
    said = f'needs {module.partition(".")[0]}, which is not installed. Run: pip install "ratioctl[torch]"'
    captured = capsys.readouterr()
    assert captured.err == f"Error: ratioctl models: {said}\n"
    assert json.loads(captured.out)["error"]["next_step"] == 'Run: pip install "ratioctl[torch]"'


def test_a_missing_module_that_no_extra_brings_is_an_internal_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'nowhere'", name="nowhere"))
    assert main(["models"]) == 1
    assert capsys.readouterr().err.startswith("Error: internal error: ModuleNotFoundError: No module")


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RATIOCTL_DEBUG", "1")
    fail_with(monkeypatch, errors.PackageError("it", "is damaged"))
    assert main(["models"]) == 5
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_message_cannot_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, errors.PackageError("a\x1b[2Jb\x9b1m\u202e", "is damaged"))
    assert main(["models", "--json"]) == 5
    captured = capsys.readouterr()
    assert captured.err == "Error: a\\x1b[2Jb\\x9b1m\\u202e: is damaged.\n"
    assert captured.out.isascii()
    assert "\x1b" not in captured.out
    assert json.loads(captured.out)["error"]["thing"] == "a\x1b[2Jb\x9b1m\u202e"


def test_json_is_one_document_even_when_the_command_fails_after_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(package, "find", lambda model: Path(model))
    monkeypatch.setattr(package, "check", lambda path: [("config.json", "is wrong")])
    assert main(["verify", "here", "--json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert document == {
        "path": "here",
        "ok": False,
        "files": [{"file": "config.json", "ok": False, "fault": "is wrong"}],
    }


def test_emit_json_takes_what_commands_have(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    emit_json({"a": np.float32(0.5), "b": np.arange(2), "c": float("nan"), "d": Path("x"), 1: (True, None)})
    assert json.loads(capsys.readouterr().out) == {
        "a": 0.5,
        "b": [0, 1],
        "c": None,
        "d": "x",
        "1": [True, None],
    }
    with pytest.raises(TypeError, match="object has no JSON form"):
        emit_json(object())


def test_quiet_silences_notes_but_not_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        context = Context(quiet=quiet)
        context.note("a note")
        context.warn("a warning")
        context.console.print("progress")
    assert capsys.readouterr().err == "a note\nWarning: a warning\nprogress\nWarning: a warning\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_their_exit_code(number: signal.Signals, code: int) -> None:
    program = (
        # Background jobs of a shell ignore SIGINT, and pass that on to their children.
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ratioctl import package\n"
        f"package.bundled = lambda: os.kill(os.getpid(), {int(number)}) or __import__('time').sleep(30)"
    )
    done = run("models", program=program)
    assert done.returncode == code
    assert done.stderr.startswith(
        f"Interrupted: stopped by {'SIGTERM' if code == 143 else 'Ctrl-C'}. Nothing "
    )
    assert done.stderr.endswith("Start again with: ratioctl models\n")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("typed", "resumed"),
    [
        (["train", "a b.toml", "-q"], "ratioctl train 'a b.toml' -q --resume"),
        (["train", "--resume", "mine"], "ratioctl train --resume mine"),
        (["train", "-q", "--", "-mine"], "ratioctl train -q --resume -- -mine"),
        (
            ["train", "--set", 'data.train="x:train"'],
            "ratioctl train --set 'data.train=\"x:train\"' --resume",
        ),
    ],
)
def test_the_line_that_goes_on_is_the_one_that_was_typed(typed: list[str], resumed: str) -> None:
    context = Context(args=tuple(typed))
    assert context.typed("--resume") == resumed
    assert shlex.split(context.typed()) == ["ratioctl", *typed]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "import os; read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)"
    done = run("models", "--json", program=program)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("line", [["models"], ["inspect"], ["verify"]])
def test_a_reader_that_leaves_early_is_no_error_for_tables(line: list[str]) -> None:
    program = "import os; read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)"
    done = run(*line, program=program)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_early_is_no_error_for_counterfactuals(
    small_package: Path, photographs: Path, tmp_path: Path
) -> None:
    program = "import os; read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)"
    line = ["counterfactual", str(photographs / "one.png"), "--model", str(small_package), "--target", "dog"]
    done = run(*line, "--eps", "0.5", "--steps", "1", "--out", str(tmp_path / "o"), program=program)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert (tmp_path / "o" / "counterfactuals.json").is_file()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_behind_stdout_exits_with_6() -> None:
    done = run("models", "--json", program="import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)")
    assert done.returncode == 6
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_locale_without_the_letters_does_not_end_a_run() -> None:
    done = run("inspect", "кошка", PYTHONIOENCODING="latin-1", PYTHONUTF8="0")
    assert done.returncode == 5
    assert r"\u043a" in done.stderr


def test_completion_offers_the_commands() -> None:
    done = run(_RATIOCTL_COMPLETE="complete_bash", COMP_WORDS="ratioctl e", COMP_CWORD="1")
    assert done.stdout.split() == ["evaluate", "export"]


def test_color_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from ratioctl.cli import _common

    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert _common._colored("x", "31", Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert _common._colored("x", "31", Terminal()) == "x"


def test_python_m_ratioctl() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ratioctl", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("ratioctl ")
