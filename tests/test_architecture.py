"""Rules of the design, read from the syntax tree: imports go upstream only, there are no cycles, and modules
and functions are short.

No module is exempt from the rules of imports, the packages' own `__init__` included; imports inside functions
and under `if TYPE_CHECKING:` count as well. `ORDER` is the order in which the packages build on each other.
"""

from __future__ import annotations

import ast
import graphlib
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ratioctl

ROOT = Path(ratioctl.__file__).parent
ORDER = (
    *("errors", "_version", "utils", "recipe", "types", "images", "metrics", "scores", "package"),
    *("data", "models", "attacks", "training", "calibration", "onnx", "scoring", "counterfactuals"),
    *("evaluation", "report", "api", "classifier", "__init__", "server", "cli", "__main__"),
)
# Features that know nothing of each other.
INDEPENDENT = ("training", "calibration", "onnx", "counterfactuals", "report")
TORCH_FREE = (
    *("errors", "_version", "utils", "recipe", "types", "images", "metrics", "scores", "package", "scoring"),
    *("report", "api", "classifier", "server", "cli", "onnx.runtime", "onnx.explainer"),
    *("counterfactuals.epsilons", "counterfactuals.pipeline"),
)
MAX_MODULE, MAX_FUNCTION = 600, 80  # lines
LONGER: dict[str, str] = {}  # "attacks/pgd.py" or "attacks/pgd.py:search" -> why it may be longer
CLI_MODULE_LEVEL = {"errors", "utils", "cli", "scores"}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted names below `ratioctl` of all modules; a package has the name of its folder."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if {"assets", "recipes"} & set(parts):
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(tree: ast.AST, name: str, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules of ours that a syntax tree imports, with the line; `__init__` is the top package itself."""
    is_package = known[name].name == "__init__.py"
    inside = (
        () if name == "__init__" else tuple(name.split(".")) if is_package else tuple(name.split(".")[:-1])
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "ratioctl":
                    yield ".".join(parts[1:]) or "__init__", node.lineno
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                module = ("ratioctl", *inside[: len(inside) - node.level + 1], *module)
            if module[:1] != ("ratioctl",):
                continue
            base = ".".join(module[1:])
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                yield (whole if whole in known else base or "__init__"), node.lineno


def module_level(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and without `if TYPE_CHECKING:` blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def package_of(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def violations(root: Path = ROOT) -> list[str]:
    """One line for every import that goes downstream, and one for a cycle."""
    known = modules(root)
    found, graph = [], {}
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = package_of(name)
        edges = set(imports(tree, name, known))
        graph[name] = {target for target, _ in edges} - {name}
        for target, line in sorted(edges):
            there = package_of(target)
            if there != own and (there not in ORDER or ORDER.index(there) >= ORDER.index(own)):
                found.append(f"{path.relative_to(root)}:{line} imports {target}")
            if own in INDEPENDENT and there in INDEPENDENT and there != own:
                found.append(f"{path.relative_to(root)}:{line} imports {target}, another feature")
        if own == "cli":
            for target, line in sorted(set(imports(module_level(tree), name, known))):
                if package_of(target) not in CLI_MODULE_LEVEL:
                    found.append(f"{path.relative_to(root)}:{line} imports {target} at module level")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append("cycle: " + " -> ".join(error.args[1]))
    return found


def test_imports_go_upstream_and_form_no_cycle() -> None:
    assert violations() == []


def test_every_package_has_its_place_in_the_order() -> None:
    assert {package_of(name) for name in modules()} == set(ORDER)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("package/store.py", "from ratioctl import models"),
        ("package/store.py", "def f():\n    from ratioctl.models.network import load"),
        ("package/store.py", "if TYPE_CHECKING:\n    from ratioctl.models.network import load"),
        ("attacks/balls.py", "from ratioctl.training import loop"),
        ("attacks/balls.py", "from .. import training"),
        ("onnx/export.py", "from ratioctl.training.loop import fit"),
        ("report/page.py", "from ratioctl import counterfactuals"),
        ("images/arrays.py", "from ratioctl import __version__"),
        ("cli/train.py", "from ratioctl import recipe"),
        ("cli/train.py", "try:\n    from ratioctl.recipe import load\nexcept ImportError: pass"),
        ("utils/text.py", "from ratioctl.utils import files"),
    ],
)
def test_the_check_sees_forbidden_imports(tmp_path: Path, path: str, source: str) -> None:
    for name in ("models", "training", "recipe", "package", "counterfactuals", "utils", "attacks", "images"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "__init__.py").touch()
    (tmp_path / "utils" / "files.py").write_text("from ratioctl.utils.text import safe_text\n")
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source + "\n")
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("package/store.py", "from ratioctl.errors import PackageError"),
        ("attacks/engine.py", "from . import balls\nfrom ratioctl.recipe import Attack"),
        ("cli/train.py", "def train(context):\n    from ratioctl.training import loop"),
        ("images/arrays.py", "from ratioctl._version import __version__"),
    ],
)
def test_the_check_lets_legal_imports_pass(tmp_path: Path, path: str, source: str) -> None:
    for name in ("recipe", "training", "attacks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "attacks" / "balls.py").touch()
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source + "\n")
    assert violations(tmp_path) == []


def lengths(root: Path = ROOT) -> Iterator[tuple[str, int, int]]:
    """(name, lines, most lines) of all modules and functions; docstrings count, decorators do not."""
    for path in modules(root).values():
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        yield name, len(text.splitlines()), MAX_MODULE
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield f"{name}:{node.name}", lines, MAX_FUNCTION


def too_long(root: Path = ROOT) -> dict[str, int]:
    return {name: lines for name, lines, most in lengths(root) if lines > most}


def test_modules_and_functions_are_short() -> None:
    """A listed exception that is short again fails as well."""
    assert too_long().keys() == LONGER.keys(), too_long()


def test_the_check_sees_long_modules_and_functions(tmp_path: Path) -> None:
    def function(lines: int, indent: str = "") -> str:
        return f"{indent}def f():\n" + f"{indent}    pass\n" * (lines - 1)

    (tmp_path / "attacks").mkdir()
    (tmp_path / "attacks" / "pgd.py").write_text(function(80) + "x = 1\n" * 520)
    assert too_long(tmp_path) == {}
    (tmp_path / "attacks" / "pgd.py").write_text("x = 1\n" * 601)
    (tmp_path / "errors.py").write_text(function(81))
    (tmp_path / "types.py").write_text("class A:\n    @property\n" + function(81, "    "))
    (tmp_path / "scores.py").write_text("async " + function(82))
    assert too_long(tmp_path) == {
        "attacks/pgd.py": 601,
        "errors.py:f": 81,
        "types.py:f": 81,
        "scores.py:f": 82,
    }


def test_names_in_docstrings_and_comments_exist() -> None:
    for path in modules().values():
        for name in re.findall(r"`(ratioctl(?:\.\w+)+)", path.read_text(encoding="utf-8")):
            assert pydoc.locate(name) is not None, f"{path.relative_to(ROOT)} names {name}"


def test_torch_free_packages_load_no_torch() -> None:
    names = [
        f"ratioctl.{name}".removesuffix(".__init__")
        for name in modules()
        if name != "__main__" and any(name == free or name.startswith(f"{free}.") for free in TORCH_FREE)
    ]
    assert len(names) > 30
    program = (
        "import importlib, sys\n"
        "def load(names, forbidden):\n"
        "    for name in names:\n"
        "        importlib.import_module(name)\n"
        "        loaded = forbidden & set(sys.modules)\n"
        "        if loaded: sys.exit(f'{name} loads {loaded}')\n"
        "load(['ratioctl', 'ratioctl.cli', 'ratioctl.api'], {'torch', 'torchvision', 'numpy'})\n"
        f"load({names!r}, {{'torch', 'torchvision'}})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
