"""Where the weights of a run start: at random, in a package, or in weights of a library."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratioctl import models
from ratioctl import package as packages
from ratioctl.data.in_distribution import Images
from ratioctl.errors import UsageError
from ratioctl.models import checkpoint_file, import_checkpoint, libraries
from ratioctl.models.device import ComputeConfig
from ratioctl.models.registry import architectures, find_architecture
from ratioctl.package import CERTIFIED, ModelPackage
from ratioctl.recipe import Recipe
from ratioctl.training import certified
from ratioctl.training.checkpoint import State
from ratioctl.training.packaging import architecture_options
from ratioctl.training.schedule import full_pace
from ratioctl.utils.seeding import seed_from_key

_LIBRARY = re.compile(r"(timm|torchvision):[^=]+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Weights that training starts from.

    Attributes:
        name: as messages call it.
        architecture, options: of the network whose weights these are.
        label_names: of its outputs; None where they are unknown.
        input_size: side of the images it was trained on, where it is known.
        mean, std: its normalization, which is part of its weights.
        digest: of the package, or the SHA-256 of the weights.
        temperature: of the package, 1 elsewhere.
        data: fingerprints "train_source" and "held_out" of its training, where they are known.
    """

    name: str
    architecture: str
    options: Mapping[str, Any]
    label_names: tuple[str, ...] | None
    input_size: int | tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: Mapping[str, np.ndarray | Tensor]
    digest: str
    temperature: float = 1.0
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)


def resolve(init: str | PathLike[str] | ModelPackage | Start, *, download: bool = False) -> Start:
    """The start that `--init` means.

    Args:
        init: a package folder, the name of a bundled model, or `timm:NAME[=WEIGHTS]` or
            `torchvision:NAME[=WEIGHTS]`; WEIGHTS is a `.safetensors` file or a PyTorch state dict.
        download: whether published weights may be fetched where no file is named.

    Raises:
        PackageError, UsageError: missing, damaged, or weights that do not fit the network NAME.
    """
    if isinstance(init, Start):
        return init
    architecture, _, path = str(init).partition("=")
    if isinstance(init, ModelPackage) or not _LIBRARY.fullmatch(architecture):
        return _of_package(packages.resolve(init))
    find_architecture(architecture)
    if path:
        return _of_checkpoint(architecture, checkpoint_file.read(path))
    if not download:
        reason = "its published weights are not loaded without permission"
        step = f"Add --download to fetch them, or name a file: --init {architecture}=WEIGHTS.safetensors."
        raise UsageError(f"--init {architecture}", reason, step)
    state = libraries.published_weights(architecture)
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].contiguous().numpy().tobytes())
    checkpoint = checkpoint_file.Checkpoint(
        path=Path(architecture), state=state, nest="", sha256=digest.hexdigest()
    )
    return _of_checkpoint(architecture, checkpoint)


def _of_package(package: ModelPackage) -> Start:
    data = package.config["ratio"].get("provenance", {}).get("data", {})
    return Start(
        name=package.name,
        architecture=package.architecture,
        options=package.architecture_options,
        label_names=package.label_names,
        input_size=package.frame.built_for,
        mean=tuple(package.mean),
        std=tuple(package.std),
        weights=packages.read_weights(package),
        digest=package.digest,
        temperature=package.temperature,
        data={key: str(data.get(key, "")) for key in ("train_source", "held_out")},
    )


def _of_checkpoint(architecture: str, checkpoint: checkpoint_file.Checkpoint) -> Start:
    """Weights of a library's network; a missing head is filled with zeros, as it will be replaced."""
    size = libraries.published_size(architecture)
    head = models.head_keys(architecture, input_size=size)
    network = models.build_network(architecture, num_classes=2, channels=3, input_size=size)
    shapes = import_checkpoint.shapes_of(network)
    prefix, names = import_checkpoint.matched(checkpoint.state, shapes)
    counts = {len(checkpoint.state[theirs]) for theirs, ours in names.items() if ours in head}
    state = dict(checkpoint.state)
    if not counts:
        counts = {2}
        state |= {prefix + key: torch.zeros(shapes[key]) for key in head}
    mean, std = import_checkpoint.stored_normalization(checkpoint) or libraries.published_normalization(
        architecture
    )
    options = find_architecture(architecture).infer(state)
    if "transform_input" in find_architecture(architecture).undetermined:
        options["transform_input"] = True  # as the library builds it around published weights
    try:
        fitted = import_checkpoint.fit(
            dataclasses.replace(checkpoint, state=state),
            architecture,
            num_classes=counts.pop(),
            mean=mean,
            std=std,
            input_size=size,
            options=options,
        )
    except UsageError as error:
        near = _nearest_architecture(checkpoint.state, architecture)
        step = f'The nearest architecture is "{near}".' if near else error.next_step
        raise UsageError(f"--init {architecture}={checkpoint.path}", error.reason, step) from None
    whole = fitted.classifier.network.state_dict()
    return Start(
        name=f"{architecture}={checkpoint.path.name}",
        architecture=architecture,
        options=fitted.options,
        label_names=None,
        input_size=size,
        mean=tuple(round(v, 7) for v in fitted.classifier.mean.flatten().tolist()),
        std=tuple(round(v, 7) for v in fitted.classifier.std.flatten().tolist()),
        weights={key: value for key, value in whole.items() if value.is_floating_point()},
        digest=checkpoint.sha256,
    )


