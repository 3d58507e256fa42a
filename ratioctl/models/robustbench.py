"""Networks of RobustBench (Croce et al. 2021, arXiv 2010.09670), by name: "robustbench:NAME".

Only their definitions are used: the weights are a file of the user's. They take pixels in [0,1].
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import nn

from ratioctl.errors import UsageError
from ratioctl.models.registry import register_architecture
from ratioctl.utils.suggest import did_you_mean

_INSTALL = 'pip install --no-deps robustbench torchdiffeq geotorch gdown "setuptools<81"'
_ALIASES = {"autoattack": "pyautoattack", "autoattack.state": "pyautoattack.state"}


@register_architecture("robustbench:NAME", pattern="robustbench:.+", normalizes=True)
def of_robustbench(
    name: str,
    *,
    num_classes: int,
    channels: int = 3,
    dataset: Literal["cifar10", "cifar100", "imagenet", "any"] = "any",
    threat: Literal["Linf", "L2", "corruptions", "any"] = "any",
) -> nn.Module:
    """A network of RobustBench's model zoo.

    Args:
        dataset, threat: which entry of that name; needed where there are several.

    Raises:
        UsageError: RobustBench is not installed, it has no such model or several, or `channels` is not 3.
    """
    if channels != 3:
        raise UsageError(name, f"cannot take {channels} channel(s)", "Use images with 3 channels.")
    short = name.partition(":")[2]
    zoo = _zoo()
    found = {
        place: models[short]
        for place, models in zoo.items()
        if short in models and dataset in ("any", place[0]) and threat in ("any", place[1])
    }
    if not found:
        known = sorted({model for models in zoo.values() for model in models})
        where = "" if (dataset, threat) == ("any", "any") else f" for dataset {dataset} and threat {threat}"
        step = did_you_mean(short, known, prefix="robustbench:") or "Its leaderboard lists the names."
        raise UsageError(name, f"RobustBench has no such model{where}", step)
    if len(found) > 1:
        (first, second), *_ = found
        places = ", ".join("/".join(place) for place in found)
        step = f"Add --arch-option dataset={first} --arch-option threat={second}, for example."
        raise UsageError(name, f"RobustBench has several models of that name ({places})", step)
    (entry,) = found.values()
    return entry["model"]()


def _zoo() -> dict[tuple[str, str], Mapping[str, Any]]:
    """RobustBench's models by (dataset, threat). Raises UsageError if it cannot be imported."""
    if importlib.util.find_spec("robustbench") is None:
        raise UsageError("robustbench:", "RobustBench is not installed", f"Install it: {_INSTALL}.")
    try:
        with _earlier_name():
            table = importlib.import_module("robustbench.model_zoo.models").model_dicts
    except Exception as error:  # of a dependency, of which it has many
        reason = f"RobustBench cannot be imported: {' '.join(str(error).split())[:200]}"
        raise UsageError("robustbench:", reason, f"It needs: {_INSTALL}.") from None
    found = {}
    for dataset, threats in table.items():
        for threat, models in threats.items():
            key = str(getattr(dataset, "value", dataset)).replace("_", ""), getattr(threat, "value", threat)
            found[key] = models
    return found


@contextlib.contextmanager
def _earlier_name() -> Iterator[None]:
    """`autoattack` is `pyautoattack`: RobustBench 1.1.1 requires the second and imports the first."""
    added = []
    if importlib.util.find_spec("autoattack") is None and importlib.util.find_spec("pyautoattack"):
        for alias, module in _ALIASES.items():
            sys.modules[alias] = importlib.import_module(module)
            added.append(alias)
    try:
        yield
    finally:
        for alias in added:
            sys.modules.pop(alias, None)
