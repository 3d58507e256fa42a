"""What generated out-distributions buy: RATIO with each, with real images, and with all together.

    python -m experiments.out_distributions --train cifar10.tar.xz:train --test cifar10.tar.xz:test \\
        --real a.tar.xz:train b.tar.xz:train --ood svhn=svhn.tar.xz:test ... --out runs/ood [--json FILE]
    python -m experiments.out_distributions --short

Every row trains the recipe cifar10-ratio-0.25-small (width 16) with another `data.outside` and the same
number of updates, then measures accuracy, robust accuracy, and clean and worst-case AUROC on each test set.
An interrupted study continues where it stopped. The row "none" has no OOD term.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ratioctl import recipe as recipes
from ratioctl.calibration.calibrate import calibrate
from ratioctl.evaluation import run
from ratioctl.training.loop import fit
from tools import harness

NOISE = ("noise:smooth", "noise:uniform")
SHORT = ["model.width=2", "optim.epochs=0.02", "optim.batch_size=16", "optim.batch_size_out=8"]
SHORT += ["optim.validate_images=20", "data.size=8", "data.channels=3"]
MEASURED = ("accuracy", "robust_accuracy", "auroc", "mmc", "ece", "fpr_at_95_tpr")


def rows(train: str, real: list[str]) -> dict[str, list[str]]:
    """OOD sources of each row."""
    made = ["synthetic:dead-leaves", "synthetic:fractal", f"patches:{train}", *NOISE]
    return {
        "none": [],
        "noise": list(NOISE),
        "dead-leaves": ["synthetic:dead-leaves"],
        "fractal": ["synthetic:fractal"],
        "patches": [f"patches:{train}"],
        "generated": made,
        **({"real": real, "all": [*real, *made]} if real else {}),
    }


def settings_of(options: argparse.Namespace, outside: list[str]) -> list[str]:
    """Settings of the recipe for one row."""
    listed = "[" + ", ".join(f'"{source}"' for source in outside) + "]"
    found = [f"seed={options.seed}", f'data.train="{options.train}"', "data.test=", f"data.outside={listed}"]
    if not outside:
        found += ["objective.outside=", "data.outside="]
    found += SHORT if getattr(options, "short", False) else []
    return [*found, *options.set]


def measured(options: argparse.Namespace, name: str, outside: list[str]) -> dict[str, Any]:
    """Train (or continue) and evaluate one row."""
    recipe = recipes.load("cifar10-ratio-0.25-small", settings_of(options, outside))
    folder = options.out / f"{name}-{options.seed}"
    began = time.perf_counter()
    package = calibrate(fit(recipe, folder, resume=True)).package
    trained = time.perf_counter() - began
    evaluation = run(
        [package],
        data=options.test,
        ood=options.ood,
        suite="quick",
        limit=options.limit,
        out=folder / "evaluation",
        resume=True,
        seed=options.seed,
    )
    found = evaluation.models[0].report.measurements
    return {
        "row": name,
        "outside": outside,
        "recipe_digest": recipe.digest,
        "digest": package.digest,
        "training_s": trained,
        "measurements": [m.to_json() for m in found if m.name in MEASURED],
    }


def main() -> None:
    short = {"train": "digits:train", "test": "digits:test", "limit": 20, "ood": ["noise=noise:uniform"]}
    parser = harness.parser(__doc__, short=short)
    parser.add_argument("--train", default="cifar10:train")
    parser.add_argument("--test", default="cifar10:test")
    parser.add_argument("--real", nargs="*", default=[], help="OOD photographs, for the rows real and all")
    parser.add_argument("--ood", nargs="+", default=["svhn=svhn:test", "cifar100=cifar100:test"])
    parser.add_argument("--only", nargs="*", help="names of the rows to run")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/out_distributions"))
    options = parser.parse_args()
    chosen = {
        name: outside
        for name, outside in rows(options.train, options.real).items()
        if not options.only or name in options.only
    }
    harness.finish(
        {
            "benchmark": "out-distributions for RATIO on CIFAR-10 at width 16",
            "train": options.train,
            "test": options.test,
            "rows": [measured(options, name, outside) for name, outside in chosen.items()],
        },
        options,
    )


if __name__ == "__main__":
    main()
