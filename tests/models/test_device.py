"""Where commands compute is chosen in one place, which says so; a precision asked for overrules it."""

import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import ratioctl
from ratioctl.cli import main
from ratioctl.errors import RatioctlError
from ratioctl.models import device as hardware
from ratioctl.models import precision as precision_of
from ratioctl.models.device import select_device
from ratioctl.models.precision import bf16_gain
from ratioctl.scoring import backends
from ratioctl.utils import resources


def test_the_choice_and_its_reason_are_logged_for_verbose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ratioctl"):
        compute = select_device("cpu")
    assert caplog.messages == [f"Computing on {compute.why}"]
    assert "thread" in compute.why
    assert ("bf16" if compute.bf16 else "fp32") in compute.why


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_asked_for_overrules(precision: str) -> None:
    compute = select_device("cpu", precision)
    assert compute.bf16 == (precision == "bf16")
    assert f"{precision}: requested" in compute.why


@pytest.mark.parametrize(
    ("able", "gain", "chosen"), [(True, 2.0, True), (True, 0.9, False), (False, 2.0, False)]
)
def test_bf16_is_chosen_where_it_is_measured_to_be_faster(
    able: bool, gain: float, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "has_bf16", lambda device: able)
    monkeypatch.setattr(hardware, "bf16_gain", lambda: gain)
    compute = select_device("cpu")
    assert compute.bf16 == chosen
    assert ("measured" in compute.why) == able
    assert select_device("cpu", "bf16").bf16, "a request overrules the measurement"
    assert not select_device("cpu", "fp32").bf16


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """No measurement of this process is kept, neither before the test nor after it."""
    bf16_gain.cache_clear()
    yield
    bf16_gain.cache_clear()


def test_the_measurement_is_made_once_on_a_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unmeasured: None
) -> None:
    """Runs on one machine choose alike; a damaged file is measured anew, and no random number is drawn."""
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path))
    state = torch.random.get_rng_state()
    first = bf16_gain()
    assert first > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(precision_of, "_measure", lambda: 123.0)
    bf16_gain.cache_clear()
    assert bf16_gain() == first
    (kept,) = tmp_path.glob("findings/*.json")
    kept.write_text("{")
    bf16_gain.cache_clear()
    assert bf16_gain() == 123.0
    assert json.loads(kept.read_text()) == {"value": 123.0}


def test_a_cache_folder_that_takes_no_files_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unmeasured: None
) -> None:
    (tmp_path / "findings").write_bytes(b"no folder")
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path))
    monkeypatch.setattr(precision_of, "_measure", lambda: 1.5)
    assert bf16_gain() == 1.5


def test_threads_stay_within_the_cpu_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr(resources, "processors", lambda: 3)
        assert "3 threads" in select_device("cpu").why
        assert torch.get_num_threads() == 3
        monkeypatch.setattr(resources, "processors", lambda: 8)
        select_device("cpu")
        assert torch.get_num_threads() == 3, "a smaller number that was set stays"
    finally:
        torch.set_num_threads(before)


SUITE = ("--data", "digits:test", "--limit", "1", "--suite")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "line",
    [
        ("train", "digits-plain", "--out", "run"),
        ("evaluate", "MODEL", *SUITE, "quick"),
        ("evaluate", "MODEL", *SUITE, "full"),
        ("evaluate", "MODEL", *SUITE, "explanations"),
        ("counterfactual", "IMAGE", "--model", "MODEL", "--target", "dog", "--out", "found"),
        ("ood-score", "IMAGE", "--model", "MODEL", "--worst-case", "0.5"),
    ],
    ids=" ".join,
)
def test_every_command_that_searches_takes_the_precision(
    line: tuple[str, ...],
    precision: str,
    small_package: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[bool] = []

    def compute(**what: Any) -> hardware.ComputeConfig:
        chosen.append(what["bf16"])
        raise RatioctlError("enough", "was seen", "")

    monkeypatch.setattr(hardware, "ComputeConfig", compute)
    monkeypatch.chdir(tmp_path)
    image = next(photographs.iterdir())
    named = {"MODEL": str(small_package), "IMAGE": str(image)}
    main([*(named.get(word, word) for word in line), "--device", "cpu", "--precision", precision])
    assert chosen == [precision == "bf16"]


def test_the_worst_case_is_searched_in_the_precision_and_scored_in_fp32(
    small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[bool] = []
    autocast = hardware.ComputeConfig.autocast

    def seen(compute: hardware.ComputeConfig) -> AbstractContextManager[object]:
        entered.append(compute.bf16)
        return autocast(compute)

    monkeypatch.setattr(hardware.ComputeConfig, "autocast", seen)
    monkeypatch.setattr(backends, "WORST_CASE_STEPS", 2)
    rows = {
        precision: list(
            ratioctl.ood_score(
                [photographs], model=small_package, worst_case=0.3, device="cpu", precision=precision
            )
        )
        for precision in ("auto", "bf16")
    }
    assert set(entered) == {False, True}
    for exact, quick in zip(rows["auto"], rows["bf16"], strict=True):
        assert quick.confidence == exact.confidence
        assert quick.worst_case_confidence is not None
        assert quick.worst_case_confidence >= quick.confidence


@pytest.mark.parametrize("option", [[], ["--verbose"], ["--quiet"]])
def test_verbose_says_what_was_picked_and_why(
    option: list[str], small_package: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ood-score", str(photographs), "--model", str(small_package), "--device", "cpu", *option])
    assert ("Computing on cpu" in capsys.readouterr().err) == (option == ["--verbose"])
