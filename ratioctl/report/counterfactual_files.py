"""Results as people see them: pictures, grids, pages, tables in the terminal.

Counterfactuals go to a folder: pictures as each image is done, then `index.html`, `counterfactuals.json`
last, so that a folder with that file is complete. Where it is there already, the new answers grow in a hidden
folder inside and take the old ones' place once they are complete; see `_take_over`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ratioctl.errors import OutputError
from ratioctl.report import counterfactual_page
from ratioctl.report.pictures import Animation, animated, grid, norm_symbol, png, png_of, two_digits
from ratioctl.types import Explanation, Target
from ratioctl.utils import atomic_files as files
from ratioctl.utils.text import safe_text

if TYPE_CHECKING:
    from rich.table import Table

DOCUMENT, PAGE = "counterfactuals.json", "index.html"
GROWING, COMPLETE, STOPPED = ".answers.partial", ".answers", ".interrupted"  # folders of new answers
STALE = "stale.json"  # among complete answers: which files of the old ones go
OURS = re.compile(r"(input|grid|flip|eps-[0-9.e+-]+)\.png|animation\.(gif|webp)")


# --- counterfactuals on disk --------------------------------------------------------------------------------


def write_counterfactuals(
    out: str | os.PathLike[str],
    header: Mapping[str, Any],
    explanations: Iterable[Explanation],
    *,
    errors: Sequence[Mapping[str, str]] = (),
    inputs: Iterable[Path] = (),
    animation: Animation | None = None,
    cards: Sequence[str | None] = (),
) -> list[Explanation]:
    """Write the folder of `ratioctl counterfactual`; explanations are taken as they come.

    Files of an earlier answer that this one does not have are removed, other files are left alone; until the
    new answer is complete the earlier one stays as it is, and for good where nothing could be answered. When
    the explanations are interrupted, what is done is written with page and document, then the interrupt goes
    on, with the folder as its attribute `saved`: `out`, or `out`/.interrupted beside an earlier answer.

    Args:
        header: of the document, everything before "images".
        errors: {"path", "error"} of images that could not be read; may grow until the explanations end.
        inputs: files that must not be overwritten.
        animation: also write one through the budgets.
        cards: the models' cards in Markdown, for the page.
    Returns:
        The explanations with the paths of their pictures, relative to `out`.
    Raises:
        OutputError: it cannot be written there, another run writes there, or it would overwrite an input.
        DiskError: the disk is full or failed.
    """
    folder = files.make_folder(Path(out))
    taken = {os.path.realpath(path) for path in inputs}
    done: list[Explanation] = []
    with contextlib.ExitStack() as stack:
        with files.writing(folder):
            stack.enter_context(files.lock(folder))
        _refuse_foreign(folder)
        _take_over(folder)
        _discard(folder / GROWING)
        earlier = (folder / DOCUMENT).exists()
        root = folder / GROWING if earlier else folder
        if earlier:
            stack.callback(_discard, root)
        written: set[str] = set()
        pictures: dict[str, bytes] = {}  # those that the document names, for the page

        def put(name: str, data: bytes) -> None:
            if os.path.realpath(folder / name) in taken:
                raise OutputError(
                    folder / name,
                    "is one of the images to explain and would be overwritten",
                    "Name another --out.",
                )
            files.make_folder((root / name).parent)
            files.write_file(root / name, data)
            written.add(name)
            if name.endswith(".png") and not name.endswith("/grid.png"):
                pictures[name] = data

        stopped: BaseException | None = None
        place = _places()
        try:
            for explanation in explanations:
                labels = header["models"][explanation.model]["labels"]
                done.append(
                    _put_pictures(
                        explanation,
                        place(explanation.path),
                        labels,
                        explanation.norm or header["norm"],
                        put,
                        animation,
                    )
                )
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
        if done or (stopped is None and not earlier):
            document = {**header, **document_body(done, errors)}
            notes = [explanation.notes for explanation in done]
            put(PAGE, counterfactual_page.page(document, pictures, notes=notes, cards=cards).encode())
            put(DOCUMENT, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
            if earlier and stopped is None:
                stale = {
                    name for name in _earlier_files(folder) if os.path.realpath(folder / name) not in taken
                }
                files.write_file(root / STALE, json.dumps(sorted(stale - written)).encode())
                _make_room(folder, written)
                with files.writing(folder):
                    os.rename(root, folder / COMPLETE)
                _take_over(folder)
            elif earlier:
                _discard(folder / STOPPED)
                with files.writing(folder):
                    os.rename(root, folder / STOPPED)
        if stopped is not None:
            if done:
                setattr(stopped, "saved", folder / STOPPED if earlier else folder)  # noqa: B010 - as it comes
            raise stopped
    return done


def _make_room(folder: Path, names: Iterable[str]) -> None:
    """Make the folders that files of these names need; raises OutputError where something is in the way."""
    for name in sorted(names):
        files.make_folder((folder / name).parent)
        if (folder / name).is_dir():
            raise OutputError(folder / name, "is a folder, and a file belongs there", "Name another --out.")


def _take_over(folder: Path) -> None:
    """Put the complete answers of `folder`/.answers, if there are any, in the place of the old ones.

    The old document goes first and the new one comes last, so that no document ever speaks of other pictures;
    whatever dies in between, all of the new answer is there, and the next command begins with the rest.
    """
    new = folder / COMPLETE
    if not new.is_dir() or new.is_symlink():
        return
    with files.writing(folder):
        if (new / DOCUMENT).exists():
            (folder / DOCUMENT).unlink(missing_ok=True)
            files.sync_folder(folder)
        names = [path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()]
        for name in sorted(set(names) - {STALE}, key=lambda name: (name == DOCUMENT, name == PAGE, name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)
        files.sync_folder(folder)
        left = 0
        for name in _stale(folder, new / STALE):
            try:
                (folder / name).unlink()
            except OSError:  # costs nothing but tidiness; the next command tries again
                left += 1
            with contextlib.suppress(OSError):
                for parent in Path(name).parents[:-1]:
                    (folder / parent).rmdir()  # only if that was the last
    if not left:
        _discard(new)


def _stale(folder: Path, listed: Path) -> list[str]:
    try:
        names = json.loads(listed.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str) and _is_ours(folder, name)]


def _discard(path: Path) -> None:
    """Remove a folder of ours with what is in it, if it is there; of a link, the link."""
    with contextlib.suppress(OSError):
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)


def document_body(
    explanations: Iterable[Explanation], errors: Iterable[Mapping[str, str]]
) -> dict[str, list[Any]]:
    """ "images" and "errors" of counterfactuals.json."""
    return {
        "images": [explanation.to_json() for explanation in explanations],
        "errors": [dict(error) for error in errors],
    }


def _put_pictures(
    explanation: Explanation,
    place: str,
    labels: Sequence[str],
    norm: str,
    put: Callable[[str, bytes], None],
    animation: Animation | None,
) -> Explanation:
    input_png = f"{place}/input.png"
    put(input_png, png(explanation.input))
    names = class_folders(labels)
    targets = []
    for target in explanation.targets:
        home = f"{place}/{names[target.target]}"
        budgets = []
        for budget in target.budgets:
            name = f"{home}/eps-{budget.eps:g}.png"
            put(name, png(budget.image))
            budgets.append(replace(budget, png=name))
        flip_png = None
        if target.flip_image is not None:
            flip_png = f"{home}/flip.png"
            put(flip_png, png(target.flip_image))
        target = replace(target, budgets=tuple(budgets), flip_png=flip_png)
        put(f"{home}/grid.png", png_of(grid(explanation, target, labels=labels, norm=norm)))
        if animation is not None:
            put(
                f"{home}/animation.{animation}",
                animated(explanation, target, animation, labels=labels, norm=norm),
            )
        targets.append(target)
    return replace(explanation, targets=tuple(targets), input_png=input_png)


def _refuse_foreign(folder: Path) -> None:
    """Raise OutputError where our page or document would take the place of a file that is not ours."""
    for name, mark in ((PAGE, b'<meta name="generator" content="ratioctl">'), (DOCUMENT, b"ratioctl/")):
        with files.writing(folder / name):
            foreign = (folder / name).exists() and mark not in (folder / name).read_bytes()
        if foreign:
            raise OutputError(folder / name, "is there already and not ours", "Name another --out.")


def _earlier_files(folder: Path) -> set[str]:
    """What an earlier run says it wrote here, as far as such names can be ours."""
    try:
        document = json.loads((folder / DOCUMENT).read_bytes())
        named = [image["input_png"] for image in document["images"]]
        targets = [target for image in document["images"] for target in image["targets"]]
        named += [target["flip_png"] for target in targets if target["flip_png"]]
        named += [budget["png"] for target in targets for budget in target["budgets"]]
        homes = {target["budgets"][0]["png"].rsplit("/", 1)[0] for target in targets}
        named += [
            f"{home}/{name}" for home in homes for name in ("grid.png", "animation.gif", "animation.webp")
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()
    return {name for name in named if isinstance(name, str) and _is_ours(folder, name)}


def _is_ours(folder: Path, name: str) -> bool:
    parts = name.split("/")
    plain = len(parts) in (2, 3) and not {"", ".", ".."} & set(parts) and OURS.fullmatch(parts[-1])
    path, root = os.path.realpath(folder / name), os.path.realpath(folder)
    return bool(plain) and os.path.isfile(path) and path == os.path.join(root, *parts)


def _places() -> Callable[[str], str]:
    """A function from paths to folder names, "-2", "-3", ... appended where a stem occurs again."""
    used = {DOCUMENT, PAGE, ".lock", GROWING, COMPLETE, STOPPED}

    def place(path: str) -> str:
        base = path.rsplit("/", 1)[-1]
        if re.search(r"\.(tar(\.\w+)?|t[gx]z|tbz2|zip):", base, re.IGNORECASE):
            base = base.rsplit(":", 1)[-1]
        stem = safe_text(Path(base).stem).replace("/", "_").replace("\\", "_")
        return _unused(stem if stem.strip(". ") else "image", used)

    return place


def class_folders(labels: Sequence[str]) -> dict[str, str]:
    """A safe and different folder name for every class, the same whichever of them are asked for."""
    used = {"input.png"}
    found: dict[str, str] = {}
    for label in labels:
        text = unicodedata.normalize("NFC", label)
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text)[:60]
        found[label] = _unused(safe if safe.strip("._") else "class", used)
    return found


def _unused(name: str, used: set[str]) -> str:
    """`name`, or with the first free number behind it; differences in case alone do not count."""
    found, number = name, 1
    while found.casefold() in used:
        number += 1
        found = f"{name}-{number}"
    used.add(found.casefold())
    return found


# --- terminal -----------------------------------------------------------------------------------------------


def counterfactual_tables(
    header: Mapping[str, Any], explanations: Sequence[Explanation], width: int = 120
) -> Iterator[Table]:
    """One table for each model and norm: a row per image and target, confidences by budget, flip radius.

    Confidences of pictures that the model sees as the target are marked with `*` (and in colour); a flip
    radius with `?` where no budget's picture is both seen as the target and known, that is above the
    threshold. A table too wide for `width` columns of the terminal tells image, label and target in one.
    """
    for number, norm_name in dict.fromkeys((e.model, e.norm or header["norm"]) for e in explanations):
        mine = [e for e in explanations if (e.model, e.norm or header["norm"]) == (number, norm_name)]
        table = _counterfactual_table(header, mine, number, norm_name, compact=False)
        if _least_width(table) > width:
            table = _counterfactual_table(header, mine, number, norm_name, compact=True)
        yield table


def _least_width(table: Table) -> int:
    """Columns of the terminal below which cells are cut: what rich cannot go below."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(width=10_000)
    return Measurement.get(wide, wide.options, table).minimum


