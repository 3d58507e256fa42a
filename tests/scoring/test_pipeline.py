"""Scoring: the numbers, the order, the faults, and that nothing piles up or is left behind."""

from __future__ import annotations

import io
import itertools
import math
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import ratioctl
from ratioctl import images, package
from ratioctl.errors import PackageError, SourceError, UncalibratedError, UsageError
from ratioctl.onnx import runtime
from ratioctl.scoring import pipeline as score
from ratioctl.types import ScoreRow

SURE = math.exp(2) / (math.exp(2) + 2)  # logits (1, 0, 0) at temperature 1/2


def model(path: Path, **changes: object) -> score.Model:
    loaded = runtime.load(path, threads=1)
    fields = {"spec": loaded.spec, "predict": loaded.predict, "backend": "onnx", "parallel": True, **changes}
    return score.Model(**fields)  # type: ignore[arg-type]


def test_rows_are_the_softmax_after_temperature(tiny_onnx: Path, colors: Path) -> None:
    rows = list(ratioctl.ood_score([colors], model=tiny_onnx, threshold="tpr99", probabilities=True))
    assert [row.path for row in rows] == [
        f"{colors}/{name}" for name in ("blue.png", "deep/green.png", "grey.png", "red.png")
    ]
    assert [row.label for row in rows] == ["blue", "green", "red", "red"]
    expected = [SURE, SURE, 1 / 3, SURE]
    assert [row.confidence for row in rows] == pytest.approx(expected, abs=1e-6)
    assert [row.ood_score for row in rows] == pytest.approx([1 - c for c in expected], abs=1e-6)
    assert [row.is_ood for row in rows] == [False, False, True, False]
    assert rows[1].probabilities == pytest.approx(((1 - SURE) / 2, SURE, (1 - SURE) / 2), abs=1e-6)
    assert all(row.error is None and row.worst_case_confidence is None for row in rows)


@pytest.mark.parametrize(
    ("threshold", "flagged"), [("tpr95", 4), ("tpr99", 1), (0.7, 1), ("0.2", 0), (0, 0), (1, 4)]
)
def test_below_the_threshold_is_out(
    tiny_onnx: Path, colors: Path, threshold: str | float, flagged: int
) -> None:
    rows = ratioctl.ood_score(str(colors), model=tiny_onnx, threshold=threshold)
    assert sum(row.is_ood is True for row in rows) == flagged


def test_a_confidence_at_the_threshold_is_in(tiny_onnx: Path, colors: Path) -> None:
    first = next(iter(ratioctl.ood_score(colors / "red.png", model=tiny_onnx)))
    assert first.confidence is not None
    again = ratioctl.ood_score(colors / "red.png", model=tiny_onnx, threshold=first.confidence)
    assert next(iter(again)).is_ood is False


def test_thresholds_that_cannot_be(
    tiny_onnx: Path, tiny_package: Path, colors: Path, tiny_graph: Callable[..., bytes]
) -> None:
    for wrong in ("nan", -0.1, 1.5, "tpr", "high", ""):
        with pytest.raises(UsageError, match="threshold"):
            ratioctl.ood_score([colors], model=tiny_onnx, threshold=wrong)
    with pytest.raises(UsageError, match=r"tiny has no such threshold. tiny has tpr95, tpr99"):
        ratioctl.ood_score([colors], model=tiny_onnx, threshold="tpr97")
    read = package.read(tiny_package)
    bare = package.update(read, config_changes={"ratio": {"thresholds": {}}}, onnx=tiny_graph())
    with pytest.raises(UncalibratedError, match="ratioctl calibrate"):
        ratioctl.ood_score([colors], model=bare)
    assert next(iter(ratioctl.ood_score([colors], model=bare, threshold="0.25"))).is_ood is False


def test_the_package_and_its_onnx_file_agree(tiny_package: Path, tiny_onnx: Path, colors: Path) -> None:
    inside = list(ratioctl.ood_score([colors], model=tiny_package))
    assert inside == list(ratioctl.ood_score([colors], model=tiny_onnx))
    assert inside == list(ratioctl.ood_score([colors], model=package.read(tiny_package)))


