"""Recipes as TOML files: find, inherit, override, explain what is wrong."""

from __future__ import annotations

import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from ratioctl.errors import RecipeError
from ratioctl.recipe.schema import Recipe
from ratioctl.utils import resources
from ratioctl.utils.suggest import did_you_mean, nearest
from ratioctl.utils.text import reason_of


def available() -> list[str]:
    """Names of the bundled recipes, sorted; files whose name starts with "_" are bases, not recipes."""
    return sorted(p.stem for p in resources.folder("recipes").glob("*.toml") if not p.name.startswith("_"))


def find(name_or_path: str | Path) -> Path:
    """The recipe file meant by a path, or by the name of a bundled recipe.

    Raises:
        RecipeError: there is no such file; the nearest bundled name is suggested.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(path, "is a folder, not a recipe", "Name the .toml file in it.")
    bundled = resources.folder("recipes") / (path.name.removesuffix(".toml") + ".toml")
    looks_bundled = len(path.parts) == 1 or path.parts[:-1] == ("recipes",)
    if looks_bundled and bundled.is_file():
        return bundled
    names = available()
    hint = did_you_mean(path.name.removesuffix(".toml"), names)
    raise RecipeError(name_or_path, "no such recipe", f"{hint} Bundled recipes: {', '.join(names)}.".lstrip())


def load(name_or_path: str | Path, settings: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file, its bases and `KEY=VALUE` settings into a checked `Recipe`.

    Args:
        name_or_path: a TOML file, or the name of a bundled recipe.
        settings: "a.b=c" each; c is read as a TOML value where it is one, else as text.

    Raises:
        RecipeError: unreadable file, invalid TOML, a circular base, an unknown key (the nearest known
            one is named) or an impossible value.
    """
    path = find(name_or_path)
    tree = _read_tree(path, ())
    if "name" not in tree and path.name.startswith("_"):
        used = f'base = "{path.name}"'
        raise RecipeError(path, "is a base for other recipes and has no name", f"Name a recipe with {used}.")
    for setting in settings:
        _apply(tree, setting)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a tree of plain values, as read from TOML without `base`, into a `Recipe`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(where, _explain(error), "Correct the recipe, or the --set option.") from None


def loads(text: str, where: str = "recipe.toml") -> Recipe:
    """A `Recipe` from the text `dumps` wrote. Raises RecipeError."""
    return parse(_toml(text, where), where)


def dumps(recipe: Recipe) -> str:
    """The complete recipe as TOML, every default written out; `loads` returns an equal value."""
    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _toml(text: str, where: object) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one; so is a number of 5,000 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(where, f"not valid TOML: {reason}", "Correct that line.") from None


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The merged tree of a file and its bases; the file's own values win, tables merge key by key."""
    here = path.resolve()
    if here in seen:
        chain = " -> ".join(p.name for p in (*seen, here))
        raise RecipeError(path, f"bases form a circle: {chain}", 'Remove one of the "base" lines.')
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(path, f"cannot be read: {reason}", "A recipe is a UTF-8 TOML file.") from None
    tree = _toml(text, path)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(path, "base must be the name of a recipe file", 'For example: base = "other.toml".')
    base_path = path.parent / base
    if not base_path.is_file():
        raise RecipeError(path, f'its base "{base}" does not exist', f"It is looked for at {base_path}.")
    return _merge(_read_tree(base_path, (*seen, here)), tree)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(f"--set {setting}", "is not KEY=VALUE", "For example: --set optim.epochs=10.")
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    node = tree
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {setting}", f'"{part}" is a value, not a table', "Set it as a whole.")
        node = child
    node[parts[-1]] = value


def _explain(error: ValidationError) -> str:
    """All findings of pydantic in one sentence each, unknown keys with the nearest known one."""
    findings = []
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        dotted = ".".join(loc) or "recipe"
        if item["type"] == "extra_forbidden":
            known = _fields_at(loc[:-1])
            near = nearest(loc[-1], known, cutoff=0.5)
            hint = f'did you mean "{near}"?' if near else f"known here: {', '.join(known)}"
            findings.append(f'unknown key "{dotted}"; {hint}')
        elif item["type"] == "missing":
            findings.append(f'"{dotted}" is missing')
        else:
            shown = "" if isinstance(item["input"], dict | BaseModel) else f" (given: {item['input']!r})"
            findings.append(f'"{dotted}": {reason_of(item)}{shown}')
    return "; ".join(findings)


def _fields_at(loc: typing.Sequence[str]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)
