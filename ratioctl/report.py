"""Results as people see them: pictures, grids, pages, tables in the terminal.

Counterfactuals go to a folder: pictures as each image is done, then `index.html`, `counterfactuals.json`
last, so that a folder with that file is complete.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ratioctl import files
from ratioctl.errors import OutputError
from ratioctl.results import Explanation, Target
from ratioctl.text import safe_text

if TYPE_CHECKING:
    from rich.table import Table

DOCUMENT, PAGE = "counterfactuals.json", "index.html"
OURS = re.compile(r"(input|grid|flip|eps-[0-9.e+-]+)\.png|animation\.(gif|webp)")
Animation = Literal["gif", "webp"]

_INK, _QUIET, _ACCENT, _RULE = (20, 24, 31), (92, 101, 115), (10, 110, 80), (208, 213, 221)
_CELL, _COLUMNS = 160, 8  # pixels of a picture in a grid at least, columns at most


# --- counterfactuals on disk --------------------------------------------------------------------------------


def write_counterfactuals(
    out: str | os.PathLike[str],
    header: Mapping[str, Any],
    explanations: Iterable[Explanation],
    *,
    errors: Sequence[Mapping[str, str]] = (),
    inputs: Iterable[Path] = (),
    animation: Animation | None = None,
) -> list[Explanation]:
    """Write the folder of `ratioctl counterfactual`; explanations are taken as they come.

    Files of an earlier answer that this one does not have are removed, other files are left alone. When the
    explanations are interrupted, what is done is written with page and document, then the interrupt goes on.

    Args:
        header: of the document, everything before "images".
        errors: {"path", "error"} of images that could not be read; may grow until the explanations end.
        inputs: files that must not be overwritten.
        animation: also write one through the budgets.
    Returns:
        The explanations with the paths of their pictures, relative to `out`.
    Raises:
        OutputError: it cannot be written there, another run writes there, or it would overwrite an input.
        DiskError: the disk is full or failed.
    """
    folder = files.make_folder(Path(out))
    taken = [os.path.realpath(path) for path in inputs]
    done: list[Explanation] = []
    with contextlib.ExitStack() as stack:
        with files.writing(folder):
            stack.enter_context(files.lock(folder))
        _refuse_foreign(folder)
        before = _earlier_files(folder)
        written: set[str] = set()

        def put(name: str, data: bytes) -> None:
            target = folder / name
            if os.path.realpath(target) in taken:
                raise OutputError(
                    target, "is one of the images to explain and would be overwritten", "Name another --out."
                )
            files.make_folder(target.parent)
            files.write_file(target, data)
            written.add(name)

        stopped: BaseException | None = None
        place = _places()
        try:
            for explanation in explanations:
                if not done:  # from here on the old document would speak of new pictures
                    with files.writing(folder):
                        (folder / DOCUMENT).unlink(missing_ok=True)
                labels = header["models"][explanation.model]["labels"]
                done.append(
                    _put_pictures(
                        explanation, place(explanation.path), labels, header["norm"], put, animation
                    )
                )
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
        if stopped is None or done:
            put(PAGE, page(header, done, errors).encode())
            document = {**header, **document_body(done, errors)}
            put(DOCUMENT, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
            for name in sorted(before - written):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
                    (folder / name).parent.rmdir()  # only if that was the last
        if stopped is not None:
            raise stopped
    return done


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
        put(f"{home}/grid.png", _png(grid(explanation, target, labels=labels, norm=norm)))
        if animation is not None:
            put(f"{home}/animation.{animation}", animated(explanation, target, animation))
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()
    return {name for name in named if isinstance(name, str) and _is_ours(folder, name)}


def _is_ours(folder: Path, name: str) -> bool:
    parts = name.split("/")
    plain = len(parts) in (2, 3) and not {"", ".", ".."} & set(parts) and OURS.fullmatch(parts[-1])
    path, root = os.path.realpath(folder / name), os.path.realpath(folder)
    return bool(plain) and os.path.isfile(path) and path == os.path.join(root, *parts)


def _places() -> Callable[[str], str]:
    """A function from paths to folder names, "-2", "-3", ... appended where a stem occurs again."""
    used = {DOCUMENT, PAGE, ".lock"}

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


# --- pictures -----------------------------------------------------------------------------------------------


def picture(image: np.ndarray) -> Image.Image:
    """A Pillow image of uint8 (H, W, C), C 1 or 3."""
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))


def png(image: np.ndarray) -> bytes:
    """uint8 (H, W, C) as a PNG without loss."""
    return _png(picture(image))


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def enlarged(image: np.ndarray, least: int) -> Image.Image:
    """At least `least` pixels wide, every pixel a square."""
    factor = max(1, -(-least // image.shape[1]))
    shown = picture(image).convert("RGB")
    return shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)


def grid(explanation: Explanation, target: Target, *, labels: Sequence[str], norm: str) -> Image.Image:
    """The original, then one column per budget, the confidence in the target over each.

    As Figure 2 of the RATIO paper; under each picture its budget and how the model sees it, in colour where
    that is the target.
    """
    original, name = explanation.original, target.target
    confidence = original.probabilities[list(labels).index(name)]
    cells = [(confidence, explanation.input, "original", original.label)]
    cells += [
        (budget.confidence, budget.image, f"{norm_symbol(norm)} ≤ {budget.eps:g}", budget.predicted)
        for budget in target.budgets
    ]
    pictures = [enlarged(cell[1], _CELL) for cell in cells]
    side, gap, head, foot, margin = pictures[0].width, 12, 30, 44, 16
    columns = min(len(cells), _COLUMNS)
    rows = -(-len(cells) // columns)
    step_x, step_y = side + gap, head + side + foot
    sheet = Image.new(
        "RGB", (2 * margin + columns * step_x - gap, 2 * margin + rows * step_y - 8), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for n, (cell, shown) in enumerate(zip(cells, pictures, strict=True)):
        x, y = margin + n % columns * step_x, margin + n // columns * step_y
        shown_confidence, _, caption, predicted = cell
        hit = predicted == name
        title = f"{_short(name)} {two_digits(shown_confidence)}"
        _centred(draw, title, x, y, side, 17, _ACCENT if hit else _INK, bold=True)
        sheet.paste(shown, (x, y + head))
        frame = (x - 1, y + head - 1, x + side, y + head + side)
        draw.rectangle(frame, outline=_ACCENT if hit else _RULE, width=1)
        _centred(draw, caption, x, y + head + side + 6, side, 13, _INK)
        seen = f"seen as {_short(predicted)}"
        _centred(draw, seen, x, y + head + side + 24, side, 13, _ACCENT if hit else _QUIET)
    return sheet


def _centred(
    draw: ImageDraw.ImageDraw,
    text: str,
    x: int,
    y: int,
    width: int,
    size: int,
    colour: tuple[int, int, int],
    bold: bool = False,
) -> None:
    font = _font(size, bold)
    while size > 8 and draw.textlength(text, font=font) > width:
        size -= 1
        font = _font(size, bold)
    draw.text((x + width / 2, y), text, fill=colour, font=font, anchor="ma")


@lru_cache(maxsize=64)
def _font(size: int, bold: bool) -> Any:
    """DejaVu Sans as matplotlib brings it along, found without importing that; else Pillow's own."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        with contextlib.suppress(OSError):
            return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name, size)
    return ImageFont.load_default(size)


