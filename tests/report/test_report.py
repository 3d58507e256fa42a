"""Counterfactuals on disk: names, pictures, page, document, and what happens when something goes wrong."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ratioctl.errors import DiskError, OutputError
from ratioctl.report import counterfactual_files as report
from ratioctl.report import counterfactual_page, pictures, terminal
from ratioctl.types import Counterfactual, Explanation, Original, Target
from ratioctl.utils import atomic_files as files

LABELS = ["cat", "dog", "<b>fox</b>"]
HEADER: dict[str, Any] = {
    "schema": "ratioctl/counterfactuals/1",
    "norm": "2",
    "steps": 500,
    "restarts": 1,
    "seed": 0,
    "models": [{"name": "tiny", "digest": "0123456789abcdef", "temperature": 0.5, "labels": LABELS}],
}
CAT, TIE = (0.9, 0.08, 0.02), (0.4, 0.5, 0.1)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def shade(value: int, size: int = 4) -> np.ndarray:
    image = np.full((size, size, 3), value, np.uint8)
    image[0, 0] = 255
    return image


def explained(
    path: str = "cat.jpg", target: str = "dog", eps: tuple[float, ...] = (0.5, 1), size: int = 4
) -> Explanation:
    budgets = tuple(
        Counterfactual(
            eps=value,
            image=shade(20 + n, size),
            confidence=TIE[1],
            confidence_float=0.51,
            predicted="dog",
            probabilities=TIE,
            distance={"l1": 0.3, "l1.5": 0.2, "l2": 0.1, "linf": 0.05},
        )
        for n, value in enumerate(eps)
    )
    return Explanation(
        path=path,
        sha256="ab" * 32,
        model=0,
        input=shade(10, size),
        original=Original(label="cat", confidence=0.9, probabilities=CAT, is_ood=False),
        targets=(Target(target=target, budgets=budgets, flip_eps=0.4, flip_image=shade(30, size)),),
    )


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    (done,) = report.write_counterfactuals(out, HEADER, [explained()])
    assert listing(out) == [
        "cat/dog/eps-0.5.png",
        "cat/dog/eps-1.png",
        "cat/dog/flip.png",
        "cat/dog/grid.png",
        "cat/input.png",
        "counterfactuals.json",
        "index.html",
    ]
    document = json.loads((out / "counterfactuals.json").read_text())
    assert list(document) == [*HEADER, "images", "errors"]
    (image,) = document["images"]
    assert list(image) == ["path", "sha256", "model", "input_png", "original", "targets"]
    assert list(image["original"]) == ["label", "confidence", "probabilities", "is_ood"]
    (target,) = image["targets"]
    assert list(target) == [
        *("target", "flip_eps", "flip_png", "flip_confidence", "flip_is_ood", "in_distribution_eps"),
        "budgets",
    ]
    assert list(target["budgets"][0]) == [
        *("eps", "png", "confidence", "confidence_float", "predicted", "is_ood", "probabilities"),
        "distance",
    ]
    assert image["input_png"] == done.input_png == "cat/input.png"
    for name, array in (
        (image["input_png"], shade(10)),
        (target["flip_png"], shade(30)),
        (target["budgets"][0]["png"], shade(20)),
        (target["budgets"][1]["png"], shade(21)),
    ):
        assert np.array_equal(np.asarray(Image.open(out / name)), array), name
    assert done.targets[0].budgets[1].png == "cat/dog/eps-1.png"


def test_grey_pictures_stay_grey(tmp_path: Path) -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    read = Image.open(io.BytesIO(report.png(grey)))
    assert read.mode == "L"
    assert np.array_equal(np.asarray(read), grey[..., 0])


def test_stems_that_occur_again_are_numbered(tmp_path: Path) -> None:
    paths = ["a/cat.jpg", "b/cat.png", "b/Cat.png", "cat-2.png", "x.tar:d/cat.jpg", "x.tar:dog.jpg"]
    paths += ["index.html.png", "counterfactuals.json.png", "...png", "my cat (1).jpg", ".lock.png"]
    done = report.write_counterfactuals(tmp_path, HEADER, [explained(path) for path in paths])
    assert [str(one.input_png).removesuffix("/input.png") for one in done] == [
        "cat",
        "cat-2",
        "Cat-3",
        "cat-2-2",
        "cat-4",
        "dog",
        "index.html-2",
        "counterfactuals.json-2",
        "image",
        "my cat (1)",
        ".lock-2",
    ]
    assert (
        json.loads((tmp_path / "counterfactuals.json").read_text())["images"][9]["path"] == "my cat (1).jpg"
    )


def test_class_names_become_folders() -> None:
    labels = ["dog", "air/plane", "air_plane", "..", "Dog", "input.png", "tench, fish", "красная"]
    assert list(report.class_folders(labels).values()) == [
        "dog",
        "air_plane",
        "air_plane-2",
        "class",
        "Dog-2",
        "input.png-2",
        "tench__fish",
        "красная",
    ]


def test_own_files_are_replaced_and_others_kept(tmp_path: Path) -> None:
    report.write_counterfactuals(tmp_path, HEADER, [explained(), explained("old.png")], animation="gif")
    (tmp_path / "cat" / "notes.txt").write_text("mine")
    (tmp_path / "cat" / "dog" / "eps-7.png").write_text("mine too: not in the document")
    report.write_counterfactuals(tmp_path, HEADER, [explained(eps=(0.5, 2))])
    assert listing(tmp_path) == [
        "cat/dog/eps-0.5.png",
        "cat/dog/eps-2.png",
        "cat/dog/eps-7.png",
        "cat/dog/flip.png",
        "cat/dog/grid.png",
        "cat/input.png",
        "cat/notes.txt",
        "counterfactuals.json",
        "index.html",
    ]
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("name", ["../victim/input.png", "link/input.png", "cat/letter.txt", "input.png", 3])
def test_a_document_from_elsewhere_deletes_nothing(tmp_path: Path, name: Any) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    for folder in (out / "cat", victim):
        folder.mkdir(parents=True)
    (out / "link").symlink_to(victim)
    kept = [victim / "input.png", out / "cat" / "letter.txt", out / "input.png"]
    for path in kept:
        path.write_text("dear")
    images = [{"input_png": name, "targets": []}]
    (out / "counterfactuals.json").write_text(json.dumps({"schema": HEADER["schema"], "images": images}))
    report.write_counterfactuals(out, HEADER, [explained("dog.png")])
    assert all(path.read_text() == "dear" for path in kept)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in listing(folder) if name != ".lock"}


@pytest.mark.parametrize("rerun", [False, True])
def test_the_document_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rerun: bool) -> None:
    if rerun:
        report.write_counterfactuals(tmp_path, HEADER, [explained()])
    before = contents(tmp_path)

    def full(*arguments: Any, **options: Any) -> str:
        raise DiskError("disk", "is full")

    monkeypatch.setattr(counterfactual_page, "page", full)
    with pytest.raises(DiskError):
        report.write_counterfactuals(tmp_path, HEADER, [explained("dog.png")])
    if rerun:
        assert contents(tmp_path) == before
    else:
        assert not (tmp_path / "counterfactuals.json").exists()
        assert (tmp_path / "dog" / "input.png").exists(), "what is done can be looked at"
    assert not list(tmp_path.rglob("*~"))


class Disk:
    """Calls `look` before every operation that changes the disk, and raises `error` at number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.watching = 0, -1, False
        self.error: BaseException = OSError(errno.EIO, os.strerror(errno.EIO))
        self.look: Callable[[], None] = lambda: None
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
            monkeypatch.setattr(os, name, self.wrapped(getattr(os, name)))

    def wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.watching:
                self.watching = False  # what the test does itself is not watched
                self.look()
                self.watching = True
                self.count += 1
                if self.count == self.at:
                    raise self.error
            return real(*arguments, **options)

        return call


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Callable[[Path], None]]:
    """(old answers, the folder that asking anew makes of them, a function that asks anew).

    Both have cat/dog/eps-0.5.png, with other pixels; only the old ones another image, budget, animation.
    """

    def page(document: Any, pictures: Any, **options: Any) -> str:
        return '<meta name="generator" content="ratioctl">' + json.dumps(document)

    monkeypatch.setattr(counterfactual_page, "page", page)
    monkeypatch.setattr(report, "grid", lambda explanation, *_, **__: Image.fromarray(explanation.input))

    def ask(folder: Path) -> None:
        report.write_counterfactuals(folder, HEADER, [explained(size=5, eps=(0.5, 2))])

    old, new = tmp_path / "old", tmp_path / "new"
    report.write_counterfactuals(old, HEADER, [explained(), explained("zebra.png")], animation="gif")
    (old / "notes.txt").write_text("mine")
    shutil.copytree(old, new)
    ask(new)
    assert len(listing(old)) == 15
    assert len(listing(new)) == 8
    return old, new, ask


