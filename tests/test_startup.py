"""What a process loads: which modules were imported is the test, the time follows from it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Typer and what it needs itself; everything else must wait for a command's body.
TYPER = {"typer", "click", "shellingham", "annotated_doc", "typing_extensions", "colorama"}
HEAVY = {"torch", "torchvision", "numpy", "onnx", "onnxruntime", "PIL", "matplotlib", "sklearn", "rich"}


def third_party(program: str) -> set[str]:
    """Top-level modules outside the standard library that `program` loads in a fresh interpreter."""
    wrapped = (
        "import sys\nbefore = set(sys.modules)\n"
        f"{program}\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('LOADED', *sorted(names - set(sys.stdlib_module_names)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("LOADED")
    return set(last.split()[1:])


@pytest.mark.parametrize("line", [["--help"], ["--version"]])
def test_help_loads_the_standard_library_and_typer(line: list[str]) -> None:
    loaded = third_party(f"from ratioctl.cli import main\nassert main({line!r}) == 0")
    assert loaded - TYPER - {"ratioctl"} == set()
    assert "typer" in loaded  # the check itself works


def test_the_commands_help_loads_nothing_heavy() -> None:
    program = (
        "from ratioctl.cli import COMMANDS, main\n"
        "assert [main([c, '--help']) for c in COMMANDS] == [0] * len(COMMANDS)"
    )
    loaded = third_party(program)
    assert loaded & HEAVY == set()


def test_import_ratioctl_is_light() -> None:
    assert third_party("import ratioctl") <= {"ratioctl"}


def test_inspecting_a_package_loads_no_torch() -> None:
    program = "from ratioctl.cli import main\nassert main(['inspect', 'no-such-model']) == 5"
    assert {"torch", "onnxruntime"} & third_party(program) == set()
