"""The state of a run and its files: `checkpoint/` and `metrics.jsonl`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ratioctl import models
from ratioctl import recipe as recipes
from ratioctl.errors import PackageError, RecipeError, TrainingError, UsageError
from ratioctl.models.device import ComputeConfig
from ratioctl.models.network import Classifier
from ratioctl.recipe import Recipe
from ratioctl.training.schedule import Pace
from ratioctl.utils import atomic_files as files

FORMAT = 1
_DAMAGED = "Start anew in another --out folder."


@dataclasses.dataclass(kw_only=True)
class State:
    """The whole state of a training run between two updates.

    Attributes:
        update: number of updates done.
        model: the network being trained; `average` its exponential moving average, or None.
        momentum: SGD's velocity, or Adam's first moment, by parameter name; `squares` Adam's second moment.
        buffer: JEM's replay buffer, or None.
        best_score, best_update, best: score, update and weights of the best validation so far.
        init: name, digest and data split of the package whose weights were the start, or None.
        pace: which epoch of the recipe every update belongs to.
        time_limit: the decisions of `train --max-time` so far (`TimeLimit.decision`).
    """

    update: int
    model: Classifier
    average: dict[str, Tensor] | None
    momentum: dict[str, Tensor]
    pace: Pace
    squares: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    buffer: Tensor | None = None
    best_score: float = -math.inf
    best_update: int = -1
    best: dict[str, Tensor] | None = None
    init: dict[str, Any] | None = None
    time_limit: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def final_weights(state: State) -> dict[str, Tensor]:
    """The weights to package at this point: the averaged ones if the run keeps an average."""
    if state.average is not None:
        return state.average
    return {k: v for k, v in state.model.network.state_dict().items() if v.is_floating_point()}


def save(folder: Path, state: State, recipe: Recipe, compute: ComputeConfig, processes: int = 1) -> None:
    """Write the checkpoint: tensors under a new name, then `state.json` that names them, atomically.

    Raises TrainingError where a value is not finite, so that it never replaces a good checkpoint.
    """
    tensors = {f"model.{k}": v for k, v in state.model.network.state_dict().items() if v.is_floating_point()}
    tensors |= {f"average.{k}": v for k, v in (state.average or {}).items()}
    tensors |= {f"momentum.{k}": v for k, v in state.momentum.items()}
    tensors |= {f"squares.{k}": v for k, v in state.squares.items()}
    tensors |= {} if state.buffer is None else {"replay.buffer": state.buffer}
    tensors |= {f"best.{k}": v for k, v in (state.best or {}).items()}
    broken = next((k for k, v in tensors.items() if not bool(torch.isfinite(v).all())), None)
    if broken is not None:
        raise TrainingError(
            f"update {state.update}",
            f"{broken} is not finite",
            f"The last good checkpoint is kept in {folder}; lower optim.lr or set optim.grad_clip.",
        )
    data = save_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    name = f"state-{state.update}.safetensors"
    files.sweep(folder, "state-*.safetensors")
    files.write_file(folder / name, data)
    root = {
        "format": FORMAT,
        "update": state.update,
        "recipe_digest": recipe.digest,
        "recipe": recipes.dumps(recipe),
        "best_score": state.best_score if state.best is not None else None,
        "best_update": state.best_update,
        "init": state.init,
        "mean": state.model.mean.flatten().tolist(),
        "std": state.model.std.flatten().tolist(),
        "pace": dataclasses.asdict(state.pace),
        "time_limit": state.time_limit,
        "device": str(compute.device.type),
        "bf16": compute.bf16,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "files": {name: hashlib.sha256(data).hexdigest()},
    }
    files.write_file(folder / "state.json", (json.dumps(root, indent=1) + "\n").encode())
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def read(folder: Path, recipe: Recipe) -> tuple[dict[str, Any], bytes]:
    """The checkpoint as it is on the disk, for `fill`.

    Raises:
        RecipeError: it is of another recipe.
        UsageError: it is damaged.
    """
    try:
        root = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        (name, expected), *_ = root["files"].items()
        data = (folder / Path(name).name).read_bytes()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(folder, f"its checkpoint cannot be read: {error}", _DAMAGED) from None
    if root.get("format") != FORMAT:
        raise UsageError(folder, f"checkpoint format {root.get('format')} is unknown", "Update ratioctl.")
    if hashlib.sha256(data).hexdigest() != expected:
        raise UsageError(folder / name, "does not match its recorded SHA-256", _DAMAGED)
    if root.get("recipe_digest") != recipe.digest:
        changed = changes(recipes.loads(str(root.get("recipe")), str(folder)), recipe)
        raise RecipeError(
            folder.parent,
            f"was started with another recipe; changed: {', '.join(changed)}",
            "Resume with the same recipe and --set options, or choose another --out.",
        )
    return root, data


def fill(folder: Path, state: State, root: dict[str, Any], data: bytes, compute: ComputeConfig) -> None:
    """Fill `state` from what `read` has found in `folder`. Raises UsageError for damage."""
    try:
        _fill(state, root, load_tensors(data), compute, where=str(folder))
    except (SafetensorError, PackageError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UsageError(folder, f"its checkpoint cannot be read: {error}", _DAMAGED) from None


def _fill(
    state: State, root: dict[str, Any], tensors: dict[str, Tensor], compute: ComputeConfig, *, where: str
) -> None:
    def group(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {k[len(start) :]: v.to(compute.device) for k, v in tensors.items() if k.startswith(start)}

    models.load_weights(state.model, group("model"), where=where)
    if state.average is not None:
        for key, value in group("average").items():
            state.average[key].copy_(value)
    own = dict(state.model.network.named_parameters())
    state.momentum = {k: torch.empty_like(own[k]).copy_(v) for k, v in group("momentum").items()}
    state.squares = {k: torch.empty_like(own[k]).copy_(v) for k, v in group("squares").items()}
    state.buffer = group("replay").get("buffer")
    state.best = group("best") or None
    state.best_score = -math.inf if root["best_score"] is None else float(root["best_score"])
    state.best_update = int(root["best_update"])
    state.init = root.get("init")
    for name in ("mean", "std"):  # a start's, which a resumed run need not name again
        if name in root:
            own_values: Tensor = getattr(state.model, name)
            own_values.copy_(torch.tensor(root[name]).view_as(own_values))
    if "pace" in root:  # earlier versions had one pace
        state.pace = Pace(**root["pace"])
    state.time_limit = list(root.get("time_limit", ()))
    state.update = int(root["update"])


def changes(old: Recipe, new: Recipe) -> list[str]:
    """The keys, such as "optim.lr", that two recipes give different values."""

    def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from flat(value, f"{prefix}.{key}".lstrip("."))
        else:
            yield prefix, tree

    a, b = dict(flat(old.model_dump(mode="json"))), dict(flat(new.model_dump(mode="json")))
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


class MetricsLog:
    """`metrics.jsonl`, one line per validation; lines beyond the resumed update are dropped first.

    It is replaced as a whole, a line longer: an append that is killed could leave half of one.
    """

    def __init__(self, path: Path, update: int) -> None:
        self.path = path
        self.text = ""
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["update"] <= update:
                        self.text += line + "\n"
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # damaged
        files.write_file(path, self.text.encode())

    def write(self, row: dict[str, Any]) -> None:
        self.text += json.dumps({k: v for k, v in row.items() if k != "event"}) + "\n"
        files.write_file(self.path, self.text.encode())
