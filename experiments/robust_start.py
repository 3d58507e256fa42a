"""Is a robust start better than none? RATIO on other classes at 64x64, at equal cost.

    python -m experiments.robust_start --train animals64.tar.xz:train --test animals64.tar.xz:val \\
        --outside out-64.tar.xz:train --seeds 0 1 [--json FILE]
    python -m experiments.robust_start --short

Every row trains the recipe restricted64-ratio (width 16) with the same number of updates, batches and
attack steps, from random weights or from the weights of a bundled model with a new head. The schedules are
those that `ratioctl init` proposes for the two cases. What the start itself cost is not counted. All rows are
measured on the same images. The same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from experiments import training_study
from ratioctl import recipe as recipes
from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.evaluation.suites import Suite
from tools import harness

SCRATCH = "scratch"
MEASURED = ("accuracy", "robust_accuracy", "auroc", "ece")
SUITE = Suite(
    name="robust-start",
    stages=("clean", "ood", "robust"),
    inside=400,
    balls=1,
    attacks=("apgd-ce", "apgd-t"),
    budget=AttackBudget(steps=15, targets=3),
    outside=0,
    probe=4,
    exact=False,
)


def settings_of(options: argparse.Namespace, start: str, seed: int) -> list[str]:
    """Settings of the recipe for one row: full radii after a third of the updates."""
    listed = training_study.listed(options.outside)
    ramp = f"ramp_epochs={options.epochs / 3:g}"
    found = [f"seed={seed}", f'data.train="{options.train}"', "data.test=", f"data.outside={listed}"]
    found += ["optim.batch_size=64", "optim.batch_size_out=32", "optim.ema=0.98"]
    found += [f"optim.epochs={options.epochs}", f"optim.validate_every={options.epochs}"]
    found += ["objective.inside.attack.steps=2", f"objective.inside.{ramp}", f"objective.outside.{ramp}"]
    if start == SCRATCH:
        found += ["optim.schedule=onecycle", "optim.lr=0.1"]
    else:
        head = options.epochs / 10
        found += ["optim.schedule=slowstart", "optim.lr=0.05", f"optim.head_epochs={head:g}"]
    found += training_study.SMALL if getattr(options, "short", False) else []
    return [*found, *options.set]


def measured(options: argparse.Namespace, start: str, seed: int) -> dict[str, Any]:
    """One row of the study."""
    return training_study.measured(
        recipes.load("restricted64-ratio", settings_of(options, start, seed)),
        options.out / f"{start}-{seed}",
        init=None if start == SCRATCH else start,
        suite=SUITE,
        names=MEASURED,
        describe=lambda package: {
            "start": start,
            "seed": seed,
            "updates": package.config["ratio"]["provenance"]["updates"],
        },
        data=options.test,
        ood=options.ood,
        limit=options.limit,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: percent, with 95 % intervals."""
    lines = ["| start | seed | updates | clean | robust |", "|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [row["start"], str(row["seed"]), str(row["updates"])]
        for name in ("accuracy", "robust_accuracy"):
            found = next(m for m in row["measurements"] if m["name"] == name)
            low, high = (100 * limit for limit in found["interval"])
            cells.append(f"{100 * found['value']:.1f} ({low:.1f} to {high:.1f}), n {found['n']:,}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    short = {"train": "digits:train", "test": "digits:test", "outside": ["noise:uniform"], "limit": 40}
    parser = harness.parser(__doc__, short={**short, "starts": [SCRATCH], "epochs": 0.1})
    parser.add_argument("--train", default="animals64.tar.xz:train")
    parser.add_argument("--test", default="animals64.tar.xz:val")
    parser.add_argument("--outside", nargs="+", default=["tinyimagenet-out-64.tar.xz:train"])
    parser.add_argument("--ood", nargs="+", default=["smooth=noise:smooth"])
    parser.add_argument("--starts", nargs="+", default=[SCRATCH, "cifar10-ratio-small"], metavar="MODEL")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=float, default=0.5)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--limit", type=int, default=None, help="images of a test set")
    parser.add_argument("--out", type=Path, default=Path("runs/robust_start"))
    options = parser.parse_args()
    found = [measured(options, start, seed) for seed in options.seeds for start in options.starts]
    print(table(found), file=sys.stderr)
    harness.finish(
        {
            "benchmark": "RATIO at 64x64 from a robust model and from scratch, width 16",
            "train": options.train,
            "test": options.test,
            "outside": options.outside,
            "epochs": options.epochs,
            "protocol": str(SUITE),
            "rows": found,
        },
        options,
    )


if __name__ == "__main__":
    main()
