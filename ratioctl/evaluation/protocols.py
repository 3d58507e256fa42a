"""Protocols that others publish figures for: what to measure, and their rows beside ours.

A protocol is a suite with fixed balls, the columns of a table, and the published rows of `published.toml`.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ratioctl.errors import UsageError
from ratioctl.evaluation import measurements
from ratioctl.evaluation.suites import Suite
from ratioctl.recipe import Ball
from ratioctl.types import Evaluated, Measurement
from ratioctl.utils.suggest import one_of

LINF_8, LINF_GOOD = Ball(p=math.inf, eps=8 / 255), Ball(p=math.inf, eps=0.01)
L2_HALF, L2_ONE = Ball(p=2.0, eps=0.5), Ball(p=2.0, eps=1.0)

# OOD sets by the names that OpenOOD v1.5 gives them for CIFAR-10; others say it themselves, as "near-NAME".
NEAR = ("cifar10", "cifar100", "tin", "tinyimagenet")
FAR = ("mnist", "svhn", "texture", "textures", "places", "places365")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A figure of a protocol's table.

    Attributes:
        key: in JSON and in `published.toml`.
        measurement: name of our measurement; attacked: whether it is one under attack.
        dataset: its set: None the ID set, "mean" over the OOD sets, "each" one row per OOD set.
    """

    key: str
    title: str
    measurement: str
    dataset: str | None = "mean"
    attacked: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """A published evaluation.

    Attributes:
        source: where it is defined.
        groups: whether OOD sets are near or far ones, which get a mean each.
    """

    suite: Suite
    description: str
    source: str
    columns: tuple[Column, ...]
    groups: bool = False

    @property
    def name(self) -> str:
        return self.suite.name

    @property
    def detects(self) -> bool:
        """Whether it measures OOD detection."""
        return "ood" in self.suite.stages


_ACCURACY = Column(key="accuracy", title="Accuracy", measurement="accuracy", dataset=None)
_ROBUST = Column(key="robust", title="Robust", measurement="robust_accuracy", dataset=None, attacked=True)
_AUROC = Column(key="auroc", title="AUROC", measurement="auroc")


def _robustbench(name: str, ball: Ball) -> Protocol:
    stages = ("clean", "robust")
    return Protocol(
        suite=Suite(name=name, stages=stages, inside=None, outside=None, fixed=(ball,), backend="reference"),
        description="clean accuracy and AutoAttack (standard) on all test images",
        source="Croce et al. 2021, arXiv 2010.09670",
        columns=(_ACCURACY, _ROBUST),
    )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _robustbench("robustbench-l2", L2_HALF),
        _robustbench("robustbench-linf", LINF_8),
        Protocol(
            suite=Suite(
                name="paper",
                stages=("clean", "ood", "robust", "worst_case", "radius"),
                inside=None,
                outside=1024,
                outside_restarts=5,
                fixed=(L2_HALF,),
                outside_ball=L2_ONE,
                backend="reference",
            ),
            description="Table 1 of the RATIO paper: AutoAttack at l2 0.5, OOD images attacked at l2 1.0",
            source="Augustin, Meinke, Hein 2020, arXiv 2003.09461, section 5",
            columns=(
                _ACCURACY,
                _ROBUST,
                Column(key="ece", title="ECE", measurement="ece", dataset=None),
                _AUROC,
                Column(key="worst", title="Worst case", measurement="auroc", attacked=True),
                Column(key="mmc", title="MMC", measurement="mmc"),
            ),
        ),
        Protocol(
            suite=Suite(
                name="good",
                stages=("clean", "ood", "worst_case", "certified"),
                inside=None,
                outside=1000,
                outside_steps=200,
                outside_restarts=5,
                fixed=(LINF_GOOD,),
                outside_ball=LINF_GOOD,
            ),
            description="AUROC, adversarial AUROC at linf 0.01 around OOD images, guaranteed AUROC",
            source="Bitterwolf, Meinke, Hein 2020, arXiv 2007.08473; Meinke et al. 2022, arXiv 2106.04260",
            columns=(
                Column(key="auroc", title="AUROC", measurement="auroc", dataset="each"),
                Column(key="worst", title="Adversarial", measurement="auroc", dataset="each", attacked=True),
                Column(
                    key="guaranteed",
                    title="Guaranteed",
                    measurement="auroc_guaranteed",
                    dataset="each",
                    attacked=True,
                ),
            ),
        ),
        Protocol(
            suite=Suite(
                name="atd",
                stages=("clean", "ood", "worst_case"),
                inside=None,
                outside=1000,
                fixed=(LINF_8,),
                outside_ball=LINF_8,
            ),
            description="AUROC with ID, OOD or both images attacked at linf 8/255: the confidence of OOD "
            "images up, of ID images down",
            source="Azizmalayeri et al. 2022, arXiv 2209.15246",
            columns=(
                _AUROC,
                Column(key="inside", title="ID attacked", measurement="auroc_inside_attacked", attacked=True),
                Column(key="outside", title="OOD attacked", measurement="auroc", attacked=True),
                Column(key="both", title="Both attacked", measurement="auroc_both_attacked", attacked=True),
            ),
        ),
        Protocol(
            suite=Suite(name="openood", stages=("clean", "ood"), inside=None, outside=None),
            description="AUROC on near and on far OOD sets, without attacks",
            source="Zhang et al. 2023, arXiv 2306.09301 (OpenOOD v1.5)",
            columns=(
                Column(key="near", title="Near", measurement="auroc", dataset="near"),
                Column(key="far", title="Far", measurement="auroc", dataset="far"),
            ),
            groups=True,
        ),
    )
}


