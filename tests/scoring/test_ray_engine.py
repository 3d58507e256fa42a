"""The Ray engine without Ray: units, the actor's work, rows that come twice or not at all, refusals."""

from __future__ import annotations

import dataclasses
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

import ratioctl
from ratioctl.errors import PackageError, RatioctlError, SourceError, UsageError
from ratioctl.scoring import ray_engine
from ratioctl.types import ScoreRow


def scored(units: list[ray_engine.Unit], model: Path, **options: Any) -> list[tuple[int, int, ScoreRow]]:
    import pyarrow as pa

    settings = ray_engine.Settings(model=str(model), threshold="tpr95", **options)
    actor = ray_engine.Scorer(dataclasses.asdict(settings))
    batch = pa.Table.from_pylist([{"unit": k, **dataclasses.asdict(unit)} for k, unit in enumerate(units)])
    table = actor(batch)
    return [(row["unit"], row["place"], ray_engine._row(row["row"])) for row in table.to_pylist()]


def test_an_actor_computes_the_rows_of_the_local_engine(
    colors: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    (colors / "bad.png").write_text("no image")
    (colors / "empty.png").touch()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(colors, "set")
    paths = [colors, tmp_path / "a.tar", colors / "red.png"]
    units = ray_engine.units_of(paths, None)
    assert [unit.file is None for unit in units] == [False] * 6 + [True, False]
    options = {"probabilities": True, "explain": True}
    rows = scored(units, tiny_onnx, **options)
    assert [row for _, _, row in rows] == list(ratioctl.ood_score(paths, model=tiny_onnx, **options))
    assert [(unit, place) for unit, place, _ in rows if unit == 6] == [(6, k) for k in range(6)]
    assert len(ray_engine.units_of([colors], 2)) == 2


def test_what_vanished_since_it_was_listed_is_a_row_with_an_error(
    colors: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(colors, "set")
    units = ray_engine.units_of([colors / "red.png", tmp_path / "a.tar"], None)
    (colors / "red.png").unlink()
    (tmp_path / "a.tar").unlink()
    assert [row.error for _, _, row in scored(units, tiny_onnx)] == ["does not exist"] * 2


def rows(*keys: tuple[int, int]) -> list[tuple[int, int, ScoreRow]]:
    return [(unit, place, ScoreRow(path=f"{unit}:{place}")) for unit, place in keys]


def test_rows_of_a_repeated_task_are_dropped_and_missing_ones_are_an_error() -> None:
    blocks = [rows((0, 0), (1, 0)), rows((1, 0), (2, 0), (2, 1)), rows((0, 0), (2, 1), (2, 2))]
    found = [row.path for block in ray_engine._once(iter(blocks), 3) for row in block]
    assert found == ["0:0", "1:0", "2:0", "2:1", "2:2"]
    with pytest.raises(RatioctlError, match="returned no rows for 1 inputs"):
        list(ray_engine._once(iter(blocks), 4))


def test_options_that_ray_cannot_follow_are_refused(colors: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(colors, "set")
    for paths, options, reason in (
        (colors, {"shard": "1/2"}, "shard: has no effect with engine ray"),
        (colors, {"checks": True}, "checks: compares every image with the one before"),
        ("-", {}, "takes no list on stdin"),
        ([b"bytes"], {}, "takes paths and URLs only"),
        ([tmp_path / "a.tar"], {"limit": 2}, "limit: does not count images of archives"),
    ):
        with pytest.raises(UsageError, match=reason):
            ratioctl.ood_score(paths, model=tiny_onnx, engine="ray", **options)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="does not exist"):
        ratioctl.ood_score(tmp_path / "nothing", model=tiny_onnx, engine="ray")


def test_a_node_with_another_version_is_named(tiny_onnx: Path) -> None:
    with pytest.raises(UsageError, match=r"a node has ratioctl .*, but 0\.0\.1 started the run"):
        scored([], tiny_onnx, version="0.0.1")


class Ray:
    """Stands for the module."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Version mismatch: Python 3.12"), "the cluster runs other versions: Version mismatch"),
        (ConnectionError("no GCS"), "cannot connect to RAY_ADDRESS=10.0.0.1:6379: no GCS"),
    ],
)
def test_a_cluster_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(UsageError, match=said), ray_engine._connected(Ray(error)):
        pass


def test_errors_of_workers_keep_their_class() -> None:
    class RayTaskError(Exception):
        cause = PackageError("x.onnx", "is damaged", "Export it again.")

    found = ray_engine._named(RayTaskError())
    assert isinstance(found, PackageError)
    assert str(found) == "x.onnx: is damaged. Export it again."
    other = ray_engine._named(RuntimeError("first line\nWorker died"))
    assert str(other) == "--engine ray: a worker failed: Worker died."


def test_without_ray_its_extra_is_named(
    colors: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'needs ray, which is not installed.*"ratioctl\[ray\]"'):
        list(ratioctl.ood_score(colors, model=tiny_onnx, engine="ray"))
