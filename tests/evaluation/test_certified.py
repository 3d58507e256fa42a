"""`evaluate --certified`: measurements and table of the guarantee, the protocol `good`, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl.cli import main
from ratioctl.errors import UsageError
from ratioctl.evaluation import SUITES, protocols, run
from ratioctl.evaluation.datasets import Datasets
from ratioctl.evaluation.merging import merge
from ratioctl.evaluation.protocols import PROTOCOLS
from ratioctl.models.predict import Predictor, predictor
from ratioctl.report import evaluation_tables, markdown
from ratioctl.types import Evaluation, Measurement
from tests.evaluation.helpers import TINY, timeless

CLEAN = dataclasses.replace(SUITES["clean"], probe=4)


def evaluated(package: Path, data: str, **options: Any) -> Evaluation:
    given: dict[str, Any] = {"suite": CLEAN, "ood": ["uni=noise:uniform"], "limit": 9, **options}
    return run([package], data=data, device="cpu", precision="fp32", **given)


def named(evaluation: Evaluation, name: str, dataset: str = "uni") -> Measurement:
    rows = evaluation.models[0].report.measurements
    return next(m for m in rows if (m.name, m.dataset) == (name, dataset))


def test_measurements_are_those_of_the_bounds(certified_package: Path, labelled: str) -> None:
    found = evaluated(certified_package, labelled, certified=True)
    package = packages.read(certified_package)
    network = predictor(package)
    sets = Datasets(
        data=labelled, ood={"uni": "noise:uniform"}, suite=CLEAN, limit=9, seed=0, download=False
    ).of(package)
    x = torch.from_numpy(sets.outside["uni"].pixels[:]).permute(0, 3, 1, 2).float() / 255
    bounds = network.guaranteed_log_odds(x, 0.02, package.temperature)
    inside = metrics.log_odds(network.predict(sets.inside.pixels), package.temperature)
    assert named(found, "auroc_guaranteed").value == pytest.approx(metrics.auroc(-inside, -bounds))
    confidence = 1 / (1 + np.exp(-bounds))
    assert named(found, "mmc_guaranteed").value == pytest.approx(confidence.mean())
    assert named(found, "mmc_guaranteed").value > named(found, "mmc").value
    assert named(found, "auroc_guaranteed").value <= named(found, "auroc").value
    passed = named(found, "let_through_at_tpr95_guaranteed")
    assert passed.value == pytest.approx((confidence >= 0.4).mean())
    assert passed.value >= named(found, "let_through_at_tpr95").value
    assert str(passed.ball) == "linf 0.02"
    assert "interval bounds" in passed.details["attack"]
    assert named(found, "auroc_guaranteed", "mean").n == named(found, "auroc_guaranteed").n
    assert not any("guarantee" in text for text in found.models[0].report.warnings)
    table = next(t for t in evaluation_tables.tables(found) if t.title.startswith("Certified"))
    assert table.title == "Certified, linf 0.02"
    assert table.header == (
        *("per cent", "AUROC", "AUROC guaranteed", "MMC", "MMC guaranteed"),
        *("tpr95", "tpr95 guaranteed", "tpr99", "tpr99 guaranteed", "n"),
    )
    assert table.rows[0][0] == "uni"
    assert table.rows[0][4] == f"{100 * confidence.mean():.1f}"
    assert "AUROC guaranteed" in markdown.markdown(found)
    without = evaluated(certified_package, labelled)
    assert not any("guaranteed" in m.name for m in without.models[0].report.measurements)


def test_attacked_images_lie_between(certified_package: Path, labelled: str) -> None:
    suite = dataclasses.replace(
        PROTOCOLS["good"].suite, outside=6, outside_steps=8, outside_restarts=1, probe=3
    )
    ball = protocols.LINF_GOOD.model_copy(update={"eps": 0.02})
    suite = dataclasses.replace(suite, fixed=(ball,), outside_ball=ball, exact=False)
    found = evaluated(certified_package, labelled, suite=suite)
    rows = [m for m in found.models[0].report.measurements if m.dataset == "uni"]
    clean, attacked = (
        [m.value for m in rows if m.name == "mmc" and bool(m.ball) == on] for on in (False, True)
    )
    assert clean[0] < attacked[0] < named(found, "mmc_guaranteed").value
    table = next(t for t in evaluation_tables.tables(found) if t.title.startswith("Certified"))
    assert "MMC attacked" in table.header


def test_good_shows_the_guaranteed_auroc(
    certified_package: Path, labelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = PROTOCOLS["good"]
    less = dataclasses.replace(
        good.suite, outside=4, outside_steps=2, outside_restarts=1, probe=2, exact=False
    )
    monkeypatch.setitem(PROTOCOLS, "good", dataclasses.replace(good, suite=less))
    found = evaluated(certified_package, labelled, suite="quick", protocol="good", certified=True)
    assert found.comparison is not None
    ours = found.comparison["rows"][0]
    assert ours["figures"]["guaranteed"]["value"] == named(found, "auroc_guaranteed").value
    assert evaluation_tables.tables(found)[0].rows[0][4] != "-"


def test_an_attack_that_exceeds_the_bound_is_told(
    certified_package: Path, labelled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Predictor.guaranteed_log_odds
    monkeypatch.setattr(Predictor, "guaranteed_log_odds", lambda *a: honest(*a) - 50)
    found = evaluated(certified_package, labelled, certified=True)
    (warning,) = [text for text in found.models[0].report.warnings if "guarantee" in text]
    assert "uni: an attack in linf 0.02 exceeds the guaranteed confidence on 4 of 4 images" in warning


def test_shards_compute_bounds_and_attacks(
    certified_package: Path, labelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SUITES, "tiny", dataclasses.replace(TINY, stages=("clean", "ood")))
    monkeypatch.setattr("ratioctl.evaluation.driver._batch_size", lambda compute: 2)
    given: dict[str, Any] = {"suite": "tiny", "certified": True}
    whole = evaluated(certified_package, labelled, **given)
    folders = [tmp_path / f"shard-{k}" for k in (1, 2)]
    for k, folder in enumerate(folders, 1):
        evaluated(certified_package, labelled, out=folder, shard=f"{k}/2", **given)
    assert timeless(merge(folders, tmp_path / "merged")) == timeless(whole)


def test_what_guarantees_nothing_is_refused(
    small_package: Path, certified_package: Path, labelled: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="small: has no certified head"):
        run([certified_package, small_package], data=labelled, certified=True)
    with pytest.raises(UsageError, match="which does not measure OOD detection"):
        run([certified_package], data=labelled, protocol="robustbench-linf", certified=True)
    with pytest.raises(UsageError, match="which does not measure OOD detection"):
        run([certified_package], data=labelled, suite="explanations", certified=True)
    assert main(["evaluate", str(small_package), "--data", labelled, "--certified"]) == 2
    assert "ratioctl train cifar10-prood-head --init MODEL" in capsys.readouterr().err


def test_the_command(
    certified_package: Path, labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["evaluate", str(certified_package), "--data", labelled, "--ood", "uni=noise:uniform"]
    line += ["--suite", "clean", "--certified", "--limit", "6", "--out", str(tmp_path), "--device", "cpu"]
    assert main(line) == 0
    assert "Certified, linf 0.02" in capsys.readouterr().out
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    names = {row["name"] for row in stored["models"][0]["measurements"]}
    assert {"auroc_guaranteed", "mmc_guaranteed", "let_through_at_tpr95_guaranteed"} <= names
    assert main(["inspect", str(certified_package)]) == 0
    assert "bounds the confidence in linf 0.02" in capsys.readouterr().out