def _counterfactual_table(
    header: Mapping[str, Any], mine: Sequence[Explanation], number: int, norm_name: str, compact: bool
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    model, norm = header["models"][number], norm_symbol(norm_name)
    name = safe_text(model["name"])
    table = Table(
        title=f"{name}: confidence in the target by budget ({norm}; * seen as the target)",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD if compact else box.HEAVY_HEAD,
        padding=(0, 1, 0, 0) if compact else (0, 1),
        show_edge=not compact,
    )
    for column in ("image",) if compact else ("image", "seen as", "target"):
        table.add_column(column, overflow="fold", min_width=16)
    for column in ("0", *(f"{budget.eps:.4g}" for budget in mine[0].targets[0].budgets)):
        table.add_column(column, justify="right", no_wrap=True)
    until = header.get("until")
    flips = "flips at" if until is None else f"reaches {until:g} at"
    table.add_column(flips, justify="right", no_wrap=not compact)
    for explanation in mine:
        original = explanation.original
        seen = f"{safe_text(original.label)} {two_digits(original.confidence)}"
        if original.is_ood:
            seen += " (out of distribution)"
        for target in explanation.targets:
            before = original.probabilities[model["labels"].index(target.target)]
            cells = [(before, original.label)] + [(b.confidence, b.predicted) for b in target.budgets]
            about = [safe_text(explanation.path), seen, safe_text(target.target)]
            if compact:
                about = [f"{Path(about[0]).name}\n{seen}\nto {about[2]}"]
            doubt = ""
            if target.flip_eps is not None and not _known(target, model.get("threshold")):
                doubt = "?"
                table.caption = "? no budget's picture is known to the model: all stay below its threshold"
            table.add_row(
                *about,
                *(
                    Text(two_digits(value) + ("*" if hit else " "), style="bold green" if hit else "")
                    for value, hit in ((value, label == target.target) for value, label in cells)
                ),
                "-" if target.flip_eps is None else f"{target.flip_eps:.3g}{doubt}",
            )
    return table


def _known(target: Target, threshold: float | None) -> bool:
    """Whether some budget's picture is seen as the target at a confidence that the model knows."""
    return threshold is None or any(
        budget.predicted == target.target and max(budget.probabilities) >= threshold
        for budget in target.budgets
    )
