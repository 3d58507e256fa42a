"""What generated out-distributions gain: RATIO with each, with real images, and with all together.

    python -m experiments.out_distributions --train cifar10.tar.xz:train --test cifar10.tar.xz:test \\
        --real a.tar.xz:train b.tar.xz:train --ood svhn=svhn.tar.xz:test ... --out runs/ood [--json FILE]
    python -m experiments.out_distributions --short

Every row fine-tunes the bundled plain model (width 16) with the recipe cifar10-ratio-0.25-small, another
`data.outside` and the same number of updates, then measures accuracy, robust accuracy, and clean and
worst-case AUROC on each test set. All rows are measured on the same images. An interrupted study continues
where it stopped, and `--only` runs some rows; the result holds all rows that are finished. The row "none" has
no OOD term.
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

NOISE = ("noise:smooth", "noise:uniform")
START = "cifar10-plain"
SHORT = [*training_study.SMALL, "optim.batch_size=16", "optim.batch_size_out=8"]
MEASURED = ("accuracy", "robust_accuracy", "auroc", "mmc", "ece")
SUITE = Suite(
    name="out-distributions",
    stages=("clean", "ood", "robust", "worst_case"),
    inside=150,
    balls=1,
    attacks=("apgd-ce", "apgd-t"),
    budget=AttackBudget(steps=12, targets=3),
    outside=120,
    outside_steps=12,
    probe=4,
    exact=False,
)


def rows(train: str, real: list[str]) -> dict[str, list[str]]:
    """OOD sources of each row, in running order."""
    made = ["synthetic:dead-leaves", "synthetic:fractal", f"patches:{train}", *NOISE]
    return {
        "noise": list(NOISE),
        **({"real": real} if real else {}),
        "generated": made,
        "dead-leaves": ["synthetic:dead-leaves"],
        "patches": [f"patches:{train}"],
        **({"all": [*real, *made]} if real else {}),
        "fractal": ["synthetic:fractal"],
        "none": [],
    }


def settings_of(options: argparse.Namespace, outside: list[str]) -> list[str]:
    """Settings of the recipe for one row: full radii after a fifth of the updates."""
    listed = training_study.listed(outside)
    found = [f"seed={options.seed}", f'data.train="{options.train}"', "data.test=", f"data.outside={listed}"]
    found += ["optim.batch_size=64", "optim.lr=0.05", "optim.ema=0.98", f"optim.epochs={options.epochs}"]
    found += [
        f"optim.validate_every={options.epochs}",
        f"objective.inside.ramp_epochs={options.epochs / 5:g}",
    ]
    if outside:
        found += [f"objective.outside.ramp_epochs={options.epochs / 5:g}"]
    else:
        found += ["objective.outside=", "data.outside="]
    found += SHORT if getattr(options, "short", False) else []
    return [*found, *options.set]


def measured(options: argparse.Namespace, name: str, outside: list[str]) -> dict[str, Any]:
    """One row of the study."""
    return training_study.measured(
        recipes.load("cifar10-ratio-0.25-small", settings_of(options, outside)),
        options.out / f"{name}-{options.seed}",
        init=options.init,
        suite=SUITE,
        names=MEASURED,
        describe=lambda package: {"row": name, "outside": outside, "temperature": package.temperature},
        data=options.test,
        ood=options.ood,
        limit=options.limit,
        seed=options.seed,
    )


def table(rows: list[dict[str, Any]], sets: list[str]) -> str:
    """The rows as Markdown: values in percent, 95 % intervals of the means in brackets."""
    names = [text.partition("=")[0] for text in sets]
    head = ["OOD training images", "clean", "robust", *(f"AUROC {name}" for name in (*names, "mean"))]
    head += [f"worst case {name}" for name in (*names, "mean")]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [row["row"], _cell(row, "accuracy"), _cell(row, "robust_accuracy", attacked=True)]
        for attacked in (False, True):
            cells += [_cell(row, "auroc", name, attacked) for name in names]
            cells.append(_cell(row, "auroc", "mean", attacked, interval=True))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(
    row: dict[str, Any],
    name: str,
    dataset: str | None = None,
    attacked: bool = False,
    interval: bool = False,
) -> str:
    for found in row["measurements"]:
        same = found["name"] == name and (found["ball"] is not None) == attacked
        if same and dataset in (None, found["dataset"]):
            low, high = found["interval"] or (0, 0)
            between = f" ({100 * low:.1f} to {100 * high:.1f})" if interval else ""
            return f"{100 * found['value']:.1f}{between}"
    return "-"


def main() -> None:
    short = {"train": "digits:train", "test": "digits:test", "limit": 20, "ood": ["noise=noise:uniform"]}
    parser = harness.parser(__doc__, short={**short, "epochs": 0.02, "init": ""})
    parser.add_argument("--train", default="cifar10:train")
    parser.add_argument("--test", default="cifar10:test")
    parser.add_argument("--real", nargs="*", default=[], help="OOD photographs, for the rows real and all")
    parser.add_argument("--ood", nargs="+", default=["svhn=svhn:test", "cifar100=cifar100:test"])
    parser.add_argument("--init", default=START, metavar="MODEL", help="start of all rows; empty for none")
    parser.add_argument("--epochs", type=float, default=0.15)
    parser.add_argument("--only", nargs="*", help="names of the rows to run")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--limit", type=int, default=1000, help="images of a test set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/out_distributions"))
    options = parser.parse_args()
    chosen = {
        name: outside
        for name, outside in rows(options.train, options.real).items()
        if not options.only or name in options.only
    }
    found = [measured(options, name, outside) for name, outside in chosen.items()]
    print(table(found, options.ood), file=sys.stderr)
    harness.finish(
        {
            "benchmark": "out-distributions for RATIO on CIFAR-10 at width 16",
            "train": options.train,
            "test": options.test,
            "start": options.init or None,
            "epochs": options.epochs,
            "protocol": str(SUITE),
            "rows": found,
        },
        options,
    )


if __name__ == "__main__":
    main()
