"""`ood-score --certified`: the bound of each image, by torch and onnxruntime, in every format; refusals."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import ratioctl
from ratioctl import package as packages
from ratioctl.attacks.worst_case import worst_case_confidence
from ratioctl.cli import main
from ratioctl.errors import PackageError, UsageError
from ratioctl.models.predict import predictor
from ratioctl.onnx.graph import graph
from ratioctl.recipe import Ball
from ratioctl.scoring import ray_engine

EPS = 0.02  # of `certified_package`
COLUMN = "guaranteed_confidence"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of several contrasts, at the size of the model."""
    folder = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(3)
    for k in range(6):
        low, high = 120 - 20 * k, 136 + 20 * k
        pixels = generator.integers(low, min(high, 256), (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def head(certified_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with a certain base and a head of smaller weights: bounds below 1, nearly reached."""
    from safetensors.numpy import load

    package = packages.read(certified_package)
    weights = load(package.weights_path.read_bytes())
    weights = {name: value * (0.6 if "discriminator" in name else 1) for name, value in weights.items()}
    (base,) = (name for name in weights if name.endswith("temperature"))
    weights[base] = np.full(1, 0.002, np.float32)
    folder = tmp_path_factory.mktemp("packages") / "head"
    packages.write(folder, config=package.config, weights=weights)
    return folder


@pytest.fixture(scope="module")
def exported(head: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "certified.onnx"
    path.write_bytes(graph(packages.read(head), threshold=0.4))
    return path


def pixels_of(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def bounds(images: Path, model: Path, **options: Any) -> list[float]:
    rows = list(ratioctl.ood_score([images], model=model, certified=True, **options))
    found = [row.guaranteed_confidence for row in rows]
    assert all(bound is not None for bound in found)
    assert all(row.confidence <= row.guaranteed_confidence < 1 for row in rows)  # type: ignore[operator]
    return found  # type: ignore[return-value]


def test_the_bound_is_that_of_evaluate(head: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    shutil.copy(images / "0.png", tmp_path / "cat")
    found = bounds(images, head)
    assert np.ptp(found) > 0.01
    (report,) = ratioctl.evaluate(
        head,
        data=str(tmp_path),
        ood=[f"noise={images}"],
        suite="clean",
        certified=True,
        device="cpu",
    )
    mean = next(m for m in report.measurements if (m.name, m.dataset) == ("mmc_guaranteed", "noise"))
    assert mean.n == 6
    assert mean.value == pytest.approx(np.mean(found), rel=1e-9)


def test_the_bound_of_the_exported_file_is_the_same(head: Path, exported: Path, images: Path) -> None:
    assert bounds(images, exported) == pytest.approx(bounds(images, head), abs=1e-5)


def test_no_attack_exceeds_the_bound(head: Path, images: Path) -> None:
    package = packages.read(head)
    network = predictor(package)
    x = torch.from_numpy(pixels_of(images)).permute(0, 3, 1, 2).float() / 255
    attacked = worst_case_confidence(
        network.exact,
        x,
        Ball(p=math.inf, eps=EPS),
        temperature=package.temperature,
        steps=40,
        restarts=2,
        seed=0,
    ).confidence
    clean = [row.confidence for row in ratioctl.ood_score([images], model=head)]
    found = bounds(images, head)
    assert (attacked.numpy() <= np.array(found)).all()
    assert (attacked.numpy() > np.array(clean) + 1e-3).all(), (
        "the attack changes too little to test the bound"
    )
    assert (attacked.numpy() > np.array(found) - 0.15).all(), "the bound is far above what the attack reaches"


def test_the_worst_case_beside_the_bound(head: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An l2 ball of this radius lies in the linf ball."""
    monkeypatch.setattr("ratioctl.scoring.backends.WORST_CASE_STEPS", 5)
    rows = ratioctl.ood_score([images], model=head, certified=True, worst_case=EPS)
    for row in rows:
        assert row.confidence is not None
        assert row.worst_case_confidence is not None
        assert row.guaranteed_confidence is not None
        assert row.confidence <= row.worst_case_confidence <= row.guaranteed_confidence


def test_rows_have_no_bound_unasked(head: Path, images: Path) -> None:
    rows = list(ratioctl.ood_score([images], model=head))
    assert {row.guaranteed_confidence for row in rows} == {None}


@pytest.mark.parametrize("model", ["package", "onnx"])
def test_every_format_has_the_column(
    head: Path,
    exported: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
) -> None:
    from pyarrow import parquet

    path = head if model == "package" else exported
    (tmp_path / "broken.png").write_bytes(b"no picture")
    expected = [*bounds(images, path), None]
    line = ["ood-score", str(images), str(tmp_path / "broken.png"), "--model", str(path), "--device", "cpu"]
    line += ["--certified", "--skip-errors", "--explain", "--output"]
    for name in ("rows.csv", "rows.jsonl", "rows.parquet", "rows.txt"):
        assert main([*line, str(tmp_path / name)]) == 0
    assert "guaranteed_confidence holds within linf 0.02" in capsys.readouterr().err
    with (tmp_path / "rows.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    found: dict[str, list[Any]] = {"csv": [float(row[COLUMN]) if row[COLUMN] else None for row in read]}
    assert list(read[0])[5:8] == ["error", COLUMN, "margin"]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    found["jsonl"] = [json.loads(text)[COLUMN] for text in lines]
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert str(table.schema.field(COLUMN).type) == "double"
    found["parquet"] = table.column(COLUMN).to_pylist()
    for values in found.values():
        assert values == [*(pytest.approx(bound, rel=1e-8) for bound in expected[:-1]), None]
    header, first, *_ = (tmp_path / "rows.txt").read_text().splitlines()
    at = header.index(COLUMN)
    assert float(first[at:].split()[0]) == pytest.approx(expected[0], rel=1e-8)


def test_ray_actors_and_shards_carry_the_bound(
    head: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses

    import pyarrow as pa

    settings = ray_engine.Settings(model=str(head), threshold="tpr95", certified=True)
    actor = ray_engine.Scorer(dataclasses.asdict(settings))
    units = [{"unit": k, **dataclasses.asdict(u)} for k, u in enumerate(ray_engine.units_of([images], None))]
    scored = [ray_engine._row(text) for text in actor(pa.Table.from_pylist(units)).column("row").to_pylist()]
    assert scored == list(ratioctl.ood_score([images], model=head, certified=True))
    line = ["ood-score", str(images), "--model", str(head), "--certified", "--device", "cpu"]
    for k in (1, 2):
        assert main([*line, "--shard", f"{k}/2", "--output", str(tmp_path / f"{k}.csv")]) == 0
    assert main([*line, "--output", str(tmp_path / "whole.csv")]) == 0
    parts = [str(tmp_path / f"{k}.csv") for k in (1, 2)]
    assert main(["merge", *parts, "--output", str(tmp_path / "merged.csv")]) == 0
    read = {}
    for name in ("merged", "whole"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            read[name] = [(row["path"], float(row[COLUMN])) for row in csv.DictReader(file)]
    assert [path for path, _ in read["merged"]] == [path for path, _ in read["whole"]]
    assert [v for _, v in read["merged"]] == pytest.approx([v for _, v in read["whole"]], rel=1e-6)


def test_models_without_a_head_are_refused(
    small_package: Path,
    small_graph: bytes,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "plain.onnx"
    file.write_bytes(small_graph)
    for model in (small_package, file):
        with pytest.raises(UsageError, match="has no certified head, so nothing bounds its confidence"):
            ratioctl.ood_score([images], model=model, certified=True)
        assert main(["ood-score", str(images), "--model", str(model), "--certified"]) == 2
        told = capsys.readouterr()
        assert "small: has no certified head" in told.err
        assert "ratioctl train cifar10-prood-head --init MODEL" in told.err
        assert told.out == ""


def test_a_file_without_the_output_is_refused(head: Path, exported: Path, images: Path) -> None:
    model = onnx.load(exported)
    del model.graph.output[-1]
    path = exported.with_name("older.onnx")
    onnx.save(model, path)
    assert [row.error for row in ratioctl.ood_score([images], model=path)] == [None] * 6
    with pytest.raises(PackageError, match=r"older\.onnx: has no output guaranteed_confidence.*export"):
        ratioctl.ood_score([images], model=path, certified=True)
