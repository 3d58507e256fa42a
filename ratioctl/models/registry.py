"""The registry of architectures.

A module in this folder registers its networks, and is found without being listed:

    @register_architecture("resnet18", undetermined=("stem_stride",))
    def resnet18(name: str, *, num_classes: int, channels: int, width: int = 64, stem_stride: int = 1): ...

Keyword arguments beyond `num_classes`, `channels` and `input_size` are the architecture's options: recipes
(`[model]`), packages (`architecture_options`) and `ratioctl package --arch-option` take them from here.
A builder with `**options` builds around another architecture, which its name holds after the first colon
("certified:resnet18"), and has that one's options too.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from ratioctl.errors import UsageError
from ratioctl.utils.registry import import_modules
from ratioctl.utils.suggest import one_of

Builder = Callable[..., nn.Module]
Inference = Callable[[Mapping[str, Tensor]], dict[str, Any]]
MAX_WIDTH = 4096
InputSize = int | tuple[int, int] | None  # the side of a square, or (height, width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One registered architecture, or a family of them.

    Attributes:
        names: as shown in messages and --help, for example ("wideresnet-28-10", "wideresnet-34-10").
        pattern: matches every name of the family.
        build: `build(name, num_classes=, channels=, input_size=, **options) -> nn.Module`; `name` is the
            matched name, `input_size` is passed where the builder takes it.
        options: their types by name: int, str, bool, or a Literal.
        infer: options that follow from the shapes of a checkpoint's tensors.
        undetermined: options that leave no trace in the weights. A package records them.
        normalizes: whether its networks take pixels in [0,1] and normalize them themselves.
        wraps: whether it is built around the architecture after the first colon of its name.
        ambiguous: whether an option must be given for an input of this size because no default is safe.
    """

    names: tuple[str, ...]
    pattern: re.Pattern[str]
    build: Builder
    options: Mapping[str, Any]
    defaults: Mapping[str, Any]
    infer: Inference
    undetermined: tuple[str, ...]
    ambiguous: Callable[[str, InputSize], str | None]
    normalizes: bool = False
    wraps: bool = False


_ARCHITECTURES: list[Architecture] = []


def register_architecture(
    *names: str,
    pattern: str | None = None,
    infer: Inference = lambda state: {},
    undetermined: tuple[str, ...] = (),
    ambiguous: Callable[[str, InputSize], str | None] = lambda option, input_size: None,
    normalizes: bool = False,
) -> Callable[[Builder], Builder]:
    """Register a builder under `names`, or under every name that `pattern` matches as a whole."""

    def register(build: Builder) -> Builder:
        hints = typing.get_type_hints(build)
        common = {"num_classes", "channels", "input_size"}
        parameters = list(inspect.signature(build).parameters.values())
        own = [p for p in parameters if p.kind == p.KEYWORD_ONLY and p.name not in common]
        _ARCHITECTURES.append(
            Architecture(
                names=names,
                pattern=re.compile(pattern or "|".join(map(re.escape, names))),
                build=build,
                options={p.name: hints[p.name] for p in own},
                defaults={p.name: p.default for p in own},
                infer=infer,
                undetermined=undetermined,
                ambiguous=ambiguous,
                normalizes=normalizes,
                wraps=any(p.kind == p.VAR_KEYWORD for p in parameters),
            )
        )
        return build

    return register


def architectures() -> list[str]:
    """Names of all architectures, for messages: ours, then "torchvision:NAME" and "timm:NAME"."""
    found = [name for architecture in _all() for name in architecture.names]
    return sorted(found, key=lambda name: (":" in name, found.index(name)))


def find_architecture(name: str) -> Architecture:
    """The architecture of that name; of one that wraps another, with the options of both.

    Raises:
        UsageError: unknown; the nearest is suggested and all are listed.
    """
    for architecture in _all():
        if architecture.pattern.fullmatch(name):
            if not architecture.wraps:
                return architecture
            inner = find_architecture(name.partition(":")[2])
            return dataclasses.replace(
                architecture,
                options={**inner.options, **architecture.options},
                defaults={**inner.defaults, **architecture.defaults},
                undetermined=inner.undetermined,
                ambiguous=inner.ambiguous,
                normalizes=inner.normalizes,
            )
    raise UsageError(name, "unknown architecture", one_of(name, architectures()))


def build_network(
    name: str, *, num_classes: int, channels: int, input_size: InputSize = None, **options: Any
) -> nn.Module:
    """A network with fresh weights. Options that are None keep their defaults.

    Raises:
        UsageError: unknown architecture, an option it does not have, or a value the option cannot take.
    """
    architecture = find_architecture(name)
    given = {key: value for key, value in options.items() if value is not None}
    for key, value in given.items():
        _check_option(architecture, name, key, value)
    if "input_size" in inspect.signature(architecture.build).parameters:
        given["input_size"] = input_size
    return architecture.build(name, num_classes=num_classes, channels=channels, **given)


def parse_option(name: str, text: str) -> tuple[str, Any]:
    """`KEY=VALUE` of the command line as an option of the architecture `name`, converted to its type.

    Raises:
        UsageError: not of that form, an unknown option, or an impossible value.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise UsageError(
            f"--arch-option {text}", "is not of the form KEY=VALUE", "For example stem_stride=2."
        )
    architecture = find_architecture(name)
    kind = architecture.options.get(key)
    converted: Any = value
    if kind is bool and value.lower() in ("true", "false"):
        converted = value.lower() == "true"
    elif kind is int and re.fullmatch(r"\d{1,9}", value):
        converted = int(value)
    _check_option(architecture, name, key, converted)
    return key, converted


def _check_option(architecture: Architecture, name: str, key: str, value: object) -> None:
    if key not in architecture.options:
        has = ", ".join(architecture.options)
        raise UsageError(name, f"has no {key} option", f"It has {has}." if has else "It has no options.")
    kind = architecture.options[key]
    if typing.get_origin(kind) is typing.Literal:
        valid = value in typing.get_args(kind)
        expected = " or ".join(map(str, typing.get_args(kind)))
    elif kind is bool:
        valid, expected = isinstance(value, bool), "true or false"
    else:
        valid, expected = type(value) is kind, "a whole number" if kind is int else kind.__name__
    if not valid:
        raise UsageError(f"{key} {value!r:.40}", f"is not a value for {name}", f"Use {expected}.")
    if key == "width" and not 1 <= typing.cast(int, value) <= MAX_WIDTH:
        raise UsageError(f"width {value!r:.40}", "is out of range", f"Use 1 to {MAX_WIDTH}.")


@cache
def _all() -> list[Architecture]:
    """The registry after every module of this folder has been imported."""
    import_modules("ratioctl.models")
    return _ARCHITECTURES
