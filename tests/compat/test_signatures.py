"""The verbs of `import ratioctl` and the command line: same parameters, same defaults.

Every difference is listed below with its reason. One that is not listed fails, and so does a listed one that
is gone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ratioctl
from ratioctl.cli import COMMANDS, load

VERBS = ("train", "calibrate", "evaluate", "counterfactual", "ood-score", "export", "package")
WITHOUT_A_VERB = (
    "thresholds",
    "parity",
    "init",
    "report",
    "figures",
    "serve",
    "inspect",
    "verify",
    "sign",
    "models",
    "cache",
    "merge",
)

FUNCTIONS = {"package": "package_checkpoint"}  # `ratioctl.package` is a module

# Options that scripts use; a command may have more of them.
COMMON = ("--json", "--quiet", "-q", "--verbose", "-v", "--device", "--precision", "--seed")
OPTIONS = {
    "train": ("--out", "--set", "--resume", "--init", "--max-time", "--download"),
    "calibrate": ("--data", "--objective", "--out", "--download"),
    "evaluate": ("--data", "--ood", "--suite", "--limit", "--resume", "--write", "--out", "--download"),
    "counterfactual": (
        *("--target", "--model", "--eps", "--norm", "--steps", "--restarts", "--until", "--region"),
        *("--format", "--out", "--open", "--bit-depth"),
    ),
    "ood-score": (
        *("--model", "--threshold", "--format", "--output", "--probabilities", "--worst-case"),
        *("--fail-on-ood", "--skip-errors", "--bit-depth"),
    ),
    "export": ("--output", "--input", "--threshold", "--int8", "--layout", "--opset"),
    "serve": ("--host", "--port", "--token"),
    "package": ("--arch", "--labels", "--mean", "--std", "--input-size", "--data", "--out"),
    "inspect": (),
    "thresholds": ("--out",),
    "parity": ("--data", "--tolerance", "--out"),
    "verify": ("--public-key",),
    "sign": (),
    "models": (),
    "cache": ("--clear",),
    "figures": ("--data", "--ood", "--eps", "--steps", "--out"),
    "report": ("--data", "--ood", "--limit", "--out"),
    "init": ("--outside", "--arch", "--size", "--out"),
}

# Of the terminal: a function returns its result, raises its errors and prints nothing.
TERMINAL = {"--json", "--quiet", "--verbose"}
TERMINAL_OF = {
    "counterfactual": {
        "--format",  # an animation beside the pictures
        "--open",  # the page in a browser
        "--live",  # what that page can do
    },
    "ood-score": {
        "--format",  # rows are values in Python
        "--output",
        "--csv-safe",
        "--save-flagged",  # `counterfactual` is its own function
        "--fail-on-ood",  # an exit code
        "--skip-errors",  # an exit code; in Python an unreadable image is always a row
    },
}
# Of Python: progress events, which the commands draw as a bar.
PYTHON_ONLY = {"train": {"callback"}, "evaluate": {"callback"}}
# The option's word is a builtin, too short for an identifier, or means one value in other verbs.
RENAMED = {
    ("train", "--set"): "settings",
    ("export", "--input"): "input_type",
    ("calibrate", "--threshold"): "thresholds",
    ("package", "--arch-option"): "arch_options",
}
# (default of the command line, of the function)
OTHER_DEFAULT = {
    # A command has to leave its answers somewhere; a function returns them and writes where it is told to.
    ("counterfactual", "--out"): (Path("counterfactuals"), None),
    # Repeatable options, which start empty: the help states the function's default.
    ("counterfactual", "--model"): (None, "cifar10-ratio"),
    ("counterfactual", "--norm"): (None, "2"),
}
# Every command takes the common options; --help shows them where they have an effect, and only there they
# are parameters.
INCONSISTENT = {
    ("calibrate", "--precision"): "scores are always computed in fp32",
    ("calibrate", "--seed"): "nothing is random: the held-out split follows the seed of the recipe",
    ("export", "--device"): "tracing and the parity check run on the CPU",
    ("export", "--precision"): "tracing and the parity check run in fp32",
    ("export", "--seed"): "images are chosen with a fixed seed",
    ("package", "--device"): "a trial forward pass runs on the CPU",
    ("package", "--precision"): "a trial forward pass runs in fp32",
    ("package", "--seed"): "nothing is random",
}


def option_of(parameter: Any) -> str:
    """ "--out", or the name of an argument."""
    long = [spelling for spelling in parameter.opts if spelling.startswith("--")]
    return (long or parameter.opts)[0]


def function_of(verb: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(ratioctl, FUNCTIONS.get(verb, verb.replace("-", "_")))
    return function


def differences(verb: str, function: Callable[..., Any]) -> dict[tuple[str, str], str]:
    """(verb, option, argument or parameter) -> what differs, less what is listed as intended.

    Raises AssertionError for a listed difference that is not there.
    """
    found: dict[tuple[str, str], str] = {}
    given = dict(inspect.signature(function).parameters)
    positional = [name for name, p in given.items() if p.kind is not p.KEYWORD_ONLY]
    arguments = [p for p in load(verb).params if p.param_type_name == "argument"]
    options = [p for p in load(verb).params if p.param_type_name == "option"]
    if [p.name for p in arguments] != positional:
        found[verb, "arguments"] = f"{[p.name for p in arguments]}, but {positional} in Python"
    for parameter in [*arguments, *options]:
        key = verb, option_of(parameter)
        if key[1] in TERMINAL | TERMINAL_OF.get(verb, set()):
            continue
        name = RENAMED.get(key, key[1].lstrip("-").replace("-", "_"))
        own = given.pop(name, None)
        if own is None:
            found[key] = "not in Python"
            continue
        if own.kind is own.VAR_POSITIONAL:
            if parameter.nargs != -1 or parameter.required:
                found[key] = f"*{name} in Python, but not any number of them"
            continue
        if parameter.required != (own.default is own.empty):
            found[key] = f"required: {parameter.required}, but its default in Python is {own.default!r}"
            continue
        if parameter.required:
            continue
        # A repeatable option that is not given is an empty sequence.
        typed = () if parameter.multiple and parameter.default is None else parameter.default
        if key in OTHER_DEFAULT:
            expected = OTHER_DEFAULT[key]
            if (parameter.default, own.default) != expected:
                found[key] = f"defaults {parameter.default!r} and {own.default!r}, not {expected!r}"
        elif (type(typed), typed) != (type(own.default), own.default):
            found[key] = f"default {typed!r}, but {own.default!r} in Python"
    for name in given.keys() - PYTHON_ONLY.get(verb, set()):
        found[verb, name] = "not on the command line"
    gone = PYTHON_ONLY.get(verb, set()) - given.keys()
    gone |= TERMINAL_OF.get(verb, set()) - {option_of(p) for p in options}
    gone |= {o for v, o in (*RENAMED, *OTHER_DEFAULT) if v == verb} - {option_of(p) for p in options}
    assert not gone, f"listed for {verb}, but not there: {sorted(gone)}"
    return found


def test_every_command_is_a_verb_or_listed_without_one() -> None:
    assert set(COMMANDS) == {*VERBS, *WITHOUT_A_VERB}
    assert {FUNCTIONS.get(verb, verb.replace("-", "_")) for verb in VERBS} | {"load_model"} <= set(
        ratioctl.__all__
    )


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_the_contract_are_there(command: str) -> None:
    have = {spelling for parameter in load(command).params for spelling in parameter.opts}
    assert {*COMMON, *OPTIONS[command]} - have == set()


@pytest.mark.parametrize("verb", VERBS)
def test_python_and_command_line_agree(verb: str) -> None:
    known = {key: "not in Python" for key in INCONSISTENT if key[0] == verb}
    assert differences(verb, function_of(verb)) == known


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_keywords_in_python(verb: str) -> None:
    kinds = {name: p.kind for name, p in inspect.signature(function_of(verb)).parameters.items()}
    first, *rest = kinds.values()
    assert first in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    assert set(rest) == {inspect.Parameter.KEYWORD_ONLY}


def test_defaults_of_repeatable_options_are_stated_in_the_help() -> None:
    model = inspect.signature(ratioctl.load_model).parameters["model"].default
    stated = {
        (verb, option_of(parameter)): found[1]
        for verb in VERBS
        for parameter in load(verb).params
        if (parameter.multiple or parameter.nargs == -1)
        and (found := re.search(r"\[default: ([^\]]*)\]", parameter.help or ""))
    }
    in_python = {key: default for key, (typed, default) in OTHER_DEFAULT.items() if typed is None}
    assert stated == {**in_python, ("evaluate", "models"): model}


def test_differences_are_found() -> None:
    def calibrate(
        model: str = "cifar10-ratio",
        *,
        data: str | None = None,
        objective: str | None = "nll",
        device: str = "auto",
        download: int = 0,
        threads: int = 1,
    ) -> None: ...

    assert differences("calibrate", calibrate) == {
        ("calibrate", "--objective"): "default None, but 'nll' in Python",
        ("calibrate", "--download"): "default False, but 0 in Python",
        ("calibrate", "--out"): "not in Python",
        ("calibrate", "--score"): "not in Python",
        ("calibrate", "--ood"): "not in Python",
        ("calibrate", "--threshold"): "not in Python",
        ("calibrate", "--per-class"): "not in Python",
        ("calibrate", "--keep-temperature"): "not in Python",
        ("calibrate", "--weights"): "not in Python",
        ("calibrate", "--precision"): "not in Python",
        ("calibrate", "--seed"): "not in Python",
        ("calibrate", "threads"): "not on the command line",
    }

    def export(package: str, *, output: Path | None = None) -> None: ...

    found = differences("export", export)
    assert found["export", "arguments"] == "['model'], but ['package'] in Python"
    assert found["export", "model"] == "not in Python"
    assert found["export", "package"] == "not on the command line"


def test_a_listed_difference_that_is_gone_is_found() -> None:
    def train(recipe: str) -> None: ...

    with pytest.raises(AssertionError, match="callback"):
        differences("train", train)
