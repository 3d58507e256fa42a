"""Training: a plain loop that reads like the paper, with checkpoints and resuming.

for each update:
    z_in  <- argmax over the ID ball of the margin          (eq. 8)
    z_out <- argmax over the OOD ball of CE(uniform)        (eq. 5)
    one SGD step on CE(y, z_in) + lambda CE(uniform, z_out) (eq. 6)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratioctl import models
from ratioctl import package as packages
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.data import loader
from ratioctl.errors import Interrupted, TrainingError, UsageError
from ratioctl.models.compiled import compiled, requested
from ratioctl.models.device import ComputeConfig, select_device
from ratioctl.models.network import Classifier
from ratioctl.recipe import Recipe
from ratioctl.training import energy, memory, starts
from ratioctl.training.checkpoint import MetricsLog, State, final_weights, restore, save
from ratioctl.training.objective import losses
from ratioctl.training.packaging import architecture_options, normalization, write_package
from ratioctl.training.schedule import learning_rate, schedule_attacks, total_updates
from ratioctl.training.starts import Start
from ratioctl.training.time_limit import TimeLimit
from ratioctl.utils import atomic_files as files
from ratioctl.utils.seeding import seed_from_key

Callback = Callable[[dict[str, Any]], None]
_NAN_EVERY = 20  # updates between checks of the loss; each check waits for the device
_SAVE_EVERY_S = 120.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What stays the same over a run.

    Attributes:
        folder: the checkpoint's.
        stopped: the number of the signal that asks the run to stop, or None.
        limit: the time that the run may take, or None.
    """

    recipe: Recipe
    splits: loader.Splits
    folder: Path
    compute: ComputeConfig
    log: MetricsLog
    stopped: Callable[[], int | None]
    callback: Callback
    limit: TimeLimit | None


def fit(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    init: packages.ModelPackage | Start | None = None,
    max_time: float | None = None,
    began: float | None = None,
    device: str = "auto",
    precision: str = "auto",
    download: bool = False,
    callback: Callback | None = None,
) -> packages.ModelPackage:
    """Train `recipe` in the run folder `out`; returns its package, not yet calibrated.

    The folder gets `metrics.jsonl`, `checkpoint/` and at the end `package/`. On a CPU with the same number
    of threads, an interrupted and resumed run ends with exactly the weights of an uninterrupted one.

    Args:
        resume: continue from `checkpoint/`; without one, start.
        init: where the weights start (fine-tuning), see `starts.resolve`.
        max_time: seconds from `began` (of `time.monotonic`, now by default) until the package is written and
            calibrated; the schedule is fitted to them (`time_limit`).
        callback: called with a dictionary: with `init`, once with a "text" about it ("event": "start"); once
            with the result of the leak check ("leaks"), per validation ("validation"), about once a second
            between ("progress"), and when the schedule is fitted to the time ("schedule").

    Raises:
        UsageError: a run is already in `out` and `resume` is false, `init` does not fit, or `max_time` is too
            short.
        RecipeError: `resume` with a recipe other than the run's.
        TrainingError: the loss is not finite; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM, after saving.
    """
    began = time.monotonic() if began is None else began
    compute = select_device(device, precision)
    folder = out / "checkpoint"
    _refuse_second_run(out, resume)
    target = out / "package"
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise UsageError(target, "is not empty and not a package", "Move it away, or choose another --out.")
    callback = callback or (lambda event: None)
    splits = loader.load(recipe, download=download)
    memory.check(recipe, len(splits.train.label_names), compute.device, bf16=compute.bf16)
    start = None if init is None else starts.resolve(init)
    mean, std = normalization(recipe, splits.train, start)
    state, note = starts.initial_state(recipe, splits.train, mean, std, start, compute)
    files.make_folder(folder)
    with files.writing(out), files.lock(out), _signals() as stopped:
        _refuse_second_run(out, resume)  # another run may have started while the data were loaded
        if resume and (folder / "state.json").exists():
            restore(folder, state, recipe, compute)
            mean, std = (_rounded(v) for v in (state.model.mean, state.model.std))
        else:
            _check_head_phase(recipe, start)
        if note:
            callback({"event": "start", "text": note})
        if state.update >= state.pace.total and (target / "config.json").is_file():
            done = packages.read(target)
            if done.config["ratio"].get("provenance", {}).get("recipe_digest") == recipe.digest:
                return done  # finished earlier; its measurements and export stay
        leaks = loader.leaks(splits) | _leaked_by(state.init, splits)
        callback({"event": "leaks", **leaks})
        log = MetricsLog(out / "metrics.jsonl", state.update)
        run = _Run(
            recipe=recipe,
            splits=splits,
            folder=folder,
            compute=compute,
            log=log,
            stopped=stopped,
            callback=callback,
            limit=None if max_time is None else _limit(recipe, splits, state, compute, max_time, began),
        )
        _train(run, state)
        package = write_package(recipe, state, splits, target, mean, std, leaks)
        signum = stopped()
        if signum is not None:  # it arrived after the loop's last check
            raise _interrupted(out, signum, "after the last update, packaged")
        return package