def test_unreadable_images_are_rows_and_harm_no_others(tiny_onnx: Path, colors: Path) -> None:
    (colors / "a-text.png").write_text("no image")
    (colors / "b-empty.png").touch()
    (colors / "zz-cut.png").write_bytes((colors / "red.png").read_bytes()[:40])
    os.mkfifo(colors / "c-fifo.png")
    (colors / "d-gone.png").symlink_to(colors / "nowhere")
    rows = {Path(row.path).name: row for row in ratioctl.ood_score([colors], model=tiny_onnx)}
    faults = {name: row.error for name, row in rows.items() if row.error is not None}
    assert faults["a-text.png"] == "is text, not an image"
    assert faults["b-empty.png"] == "is empty (0 bytes)"
    assert faults["c-fifo.png"] == "is a FIFO, not a file"
    assert faults["d-gone.png"] == "does not exist"
    assert "PNG" in str(faults["zz-cut.png"])
    assert len(faults) == 5
    for name in faults:
        assert rows[name] == ScoreRow(path=rows[name].path, error=faults[name])
    assert rows["red.png"].confidence == pytest.approx(SURE, abs=1e-6)
    assert list(rows) == sorted(rows, key=lambda name: {"green.png": "deep"}.get(name, name))


def test_what_does_not_exist_is_a_row_beside_what_does(tiny_onnx: Path, colors: Path) -> None:
    empty = colors.parent / "empty"
    empty.mkdir()
    rows = list(ratioctl.ood_score([colors / "red.png", "missing.png", empty], model=tiny_onnx))
    assert [row.error for row in rows] == [None, "does not exist", "holds no images"]
    for alone in (["missing.png"], [empty], ["missing.png", empty]):
        with pytest.raises(SourceError):
            ratioctl.ood_score(alone, model=tiny_onnx)
    with pytest.raises(UsageError, match="there are none"):
        ratioctl.ood_score([], model=tiny_onnx)


def test_archives_and_lists(tiny_onnx: Path, colors: Path, tmp_path: Path) -> None:
    archive = tmp_path / "colors.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(colors, "colors")
    listed = io.BytesIO(f"{colors}/red.png\nmissing.png\n{archive}:colors/deep\n".encode())
    rows = list(score.ood_score([archive, "-", colors / "grey.png"], model(tiny_onnx), stdin=listed))
    found = [(row.path, row.error or row.label) for row in rows]
    assert sorted(found[:4]) == [
        (f"{archive}:colors/blue.png", "blue"),
        (f"{archive}:colors/deep/green.png", "green"),
        (f"{archive}:colors/grey.png", "red"),
        (f"{archive}:colors/red.png", "red"),
    ]
    assert found[4:] == [
        (f"{colors}/red.png", "red"),
        ("missing.png", "does not exist"),
        (f"{archive}:colors/deep/green.png", "green"),
        (f"{colors}/grey.png", "red"),
    ]


