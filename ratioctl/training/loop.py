"""Training: a plain loop that reads like the paper, and everything it takes to stop and go on.

for each update:
    z_in  <- argmax over the in-ball of the margin          (eq. 8)
    z_out <- argmax over the out-ball of CE(uniform)        (eq. 5)
    one SGD step on CE(y, z_in) + lambda CE(uniform, z_out) (eq. 6)
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ratioctl import models as nets
from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.data import loader
from ratioctl.data.in_distribution import Images
from ratioctl.errors import Interrupted, PackageError, RecipeError, TrainingError, UsageError
from ratioctl.models.device import ComputeConfig, select_device
from ratioctl.models.network import Classifier
from ratioctl.recipe import Attack, Objective, Recipe, Term
from ratioctl.training import memory
from ratioctl.training.objective import losses
from ratioctl.utils import atomic_files as files
from ratioctl.utils.seeding import seed_from_key

Callback = Callable[[dict[str, Any]], None]
FORMAT = 1
_NAN_EVERY = 20  # updates between looks at the loss; each look waits for the device
_SAVE_EVERY_S = 120.0


@dataclasses.dataclass(kw_only=True)
class State:
    """Everything that training is, between two updates.

    Attributes:
        update: number of updates done.
        model: the network being trained; `average` its exponential moving average, or None.
        momentum: SGD's velocity by parameter name.
        best: score, update and weights of the best validation so far, or None.
        init: name, digest and data split of the package whose weights were the start, or None.
    """

    update: int
    model: Classifier
    average: dict[str, Tensor] | None
    momentum: dict[str, Tensor]
    best_score: float = -math.inf
    best_update: int = -1
    best: dict[str, Tensor] | None = None
    init: dict[str, str] | None = None


def fit(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    init: packages.ModelPackage | None = None,
    device: str = "auto",
    precision: str = "auto",
    download: bool = False,
    callback: Callback | None = None,
) -> packages.ModelPackage:
    """Train `recipe` in the run folder `out`; returns its package, not yet calibrated.

    The folder gets `metrics.jsonl`, `checkpoint/` and at the end `package/`. On a CPU with the same number
    of threads, an interrupted and resumed run ends with the very weights of an uninterrupted one.

    Args:
        resume: continue from `checkpoint/`; without one, start.
        init: a package whose weights are the starting point (fine-tuning).
        watch: called with a dictionary: once what the leak check found ("event": "leaks"), per validation
            ("event": "validation") and about once a second between ("event": "progress").

    Raises:
        UsageError: a run is already in `out` and `resume` is false, or `init` does not fit.
        RecipeError: `resume` with a recipe other than the run's.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM, after saving.
    """
    compute = select_device(device, precision)
    folder = out / "checkpoint"
    _refuse_second_run(out, resume)
    target = out / "package"
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise UsageError(target, "is not empty and not a package", "Move it away, or choose another --out.")
    callback = callback or (lambda event: None)
    splits = loader.load(recipe, download=download)
    memory.check(recipe, len(splits.train.label_names), compute.device, bf16=compute.bf16)
    mean, std = _normalisation(recipe, splits.train)
    state = _fresh(recipe, splits.train, mean, std, init, compute)
    files.make_folder(folder)
    with files.writing(out), files.lock(out), _signals() as stopped:
        _refuse_second_run(out, resume)  # it may have begun while the data were loaded
        if resume and (folder / "state.json").exists():
            _restore(folder, state, recipe, compute)
        if state.update >= total_updates(recipe, len(splits.train)) and (target / "config.json").is_file():
            done = packages.read(target)
            if done.config["ratio"].get("provenance", {}).get("recipe_digest") == recipe.digest:
                return done  # nothing left to do, and its measurements and export stay
        found = loader.leaks(splits) | _leaked_by(state.init, splits)
        callback({"event": "leaks", **found})
        log = _MetricsLog(out / "metrics.jsonl", state.update)
        _loop(recipe, state, splits, folder, log, compute, stopped, callback)
        package = _package(recipe, state, splits, target, mean, std, found)
        signum = stopped()
        if signum is not None:  # it came after the last look in the loop
            raise _interrupted(out, signum, "after the last update, packaged")
        return package


def _refuse_second_run(out: Path, resume: bool) -> None:
    if (out / "checkpoint" / "state.json").exists() and not resume:
        raise UsageError(
            out, "already holds a training run", "Continue it with --resume, or choose another --out."
        )


def _interrupted(out: Path, signum: int, when: str) -> Interrupted:
    reason = f"stopped by {signal.Signals(signum).name} {when}"
    step = f"Continue with: ratioctl train RECIPE --out {out} --resume"
    return Interrupted(out, reason, step, signum=signum)


def _loop(
    recipe: Recipe,
    state: State,
    splits: loader.Splits,
    folder: Path,
    log: _MetricsLog,
    compute: ComputeConfig,
    stopped: Callable[[], int | None],
    callback: Callback,
) -> None:
    optim = recipe.optim
    per_epoch = loader.updates_per_epoch(len(splits.train), optim.batch_size)
    total = total_updates(recipe, len(splits.train))
    validate_at = {min(total, math.ceil(k * optim.validate_every * per_epoch)) for k in range(1, total + 1)}
    validate_at.add(total)
    model = state.model
    parameters = dict(model.network.named_parameters())
    sgd = torch.optim.SGD(
        parameters.values(),
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=compute.device.type == "cuda" or None,
    )
    for name, p in parameters.items():
        # Given from the start, in the parameter's own memory layout: a buffer that SGD makes takes its
        # gradient's, another layout takes another kernel, and a resumed run would differ in the last bit.
        state.momentum.setdefault(name, torch.zeros_like(p, requires_grad=False))
        sgd.state[p]["momentum_buffer"] = state.momentum[name]
    eval_net = nets.fold_batchnorm(model)
    logits_of, train_logits = _in_precision(eval_net, compute), _in_precision(model, compute)
    fill = (model.mean.flatten().cpu() * 255).round().to(torch.uint8)
    batches = loader.stream(
        recipe,
        splits.train,
        splits.outside,
        fill,
        start=state.update,
        stop=total,
        device=compute.device,
    )
    began, first = time.monotonic(), state.update
    saved = told = began
    recent: dict[str, Tensor] = {}
    for batch in batches:
        epoch = state.update / per_epoch
        objective, shrink = schedule_attacks(recipe, epoch)
        for group in sgd.param_groups:
            group["lr"] = learning_rate(recipe, epoch)
        generator = torch.Generator(compute.device).manual_seed(seed_from_key(recipe.seed, state.update, 3))
        nets.sync_folded(eval_net, model)
        model.train()
        named = losses(train_logits, logits_of, batch, objective, generator=generator, shrink=shrink)
        sgd.zero_grad(set_to_none=True)
        named["total"].backward()
        if optim.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), optim.grad_clip)
        last = state.update + 1 in validate_at
        if (state.update % _NAN_EVERY == 0 or last) and not math.isfinite(float(named["total"].detach())):
            raise TrainingError(
                f"update {state.update}",
                f"the loss is {float(named['total'].detach())}",
                f"The last good checkpoint is kept in {folder}; lower optim.lr or set optim.grad_clip.",
            )
        sgd.step()
        state.update += 1
        if state.average is not None:
            _average(state.average, model.network, min(optim.ema or 0, state.update / (9 + state.update)))
        recent = {k: v.detach() for k, v in named.items()}

        now = time.monotonic()
        if now - told > 1:
            told = now
            pace = (state.update - first) / (now - began)
            callback(
                {
                    "event": "progress",
                    "update": state.update,
                    "updates": total,
                    "epoch": state.update / per_epoch,
                    "images_per_s": pace
                    * (optim.batch_size + (0 if batch.x_out is None else len(batch.x_out))),
                    "remaining_s": (total - state.update) / pace,
                    **{k: float(v) for k, v in recent.items()},
                }
            )
        if last:
            if any(not bool(torch.isfinite(p).all()) for p in parameters.values()):
                raise TrainingError(
                    f"update {state.update}", "a weight is not finite", f"The checkpoint in {folder} is kept."
                )
            row: dict[str, Any] = {
                "event": "validation",
                "update": state.update,
                "updates": total,
                "epoch": state.update / per_epoch,
                "lr": learning_rate(recipe, epoch),
                **{k: float(v) for k, v in recent.items()},
                **_validate(recipe, state, splits, compute),
                "seconds": time.monotonic() - began,
            }
            if row["score"] > state.best_score or optim.select == "last":
                state.best_score, state.best_update = row["score"], state.update
                state.best = {k: v.clone() for k, v in _final_weights(state).items()}
            log.write(row)
            callback(row)
        signum = stopped()
        if last or signum is not None or now - saved > _SAVE_EVERY_S:
            saved = now
            _save(folder, state, recipe, compute)
        if signum is not None:
            raise _interrupted(folder.parent, signum, f"after update {state.update} of {total}, saved")


def total_updates(recipe: Recipe, train_images: int) -> int:
    """Number of updates in `optim.epochs` passes over the in-images, at least 1."""
    return max(
        1, math.ceil(recipe.optim.epochs * loader.updates_per_epoch(train_images, recipe.optim.batch_size))
    )


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The rate at a (fractional) epoch: warm-up times step, cosine or one-cycle."""
    optim = recipe.optim
    warm = min(1.0, epoch / optim.warmup_epochs) if optim.warmup_epochs > 0 else 1.0
    part = min(1.0, epoch / optim.epochs)
    if optim.schedule == "step":
        factor = optim.gamma ** _drops(recipe, epoch)
    elif optim.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * part))
    else:
        rise = 0.3
        if part < rise:
            factor = 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * part / rise))
        else:
            factor = 0.5 * (1 + math.cos(math.pi * (part - rise) / (1 - rise)))
    return optim.lr * warm * factor