def _nearest_architecture(state: Mapping[str, Tensor], architecture: str) -> str | None:
    """The architecture whose tensors agree most with these, of ours and of the same family in the library."""
    library, _, short = architecture.partition(":")
    family = re.match(r"[a-z]+", short)
    candidates = [name for name in architectures() if ":" not in name]
    candidates += [f"{library}:{name}" for name in libraries.family(library, family[0] if family else short)]
    best, nearest = 0.5, None  # half of the tensors
    for name in candidates:
        try:
            options = find_architecture(name).infer(state)
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                network = models.build_network(name, num_classes=2, channels=3, **options)
        except Exception:  # libraries raise many kinds of errors for what cannot be built on "meta"
            continue
        shapes = import_checkpoint.shapes_of(network)
        _, names = import_checkpoint.matched(state, shapes)
        agree = sum(tuple(state[theirs].shape) == shapes[ours] for theirs, ours in names.items())
        share = agree / max(len(shapes), len(state))
        if share > best:
            best, nearest = share, name
    return nearest


def initial_state(
    recipe: Recipe,
    train: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    start: Start | None,
    compute: ComputeConfig,
) -> tuple[State, str]:
    """The state before the first update, and a sentence about the start, empty without one.

    The head is new where the labels of the start are not those of the data.

    Raises:
        UsageError: weights that do not fit the recipe's network; they are named.
    """
    options = architecture_options(recipe)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(seed_from_key(recipe.seed, 0))
        model = models.build(
            recipe.model.architecture,
            num_classes=len(train.label_names),
            channels=recipe.data.channels,
            input_size=recipe.data.frame.built_for,
            **options,
            mean=mean,
            std=std,
        )
    record: dict[str, Any] | None = None
    note = ""
    if start is not None:
        own = models.state_of(model)
        new_head = start.label_names is None or tuple(start.label_names) != tuple(train.label_names)
        weights = dict(start.weights)
        if recipe.objective.certified is not None:
            if new_head:
                differ = _difference(start.label_names, train.label_names)
                reason = f"a certified head keeps its classes, but {differ}"
                raise UsageError(f"--init {start.name}", reason, "Train on the data that the model knows.")
            weights = certified.weights_of(recipe, weights, start.temperature, own)
            note = f"--init {start.name}: its weights stay, the certified head is trained"
        elif new_head:
            head = models.head_keys(
                recipe.model.architecture,
                channels=recipe.data.channels,
                input_size=recipe.data.frame.built_for,
                **options,
            )
            weights |= {key: own[key] for key in head if key in own}
            note = (
                f"--init {start.name}: the head is new; {_difference(start.label_names, train.label_names)}"
            )
        else:
            note = f"--init {start.name}: all weights are taken over"
        _check_fit(start, recipe, weights, own)
        models.load_weights(model, weights, where=f"--init {start.name}")
        record = {"name": start.name, "digest": start.digest, **start.data}
        record |= {"head": "new"} if new_head else {}
    model = model.to(compute.device).to(memory_format=torch.channels_last)
    average = None
    if recipe.optim.ema is not None:
        average = {k: v.clone() for k, v in models.state_of(model).items()}
    pace = full_pace(recipe, len(train))
    state = State(update=0, model=model, average=average, momentum={}, pace=pace, init=record)
    return state, note


def _check_fit(
    start: Start, recipe: Recipe, weights: Mapping[str, np.ndarray | Tensor], own: Mapping[str, Tensor]
) -> None:
    missing = sorted(own.keys() - weights.keys())
    extra = sorted(k for k in weights.keys() - own.keys() if not k.endswith("num_batches_tracked"))
    shapes = [k for k in own if k in weights and tuple(weights[k].shape) != tuple(own[k].shape)]
    if not (missing or extra or shapes):
        return
    shown = [f"{k} {list(weights[k].shape)} instead of {list(own[k].shape)}" for k in shapes]
    parts = [
        f"{what} {import_checkpoint.some(names)}"
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", shown))
        if names
    ]
    architecture = start.architecture
    if recipe.objective.certified is not None:
        architecture = CERTIFIED + architecture.removeprefix(CERTIFIED)
    wanted = {"architecture": architecture, "channels": len(start.mean), **start.options}
    model = recipe.model
    has = {
        "architecture": model.architecture,
        "channels": recipe.data.channels,
        **dict.fromkeys(start.options),
        **architecture_options(recipe),
    }
    differ = {key: value for key, value in wanted.items() if has[key] != value}
    named = {"channels": "data.channels", "architecture": "model.architecture", "width": "model.width"}
    named |= {"stem_stride": "model.stem_stride"}
    sets = [f"--set {named.get(key, f'model.options.{key}')}={value}" for key, value in differ.items()]
    if not sets and start.input_size is not None:
        size = start.input_size
        sets = [f"--set data.size={size if isinstance(size, int) else list(size)}"]
    reason = f"does not fit {model.architecture} of the recipe: {'; '.join(parts)}"
    raise UsageError(f"--init {start.name}", reason, f"The recipe that fits: {' '.join(sets)}.")


def _difference(ours: Sequence[str] | None, theirs: Sequence[str]) -> str:
    """How the labels of a start and of the data differ, in a line."""
    if ours is None:
        return f"the data have {len(theirs)} classes, those of the start are not known"
    if sorted(ours) == sorted(theirs):
        k = next(k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        return f'the labels are the same in another order: number {k} is "{ours[k]}" and "{theirs[k]}"'
    sides = []
    for name, mine, other in (("start", ours, theirs), ("data", theirs, ours)):
        only = [label for label in mine if label not in set(other)]
        shown = ", ".join(only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "")
        sides.append(f"{len(mine)} classes of the {name}" + (f" ({shown} only there)" if only else ""))
    return f"{sides[0]}, {sides[1]}"