class Slow(io.RawIOBase):
    """A list that goes on only when the test says so."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines
        self.more = threading.Semaphore(0)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self.more.acquire()
        return self.lines.pop(0) if self.lines else b""


def test_rows_of_a_slow_list_come_at_once(tiny_onnx: Path, colors: Path) -> None:
    stdin = Slow([f"{colors}/{name}.png\n".encode() for name in ("red", "blue", "grey")])
    rows = score.ood_score(["-"], model(tiny_onnx), stdin=stdin)  # type: ignore[arg-type]
    for expected in ("red", "blue", "red"):
        stdin.more.release()
        assert next(rows).label == expected  # hangs if a batch had to fill first
    stdin.more.release()
    assert list(rows) == []


def score_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("score-")]


def endless(path: Path) -> Iterator[images.Item]:
    item = next(iter(images.walk([path])))
    return (item for _ in itertools.count())


def test_a_reader_that_stops_ends_the_threads(
    tiny_onnx: Path, colors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def counted(paths: object, *, stdin: object = None) -> Iterator[images.Item]:
        nonlocal drawn
        for item in endless(colors / "red.png"):
            drawn += 1
            yield item

    monkeypatch.setattr(score, "items_of", counted)
    rows = score.ood_score(["x"], model(tiny_onnx), workers=2)
    assert next(rows).label == "red"
    time.sleep(0.2)  # time to run ahead, were there no limit
    # Two workers: what was begun, what is done and not yet taken, and what waits.
    assert drawn <= score.MAX_BATCH * 10 + 1
    rows.close()  # type: ignore[attr-defined]
    for thread in score_threads():
        thread.join(10)
    assert score_threads() == []


def test_waiting_archive_members_are_bounded_by_their_bytes(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def heavy(paths: object, *, stdin: object = None) -> Iterator[images.Item]:
        nonlocal drawn
        for k in range(100):
            drawn += 1
            yield images.Item(path=str(k), member=images.Member(name=str(k), data=b"x" * 2**20))

    gate = threading.Event()

    def held(pixels: np.ndarray) -> np.ndarray:
        raise AssertionError("no image is readable")

    def wait(item: images.Item) -> bytes:
        gate.wait(30)
        return b"x" * 10

    monkeypatch.setattr(score, "items_of", heavy)
    monkeypatch.setattr(score, "MAX_WAITING_BYTES", 4 * 2**20)
    monkeypatch.setattr(images.Item, "read", wait)
    rows = score.ood_score(["x"], model(tiny_onnx, predict=held), workers=1)
    collected: list[ScoreRow] = []
    reader = threading.Thread(target=lambda: collected.extend(rows))
    reader.start()
    time.sleep(0.3)
    assert drawn <= 2 * 6 + score.MAX_BATCH, "more than the limit waits"
    gate.set()
    reader.join(30)
    assert [row.path for row in collected] == [str(k) for k in range(100)]


def test_order_holds_whichever_batch_is_slow(
    tiny_onnx: Path, colors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = model(tiny_onnx)
    pause = itertools.cycle([0.03, 0.0, 0.01, 0.0, 0.0])

    def uneven(pixels: np.ndarray) -> np.ndarray:
        time.sleep(next(pause))
        return loaded.predict(pixels)

    monkeypatch.setattr(score, "MAX_BATCH", 3)
    listed = [colors / f"{('red', 'grey', 'blue')[k % 3]}.png" for k in range(60)]
    rows = list(score.ood_score(listed, model(tiny_onnx, predict=uneven), workers=4))
    assert [row.path for row in rows] == [str(path) for path in listed]
    assert [row.label for row in rows] == ["red", "red", "blue"] * 20


def test_faults_of_the_model_reach_the_reader(tiny_onnx: Path, colors: Path) -> None:
    def broken(pixels: np.ndarray) -> np.ndarray:
        return np.full((len(pixels), 3), np.nan, np.float32)

    with pytest.raises(PackageError, match="no usable numbers"):
        list(score.ood_score([colors], model(tiny_onnx, predict=broken)))

    def fails(pixels: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(score.ood_score([colors], model(tiny_onnx, predict=fails)))


def test_the_attacked_confidence_is_never_below_the_clean_one(tiny_onnx: Path, colors: Path) -> None:
    attacked = model(
        tiny_onnx, worst_case=lambda pixels: (np.full(len(pixels), 0.5), np.full(len(pixels), True))
    )
    rows = list(score.ood_score([colors], attacked, threshold="tpr99"))
    assert [row.worst_case_confidence for row in rows] == pytest.approx([SURE, SURE, 0.5, SURE])
    assert [row.worst_case_is_ood for row in rows] == [False, False, True, False]


def test_an_onnx_file_has_no_worst_case(tiny_onnx: Path, colors: Path) -> None:
    with pytest.raises(UsageError, match="needs a package"):
        ratioctl.ood_score([colors], model=tiny_onnx, worst_case=0.5)
    with pytest.raises(UsageError, match="not a radius"):
        ratioctl.ood_score([colors], model=tiny_onnx, worst_case=float("nan"))
