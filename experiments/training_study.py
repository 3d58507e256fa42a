"""What the studies of trainings share: one row is trained, calibrated and evaluated once, and then kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ratioctl import package as packages
from ratioctl.calibration.calibrate import calibrate
from ratioctl.evaluation import run
from ratioctl.evaluation.suites import Suite
from ratioctl.package import ModelPackage
from ratioctl.recipe import Recipe
from ratioctl.training.loop import fit

SMALL = ["model.width=2", "data.size=8", "data.channels=3", "data.validation=0.2", "optim.validate_images=20"]


def listed(sources: Sequence[str]) -> str:
    """Sources as a list of a recipe."""
    return "[" + ", ".join(f'"{source}"' for source in sources) + "]"


def measured(
    recipe: Recipe,
    folder: Path,
    *,
    init: str | None,
    suite: Suite,
    names: Collection[str],
    describe: Callable[[ModelPackage], dict[str, Any]],
    **options: Any,
) -> dict[str, Any]:
    """Train (or continue) and evaluate one row, whose result is kept in `folder` for this recipe.

    Args:
        init: name or folder of the start.
        names: of the measurements that the row keeps.
        describe: further entries of the row.
        options: of `ratioctl.evaluation.run`.
    """
    kept = folder / "row.json"
    if kept.is_file():
        row: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if row["recipe_digest"] == recipe.digest:
            return row
    start = packages.resolve(init) if init else None
    package = calibrate(fit(recipe, folder, resume=True, init=start)).package
    evaluation = run([package], suite=suite, out=folder / "evaluation", resume=True, **options)
    found = evaluation.models[0].report
    row = {
        **describe(package),
        "recipe_digest": recipe.digest,
        "digest": package.digest,
        "measurements": [m.to_json() for m in found.measurements if m.name in names],
        "warnings": list(found.warnings),
    }
    kept.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row
