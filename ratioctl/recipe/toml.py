"""Recipes as TOML files: find, inherit, override, explain what is wrong."""

from __future__ import annotations

import contextlib
import copy
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ratioctl.errors import RecipeError
from ratioctl.recipe.schema import RENAMED, Recipe
from ratioctl.utils import resources
from ratioctl.utils.suggest import did_you_mean, nearest
from ratioctl.utils.text import reason_of

Tree = dict[str, Any]
_CURRENT = {earlier: key for key, earlier in RENAMED.items()}


def available() -> list[str]:
    """Names of the bundled recipes, sorted. Files whose name starts with "_" are bases, not recipes."""
    return sorted(p.stem for p in resources.folder("recipes").glob("*.toml") if not p.name.startswith("_"))


def find(name_or_path: str | Path, beside: Path | None = None) -> Path:
    """The recipe file of a path, or of the name of a bundled recipe.

    Args:
        beside: folder in which relative names are looked up first (that of the file which names a base).

    Raises:
        RecipeError: there is no such file; the nearest bundled name is suggested.
    """
    path = Path(name_or_path)
    local = path if beside is None else beside / path
    for candidate in (local, local.with_name(local.name + ".toml") if beside else local):
        if candidate.is_file():
            return candidate
    if local.is_dir():
        raise RecipeError(local, "is a folder, not a recipe", "Name the .toml file in it.")
    bundled = resources.folder("recipes") / (path.name.removesuffix(".toml") + ".toml")
    looks_bundled = len(path.parts) == 1 or path.parts[:-1] == ("recipes",)
    if looks_bundled and bundled.is_file():
        return bundled
    names = available()
    hint = f"{did_you_mean(path.name.removesuffix('.toml'), names)} Bundled recipes: {', '.join(names)}."
    raise RecipeError(name_or_path, "no such recipe", hint.lstrip())


def load(name_or_path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, its bases and `KEY=VALUE` settings into a validated `Recipe`.

    Args:
        name_or_path: a TOML file, or the name of a bundled recipe.
        settings: "a.b=c" each; c is read as a TOML value if it is one, else as text. "a.b=" without a value
            restores the default.

    Raises:
        RecipeError: unreadable file, invalid TOML, a circular base, an unknown key (the nearest known one is
            named), an impossible value, or OOD images that no term of the objective uses.
    """
    path = find(name_or_path)
    own = _read(path)
    tree = _inherit(own, path, ())
    alone = copy.deepcopy(tree)
    if "name" not in tree and path.name.startswith("_"):
        used = f'base = "{path.name}"'
        raise RecipeError(path, "is a base for other recipes and has no name", f"Name a recipe with {used}.")
    data = own.get("data")
    named_here = isinstance(data, dict) and "outside" in data
    set_by = {_apply(tree, setting): f"--set {setting}" for setting in settings}
    try:
        recipe = Recipe.model_validate(_with_current_names(tree, path))
    except ValidationError as error:
        raise _blamed(error, path, alone, set_by) from None
    named_here = named_here or "data.outside" in set_by
    if recipe.data.outside and not recipe.objective.uses_ood and (named_here or "objective" not in tree):
        raise RecipeError(
            set_by.get("data.outside", path),
            "data.outside names OOD images, but the objective has no OOD term (objective.outside)",
            "Add an [objective.outside] table (clean = 1.0 for outlier exposure), or remove data.outside.",
        )
    return recipe


def parse(tree: Tree, where: str = "recipe") -> Recipe:
    """Validate a tree of plain values, as read from TOML without `base`. Raises RecipeError."""
    try:
        return Recipe.model_validate(_with_current_names(tree, where))
    except ValidationError as error:
        raise RecipeError(where, _explain(error), "Correct the recipe.") from None


def _blamed(error: ValidationError, path: Path, alone: Tree, set_by: Mapping[str, str]) -> RecipeError:
    """The error of a recipe with settings: of those options where the file `alone` is valid.

    Args:
        set_by: the option that set each key.
    """
    if set_by:
        with contextlib.suppress(RecipeError):
            parse(alone)
            found = [".".join(map(str, item["loc"])) for item in error.errors()]
            near = [option for key, option in set_by.items() if any(_overlap(key, at) for at in found)]
            options = ", ".join(near or set_by.values())
            return RecipeError(options, _explain(error), "Correct the option.")
    return RecipeError(path, _explain(error), "Correct the recipe.")


def _overlap(one: str, other: str) -> bool:
    """Whether one of two dotted keys contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def loads(text: str, where: str = "recipe.toml") -> Recipe:
    """A `Recipe` from the text `dumps` wrote. Raises RecipeError."""
    return parse(_toml(text, where), where)


def dumps(recipe: Recipe) -> str:
    """The complete recipe as TOML, every default written out; `loads` returns an equal value."""
    import tomli_w  # not part of the installation that only scores

    return tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True))