def _drops(recipe: Recipe, epoch: float) -> int:
    return sum(epoch >= drop for drop in recipe.optim.milestones)


def schedule_attacks(recipe: Recipe, epoch: float) -> tuple[Objective, tuple[float, float]]:
    """The objective with this epoch's attack steps, and the factors on the radii of its two sides."""
    inside, shrink_in = _term_at(recipe.objective.inside, epoch, _drops(recipe, epoch))
    outside, shrink_out = recipe.objective.outside, 1.0
    if outside is not None:
        outside, shrink_out = _term_at(outside, epoch, _drops(recipe, epoch))
    return Objective(inside=inside, outside=outside), (shrink_in, shrink_out)


def _term_at(term: Term, epoch: float, drops: int) -> tuple[Term, float]:
    if term.attack is None:
        return term, 1.0
    steps = term.attack.steps + term.more_steps_per_drop * drops
    if term.max_steps is not None:
        steps = min(steps, max(term.max_steps, term.attack.steps))
    shrink = 1.0
    if epoch < term.ramp_epochs:
        part = epoch / term.ramp_epochs
        # Never quite 0: a radius of 0 would make the attack's steps a waste of their passes.
        shrink = max(part, 0.05)
        if term.ramp_steps_from is not None:
            steps = round(term.ramp_steps_from + part * (steps - term.ramp_steps_from))
    if steps == term.attack.steps:
        return term, shrink
    attack: Attack = term.attack.model_copy(update={"steps": steps})
    return term.model_copy(update={"attack": attack}), shrink


