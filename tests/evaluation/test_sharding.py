"""Evaluation in shards: the merged evaluation is that of an unsharded run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratioctl.errors import RatioctlError, SourceError, UsageError
from ratioctl.evaluation import SUITES, run, sharding
from ratioctl.evaluation.merging import merge
from ratioctl.evaluation.stages import robust
from ratioctl.report import evaluation_files
from ratioctl.types import Evaluation
from tests.evaluation.helpers import TINY, timeless

STAGES = (*TINY.stages, "scores")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and batches in sets of a dozen images."""
    monkeypatch.setitem(SUITES, "tiny", TINY)
    monkeypatch.setitem(SUITES, "without", dataclasses.replace(TINY, name="without", stages=("clean", "ood")))
    monkeypatch.setattr(robust, "BLOCK", 3)
    monkeypatch.setattr("ratioctl.evaluation.stages.clean._BATCH", 2)
    monkeypatch.setattr("ratioctl.evaluation.driver._batch_size", lambda compute: 2)


@pytest.fixture
def evaluate(small_package: Path, labelled: str) -> Any:
    def evaluate(**options: Any) -> Evaluation:
        given: dict[str, Any] = {"suite": "tiny", "ood": ["uni=noise:uniform"], "limit": 9, **options}
        return run([small_package], data=labelled, precision="fp32", device="cpu", **given)

    return evaluate


def computed(folder: Path) -> set[str]:
    return {path.stem for path in (folder / ".result-cache").glob("*.npz")}


@pytest.mark.parametrize("options", [{"score": ["energy"], "save_adversarial": True}, {"suite": "without"}])
def test_the_merged_evaluation_is_that_of_an_unsharded_run(
    evaluate: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = evaluate(out=tmp_path / "whole", **options)
    folders = [tmp_path / f"shard-{k}" for k in (1, 2, 3)]
    for k, folder in enumerate(folders, 1):
        assert evaluate(out=folder, shard=f"{k}/3", **options).models == ()
    merged = merge(list(reversed(folders)), tmp_path / "merged")
    assert timeless(merged) == timeless(whole)
    assert evaluation_files.parquet(merged) == evaluation_files.parquet(whole)
    for path in (tmp_path / "whole" / "adversarial").glob("*"):
        assert path.read_bytes() == (tmp_path / "merged" / "adversarial" / path.name).read_bytes()
    parts = [computed(folder) for folder in folders]
    needed = computed(tmp_path / "whole")
    assert all(part and part < needed for part in parts)
    left = computed(tmp_path / "merged")
    assert set().union(*parts) | left == needed
    assert not left & set().union(*parts)
    assert len(left) <= 1, "only the self-check of the robust accuracy"
    if options.get("suite") == "without":
        assert sum(map(len, parts)) == len(needed)


def test_a_shard_that_was_interrupted_continues(
    evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, count = tmp_path / "shard", 0

    def stop(event: dict[str, Any]) -> None:
        nonlocal count
        count += event["event"] == "batch"
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(out=folder, shard="1/2", callback=stop)
    kept = computed(folder)
    assert kept
    with pytest.raises(SourceError, match=r"holds no finished shard: shard\.json is missing"):
        merge([folder], tmp_path / "merged")
    times = {key: (folder / ".result-cache" / f"{key}.npz").stat().st_mtime_ns for key in kept}
    evaluate(out=folder, shard="1/2")
    assert times == {key: (folder / ".result-cache" / f"{key}.npz").stat().st_mtime_ns for key in kept}
    assert sharding.Part.read(folder).shard.index == 1


def test_what_does_not_belong_together_is_refused(evaluate: Any, labelled: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"suite": "without"}
    first, second = tmp_path / "1", tmp_path / "2"
    evaluate(out=first, shard="1/2", **options)

    def refused(*folders: Path) -> str:
        with pytest.raises(RatioctlError) as caught:
            merge(folders, tmp_path / "merged")
        assert not (tmp_path / "merged" / "report.json").exists()
        return str(caught.value)

    assert "shard 2/2 is missing" in refused(first)
    assert "is shard 1/2, as" in refused(first, first)
    assert "is missing" in refused(first, tmp_path / "nothing")
    for other, reason in (
        ({"shard": "2/3"}, "is shard 2/3, but"),
        ({"shard": "2/2", "seed": 1}, "has seed 1, but"),
        ({"shard": "2/2", "limit": 8}, "has limit 8, but"),
        ({"shard": "2/2", "ood": ["uni=noise:smooth"]}, "has set small, uni '"),
    ):
        evaluate(out=second, **{**options, **other})
        assert reason in refused(first, second)
    evaluate(out=second, shard="2/2", **options)
    with pytest.raises(UsageError, match="is the folder of a shard"):
        merge([first, second], second)

    key = min(computed(second))
    (second / ".result-cache" / f"{key}.npz").write_bytes(b"damaged")
    assert "the shards: lack 1 of" in refused(first, second)
    record = json.loads((second / "shard.json").read_text())
    record["facts"][0]["torch"] = "0.1"
    for folder in (first, second):
        (folder / "shard.json").write_text(json.dumps({**record, "shard": f"{folder.name}/2"}))
    assert "have torch of model 1 '0.1', but here it is" in refused(first, second)
    record["facts"][0]["model"] = "0" * 64
    for folder in (first, second):
        (folder / "shard.json").write_text(json.dumps({**record, "shard": f"{folder.name}/2"}))
    assert "is another model than that of the shards" in refused(first, second)
    (first / "shard.json").write_text("{")
    assert "shard.json: cannot be read" in refused(first, second)


def test_data_that_changed_after_the_shards_ran_is_refused(
    evaluate: Any, labelled: str, tmp_path: Path
) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for k, folder in enumerate(folders, 1):
        evaluate(out=folder, shard=f"{k}/2", suite="without")
    picture = next(Path(labelled).glob("*/*.png"))
    (picture.parent / "more.png").write_bytes(picture.read_bytes())
    with pytest.raises(SourceError, match="have set small, test"):
        merge(folders, tmp_path / "merged")


def test_options_that_do_not_fit_a_shard_are_refused(evaluate: Any, tmp_path: Path) -> None:
    for options, reason in (
        ({"shard": "3/2", "out": tmp_path}, "--shard 3/2: is not one of 2 parts"),
        ({"shard": "1/2"}, "--shard: needs a folder"),
        ({"shard": "1/2", "out": tmp_path, "suite": TINY}, "--shard: needs a suite by its name"),
    ):
        with pytest.raises(UsageError, match=reason):
            evaluate(**options)


def test_blocks_of_survivors_do_not_change_the_verdicts(
    evaluate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image's random numbers come from its pixels, so the packing matters up to rounding only."""
    in_blocks = evaluate(limit=12)
    monkeypatch.setattr(robust, "BLOCK", 512)
    packed = evaluate(limit=12)
    for a, b in zip(
        in_blocks.models[0].report.measurements, packed.models[0].report.measurements, strict=True
    ):
        assert a.name == b.name
        assert a.value == pytest.approx(b.value, abs=1e-5)
    assert np.array_equal(in_blocks.models[0].examples["verdict"], packed.models[0].examples["verdict"])
