"""Registries of named implementations, one module each, which are found without being listed.

Scores, sources and architectures are found by `import_modules`. Attack methods use `Registry`, whose names
are known before anything is imported; a module declares itself with a decorator of literal arguments:

    @register_attack("pgd", norms=("1", "2", "inf"))
    def pgd(problem, x, attack): ...

The recipe schema checks names and options of attacks and works without torch, which these modules import. So
they are read from the source; `get` imports the module.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from ratioctl.utils.suggest import nearest

T = TypeVar("T")


def import_modules(package: str) -> None:
    """Import every module of a package, so that it registers what it declares."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


class Registry(Generic[T]):
    """Implementations of one kind.

    Args:
        kind: what an entry is called in messages, "attack method".
        package: below `ratioctl`, the folder whose modules declare entries, "attacks".
        decorator: the name of the decorator there, "register_attack".
    """

    def __init__(self, kind: str, package: str, decorator: str) -> None:
        self.kind, self.package, self.decorator = kind, package, decorator
        self._loaded: dict[str, T] = {}

    def register(self, name: str, **options: Any) -> Callable[[T], T]:
        """Decorator that adds an implementation; modules outside the package may use it too."""

        def add(implementation: T) -> T:
            if name in self._loaded:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._loaded[name] = implementation
            self._options.setdefault(name, options)
            return implementation

        return add

    def names(self) -> tuple[str, ...]:
        return tuple(self._options)

    def options(self, name: str) -> dict[str, Any]:
        """Keyword arguments of the declaration. Raises ValueError for an unknown name."""
        self.check(name)
        return self._options[name]

    def check(self, name: str) -> str:
        """`name` itself. Raises ValueError for an unknown one, with the closest known name."""
        if name in self._options:
            return name
        near = nearest(name, self._options)
        hint = f'; did you mean "{near}"?' if near else ""
        known = ", ".join(f'"{one}"' for one in self._options)
        raise ValueError(f'unknown {self.kind} "{name}"{hint} (known: {known})')

    def get(self, name: str) -> T:
        """The implementation; its module is imported on first use. Raises ValueError for an unknown name."""
        if self.check(name) not in self._loaded:
            importlib.import_module(f"ratioctl.{self.package}.{self._modules[name]}")
        return self._loaded[name]

    @cached_property
    def _modules(self) -> dict[str, str]:
        return {name: module for name, (module, _) in self._declared.items()}

    @cached_property
    def _options(self) -> dict[str, dict[str, Any]]:
        return {name: options for name, (_, options) in self._declared.items()}

    @cached_property
    def _declared(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Name -> module, options; in the order of the modules' names."""
        found = {}
        folder = Path(__file__).parent.parent / self.package
        for path in sorted(folder.glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if f"@{self.decorator}(" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                for call in getattr(node, "decorator_list", ()):
                    if isinstance(call, ast.Call) and getattr(call.func, "id", None) == self.decorator:
                        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
                        found[ast.literal_eval(call.args[0])] = (path.stem, options)
        return found
