"""The parsers that are ours, under hypothesis, and the inputs that once broke them (`tests/corpus/`).

`tools/fuzz.py` gives the same functions some hundred thousand inputs each, guided by coverage.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools import fuzz_targets

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "corpus"
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file() and path.suffix != ".md")
SMALL = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


NAMES = [name for name in fuzz_targets.TARGETS if name != "signature" or importlib.util.find_spec("minisign")]


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_stays_fixed(path: Path) -> None:
    fuzz_targets.run(path.parent.name, path.read_bytes())


def test_every_folder_of_the_corpus_belongs_to_a_parser() -> None:
    assert {path.parent.name for path in FOUND} <= set(fuzz_targets.TARGETS)


def test_a_fault_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness lets errors of ours pass and nothing else."""
    from ratioctl.errors import UsageError

    def fail(data: bytes) -> None:
        raise UsageError("x", "y") if data else IndexError("z")

    monkeypatch.setitem(fuzz_targets.TARGETS, "names", fail)
    fuzz_targets.run("names", b"x")
    with pytest.raises(IndexError):
        fuzz_targets.run("names", b"")


@pytest.mark.parametrize("name", NAMES)
def test_honest_inputs_cut_doubled_and_scrambled(name: str) -> None:
    for seed in fuzz_targets.seeds(name):
        for data in (seed, seed[: len(seed) // 2], seed + seed, seed[1:], seed.replace(b"a", b"\r\xff")):
            fuzz_targets.run(name, data)


@pytest.mark.parametrize("name", NAMES)
@SMALL
@given(data=st.data())
def test_bytes(name: str, data: st.DataObject) -> None:
    """An honest input with a piece replaced by anything."""
    seed = data.draw(st.sampled_from(sorted(fuzz_targets.seeds(name))))
    start = data.draw(st.integers(0, len(seed)))
    end = data.draw(st.integers(start, min(len(seed), start + 40)))
    fuzz_targets.run(name, seed[:start] + data.draw(st.binary(max_size=40)) + seed[end:])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(tree: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values of a JSON document."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [here, *(place for key, value in inner for place in places(value, (*here, key)))]


def put(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[place[0]] = put(tree[place[0]], place[1:], value)
    return copied


@pytest.mark.parametrize("name", ["package_config", "onnx_metadata"])
@SMALL
@given(data=st.data())
def test_a_config_with_one_value_replaced(name: str, data: st.DataObject) -> None:
    (seed,) = fuzz_targets.seeds(name)
    tree = json.loads(seed)
    place = data.draw(st.sampled_from(places(tree)))
    changed = put(tree, place, data.draw(JSON))
    fuzz_targets.run(name, json.dumps(changed).encode())


@SMALL
@given(
    header=st.dictionaries(
        st.text(max_size=4),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "x"]),
                "shape": st.lists(st.integers(-1, 2**70) | st.integers(0, 3), max_size=4),
                "data_offsets": st.lists(st.integers(-1, 40) | st.integers(0, 2**70), min_size=1, max_size=3),
            }
        ),
        max_size=3,
    ),
    body=st.binary(max_size=40),
)
def test_safetensors_headers_that_lie(header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    fuzz_targets.run("safetensors_file", struct.pack("<Q", len(text)) + text + body)


@SMALL
@given(st.lists(st.text(max_size=12), min_size=1, max_size=12))
def test_rows_with_nasty_names(parts: list[str]) -> None:
    fuzz_targets.run("rows", "|".join(parts).encode("utf-8", "surrogatepass"))


@SMALL
@given(st.text(alphabet="0123456789.,:e+-_ naif", max_size=24))
def test_ranges(text: str) -> None:
    fuzz_targets.run("eps_range", text.encode())


@SMALL
@given(st.text(alphabet="abcdt./:-\n\x00é", max_size=24))
def test_sources_and_lists(text: str) -> None:
    fuzz_targets.run("source", text.encode())
    fuzz_targets.run("path_list", text.encode())


@SMALL
@given(
    key=st.sampled_from(
        ["seed", "optim.epochs", "objective.inside.attack.ball.p", "data.outside", "model", "x.y"]
    ),
    value=JSON,
)
def test_settings(key: str, value: Any) -> None:
    fuzz_targets.run("recipe_settings", f"{key}={json.dumps(value)}".encode())