def animated(explanation: Explanation, target: Target, kind: Animation) -> bytes:
    """From the original through the budgets and back, enlarged, forever."""
    images = [explanation.input, *(budget.image for budget in target.budgets)]
    frames = [enlarged(image, 256) for image in images]
    times = [900, *(350 for _ in frames[1:-1]), 1400] if len(frames) > 1 else [900]
    frames, times = frames + frames[-2:0:-1], times + times[-2:0:-1]
    stream = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {"optimize": False}
    frames[0].save(
        stream, kind.upper(), save_all=True, append_images=frames[1:], duration=times, loop=0, **options
    )
    return stream.getvalue()


def norm_symbol(norm: str) -> str:
    """ "l₂" of "2", "l∞" of "inf"."""
    return "l" + {"1": "₁", "1.5": "₁.₅", "2": "₂", "inf": "∞"}.get(norm, norm)


def two_digits(confidence: float) -> str:
    """A confidence for people, never rounded to a certainty that is none: "<0.01", "0.42", ">0.99"."""
    if 0 < confidence < 0.005:
        return "<0.01"
    if 0.995 <= confidence < 1:
        return ">0.99"
    return f"{confidence:.2f}"


def _short(label: str, most: int = 18) -> str:
    text = safe_text(label)
    return text if len(text) <= most else text[: most - 1] + "…"


# --- page ---------------------------------------------------------------------------------------------------


def page(
    header: Mapping[str, Any], explanations: Sequence[Explanation], errors: Iterable[Mapping[str, str]]
) -> str:
    """`index.html`: one file that needs no other and no network, pictures inside."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ratioctl", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(two=two_digits, png=_data_uri, safe_text=safe_text)
    models = header["models"]
    return environment.get_template("counterfactuals.html").render(
        header=header,
        norm=norm_symbol(header["norm"]),
        models=models,
        entries=[
            (e, models[e.model], {t: i for i, t in enumerate(models[e.model]["labels"])})
            for e in explanations
        ],
        errors=list(errors),
        document=DOCUMENT,
    )


def _data_uri(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


# --- terminal -----------------------------------------------------------------------------------------------


def counterfactual_tables(header: Mapping[str, Any], explanations: Sequence[Explanation]) -> Iterator[Table]:
    """One table for each model: a row per image and target, the confidence by budget, the flip radius.

    Confidences of pictures that the model sees as the target are marked with `*` (and in colour).
    """
    from rich.table import Table
    from rich.text import Text

    norm = norm_symbol(header["norm"])
    for number, model in enumerate(header["models"]):
        mine = [explanation for explanation in explanations if explanation.model == number]
        if not mine:
            continue
        title = (
            f"{safe_text(model['name'])}: confidence in the target by budget ({norm}; * seen as the target)"
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in ("image", "seen as", "target"):
            table.add_column(column, overflow="fold")
        for column in ("0", *(f"{budget.eps:.4g}" for budget in mine[0].targets[0].budgets)):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("flips at", justify="right", no_wrap=True)
        for explanation in mine:
            original = explanation.original
            seen = f"{safe_text(original.label)} {two_digits(original.confidence)}"
            if original.is_ood:
                seen += " (out of distribution)"
            for target in explanation.targets:
                before = original.probabilities[model["labels"].index(target.target)]
                cells = [(before, original.label)] + [(b.confidence, b.predicted) for b in target.budgets]
                table.add_row(
                    safe_text(explanation.path),
                    seen,
                    safe_text(target.target),
                    *(
                        Text(two_digits(value) + ("*" if hit else " "), style="bold green" if hit else "")
                        for value, hit in ((value, label == target.target) for value, label in cells)
                    ),
                    "-" if target.flip_eps is None else f"{target.flip_eps:.3g}",
                )
        yield table
