"""The output folder of counterfactuals.

Pictures are written as each image is finished, then `index.html`, and `counterfactuals.json` last, so a
folder with that file is complete. Where it already exists, the new result is written into a hidden folder
inside and replaces the old one once it is complete; see `_take_over`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ratioctl.errors import OutputError
from ratioctl.report import counterfactual_page
from ratioctl.report.live import Live
from ratioctl.report.pictures import Animation, animated, grid, png, png_of
from ratioctl.types import Explanation
from ratioctl.utils import atomic_files as files
from ratioctl.utils.text import nfc, safe_stem

DOCUMENT, PAGE = "counterfactuals.json", "index.html"
GROWING, COMPLETE, STOPPED = ".results.partial", ".results", ".interrupted"  # folders of new results
EARLIER = {".answers.partial": GROWING, ".answers": COMPLETE}  # before version 0.3
STALE = "stale.json"  # in a complete result: the old files to remove
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
    live: Live | None = None,
) -> list[Explanation]:
    """Write the folder of `ratioctl counterfactual`, consuming the explanations one by one.

    Files of an earlier run that this one does not write are removed; other files are left alone. The earlier
    result stays intact until the new one is complete, and for good where nothing could be explained. On
    KeyboardInterrupt the finished part is written with page and document, and the exception gets an attribute
    `saved`: `out`, or `out`/.interrupted beside an earlier result.

    Args:
        header: of the document, everything before "images".
        errors: {"path", "error"} of images that could not be read; may grow until the explanations end.
        inputs: files that must not be overwritten.
        animation: also write an animation through the budgets.
        cards: the models' cards in Markdown, for the page.
        live: what the page needs to search itself.
    Returns:
        The explanations with the paths of their pictures, relative to `out`.
    Raises:
        OutputError: the folder cannot be written, another run writes there, or an input would be overwritten.
        DiskError: the disk is full or failed.
    """
    folder = files.make_folder(Path(out))
    done: list[Explanation] = []
    with contextlib.ExitStack() as stack:
        with files.writing(folder):
            stack.enter_context(files.lock(folder))
        refuse_foreign(folder)
        _rename_earlier(folder)
        _take_over(folder)
        _discard(folder / GROWING)
        earlier = (folder / DOCUMENT).exists()
        if earlier:
            stack.callback(_discard, folder / GROWING)
        taken = frozenset(os.path.realpath(path) for path in inputs)
        output = _Output(folder=folder, root=folder / GROWING if earlier else folder, taken=taken)
        stopped: BaseException | None = None
        place = _places()
        try:
            for explanation in explanations:
                labels = header["models"][explanation.model]["labels"]
                norm = explanation.norm or header["norm"]
                done.append(
                    _put_pictures(explanation, place(explanation.path), labels, norm, output.put, animation)
                )
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
        if done or (stopped is None and not earlier):
            document = {**header, **document_body(done, errors)}
            notes = [explanation.notes for explanation in done]
            page = counterfactual_page.page(document, output.pictures, notes=notes, cards=cards, live=live)
            output.put(PAGE, page.encode())
            output.put(DOCUMENT, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
            if earlier:
                output.publish(interrupted=stopped is not None)
        if stopped is not None:
            if done:
                setattr(stopped, "saved", folder / STOPPED if earlier else folder)  # noqa: B010
            raise stopped
    return done


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rendered:
    """What `write_counterfactuals` writes, in memory.

    Attributes:
        document: counterfactuals.json.
        pictures: PNG bytes by name, grids included.
        page: index.html.
    """

    document: dict[str, Any]
    pictures: dict[str, bytes]
    page: str


def render(
    header: Mapping[str, Any],
    explanations: Iterable[Explanation],
    *,
    cards: Sequence[str | None] = (),
    live: Live | None = None,
) -> Rendered:
    """The files of these explanations without a folder; arguments as for `write_counterfactuals`."""
    pictures: dict[str, bytes] = {}
    place, done = _places(), []
    for explanation in explanations:
        labels = header["models"][explanation.model]["labels"]
        norm, home = explanation.norm or header["norm"], place(explanation.path)
        done.append(_put_pictures(explanation, home, labels, norm, pictures.__setitem__, None))
    document = {**header, **document_body(done, ())}
    shown = {name: data for name, data in pictures.items() if not name.endswith("/grid.png")}
    notes = [explanation.notes for explanation in done]
    page = counterfactual_page.page(document, shown, notes=notes, cards=cards, live=live)
    return Rendered(document=document, pictures=pictures, page=page)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Output:
    """The files of a run.

    Attributes:
        root: where they are written: `folder`, or a hidden folder inside it beside an earlier result.
        taken: real paths of inputs.
        pictures: PNG bytes by name, for the page.
    """

    folder: Path
    root: Path
    taken: frozenset[str]
    written: set[str] = dataclasses.field(default_factory=set)
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def put(self, name: str, data: bytes) -> None:
        """Write one file; raises OutputError where it would replace an input."""
        if os.path.realpath(self.folder / name) in self.taken:
            reason = "is one of the images to explain and would be overwritten"
            raise OutputError(self.folder / name, reason, "Choose another --out.")
        for parent in Path(name).parents[:-1]:
            if (self.folder / parent).is_symlink():
                reason = "is a symbolic link, which is not written through"
                raise OutputError(self.folder / parent, reason, "Remove it, or choose another --out.")
        files.make_folder((self.root / name).parent)
        files.write_file(self.root / name, data)
        self.written.add(name)
        if name.endswith(".png") and not name.endswith("/grid.png"):
            self.pictures[name] = data

    def publish(self, *, interrupted: bool) -> None:
        """Replace the earlier result, or keep an interrupted one beside it."""
        if interrupted:
            _discard(self.folder / STOPPED)
            with files.writing(self.folder):
                os.rename(self.root, self.folder / STOPPED)
            return
        stale = {
            name
            for name in _earlier_files(self.folder)
            if os.path.realpath(self.folder / name) not in self.taken
        }
        files.write_file(self.root / STALE, json.dumps(sorted(stale - self.written)).encode())
        _make_room(self.folder, self.written)
        with files.writing(self.folder):
            os.rename(self.root, self.folder / COMPLETE)
        _take_over(self.folder)


def _make_room(folder: Path, names: Iterable[str]) -> None:
    """Create the parents of these names; raises OutputError where a folder is in the place of a file."""
    for name in sorted(names):
        files.make_folder((folder / name).parent)
        if (folder / name).is_dir():
            raise OutputError(
                folder / name, "is a folder where a file is to be written", "Choose another --out."
            )


def _rename_earlier(folder: Path) -> None:
    """Give the folders that an interrupted run of an earlier version left their present names."""
    for old, new in EARLIER.items():
        if (folder / old).is_dir() and not (folder / old).is_symlink() and not (folder / new).exists():
            with files.writing(folder):
                os.rename(folder / old, folder / new)


def _take_over(folder: Path) -> None:
    """Move a complete result from `folder`/.results, if there is one, into the place of the old one.

    The old document is removed first and the new one moved last, so a document always matches the pictures
    beside it. After an interruption in between, the next command moves the rest.
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
            except OSError:  # the next command tries again
                left += 1
            with contextlib.suppress(OSError):
                for parent in Path(name).parents[:-1]:
                    (folder / parent).rmdir()  # succeeds only if it is empty
    if not left:
        _discard(new)


