"""Saved attacked images."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ratioctl
from ratioctl import metrics
from ratioctl.report import evaluation_files
from tests.evaluation.helpers import TINY, evaluated, timeless


def test_saved_images_lie_in_their_ball_and_do_what_the_report_says(
    small_package: Path, labelled: str, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    events: list[dict[str, Any]] = []
    found = evaluated(small_package, labelled, out=tmp_path, save_adversarial=True, callback=events.append)
    evaluation_files.write(found, tmp_path)
    files = [Path(event["path"]) for event in events if event["event"] == "file"]
    assert [path.name for path in files] == [
        "small-test-l2-0.125.npz",
        "small-test-l2-0.125-lowest-confidence.npz",
        "small-uni-l2-0.25-worst-case.npz",
    ]
    assert {path.parent for path in files} == {tmp_path / "adversarial"}
    network = ratioctl.load_model(str(small_package))
    rows = pq.read_table(tmp_path / "examples.parquet").to_pylist()
    for path, attack, eps in zip(
        files, (")", "lowest confidence", "worst case"), (0.125, 0.125, 0.25), strict=True
    ):
        with np.load(path, allow_pickle=False) as filed:
            kept = dict(filed)
        theirs = [row for row in rows if row["attack"].endswith(attack)]
        assert kept["x"].dtype == np.float32
        assert len(kept["x"]) == len(theirs) > 0
        assert (kept["index"] == [row["index"] for row in theirs]).all()
        assert (kept["distance"] <= eps * (1 + 1e-5)).all()
        with torch.no_grad():
            logits = network(torch.from_numpy(kept["x"])).numpy()
        assert (logits.argmax(1) == kept["predicted"]).all()
        p = metrics.confidence(logits, 0.01)
        assert np.allclose(p, [row["confidence"] for row in theirs], atol=2e-3)
        if attack == ")":
            assert ((kept["predicted"] == kept["label"]) == (kept["broken_by"] == 0)).all()
            assert (kept["broken_by"] != 0).any()
        else:
            assert (kept["distance"] > 0).any()
    again = evaluated(small_package, labelled, out=tmp_path, save_adversarial=True, resume=True)
    assert timeless(again) == timeless(found)
    without = evaluated(small_package, labelled)
    assert timeless(without) == timeless(found), "keeping the images changes nothing else"


def test_every_set_gets_files_of_its_own(small_package: Path, labelled: str, tmp_path: Path) -> None:
    """Names that differ only in what a file name cannot hold, in case, or in one separator."""
    names = ("暗", "明", "a b", "a-b", "A-b", "..", "x" * 150)
    suite = dataclasses.replace(TINY, curve=0, probe=0)
    ood = dict.fromkeys(names, "noise:uniform")
    events: list[dict[str, Any]] = []
    options = {"ood": ood, "suite": suite, "limit": 4, "out": tmp_path, "save_adversarial": True}
    evaluated(small_package, labelled, callback=events.append, **options)
    files = [Path(event["path"]).name for event in events if event["event"] == "file"]
    assert len({name.casefold() for name in files}) == len(files) == 2 + len(names)
    assert sorted(path.name for path in (tmp_path / "adversarial").iterdir()) == sorted(files)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.npz", name) for name in files), files
    assert max(map(len, files)) < 150