def _check_head_phase(recipe: Recipe, start: Start | None) -> None:
    if recipe.optim.head_epochs > 0 and start is None:
        reason = "trains the head of a start first, and there is none"
        raise UsageError("optim.head_epochs", reason, "Name one with --init, or --set optim.head_epochs=0.")


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(round(v, 7) for v in values.flatten().tolist())


def _refuse_second_run(out: Path, resume: bool) -> None:
    if (out / "checkpoint" / "state.json").exists() and not resume:
        raise UsageError(
            out, "already holds a training run", "Continue it with --resume, or choose another --out."
        )


def _interrupted(out: Path, signum: int, when: str) -> Interrupted:
    reason = f"stopped by {'Ctrl-C' if signum == signal.SIGINT else signal.Signals(signum).name} {when}"
    step = f"Continue with: ratioctl train RECIPE --out {out} --resume"
    return Interrupted(out, reason, step, signum=signum)


def _limit(
    recipe: Recipe, splits: loader.Splits, state: State, compute: ComputeConfig, seconds: float, began: float
) -> TimeLimit:
    """The limit of a run that may take `seconds` from `began`."""
    start = time.monotonic()
    calibration = loader.held_out(recipe, splits.train.label_names)  # as the calibration will read them
    validated = min(len(splits.held_out), recipe.optim.validate_images)
    inside = recipe.objective.inside
    steps = inside.attack.steps * inside.attack.restarts if inside.attack and inside.robust > 0 else 0
    outside = 0 if splits.outside_test is None else min(len(splits.outside_test), validated)
    weights = sum(value.nbytes for value in final_weights(state).values())
    return TimeLimit(
        recipe=recipe,
        seconds=seconds,
        began=began,
        train_images=len(splits.train),
        calibration_images=len(calibration),
        validation_work=validated * (1 + 2 * steps) + outside,
        written_bytes=weights * (5 + (state.average is not None)),  # a checkpoint and two packages
        reading_s=time.monotonic() - start,
        slowdown=4.0 if compute.bf16 else 1.0,
        synchronize=(lambda: torch.cuda.synchronize(compute.device))
        if compute.device.type == "cuda"
        else _no_wait,
    )


def _no_wait() -> None:
    pass