def _stale(folder: Path, listed: Path) -> list[str]:
    try:
        names = json.loads(listed.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str) and _is_ours(folder, name)]


def _discard(path: Path) -> None:
    """Remove a folder with its contents if it exists; of a link, the link only."""
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


def refuse_foreign(folder: Path) -> None:
    """Raise OutputError where page or document would replace a file that ratioctl did not write."""
    for name, mark in ((PAGE, b'<meta name="generator" content="ratioctl">'), (DOCUMENT, b"ratioctl/")):
        with files.writing(folder / name):
            foreign = (folder / name).exists() and mark not in (folder / name).read_bytes()
        if foreign:
            raise OutputError(
                folder / name, "exists and was not written by ratioctl", "Choose another --out."
            )


def _earlier_files(folder: Path) -> set[str]:
    """Files that an earlier run lists, restricted to names that ratioctl writes."""
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
    """A function from paths to folder names; "-2", "-3", ... is appended to repeated stems."""
    used = {DOCUMENT, PAGE, ".lock", GROWING, COMPLETE, STOPPED, *EARLIER}

    def place(path: str) -> str:
        base = path.rsplit("/", 1)[-1]
        if re.search(r"\.(tar(\.\w+)?|t[gx]z|tbz2|zip):", base, re.IGNORECASE):
            base = base.rsplit(":", 1)[-1]
        stem = safe_stem(Path(base).stem)
        return _unused(stem if stem.strip(". ") else "image", used)

    return place


def class_folders(labels: Sequence[str]) -> dict[str, str]:
    """A safe and unique folder name for every class, independent of the requested targets."""
    used = {"input.png"}
    found: dict[str, str] = {}
    for label in labels:
        text = nfc(label)
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text)[:60]
        found[label] = _unused(safe if safe.strip("._") else "class", used)
    return found


def _unused(name: str, used: set[str]) -> str:
    """`name`, or `name` with the first free number appended; comparison ignores case."""
    found, number = name, 1
    while found.casefold() in used:
        number += 1
        found = f"{name}-{number}"
    used.add(found.casefold())
    return found
