"""`ratioctl init`: a recipe for photographs, chosen after a look at them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, registry, survey
from ratioctl.errors import SourceError
from ratioctl.utils.frame import Frame

SIZES = (16, 32, 64, 96, 128, 160, 192, 224)
DEFAULT_SIZE = 64  # a side of 128 takes four times as long
START = "cifar10-ratio-small"  # the bundled model that photographs in color start from
START_SIZE = 32  # its input size; photographs may be larger
START_OPTIONS = {"width": 16}
GENERATED = ("synthetic:dead-leaves", "synthetic:fractal", "noise:smooth", "noise:uniform")
UPDATES, UPDATES_FROM_START = 2000, 800  # about 30 and 15 minutes on two processor cores at the default size
HEADER = "# Written by ratioctl init"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The network whose weights training will start from; `name` is what `--init` takes."""

    name: str
    architecture: str
    options: Mapping[str, Any]
    input_size: int | tuple[int, int] | None
    channels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A recipe and what was found.

    Attributes:
        name: of the recipe. text: TOML with a comment for each choice.
        init: the start it is made for, or None.
        findings: about the photographs, in sentences.
    """

    name: str
    text: str
    init: str | None
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    findings: tuple[str, ...]

    def recipe(self) -> recipes.Recipe:
        return recipes.loads(self.text, "the recipe of ratioctl init")


def propose(
    photos: str,
    *,
    outside: Sequence[str] = (),
    arch: str | None = None,
    size: int | None = None,
    start: Start | None = None,
    download: bool = False,
) -> Proposal:
    """Look at photographs and write a recipe for them.

    Args:
        photos: a labelled SOURCE, with or without splits.
        outside: OOD SOURCEs; none proposes generated ones.
        arch, size: of the network; None chooses.
        start: weights that training will start from. None proposes those of `START` for photographs in color
            of its size and above, where `arch` leaves that open.

    Raises:
        SourceError: see `survey.survey`.
    """
    train, _ = survey.parts(photos)
    shapes = survey.shapes(photos if train.startswith("split:") else train)
    channels = 3 if start is None and arch is not None and ":" in arch else shapes.channels
    if start is not None:
        channels = start.channels
    chosen = size or _size(shapes, start)
    if start is None and arch is None and channels == 3 and chosen >= START_SIZE:
        options = {**START_OPTIONS, "stem_stride": 2} if chosen >= 2 * START_SIZE else START_OPTIONS
        start = Start(name=START, architecture="resnet18", options=options, input_size=START_SIZE, channels=3)
    frame = Frame(chosen, chosen, shapes.cut > survey.MUCH_CUT, shapes.bit_depth)  # as training reads them
    found = survey.survey(photos, outside, frame, channels, download=download)
    settings = _Settings(
        name=name_of(photos),
        photos=photos,
        outside=tuple(outside),
        size=chosen,
        given_size=size is not None,
        channels=channels,
        arch=start.architecture if start is not None else arch or "resnet18",
        start=start,
        shapes=shapes,
        found=found,
    )
    text = _text(settings)
    recipes.loads(text, "the recipe of ratioctl init")
    return Proposal(
        name=settings.name,
        text=text,
        init=None if start is None else start.name,
        labels=found.labels,
        counts=found.counts,
        findings=(*shapes.notes, *found.findings),
    )


def _size(shapes: survey.Shapes, start: Start | None) -> int:
    if start is not None and isinstance(start.input_size, int):
        return start.input_size
    return max((s for s in SIZES if s <= min(DEFAULT_SIZE, shapes.short_side)), default=SIZES[0])


def name_of(photos: str) -> str:
    stem = in_distribution.short_name(photos.partition(":")[0] if registry.find(photos) else photos)
    stem = re.sub(r"(\.tar)?\.[A-Za-z0-9]+$", "", stem.partition(":")[0])
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") or "photographs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    name: str
    photos: str
    outside: tuple[str, ...]
    size: int
    given_size: bool
    channels: int
    arch: str
    start: Start | None
    shapes: survey.Shapes
    found: survey.Survey


def _text(s: _Settings) -> str:
    """The recipe, one section after the other, a comment for each choice."""
    lines = [
        f"{HEADER} {s.photos}",
        "# Every value may be changed, here or with --set KEY=VALUE; Recipe keys in the reference lists all.",
        "",
        f"name = {_toml(s.name)}",
        f"description = {_toml(f'{len(s.found.labels)} classes of {s.name}')}",
        "",
        *_data(s),
        *_model(s),
        *_optim(s),
        *_objective(s),
    ]
    return "\n".join(lines) + "\n"


def _data(s: _Settings) -> list[str]:
    n, classes = sum(s.found.counts), len(s.found.counts)
    validation = min(0.5, max(0.1, round(2 * classes / n + 0.005, 2)))
    outside = list(s.outside) or [*GENERATED, f"patches:{s.found.train}"]
    side = f"as asked for; the files' median short side is {s.shapes.short_side}"
    if not s.given_size:
        side = (
            f"the files' median short side is {s.shapes.short_side}; twice the size takes four times as long"
        )
    lines = ["[data]"]
    if s.found.train.startswith("split:"):
        lines.append("# There is no split: 15 % of each class, chosen by content, are kept for the test.")
    lines += [
        f"train = {_toml(s.found.train)}  # {n} images of {classes} classes, {min(s.found.counts)} to "
        f"{max(s.found.counts)} each",
        f"test = {_toml(s.found.test)}",
        f"validation = {validation:g}  # of the training images, held out to select weights and to calibrate",
    ]
    lines.append(
        "# Images of anything else teach the model what it does not know. Your own are better than these."
        if not s.outside
        else "# Images of anything else: they teach the model what it does not know."
    )
    lines.append(f"outside = {_toml(outside)}")
    if s.found.excluded:
        lines.append(f"exclude = {_toml(list(s.found.excluded))}  # these folders have names of classes")
    lines.append(f"size = {s.size}  # {side}")
    color = "the images are gray" if s.channels == 1 else "color"
    lines.append(f"channels = {s.channels}  # {color}")
    if s.shapes.cut > survey.MUCH_CUT:
        lines.append(
            f'resize = "pad"  # the centre square would cut away {s.shapes.cut:.0%} of the median picture'
        )
    if s.shapes.bit_depth is not None:
        lines.append(f"bit_depth = {s.shapes.bit_depth}  # the images with 16 bits per pixel fill no more")
    if s.found.uneven:
        lines.append('balance = "sampling"  # classes of unequal size are drawn equally often')
    lines += [
        "",
        "[data.augment]",
        "flip = true  # set it to false where left and right differ in meaning",
        "resized_crop = 0.5" if s.size >= 64 else f"crop = {max(1, s.size // 8)}",
        "",
    ]
    return lines


def _model(s: _Settings) -> list[str]:
    lines = ["[model]", f"architecture = {_toml(s.arch)}"]
    if s.start is not None:
        lines[1] += f"  # that of the start, {s.start.name}"
        options = dict(s.start.options)
        for key in ("width", "stem_stride"):
            if key in options:
                lines.append(f"{key} = {options.pop(key)}")
        if options:
            lines.append("options = { " + ", ".join(f"{k} = {_toml(v)}" for k, v in options.items()) + " }")
    elif ":" not in s.arch and "resnet" in s.arch:
        lines.append("width = 16  # for a processor; 64 with a GPU")
        if s.size >= 64 and s.arch.startswith("resnet"):
            lines.append("stem_stride = 2  # an image costs a quarter")
    return [*lines, ""]


def _optim(s: _Settings) -> list[str]:
    n = sum(s.found.counts)
    batch = min(128, max(8, 2 ** int(math.log2(max(8, n // 8)))))
    updates = UPDATES if s.start is None else UPDATES_FROM_START
    epochs = min(300, max(2, round(updates * batch / n)))
    lines = [
        "[optim]",
        f"epochs = {epochs}  # about {max(1, epochs * n // batch)} updates",
        f"batch_size = {batch}  # " + ("of a small set" if batch < 128 else "as in the paper"),
        f"batch_size_out = {max(4, batch // 2)}  # OOD images cost a longer attack",
        "ema = 0.995  # averaged weights are more robust",
        'select = "last"  # the schedule ends at a low learning rate; "best" takes the best validation',
        f"validate_every = {max(1, epochs // 10)}  # epochs",
    ]
    if s.start is None:
        lines += ['schedule = "onecycle"  # up, then down to zero', "lr = 0.1"]
    else:
        lines += [
            f"head_epochs = {max(0.5, round(epochs * 0.1, 1)):g}  # the head is trained alone first",
            'schedule = "slowstart"  # then all layers, at a learning rate that rises slowly',
            "lr = 0.05",
        ]
    return [*lines, ""]


def _objective(s: _Settings) -> list[str]:
    """RATIO with the paper's radii: 0.25 (or 0.5) and 1 at 32x32, 1.75 (or 3.5) and 7 at 224x224."""
    factor = s.size / 32 * math.sqrt(s.channels / 3)
    ramp = "ramp_epochs = {}  # radii grow from 0"
    batch = min(128, max(8, 2 ** int(math.log2(max(8, sum(s.found.counts) // 8)))))
    updates = UPDATES if s.start is None else UPDATES_FROM_START
    ramp = ramp.format(max(1, round(min(300, max(2, updates * batch / sum(s.found.counts))) / 3)))
    return [
        f"# RATIO. The paper's radii at 32x32 times {factor:.3g}, for sqrt(pixels). It also uses "
        f"{0.5 * factor:.3g} inside: more robust, less accurate.",
        "[objective.inside]",
        "clean = 1.0",
        "robust = 1.0",
        'goal = "margin"',
        ramp,
        "ramp_steps_from = 1",
        f"attack = {{ ball = {{ p = 2, eps = {0.25 * factor:.3g} }}, steps = 3 }}",
        "",
        "[objective.outside]",
        "robust = 1.0",
        ramp,
        "ramp_steps_from = 1",
        f"attack = {{ ball = {{ p = 2, eps = {1.0 * factor:.3g} }}, steps = 3 }}",
    ]


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write(proposal: Proposal, path: Path, *, again: bool) -> None:
    """Write the recipe; with `again` an earlier one of `ratioctl init` is replaced.

    Raises:
        OutputError: the file exists and is not replaced, or cannot be written.
    """
    from ratioctl.errors import OutputError
    from ratioctl.utils.atomic_files import streaming

    if path.exists():
        ours = path.is_file() and path.read_bytes().startswith(HEADER.encode())
        if not (again and ours):
            reason = "already exists" if ours else "already exists and was not written by ratioctl init"
            step = f"Give --out {path} to replace it." if ours else "Choose another name with --out."
            raise OutputError(path, reason, step)
    with streaming(path) as stream:  # names a folder that is missing
        stream.write(proposal.text.encode())


def is_photos(argument: str) -> bool:
    """Whether an argument of `train` names photographs and not a recipe."""
    if registry.find(argument) is not None and not argument.endswith(".toml"):
        return argument.partition(":")[0] not in recipes.available()
    from ratioctl import images

    try:
        path, _ = images.split_source(argument)
    except SourceError:
        return False
    return Path(path).is_dir() or not path.lower().endswith(".toml")
