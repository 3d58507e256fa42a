"""`merge`: the evaluation that shards have computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ratioctl import package as packages
from ratioctl.errors import SourceError, UsageError
from ratioctl.evaluation import sharding
from ratioctl.evaluation.driver import run
from ratioctl.types import Evaluation


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    callback: Callable[[dict[str, Any]], None] | None = None,
    finish: Callable[[Evaluation], object] | None = None,
) -> Evaluation:
    """The evaluation that the shards in `folders` computed, as an unsharded run has it.

    It runs with the models and sources that the shards name, on the same kind of device with the same
    versions. Self-checks of the robust accuracy need all survivors and are computed here.

    Raises:
        SourceError: as `sharding.complete`; batches that are missing; models or sources that changed.
    """
    parts = sharding.complete([sharding.Part.read(folder) for folder in folders])
    if any(out.resolve() == part.folder.resolve() for part in parts):
        raise UsageError(f"--output {out}", "is the folder of a shard", "Choose another folder.")
    arguments, expected = parts[0].arguments, parts[0].facts
    loaded = [packages.resolve(model) for model in arguments["models"]]
    for package, facts in zip(loaded, expected, strict=True):
        if package.digest != facts["model"]:
            step = "Merge with the model that the shards evaluated, or run them again."
            raise SourceError(package.path, "is another model than that of the shards", step)
    return run(
        loaded,
        **{name: value for name, value in arguments.items() if name != "models"},
        out=out,
        parts=parts,
        callback=callback,
        finish=finish,
    )