def _train(run: _Run, state: State) -> None:
    """All updates from `state.update` on, with validations and checkpoints."""
    recipe, compute, limit = run.recipe, run.compute, run.limit
    images = len(run.splits.train)
    model = state.model
    optimizer = _optimizer(recipe, state, compute)
    head = _head_of(recipe) if recipe.optim.head_epochs > 0 else None
    eval_net = models.fold_batchnorm(model)
    logits_of = in_precision(compiled(eval_net) if requested() else eval_net, compute)
    train_logits = in_precision(model, compute)
    fill = (model.mean.flatten().cpu() * 255).round().to(torch.uint8)
    weights = _class_weights(run)
    if recipe.objective.energy is not None and state.buffer is None:
        state.buffer = energy.new_buffer(recipe, recipe.objective.energy, compute.device)
    if compute.device.type == "cuda":  # shapes stay the same, so measuring cuDNN's algorithms pays
        torch.backends.cudnn.benchmark = True
    progress = _Progress(run, state.update)
    last_save = progress.started
    if limit is not None:
        limit.start(state.update)
    batches = loader.stream(
        recipe,
        run.splits.train,
        run.splits.outside,
        fill,
        start=state.update,
        stop=total_updates(recipe, images) if state.update < state.pace.total else state.update,
        device=compute.device,
    )
    with contextlib.closing(batches):
        for batch in batches:
            epoch = state.pace.at(state.update)
            objective, shrink = schedule_attacks(recipe, epoch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch)
            generator = torch.Generator(compute.device)
            generator.manual_seed(seed_from_key(recipe.seed, state.update, 3))
            models.sync_folded(eval_net, model)
            model.train()
            if head is not None:
                _train_head_only(model, head if epoch < recipe.optim.head_epochs else None)
            samples = None
            if objective.energy is not None and state.buffer is not None:
                batch = energy.with_noise(batch, objective.energy, generator)
                samples = energy.sample(state.buffer, logits_of, objective.energy, generator)
            named = losses(
                train_logits,
                logits_of,
                batch,
                objective,
                generator=generator,
                shrink=shrink,
                class_weights=weights,
                samples=samples,
            )
            if objective.energy is not None:
                energy.check(named["energy"], objective.energy, state.update, run.folder)
            checked = state.pace.validates(state.update + 1) or state.update % _NAN_EVERY == 0
            _step(run, state, optimizer, named["total"], check=checked)
            _fit_schedule(run, state)
            named = {k: v.detach() for k, v in named.items()}
            progress.update(state, batch, named)
            now, validating = time.monotonic(), state.pace.validates(state.update)
            if validating:
                row = progress.row(state) | {"lr": learning_rate(recipe, epoch)}
                _validation(run, state, row | {k: float(v) for k, v in named.items()}, progress.started)
                if limit is not None:
                    limit.spent(time.monotonic() - now, validation=True)
            signum = run.stopped()
            if validating or signum is not None or now - last_save > _SAVE_EVERY_S:
                last_save = time.monotonic()
                save(run.folder, state, recipe, compute)
                if limit is not None:
                    limit.spent(time.monotonic() - last_save)
            if signum is not None:
                when = f"after update {state.update} of {state.pace.total}, saved"
                raise _interrupted(run.folder.parent, signum, when)
            if state.update >= state.pace.total:
                break


def _fit_schedule(run: _Run, state: State) -> None:
    """Fit the schedule to the time that is left; record and report decisions that change it by over 2 %."""
    if run.limit is None:
        return
    before, state.pace = state.pace, run.limit.fit(state.update, state.pace)
    if not run.limit.known:
        return
    if run.limit.decided and abs(state.pace.total - before.total) <= 0.02 * before.total:
        return
    run.limit.decided = True
    decision = run.limit.decision(state.update, state.pace)
    state.time_limit.append(decision)
    run.log.write({"update": state.update, "max_time": {k: v for k, v in decision.items() if k != "update"}})
    run.callback({"event": "schedule", **decision})


class _Progress:
    """Reports about once a second how far the run is; `started` is the time of its first update."""

    def __init__(self, run: _Run, first_update: int) -> None:
        self.run, self.first = run, first_update
        self.started = self.last = time.monotonic()

    def row(self, state: State) -> dict[str, Any]:
        """Where the run is: updates done and in all, epochs through the images."""
        per_epoch = loader.updates_per_epoch(len(self.run.splits.train), self.run.recipe.optim.batch_size)
        return {"update": state.update, "updates": state.pace.total, "epoch": state.update / per_epoch}

    def update(self, state: State, batch: loader.Batch, named: dict[str, Tensor]) -> None:
        now = time.monotonic()
        if now - self.last <= 1:
            return
        self.last = now
        pace = (state.update - self.first) / (now - self.started)
        images = len(batch.x_in) + (0 if batch.x_out is None else len(batch.x_out))
        self.run.callback(
            {
                "event": "progress",
                **self.row(state),
                "images_per_s": pace * images,
                "remaining_s": (state.pace.total - state.update) / pace,
                **{k: float(v) for k, v in named.items()},  # waits for the device
            }
        )


def _class_weights(run: _Run) -> Tensor | None:
    train = run.splits.train
    if run.recipe.data.balance != "weights" or train.labels is None:
        return None
    found = loader.class_weights(train.labels, len(train.label_names))
    return torch.from_numpy(found).to(run.compute.device)


def _head_of(recipe: Recipe) -> frozenset[str]:
    """Names of the parameters of the classification head."""
    data = recipe.data
    return models.head_keys(
        recipe.model.architecture,
        channels=data.channels,
        input_size=data.frame.built_for,
        **architecture_options(recipe),
    )


def _train_head_only(model: Classifier, head: frozenset[str] | None) -> None:
    """Let only the parameters `head` change, batch statistics included; None lets all change."""
    if head is not None:
        model.eval()
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(head is None or name in head)