def _toml(text: str, where: object) -> Tree:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one; so is a number of 5,000 digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(where, f"not valid TOML: {reason}", "Correct that line.") from None


def _read(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(path, f"cannot be read: {reason}", "A recipe is a UTF-8 TOML file.") from None
    return _with_current_names(_toml(text, path), path)


def _inherit(tree: Tree, path: Path, seen: tuple[Path, ...]) -> Tree:
    """The merged tree of a file and its bases: the file's values win, tables merge key by key.

    `unset = ["data.test", ...]` removes inherited values, which restores the defaults.
    """
    here = path.resolve()
    if here in seen:
        chain = " -> ".join(p.name for p in (*seen, here))
        raise RecipeError(path, f"bases form a cycle: {chain}", 'Remove one of the "base" lines.')
    tree = dict(tree)
    base, unset = tree.pop("base", None), tree.pop("unset", [])
    if not isinstance(unset, list) or not all(isinstance(key, str) for key in unset):
        raise RecipeError(path, "unset must be a list of keys", 'For example: unset = ["optim.grad_clip"].')
    if base is None:
        if unset:
            raise RecipeError(path, "unset has no effect without a base", "Remove the line, or add a base.")
        return tree
    if not isinstance(base, str) or not base:
        raise RecipeError(path, "base must name a recipe", 'For example: base = "other.toml".')
    try:
        base_path = find(base, beside=path.parent)
    except RecipeError as error:
        step = f"It is looked for in {path.parent} and among the bundled recipes. {error.next_step}"
        raise RecipeError(path, f'its base "{base}" does not exist', step) from None
    under = _inherit(_read(base_path), base_path, (*seen, here))
    for key in unset:
        if not _remove(under, str(_CURRENT.get(key, key))):
            raise RecipeError(path, f'unset names "{key}", which its base does not set', "Remove it.")
    return _merge(under, tree)


def _merge(under: Tree, over: Tree) -> Tree:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _remove(tree: Tree, dotted: str) -> bool:
    """Remove a key; whether it was there."""
    *tables, last = dotted.split(".")
    node: Any = tree
    for part in tables:
        node = node.get(part) if isinstance(node, dict) else None
    return isinstance(node, dict) and node.pop(last, None) is not None


def _with_current_names(tree: Tree, where: object) -> Tree:
    """`tree` with the names that keys have today. Raises RecipeError where both are given."""
    for earlier, key in _CURRENT.items():
        table, name = earlier.split(".")
        values = tree.get(table)
        if isinstance(values, dict) and name in values:
            new = key.split(".")[1]
            if new in values:
                reason = f"{table}.{name} is the earlier name of {key}, and both are given"
                raise RecipeError(where, reason, f"Remove {table}.{name}.")
            tree = {**tree, table: {new if k == name else k: v for k, v in values.items()}}
    return tree


def _apply(tree: Tree, setting: str) -> str:
    """Apply one `KEY=VALUE` to the tree; the key under its current name."""
    key, equals, text = setting.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise RecipeError(f"--set {setting}", "is not KEY=VALUE", "For example: --set optim.epochs=10.")
    dotted = _CURRENT.get(".".join(parts), ".".join(parts))
    *tables, last = dotted.split(".")
    if not text.strip():
        _remove(tree, dotted)
        return dotted
    try:
        value: Any = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    node = tree
    for part in tables:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise RecipeError(f"--set {setting}", f'"{part}" is a value, not a table', "Set it as a whole.")
        node = child
    node[last] = value
    return dotted


def _explain(error: ValidationError) -> str:
    """All findings of pydantic in one sentence each, unknown keys with the nearest known one."""
    findings = []
    for item in error.errors():
        loc = [str(part) for part in item["loc"]]
        dotted = ".".join(loc) or "recipe"
        if item["type"] == "extra_forbidden":
            table = _schema_at(loc[:-1])
            known = sorted(table.model_fields) if table else []
            near = nearest(loc[-1], known, cutoff=0.5)
            hint = f'did you mean "{near}"?' if near else f"known here: {', '.join(known)}"
            if table:
                hint += f" (documented by: python -m pydoc ratioctl.recipe.{table.__name__})"
            findings.append(f'unknown key "{dotted}"; {hint}')
        elif item["type"] == "missing":
            findings.append(f'"{dotted}" is missing')
        else:
            shown = "" if isinstance(item["input"], dict | BaseModel) else f" (given: {item['input']!r})"
            findings.append(f'"{dotted}": {reason_of(item)}{shown}')
    return "; ".join(findings)


def _schema_at(loc: Sequence[str]) -> type[BaseModel] | None:
    """The model of the table at `loc`, None where there is no table."""
    model: Any = Recipe
    for part in loc:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        model = annotation
    return typing.cast(type[BaseModel], model)
