"""The harness of benchmarks, experiments and tools; and every script loads and knows its options."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tools import harness

SCRIPTS = [
    f"{folder}.{path.stem}"
    for folder in ("benchmarks", "experiments", "tools")
    for path in sorted((harness.ROOT / folder).glob("*.py"))
]


def test_sides_take_turns_in_a_rotating_order() -> None:
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "abc"}
    times, worked = harness.interleaved(sides, 3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # the warm-up first
    assert [len(times[name]) for name in "abc"] == [3, 3, 3]
    assert set(worked) == set("abc")


def test_ratios_are_taken_round_by_round() -> None:
    times = {"one": [2.0, 3.0, 8.0], "other": [1.0, 1.0, 2.0]}
    assert harness.ratio(times, "one", "other") == {"median": 3.0, "least": 2.0, "most": 4.0}
    assert harness.medians(times) == {"one": 3.0, "other": 1.0}


def test_a_result_is_written_with_its_provenance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = harness.parser("doc", short={"steps": 2})
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args(["--short", "--json", str(tmp_path / "result.json")])
    assert options.steps == 2
    harness.finish({"ratios": {"x over y": harness.spread([1.5])}}, options, "no such result")
    printed = capsys.readouterr()
    assert "x over y 1.50 (none stored)" in printed.err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == json.loads(printed.out)
    assert result["provenance"]["seed"] is None
    assert result["provenance"]["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert result["provenance"]["hardware"]["processors"] >= 1
    assert parser.parse_args([]).steps == 50


def test_ratios_are_compared_with_those_of_the_same_kind_of_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A difference is printed and never an error."""
    monkeypatch.setattr(harness, "RESULTS", (tmp_path,))
    options = harness.parser("doc", short={}).parse_args(["--short"])
    hardware = {"gpu": None, "instructions": ["avx2", "avx512_bf16"]}
    monkeypatch.setattr(harness, "provenance", lambda seed: {"hardware": hardware})

    def printed() -> str:
        harness.finish({"ratios": {"a over b": harness.spread([1.5])}}, options, "work")
        return capsys.readouterr().err.strip()

    def store(name: str, instructions: list[str], ratio: float) -> None:
        other = {"hardware": {"gpu": None, "instructions": instructions}}
        text = json.dumps({"ratios": {"a over b": {"median": ratio}}, "provenance": other})
        (tmp_path / f"{name}.json").write_text(text)

    store("work", ["avx2"], 3.0)
    assert printed() == (
        "work: a over b 1.50 (stored 3.00, on a processor of another kind (fp32; here avx512-bf16))"
    )
    store("work-amx-bf16", ["amx_bf16", "avx512_bf16"], 5.0)
    assert "stored 3.00" in printed()
    store("work-avx512-bf16", ["avx512_bf16"], 4.0)
    assert printed() == "work: a over b 1.50 (stored 4.00)"
    hardware["gpu"] = "NVIDIA H200"
    assert "here NVIDIA H200" in printed()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/data/cifar10.tar.xz:test", "cifar10.tar.xz:test"),
        ("svhn=/data/sets/svhn.tar.xz", "svhn=svhn.tar.xz"),
        ("assets/samples/cat.jpg", "assets/samples/cat.jpg"),
        ("--rounds", "--rounds"),
    ],
)
def test_recorded_commands_name_no_folder_of_the_machine(word: str, expected: str) -> None:
    assert harness.without_folders(word) == expected


def test_a_process_is_measured_and_its_failure_ends_the_script() -> None:
    done = harness.run_process(sys.executable, "-c", "print('x' * 3); bytearray(40 * 2**20)")
    assert done.stdout == "xxx\n"
    assert done.peak_mib > 40
    with pytest.raises(SystemExit, match="ended with 3:\nreason"):
        harness.run_process(
            sys.executable, "-c", "import sys; sys.stderr.write('reason'); sys.stderr.flush(); sys.exit(3)"
        )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_loads_and_shows_its_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(name)
    main = getattr(module, "main", None)
    if main is None:
        return
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    first = module.__doc__.splitlines()[0]
    assert first in capsys.readouterr().out