def _optimizer(recipe: Recipe, state: State, compute: ComputeConfig) -> torch.optim.Optimizer:
    optim = recipe.optim
    parameters = dict(state.model.network.named_parameters())
    # Buffers are set here, in the parameter's own memory layout: one made by the optimizer takes its
    # gradient's layout, which selects another kernel, and a resumed run would differ in the last bit.
    for name, p in parameters.items():
        state.momentum.setdefault(name, torch.zeros_like(p, requires_grad=False))
    if optim.optimizer == "adam":
        betas = (optim.momentum, 0.999)
        adam = torch.optim.Adam(
            parameters.values(), lr=optim.lr, betas=betas, weight_decay=optim.weight_decay
        )
        for name, p in parameters.items():
            state.squares.setdefault(name, torch.zeros_like(p, requires_grad=False))
            adam.state[p]["step"] = torch.tensor(float(state.update))
            adam.state[p]["exp_avg"] = state.momentum[name]
            adam.state[p]["exp_avg_sq"] = state.squares[name]
        return adam
    sgd = torch.optim.SGD(
        parameters.values(),
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=compute.device.type == "cuda" or None,
    )
    for name, p in parameters.items():
        sgd.state[p]["momentum_buffer"] = state.momentum[name]
    return sgd


def _step(run: _Run, state: State, optimizer: torch.optim.Optimizer, loss: Tensor, *, check: bool) -> None:
    """One update of weights and average. Raises TrainingError if `check` and the loss is not finite."""
    optim, network = run.recipe.optim, state.model.network
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if optim.grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(list(network.parameters()), optim.grad_clip)
    if check and not math.isfinite(float(loss.detach())):
        raise TrainingError(
            f"update {state.update}",
            f"the loss is {float(loss.detach())}",
            f"The last good checkpoint is kept in {run.folder}; lower optim.lr or set optim.grad_clip.",
        )
    optimizer.step()
    state.update += 1
    if state.average is not None:
        update_average(state.average, network, min(optim.ema or 0, state.update / (9 + state.update)))


def _validation(run: _Run, state: State, row: dict[str, Any], started: float) -> None:
    """Validate, keep the weights if they are to be selected, and report `row` with the results."""
    if any(not bool(torch.isfinite(p).all()) for p in state.model.network.parameters()):
        raise TrainingError(
            f"update {state.update}", "a weight is not finite", f"The checkpoint in {run.folder} is kept."
        )
    row |= {"event": "validation", **_validate(run.recipe, state, run.splits, run.compute)}
    row["seconds"] = time.monotonic() - started
    if row["score"] > state.best_score or run.recipe.optim.select == "last":
        state.best_score, state.best_update = row["score"], state.update
        state.best = {k: v.clone() for k, v in final_weights(state).items()}
    run.log.write(row)
    run.callback(row)


def in_precision(net: Callable[[Tensor], Tensor], compute: ComputeConfig) -> Callable[[Tensor], Tensor]:
    if not compute.bf16:
        return net

    def logits_of(x: Tensor) -> Tensor:
        with compute.autocast():
            return net(x)

    return logits_of


@torch.no_grad()
def update_average(average: dict[str, Tensor], network: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of weights and batch statistics, in place."""
    old, new = [], []
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            old.append(average[key])
            new.append(value)
    torch._foreach_lerp_(old, new, 1 - decay)


def _validate(
    recipe: Recipe, state: State, splits: loader.Splits, compute: ComputeConfig
) -> dict[str, float]:
    """Clean and attacked accuracy on held-out ID images; mean confidence on held-out OOD images."""
    model = state.model if state.average is None else _with_weights(state.model, state.average)
    logits_of = in_precision(models.fold_batchnorm(model), compute)
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
    models.load_weights(other, weights, where="averaged weights")
    return other


def _leaked_by(init: dict[str, Any] | None, splits: loader.Splits) -> dict[str, int]:
    """Held-out images that `init` may have been trained on: all, if it split the same data differently."""
    if init is None:
        return {}
    held = splits.held_out
    same_data = init.get("train_source") == splits.source_fingerprint
    return {"init": len(held) if same_data and init.get("held_out") != held.fingerprint else 0}


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """SIGINT and SIGTERM set a flag that the loop reads; a second one acts as usual."""
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