def by_name(name: str) -> Protocol:
    """The protocol of that name. Raises UsageError."""
    if name not in PROTOCOLS:
        raise UsageError(f"--protocol {name}", "no such protocol", one_of(name, PROTOCOLS))
    return PROTOCOLS[name]


def group_of(name: str) -> str:
    """ "near" or "far" for the name of an OOD set. Raises UsageError where it does not tell."""
    plain = name.lower().replace("-", "").replace("_", "")
    for group, known in (("near", NEAR), ("far", FAR)):
        if plain in known or plain.startswith(group):
            return group
    step = f"Name it near-{name}=SOURCE or far-{name}=SOURCE."
    raise UsageError(f"--ood {name}", "the protocol openood does not know whether it is near or far", step)


def group_means(
    rows: Sequence[Measurement], sets: Sequence[str], inside: str, seed: int
) -> list[Measurement]:
    """Means over the near and over the far OOD sets, as measurements on "near" and "far"."""
    means = []
    for group in ("near", "far"):
        members = [name for name in sets if group_of(name) == group]
        if members:
            found = measurements.mean_over_sets(rows, members, inside, seed)
            means += [dataclasses.replace(row, dataset=group) for row in found]
    return means


@cache
def published() -> tuple[dict[str, Any], ...]:
    """The rows of `published.toml`; figures in percent."""
    text = Path(__file__).with_name("published.toml").read_text(encoding="utf-8")
    return tuple(tomllib.loads(text)["row"])


def comparison(
    protocol: Protocol, models: Sequence[Evaluated], data: str, sets: Sequence[str]
) -> dict[str, Any]:
    """Our rows and the published ones, plain JSON values; figures in [0,1], None where there is none.

    Args:
        data: name of the ID set. Published rows of another one are left out where some are of it; without any
            of it those of CIFAR-10 are shown.
        sets: names of the OOD sets.
    """
    rows: list[dict[str, Any]] = []
    each = any(column.dataset == "each" for column in protocol.columns)
    for model in models:
        for dataset in sets if each else (None,):
            figures = {column.key: _figure(model, column, dataset) for column in protocol.columns}
            rows.append({"name": model.name, "published": False, "dataset": dataset, "figures": figures})
    for row in _of_data([row for row in published() if row["protocol"] == protocol.name], data):
        given = row["figures"]
        figures = {
            column.key: {"value": round(given[column.key] / 100, 6), "interval": None, "n": None}
            if column.key in given
            else None
            for column in protocol.columns
        }
        origin = {key: row[key] for key in ("network", "data", "source")}
        rows.append(
            {
                "name": row["name"],
                "published": True,
                "dataset": row.get("dataset"),
                "figures": figures,
                **origin,
            }
        )
    return {
        "protocol": protocol.name,
        "description": protocol.description,
        "source": protocol.source,
        "columns": [{"key": column.key, "title": column.title} for column in protocol.columns],
        "rows": rows,
    }


def _of_data(rows: Sequence[dict[str, Any]], data: str) -> list[dict[str, Any]]:
    """The rows of the ID set `data` ("cifar10.tar.xz:test"), else those of CIFAR-10."""
    plain = data.lower().replace("-", "")
    names = sorted({row["data"] for row in rows}, key=len, reverse=True)
    name = next((n for n in names if n.lower().replace("-", "") in plain), "CIFAR-10")
    return [row for row in rows if row["data"] == name]


def _figure(model: Evaluated, column: Column, dataset: str | None) -> dict[str, Any] | None:
    wanted = dataset if column.dataset == "each" else column.dataset
    for row in model.report.measurements:
        fits = row.name == column.measurement and (row.ball is not None) == column.attacked
        if fits and (wanted is None or row.dataset == wanted):
            interval = None if row.interval is None else list(row.interval)
            return {"value": row.value, "interval": interval, "n": row.n}
    return None