def _in_precision(net: Classifier, compute: ComputeConfig) -> Callable[[Tensor], Tensor]:
    if not compute.bf16:
        return net

    def logits_of(x: Tensor) -> Tensor:
        with compute.autocast():
            return net(x)

    return logits_of


@torch.no_grad()
def _average(average: dict[str, Tensor], network: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of weights and batch statistics, in place."""
    old, new = [], []
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            old.append(average[key])
            new.append(value)
    torch._foreach_lerp_(old, new, 1 - decay)


def _final_weights(state: State) -> dict[str, Tensor]:
    """What would be packaged now: the averaged weights where there are any."""
    if state.average is not None:
        return state.average
    return {k: v for k, v in state.model.network.state_dict().items() if v.is_floating_point()}


def _validate(
    recipe: Recipe, state: State, splits: loader.Splits, compute: ComputeConfig
) -> dict[str, float]:
    """Accuracy, clean and attacked, on held-out in-images; mean confidence on held-out out-images."""
    model = state.model if state.average is None else _with_weights(state.model, state.average)
    logits_of = _in_precision(nets.fold_batchnorm(model), compute)
    held = splits.held_out
    assert held.labels is not None
    count = min(len(held), recipe.optim.validate_images)
    picked = np.sort(np.random.default_rng([recipe.seed, 4]).permutation(len(held))[:count])
    attack = recipe.objective.inside.attack if recipe.objective.inside.robust > 0 else None
    clean = robust = 0
    for start in range(0, count, 256):
        index = picked[start : start + 256]
        x = loader.to_float(held.pixels[index], compute.device)
        y = torch.from_numpy(held.labels[index]).to(compute.device)
        with torch.no_grad():
            clean += int((logits_of(x).argmax(1) == y).sum())
        if attack is not None:
            generator = torch.Generator(compute.device).manual_seed(seed_from_key(recipe.seed, start, 5))
            found = perturb(logits_of, x, goals.margin(y), attack, generator=generator)
            robust += int((found.value <= 0).sum())
    result = {"validation.clean": clean / count, "validation.n": float(count)}
    if attack is not None:
        result["validation.attacked"] = robust / count
    result["score"] = (robust if attack is not None else clean) / count
    if splits.outside_test is not None:
        pixels = splits.outside_test.pixels
        chosen = np.random.default_rng([recipe.seed, 6]).permutation(len(pixels))[:count]
        confidence = 0.0
        for start in range(0, len(chosen), 256):
            x = loader.to_float(pixels[np.sort(chosen[start : start + 256])], compute.device)
            with torch.no_grad():
                confidence += float(logits_of(x).float().softmax(1).amax(1).sum())
        result["validation.out_confidence"] = confidence / len(chosen)
    return result


def _with_weights(model: Classifier, weights: dict[str, Tensor]) -> Classifier:
    other = copy.deepcopy(model)
    nets.load_weights(other, weights, where="averaged weights")
    return other


def _normalisation(recipe: Recipe, train: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation: the recipe's, or those of the training pixels."""
    if recipe.model.mean is not None and recipe.model.std is not None:
        return recipe.model.mean, recipe.model.std
    flat = train.pixels.reshape(-1, train.pixels.shape[-1])
    count, total, squares = len(flat), np.zeros(flat.shape[1]), np.zeros(flat.shape[1])
    for start in range(0, count, 1 << 22):
        part = flat[start : start + (1 << 22)].astype(np.float64) / 255
        total, squares = total + part.sum(0), squares + (part**2).sum(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-8))
    return tuple(round(float(m), 4) for m in mean), tuple(round(float(s), 4) for s in std)