def test_at_every_moment_of_a_rerun_the_document_speaks_of_the_pictures_beside_it(
    answers: tuple[Path, Path, Callable[[Path], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had died there: old answers or new ones, never some of each, and the next command works."""
    old, new, ask = answers
    before, after = contents(old), contents(new)
    work = Path(shutil.copytree(old, tmp_path / "work"))
    seen: list[str] = []

    def look() -> None:
        there = contents(work)
        document = there.get(report.DOCUMENT)
        if document is None:
            present = [name in there or f"{report.COMPLETE}/{name}" in there for name in after]
            assert all(present), "both are gone"
            seen.append("neither")
        else:
            whole = after if document == after[report.DOCUMENT] else before
            assert {name: there[name] for name in whole} == whole
            seen.append("new" if whole is after else "old")
        if seen[-1] == "old" and len(seen) % 5:  # each costs a rerun
            return
        copy = shutil.copytree(work, tmp_path / f"moment-{len(seen)}")
        ask(copy)
        assert contents(copy) == after
        assert not [path for path in copy.iterdir() if path.name.startswith(".")]

    disk = Disk(monkeypatch)
    disk.look, disk.watching = look, True
    ask(work)
    disk.watching = False
    assert [what for what, _ in itertools.groupby(seen)] == ["old", "neither", "new"]
    assert seen.count("old") > 20
    assert contents(work) == after


def test_a_rerun_that_an_earlier_version_left_is_finished(
    answers: tuple[Path, Path, Callable[[Path], None]], tmp_path: Path
) -> None:
    """Version 0.2 called the folder of a complete result .answers."""
    old, new, _ = answers
    work = Path(shutil.copytree(old, tmp_path / "work"))
    shutil.copytree(new, work / ".answers", ignore=lambda folder, names: [n for n in names if n == ".lock"])
    stale = sorted(set(contents(old)) - set(contents(new)))
    (work / ".answers" / report.STALE).write_text(json.dumps(stale))
    report._rename_earlier(work)
    report._take_over(work)
    assert contents(work) == contents(new)
    assert not (work / ".answers").exists()


def test_a_disk_that_fails_in_a_rerun_costs_nothing(
    answers: tuple[Path, Path, Callable[[Path], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, ask = answers
    before, after = contents(old), contents(new)
    disk = Disk(monkeypatch)
    ends = set()
    for step in range(1, 200, 2):
        work = Path(shutil.copytree(old, tmp_path / f"work-{step}"))
        disk.count, disk.at, disk.watching = 0, step, True
        try:
            ask(work)
            failed = False
        except DiskError:
            failed = True
        disk.watching = False
        there = contents(work)
        if (work / report.COMPLETE).exists():
            ends.add("to be finished")
        else:
            ends.add("old" if there == before else "new" if there == after else "mixed")
            assert failed == (there == before)
        ask(work)
        assert contents(work) == after
        if disk.count < step:
            break
    assert ends == {"old", "to be finished", "new"}


def test_an_interrupted_rerun_leaves_the_old_answers_and_keeps_the_new_ones_beside_them(
    tmp_path: Path,
) -> None:
    report.write_counterfactuals(tmp_path, HEADER, [explained(), explained("old.png")])
    before = contents(tmp_path)

    def answers() -> Iterator[Explanation]:
        yield explained("dog.png")
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) as caught:
            report.write_counterfactuals(tmp_path, HEADER, answers())
        saved = tmp_path / ".interrupted"
        assert getattr(caught.value, "saved") == saved  # noqa: B009
        document = json.loads((saved / "counterfactuals.json").read_text())
        assert [image["path"] for image in document["images"]] == ["dog.png"]
        assert (saved / document["images"][0]["input_png"]).is_file()
        now = contents(tmp_path)
        assert {name: data for name, data in now.items() if not name.startswith(".interrupted/")} == before


def test_a_rerun_that_answers_nothing_replaces_nothing(tmp_path: Path) -> None:
    report.write_counterfactuals(tmp_path, HEADER, [explained()])
    before = contents(tmp_path)
    assert (
        report.write_counterfactuals(tmp_path, HEADER, [], errors=[{"path": "x", "error": "is empty"}]) == []
    )
    assert contents(tmp_path) == before


def test_a_picture_that_is_asked_about_is_not_tidied_away(tmp_path: Path) -> None:
    report.write_counterfactuals(tmp_path, HEADER, [explained()])
    mine = tmp_path / "cat" / "dog" / "eps-1.png"
    report.write_counterfactuals(tmp_path, HEADER, [explained("eps-1.png")], inputs=[mine])
    assert np.array_equal(np.asarray(Image.open(mine)), shade(21))
    assert not (tmp_path / "cat" / "dog" / "eps-0.5.png").exists()


def test_what_is_in_the_way_of_new_answers_is_found_before_the_old_ones_go(tmp_path: Path) -> None:
    report.write_counterfactuals(tmp_path, HEADER, [explained()])
    (tmp_path / "dog").write_text("a file where a folder should be")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="dog"):
        report.write_counterfactuals(tmp_path, HEADER, [explained("dog.png")])
    assert contents(tmp_path) == before


def test_a_fault_before_the_first_answer_leaves_the_old_ones(tmp_path: Path) -> None:
    report.write_counterfactuals(tmp_path, HEADER, [explained()])
    before = {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)}

    def answers() -> Iterator[Explanation]:
        raise OutputError("model", "fails")
        yield

    with pytest.raises(OutputError):
        report.write_counterfactuals(tmp_path, HEADER, answers())
    assert {name: (tmp_path / name).read_bytes() for name in listing(tmp_path)} == before


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    def answers() -> Iterator[Explanation]:
        yield explained()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.write_counterfactuals(tmp_path, HEADER, answers(), errors=[{"path": "x", "error": "is empty"}])
    document = json.loads((tmp_path / "counterfactuals.json").read_text())
    assert [image["path"] for image in document["images"]] == ["cat.jpg"]
    assert document["errors"] == [{"path": "x", "error": "is empty"}]
    assert not (tmp_path / ".lock").exists()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with files.lock(tmp_path), pytest.raises(OutputError, match="is being written by"):
        report.write_counterfactuals(tmp_path, HEADER, [explained()])


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        report.write_counterfactuals(tmp_path / "file" / "out", HEADER, [explained()])
    with pytest.raises(OutputError):
        report.write_counterfactuals(tmp_path / "file", HEADER, [explained()])
    (tmp_path / "cat").write_text("a file where a folder should be")
    with pytest.raises(OutputError):
        report.write_counterfactuals(tmp_path, HEADER, [explained()])


def test_images_to_explain_are_never_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "cat" / "input.png"
    mine.parent.mkdir()
    mine.write_bytes(report.png(shade(99)))
    with pytest.raises(OutputError, match="would be overwritten"):
        report.write_counterfactuals(tmp_path, HEADER, [explained()], inputs=[mine])
    assert mine.read_bytes() == report.png(shade(99))


@pytest.mark.parametrize("name", ["index.html", "counterfactuals.json"])
def test_a_page_of_somebody_else_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("my own")
    with pytest.raises(OutputError, match="not written by ratioctl"):
        report.write_counterfactuals(tmp_path, HEADER, [explained()])
    assert listing(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "my own"


# --- pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [(4, 160), (32, 160), (64, 192), (224, 224)])
def test_grid_has_a_column_for_each_budget(size: int, side: int) -> None:
    explanation = explained(size=size, eps=(0.5, 1, 2))
    sheet = report.grid(explanation, explanation.targets[0], labels=LABELS, norm="2")
    pixels = np.asarray(sheet)
    for value in (10, 20, 21, 22):
        rows, columns = np.nonzero((pixels == value).all(2))
        assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == side
    lefts = [np.nonzero((pixels == value).all(2))[1].min() for value in (10, 20, 21, 22)]
    assert lefts == sorted(lefts)


def test_grid_says_where_the_original_is_out_of_distribution() -> None:
    """In the first column, below how it is seen, in a color of its own."""
    from dataclasses import replace

    from ratioctl.report.pictures import _WARNING

    sheets = []
    for is_ood in (False, None, True):
        explanation = explained(eps=(0.5, 1, 2))
        explanation = replace(explanation, original=replace(explanation.original, is_ood=is_ood))
        sheets.append(np.asarray(report.grid(explanation, explanation.targets[0], labels=LABELS, norm="2")))
    assert np.array_equal(sheets[0], sheets[1])
    assert not (sheets[0] == _WARNING).all(2).any()
    rows, columns = np.nonzero((sheets[2] == _WARNING).all(2))
    assert len(rows) > 50
    assert columns.max() < 16 + 160 < sheets[2].shape[1] / 2
    assert rows.min() > sheets[0].shape[0] - 30


def test_many_budgets_take_several_rows() -> None:
    explanation = explained(eps=tuple(range(1, 20)))
    sheet = report.grid(explanation, explanation.targets[0], labels=LABELS, norm="inf")
    assert sheet.width < 1500
    assert sheet.height > 3 * 160


def test_long_and_strange_names_fit() -> None:
    explanation = explained(target="<b>fox</b>")
    labels = ["x" * 300, "dog", "<b>fox</b>"]
    report.grid(explanation, explanation.targets[0], labels=labels, norm="1.5")


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animation_goes_through_the_budgets_and_back(tmp_path: Path, kind: Any) -> None:
    report.write_counterfactuals(tmp_path, HEADER, [explained(eps=(1, 2, 3))], animation=kind)
    with Image.open(tmp_path / "cat" / "dog" / f"animation.{kind}") as film:
        assert film.n_frames == 6  # type: ignore[attr-defined]
        assert film.size == (256, 286)  # and a line for budget and confidence
        middles = []
        for n in range(6):
            film.seek(n)
            middles.append(film.convert("RGB").getpixel((128, 128))[0])  # type: ignore[index]
    assert middles == [10, 20, 21, 22, 21, 20]


def test_confidences_never_round_to_certainty() -> None:
    shown = [pictures.two_digits(value) for value in (0, 1e-9, 0.0049, 0.005, 0.5, 0.994, 0.995, 1 - 1e-9, 1)]
    assert shown == ["0.00", "<0.01", "<0.01", "0.01", "0.50", "0.99", ">0.99", ">0.99", "1.00"]


# --- table ---------------------------------------------------------------------------------------


def test_table_says_what_the_document_says() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, color_system=None)
    for table in terminal.counterfactual_tables(HEADER, [explained("a\x1b[31m.png"), explained()]):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [
        ["a\\x1b[31m.png", "cat 0.90", "dog", "0.08", "0.50*", "0.50*", "0.4"],
        ["cat.jpg", "cat 0.90", "dog", "0.08", "0.50*", "0.50*", "0.4"],
    ]


def test_table_fits_a_narrow_terminal() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80, color_system=None)
    answer = explained("photos/cat.jpg", eps=(0.5, 1, 1.5, 2, 2.5, 3))
    for table in terminal.counterfactual_tables(HEADER, [answer], console.width):
        console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    row = next(k for k, line in enumerate(lines) if line.startswith("cat.jpg"))
    assert [line.strip() for line in lines[row + 1 : row + 3]] == ["cat 0.90", "to dog"]
    assert lines[row].split() == ["cat.jpg", "0.08", *["0.50*"] * 6, "0.4"]


@pytest.mark.parametrize(
    ("threshold", "radius", "cells"),
    [(None, None, ["0.4"]), (0.4, 0.45, ["0.4", "0.45"]), (0.7, None, ["0.4", "-"])],
)
def test_table_has_a_second_radius_where_the_model_has_a_threshold(
    threshold: float | None, radius: float | None, cells: list[str]
) -> None:
    from dataclasses import replace

    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, color_system=None)
    header = {**HEADER, "models": [{**HEADER["models"][0], "threshold": threshold}]}
    one = explained()
    one = replace(one, targets=(replace(one.targets[0], in_distribution_eps=radius),))
    for table in terminal.counterfactual_tables(header, [one], console.width):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("ID radius" in text) is (threshold is not None)
    row = next(line for line in text.splitlines() if "cat.jpg" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]][6:] == cells
