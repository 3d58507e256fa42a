"""The import table of the design, read from the syntax tree, and the rooms that must not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ratioctl

ROOT = Path(ratioctl.__file__).parent
OPEN = {"errors", "resources", "text", "files", "ranges", "journal"}  # to all; import each other at most
WORK = {"recipe", "images", "data", "nets", "attack", "package", "metrics", "results", "runtime"}
TABLE: dict[str, set[str]] = {
    "errors": set(),
    "resources": set(),
    "text": set(),
    "files": {"errors"},
    "ranges": {"errors"},
    "journal": {"files"},
    "recipe": set(),
    "images": set(),
    "metrics": set(),
    "results": {"recipe"},
    "package": set(),
    "signing": {"package"},
    "runtime": {"package", "images", "metrics", "results"},
    "score": {"package", "images", "metrics", "results"},
    "data": {"recipe", "images"},
    "nets": {"recipe", "package"},
    "attack": {"recipe"},
    "objective": {"recipe", "attack", "data"},
    "train": {"recipe", "data", "nets", "attack", "objective", "package"},
    "calibrate": WORK,
    "evaluate": WORK,
    "explain": WORK,
    "export": WORK,
    "pictures": {"results"},
    "report": {"results", "metrics", "explorer", "pictures"},
    "explorer": set(),
    "evaluation_report": {"results", "metrics", "explanation_tables"},
    "explanation_tables": {"results", "evaluation_report"},
}
TORCH_FREE = (
    *("errors", "recipe", "images", "metrics", "results", "package", "signing", "runtime", "score"),
    *("report", "evaluation_report", "explanation_tables", "explorer", "pictures"),
)
CLI_MODULE_LEVEL = {"cli", "errors", "text", "resources"}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if not {"assets", "recipes"} & set(path.parts))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, path: Path, root: Path = ROOT) -> Iterator[tuple[str, int]]:
    """Rooms that a syntax tree imports, with the line; "" where the package itself is meant."""
    inside = ("ratioctl", *path.relative_to(root).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "ratioctl":
                    yield (parts[1] if len(parts) > 1 else ""), node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            parts_from = inside[: len(inside) - node.level + 1] + module if node.level else module
            if parts_from[:1] != ("ratioctl",):
                continue
            if len(parts_from) > 1:
                yield parts_from[1], node.lineno
            else:
                for alias in node.names:
                    is_room = (root / alias.name).is_dir() or (root / f"{alias.name}.py").exists()
                    if is_room:
                        yield alias.name, node.lineno


def module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without `if TYPE_CHECKING:` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def violations(path: Path, source: str, root: Path = ROOT) -> list[str]:
    room, tree = path.relative_to(root).parts[0].removesuffix(".py"), ast.parse(source)
    if room in ("cli", "__main__"):
        allowed, tree = CLI_MODULE_LEVEL, module_level(tree)
    elif room == "__init__":
        allowed, tree = set(), module_level(tree)
    else:
        allowed = TABLE[room] | OPEN | {room}
    found = imports(tree, path=path, root=root)
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for name, line in found
        if name and name not in allowed
    ]


def test_every_room_imports_only_what_the_table_allows() -> None:
    found = [line for path in modules() for line in violations(path, path.read_text(encoding="utf-8"))]
    assert found == []


def test_every_module_is_a_room_of_the_table() -> None:
    rooms = {room_of(path) for path in modules()} - {"__init__", "__main__", "cli"}
    assert rooms <= set(TABLE)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("package.py", "from ratioctl import nets"),
        ("package.py", "import ratioctl.recipe"),
        ("package.py", "def f():\n    from ratioctl.nets.classifier import load"),
        ("attack/ball.py", "from ratioctl.data import inside"),
        ("attack/ball.py", "from .. import data"),
        ("evaluate.py", "from ratioctl.train import fit"),
        ("explain.py", "from ratioctl import evaluate"),
        ("report.py", "from ratioctl import package"),
        ("cli/train.py", "from ratioctl import train"),
        ("cli/train.py", "try:\n    from ratioctl.recipe import load\nexcept ImportError: pass"),
        ("__init__.py", "from ratioctl.recipe import Recipe"),
    ],
)
def test_the_check_sees_forbidden_imports(tmp_path: Path, path: str, source: str) -> None:
    for name in ("nets", "data", "recipe", "train", "evaluate", "package"):
        (tmp_path / f"{name}.py").touch()
    assert len(violations(tmp_path / path, source, tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("package.py", "from ratioctl.errors import PackageError"),
        ("attack/engine.py", "from . import ball\nfrom ratioctl.recipe import Attack"),
        ("cli/train.py", "def train(context):\n    from ratioctl import train as verbs"),
        ("cli/train.py", "from ratioctl import __version__"),
    ],
)
def test_the_check_lets_legal_imports_pass(tmp_path: Path, path: str, source: str) -> None:
    (tmp_path / "train.py").touch()
    assert violations(tmp_path / path, source, tmp_path) == []


def test_torch_free_rooms_load_no_torch() -> None:
    names = [f"ratioctl.{room}" for room in TORCH_FREE if (ROOT / f"{room}.py").exists()]
    names += [f"ratioctl.cli.{path.stem}" for path in sorted((ROOT / "cli").glob("[!_]*.py"))]
    program = (
        "import importlib, sys\n"
        f"for name in {['ratioctl', *names]!r}:\n"
        "    importlib.import_module(name)\n"
        "    loaded = {'torch', 'torchvision'} & set(sys.modules)\n"
        "    if loaded: sys.exit(f'{name} loads {loaded}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