def _options(recipe: Recipe) -> dict[str, Any]:
    """The architecture's options, those that are set."""
    model = recipe.model
    options = {"width": model.width, "stem_stride": model.stem_stride, **(model.options or {})}
    return {name: value for name, value in options.items() if value is not None}


def _fresh(
    recipe: Recipe,
    train: Images,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    init: packages.ModelPackage | None,
    compute: ComputeConfig,
) -> State:
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
        torch.manual_seed(seed_from_key(recipe.seed, 0))
        model = nets.build(
            recipe.model.architecture,
            num_classes=len(train.label_names),
            channels=recipe.data.channels,
            input_size=recipe.data.size,
            **_options(recipe),
            mean=mean,
            std=std,
        )
    if init is not None:
        if tuple(init.label_names) != tuple(train.label_names):
            raise UsageError(
                f"--init {init.name}",
                "its labels are not those of the training data",
                f"It knows {', '.join(init.label_names)}; the data {', '.join(train.label_names)}.",
            )
        nets.load_weights(model, packages.read_weights(init), where=f"--init {init.name}")
    model = model.to(compute.device).to(memory_format=torch.channels_last)
    average = None
    if recipe.optim.ema is not None:
        average = {k: v.clone() for k, v in model.network.state_dict().items() if v.is_floating_point()}
    start = None
    if init is not None:
        data = init.config["ratio"].get("provenance", {}).get("data", {})
        split = {key: str(data.get(key, "")) for key in ("train_source", "held_out")}
        start = {"name": init.name, "digest": init.digest, **split}
    return State(update=0, model=model, average=average, momentum={}, init=start)


def _leaked_by(init: dict[str, str] | None, splits: loader.Splits) -> dict[str, int]:
    """Held-out images that `init` may have been trained on: all, if it split the same data otherwise."""
    if init is None:
        return {}
    held = splits.held_out
    same_data = init.get("train_source") == splits.source_fingerprint
    return {"init": len(held) if same_data and init.get("held_out") != held.fingerprint else 0}


