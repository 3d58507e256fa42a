"""The cache of finished batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ratioctl.utils.result_cache import ResultCache, key_of


def test_a_result_cache_computes_a_batch_once_and_again_where_it_is_damaged(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"x": np.arange(3.0)}

    results = ResultCache(tmp_path / "j")
    first = results.get_or_compute("k", compute)
    again = ResultCache(tmp_path / "j").get_or_compute("k", compute)
    assert len(calls) == 1
    assert np.array_equal(first["x"], again["x"])
    assert first["seconds"] == again["seconds"]
    path = tmp_path / "j" / "k.npz"
    path.write_bytes(path.read_bytes()[:40])
    assert np.array_equal(ResultCache(tmp_path / "j").get_or_compute("k", compute)["x"], first["x"])
    assert len(calls) == 2


def test_a_finished_result_cache_starts_anew_unless_it_is_kept(tmp_path: Path) -> None:
    results = ResultCache(tmp_path)
    results.get_or_compute("k", lambda: {"x": np.zeros(1)})
    results.finish()
    ResultCache(tmp_path, keep=True)
    assert (tmp_path / "k.npz").exists()
    results.finish()
    ResultCache(tmp_path)
    assert not (tmp_path / "k.npz").exists()


def test_keys_tell_facts_apart() -> None:
    assert key_of({"a": 1, "b": [2.0, "x"]}) == key_of({"b": [2.0, "x"], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