def _save(folder: Path, state: State, recipe: Recipe, compute: ComputeConfig) -> None:
    """Write the checkpoint: tensors under a new name, then `state.json` that names them, atomically.

    Raises TrainingError where a value is not finite, so that it never replaces a good checkpoint.
    """
    tensors = {f"model.{k}": v for k, v in state.model.network.state_dict().items() if v.is_floating_point()}
    tensors |= {f"average.{k}": v for k, v in (state.average or {}).items()}
    tensors |= {f"momentum.{k}": v for k, v in state.momentum.items()}
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
        "device": str(compute.device.type),
        "bf16": compute.bf16,
        "threads": torch.get_num_threads(),
        "files": {name: hashlib.sha256(data).hexdigest()},
    }
    files.write_file(folder / "state.json", (json.dumps(root, indent=1) + "\n").encode())
    for old in folder.glob("state-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)


def _restore(folder: Path, state: State, recipe: Recipe, compute: ComputeConfig) -> None:
    """Fill `state` from the checkpoint. Raises RecipeError for another recipe, UsageError for damage."""
    damaged = "Start anew in another --out folder."
    try:
        root = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        (name, expected), *_ = root["files"].items()
        data = (folder / Path(name).name).read_bytes()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(folder, f"its checkpoint cannot be read: {error}", damaged) from None
    if root.get("format") != FORMAT:
        raise UsageError(folder, f"checkpoint format {root.get('format')} is not known", "Update ratioctl.")
    if hashlib.sha256(data).hexdigest() != expected:
        raise UsageError(folder / name, "does not match its recorded SHA-256", damaged)
    if root.get("recipe_digest") != recipe.digest:
        changed = _changes(recipes.loads(str(root.get("recipe")), str(folder)), recipe)
        raise RecipeError(
            folder.parent,
            f"was started with another recipe; changed: {', '.join(changed)}",
            "Resume with the same recipe and --set options, or choose another --out.",
        )
    try:
        _fill(state, root, load_tensors(data), compute, where=str(folder / name))
    except (SafetensorError, PackageError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UsageError(folder, f"its checkpoint cannot be read: {error}", damaged) from None


def _fill(
    state: State, root: dict[str, Any], tensors: dict[str, Tensor], compute: ComputeConfig, *, where: str
) -> None:
    def group(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {k[len(start) :]: v.to(compute.device) for k, v in tensors.items() if k.startswith(start)}

    nets.load_weights(state.model, group("model"), where=where)
    if state.average is not None:
        for key, value in group("average").items():
            state.average[key].copy_(value)
    own = dict(state.model.network.named_parameters())
    state.momentum = {k: torch.empty_like(own[k]).copy_(v) for k, v in group("momentum").items()}
    state.best = group("best") or None
    state.best_score = -math.inf if root["best_score"] is None else float(root["best_score"])
    state.best_update = int(root["best_update"])
    state.init = root.get("init")
    state.update = int(root["update"])


def _changes(old: Recipe, new: Recipe) -> list[str]:
    def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict):
            for key, value in tree.items():
                yield from flat(value, f"{prefix}.{key}".lstrip("."))
        else:
            yield prefix, tree

    a, b = dict(flat(old.model_dump(mode="json"))), dict(flat(new.model_dump(mode="json")))
    return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))


class _MetricsLog:
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


@contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """SIGINT and SIGTERM become a flag that the loop looks at; a second one acts as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(signum: int, frame: object) -> None:
        caught.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    for s in before:
        signal.signal(s, handle)
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def _package(
    recipe: Recipe,
    state: State,
    splits: loader.Splits,
    path: Path,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    found: dict[str, int],
) -> packages.ModelPackage:
    """Write the chosen weights as a package without temperature and thresholds."""
    import torchvision

    from ratioctl._version import __version__

    weights = {k: v.detach().cpu().contiguous() for k, v in (state.best or _final_weights(state)).items()}
    data, evaluation = recipe.data, recipe.evaluation
    ladders = {
        recipes.norm_name(p): list(
            evaluation.ladders.get(recipes.norm_name(p))  # type: ignore[call-overload]
            or recipes.default_ladder(p, data.size, data.channels)
        )
        for p in recipes.NORMS
    }
    fingerprints = {
        "train_source": splits.source_fingerprint,
        "train": splits.train.fingerprint,
        "held_out": splits.held_out.fingerprint,
    }
    if splits.outside is not None:
        fingerprints["outside"] = splits.outside.fingerprint
    if splits.outside_test is not None:
        fingerprints["outside_test"] = splits.outside_test.fingerprint
    config = {
        "architecture": recipe.model.architecture,
        "architecture_options": _options(recipe),
        "num_classes": len(splits.train.label_names),
        "label_names": list(splits.train.label_names),
        "pretrained_cfg": {
            "input_size": [data.channels, data.size, data.size],
            "mean": list(mean),
            "std": list(std),
            "interpolation": "bicubic",
        },
        "ratio": {
            "temperature": 1.0,
            "thresholds": {},
            "ladders": ladders,
            "objective": recipe.objective.model_dump(mode="json", exclude_none=True),
            "metrics": {},
            "provenance": {
                "recipe": recipe.name,
                "recipe_digest": recipe.digest,
                "data": fingerprints,
                "sources": {
                    "train": data.train,
                    "outside": list(data.outside) if splits.outside is not None else [],
                },
                "images": {
                    "train": len(splits.train),
                    "held_out": len(splits.held_out),
                    "outside": 0 if splits.outside is None else len(splits.outside),
                },
                "leaks": found,
                "seed": recipe.seed,
                "updates": state.update,
                "selected_update": state.best_update,
                "validation_score": state.best_score,
                "init": state.init,
                "versions": {
                    "ratioctl": __version__,
                    "torch": torch.__version__,
                    "torchvision": torchvision.__version__,
                },
            },
        },
    }
    return packages.write(
        path, config=config, weights=save_tensors(weights), recipe_text=recipes.dumps(recipe)
    )
