"""Training: a plain loop that reads like the paper, with checkpoints and resuming.

for each update:
    z_in  <- argmax over the ID ball of the margin          (eq. 8)
    z_out <- argmax over the OOD ball of CE(uniform)        (eq. 5)
    one SGD step on CE(y, z_in) + lambda CE(uniform, z_out) (eq. 6)
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratioctl import models
from ratioctl import package as packages
from ratioctl.data import loader
from ratioctl.errors import Interrupted, RatioctlError, TrainingError, UsageError
from ratioctl.models.compiled import compiled, requested
from ratioctl.models.device import ComputeConfig, in_precision, select_device
from ratioctl.recipe import Recipe
from ratioctl.training import agreement, certified, energy, memory, starts
from ratioctl.training.checkpoint import MetricsLog, State, fill, final_weights, read, save
from ratioctl.training.distributed import ALONE, Processes, of_all
from ratioctl.training.objective import Logits, losses
from ratioctl.training.optimizer import optimizer as optimizer_of
from ratioctl.training.packaging import architecture_options, normalization, write_package
from ratioctl.training.replica import Replica
from ratioctl.training.schedule import Pace, learning_rate, schedule_attacks, total_updates
from ratioctl.training.starts import Start
from ratioctl.training.time_limit import TimeLimit
from ratioctl.training.validation import check_replicas, validate
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
        stopped: the number of the signal that asks this process to stop, or None.
        log: None in processes that do not write.
        limit: the time that the run may take, or None; process 0 alone has it.
    """

    recipe: Recipe
    splits: loader.Splits
    folder: Path
    compute: ComputeConfig
    processes: Processes
    log: MetricsLog | None
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
    processes: Processes = ALONE,
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
            between ("progress"), and when the schedule is fitted to the time ("schedule"). Process 0 alone
            calls it.
        processes: those that train together; every one calls this function with the same arguments.

    Raises:
        UsageError: a run is already in `out` and `resume` is false, `init` does not fit, `max_time` is too
            short, or the processes have different arguments or data.
        RecipeError: `resume` with a recipe other than the run's, or processes with different recipes.
        TrainingError: the loss is not finite, or a process has ended; the last good checkpoint is kept.
        Interrupted: SIGINT or SIGTERM, after saving.
    """
    began = time.monotonic() if began is None else began
    # In turn, so that the processes of a machine share one measurement of its precisions.
    compute = processes.everywhere(lambda: select_device(processes.device(device), precision), in_turn=True)
    resume = resume or processes.restarts > 0
    callback = callback or (lambda event: None)
    with processes.watched(out):
        agreement.check_arguments(recipe, processes, compute, {"--resume": resume, "--max-time": max_time})
        processes.together(lambda: _check_folders(out, resume))
        splits = processes.everywhere(lambda: loader.load(recipe, download=download), in_turn=True)
        agreement.check_data(splits, processes)
        _check_resources(recipe, splits, compute, processes)
        start = None if init is None else starts.resolve(init)
        mean, std = normalization(recipe, splits.train, start)
        state, note = processes.everywhere(
            lambda: starts.initial_state(recipe, splits.train, mean, std, start, compute)
        )
        folder = out / "checkpoint"
        processes.together(lambda: _nothing(files.make_folder(folder)))
        with files.writing(out), contextlib.ExitStack() as held, _signals() as stopped:
            processes.together(lambda: _nothing(held.enter_context(_held(out, resume))))
            agreement.check_folder(out, processes)
            if _resumed(folder, state, recipe, compute, start, processes, resume):
                mean, std = (_rounded(v) for v in (state.model.mean, state.model.std))
            run = _Run(
                recipe=recipe,
                splits=splits,
                folder=folder,
                compute=compute,
                processes=processes,
                log=None,
                stopped=stopped,
                callback=callback,
                limit=None,
            )
            return _finished(run, state) or _run(run, state, note, (mean, std), max_time, began)


def _run(
    run: _Run,
    state: State,
    note: str,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    max_time: float | None,
    began: float,
) -> packages.ModelPackage:
    """Train and write the package."""
    recipe, splits, processes, target = run.recipe, run.splits, run.processes, run.folder.parent / "package"
    if note and processes.first:
        run.callback({"event": "start", "text": note})
    leaks = processes.together(lambda: loader.leaks(splits) | _leaked_by(state.init, splits))
    if processes.first:
        run.callback({"event": "leaks", **leaks})
        limit = None if max_time is None else _limit(run, state, max_time, began)
        log = MetricsLog(run.folder.parent / "metrics.jsonl", state.update)
        run = dataclasses.replace(run, log=log, limit=limit)
    _train(run, state)
    processes.together(lambda: _nothing(write_package(recipe, state, splits, target, *statistics, leaks)))
    (signum,) = processes.highest([run.stopped() or 0])
    if signum:  # it arrived after the loop's last check
        raise of_all(_interrupted(run.folder.parent, int(signum), "after the last update, packaged"))
    return packages.read(target)


def _check_resources(
    recipe: Recipe, splits: loader.Splits, compute: ComputeConfig, processes: Processes
) -> None:
    """Raises where the recipe needs more memory than there is, or cannot be divided among processes."""

    def check() -> None:
        if recipe.objective.energy is not None and processes.world > 1:
            reason = f"has one replay buffer, and {processes.world} processes were started"
            raise UsageError("objective.energy", reason, "JEM is trained by one process.")
        if recipe.objective.certified is not None and processes.world > 1:
            reason = f"takes minutes, and {processes.world} processes were started"
            raise UsageError("objective.certified", reason, "A head is trained by one process.")
        memory.check(
            recipe,
            len(splits.train.label_names),
            compute.device,
            bf16=compute.bf16,
            world=processes.world,
            local_world=processes.local_world,
        )

    processes.everywhere(check)


def _nothing(value: object) -> None:
    """For work whose value stays in its process."""


def _check_folders(out: Path, resume: bool) -> None:
    _refuse_second_run(out, resume)
    target = out / "package"
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise UsageError(target, "is not empty and not a package", "Move it away, or choose another --out.")


@contextlib.contextmanager
def _held(out: Path, resume: bool) -> Iterator[None]:
    """The run folder, locked; another run may have started in it while the data were loaded."""
    with files.lock(out):
        _refuse_second_run(out, resume)
        yield


def _resumed(
    folder: Path,
    state: State,
    recipe: Recipe,
    compute: ComputeConfig,
    start: Start | None,
    processes: Processes,
    resume: bool,
) -> bool:
    """Fill `state` from the checkpoint, which process 0 reads, if the run is to be continued and has one."""
    found = processes.together(
        lambda: read(folder, recipe) if resume and (folder / "state.json").exists() else None
    )
    if found is None:
        processes.everywhere(lambda: _check_head_phase(recipe, start))
    else:
        processes.everywhere(lambda: fill(folder, state, *found, compute))
    return found is not None


def _finished(run: _Run, state: State) -> packages.ModelPackage | None:
    """The package of a run that had ended before; its measurements and export stay."""
    target = run.folder.parent / "package"

    def is_done() -> bool:
        if state.update < state.pace.total or not (target / "config.json").is_file():
            return False
        provenance = packages.read(target).config["ratio"].get("provenance", {})
        return bool(provenance.get("recipe_digest") == run.recipe.digest)

    return packages.read(target) if run.processes.together(is_done) else None


def _check_head_phase(recipe: Recipe, start: Start | None) -> None:
    certified.check_start(recipe, start is not None)
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


def _limit(run: _Run, state: State, seconds: float, began: float) -> TimeLimit:
    """The limit of a run that may take `seconds` from `began`."""
    recipe, splits, compute = run.recipe, run.splits, run.compute
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
        slowdown=4.0 if compute.bf16 and recipe.objective.certified is None else 1.0,  # heads train in fp32
        synchronize=(lambda: torch.cuda.synchronize(compute.device))
        if compute.device.type == "cuda"
        else _no_wait,
    )


def _no_wait() -> None:
    pass


def _train(run: _Run, state: State) -> None:
    """All updates from `state.update` on, with validations and checkpoints."""
    recipe, compute, processes = run.recipe, run.compute, run.processes
    images = len(run.splits.train)
    model = state.model
    alone = certified.trained(model) if recipe.objective.certified is not None else None
    optimizer = optimizer_of(recipe, state, compute, alone)
    head = _head_of(recipe) if recipe.optim.head_epochs > 0 else None
    trained = Replica(model, recipe, processes)
    eval_net = models.fold_batchnorm(model)
    logits_of = in_precision(compiled(eval_net) if requested() else eval_net, compute)
    train_logits = in_precision(trained, compute)
    fill_color = (model.mean.flatten().cpu() * 255).round().to(torch.uint8)
    weights = _class_weights(run)
    if recipe.objective.energy is not None and state.buffer is None:
        state.buffer = energy.new_buffer(recipe, recipe.objective.energy, compute.device)
    if compute.device.type == "cuda":  # shapes stay the same, so measuring cuDNN's algorithms pays
        torch.backends.cudnn.benchmark = True
    progress = _Progress(run, state.update)
    last_save = progress.started
    processes.together(lambda: None if run.limit is None else run.limit.start(state.update))
    batches = loader.stream(
        recipe,
        run.splits.train,
        run.splits.outside,
        fill_color,
        start=state.update,
        stop=total_updates(recipe, images) if state.update < state.pace.total else state.update,
        device=compute.device,
        share=processes.share,
    )
    with contextlib.closing(batches):
        for batch in batches:
            epoch = state.pace.at(state.update)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch)
            trained.train(head if head is not None and epoch < recipe.optim.head_epochs else alone)
            if recipe.objective.certified is not None:
                named = certified.losses(model, batch, recipe.objective.certified, epoch)
            else:
                models.sync_folded(eval_net, model)
                named = _losses(run, state, batch, epoch, train_logits, logits_of, weights)
            checked = state.pace.validates(state.update + 1) or state.update % _NAN_EVERY == 0
            _step(run, state, optimizer, named["total"], trained, check=checked)
            now = time.monotonic()
            decision = _decide(run, state, save=now - last_save > _SAVE_EVERY_S)
            named = {k: v.detach() for k, v in named.items()}
            progress.update(state, batch, named)
            validating = state.pace.validates(state.update)
            if validating:
                row = progress.row(state) | {"lr": learning_rate(recipe, epoch)}
                _validation(run, state, row | _of_whole_batch(run, named), progress.started)
                if run.limit is not None:
                    run.limit.spent(time.monotonic() - now, validation=True)
            if validating or decision.signum or decision.save:
                last_save = time.monotonic()
                processes.together(lambda: save(run.folder, state, recipe, compute, processes.world))
                if run.limit is not None:
                    run.limit.spent(time.monotonic() - last_save)
            if decision.signum:
                when = f"after update {state.update} of {state.pace.total}, saved"
                raise of_all(_interrupted(run.folder.parent, decision.signum, when))
            if state.update >= state.pace.total:
                break


def _losses(
    run: _Run,
    state: State,
    batch: loader.Batch,
    epoch: float,
    train_logits: Logits,
    logits_of: Logits,
    weights: Tensor | None,
) -> dict[str, Tensor]:
    """The losses of an update, see `objective.losses`; `weights` (K,) are of the classes."""
    recipe, device = run.recipe, run.compute.device
    objective, shrink = schedule_attacks(recipe, epoch)
    generator = torch.Generator(device)
    generator.manual_seed(seed_from_key(recipe.seed, state.update, 3))
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
        share=run.processes.share,
        counts=(recipe.optim.batch_size, recipe.optim.batch_size_out),
        samples=samples,
    )
    if objective.energy is not None:
        energy.check(named["energy"], objective.energy, state.update, run.folder)
    return named


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Decision:
    """What all processes do after an update: stop for a signal (0: none), and save."""

    signum: int
    save: bool


def _decide(run: _Run, state: State, *, save: bool) -> _Decision:
    """Fit the schedule, and agree on it, on signals and on saving; clocks are those of process 0."""
    processes, failure = run.processes, None
    if processes.first:
        try:
            _fit_schedule(run, state)
        except RatioctlError as error:
            failure = error
    pace = dataclasses.astuple(state.pace) if processes.first else (-math.inf,) * 5
    own = [run.stopped() or 0, processes.first and save, failure is not None, *pace]
    signum, saving, failed, update, epoch, per_epoch, total, every = processes.highest(own)
    if failed:
        processes.together(lambda: _raise(failure))
    state.pace = Pace(
        update=int(update), epoch=epoch, per_epoch=per_epoch, total=int(total), validate_every=every
    )
    return _Decision(signum=int(signum), save=bool(saving))


def _raise(error: RatioctlError | None) -> None:
    if error is not None:
        raise error


def _of_whole_batch(run: _Run, named: dict[str, Tensor]) -> dict[str, float]:
    """The losses of this process's images as those of the whole batch."""
    share, optim = run.processes.share, run.recipe.optim
    weights = {"inside": share.weight(optim.batch_size), "outside": share.weight(optim.batch_size_out)}
    own = [float(value) * weights.get(name.partition(".")[0], 1.0) for name, value in named.items()]
    return {k: v / run.processes.world for k, v in zip(named, run.processes.total(own), strict=True)}


def _fit_schedule(run: _Run, state: State) -> None:
    """Fit the schedule to the time that is left; record and report decisions that change it by over 2 %."""
    if run.limit is None or run.log is None:
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
        if now - self.last <= 1 or not self.run.processes.first:
            return
        self.last = now
        pace = (state.update - self.first) / (now - self.started)
        optim = self.run.recipe.optim
        images = optim.batch_size + (0 if batch.x_out is None else optim.batch_size_out)
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


def _step(
    run: _Run, state: State, optimizer: torch.optim.Optimizer, loss: Tensor, trained: Replica, *, check: bool
) -> None:
    """One update of weights and average. Raises TrainingError if `check` and the loss is not finite."""
    optim, network, processes = run.recipe.optim, state.model.network, run.processes
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained.average_statistics()
    if optim.grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(list(network.parameters()), optim.grad_clip)
    reached = processes.total([float(loss.detach())])[0] / processes.world if check else 0.0
    if not math.isfinite(reached):
        step = f"The last good checkpoint is kept in {run.folder}; lower optim.lr or set optim.grad_clip."
        raise of_all(TrainingError(f"update {state.update}", f"the loss is {reached}", step))
    optimizer.step()
    state.update += 1
    if state.average is not None:
        update_average(state.average, network, min(optim.ema or 0, state.update / (9 + state.update)))


def _validation(run: _Run, state: State, row: dict[str, Any], started: float) -> None:
    """Validate, keep the weights if they are to be selected, and report `row` with the results."""
    if any(not bool(torch.isfinite(p).all()) for p in state.model.network.parameters()):
        step = f"The checkpoint in {run.folder} is kept."
        raise of_all(TrainingError(f"update {state.update}", "a weight is not finite", step))
    check_replicas(state, run.processes)
    row |= {"event": "validation"}
    row |= validate(run.recipe, state, run.splits, run.compute, run.processes)
    row["seconds"] = time.monotonic() - started
    if row["score"] > state.best_score or run.recipe.optim.select == "last":
        state.best_score, state.best_update = row["score"], state.update
        state.best = {k: v.clone() for k, v in final_weights(state).items()}
    if run.log is not None:
        run.log.write(row)
        run.callback(row)


@torch.no_grad()
def update_average(average: dict[str, Tensor], network: torch.nn.Module, decay: float) -> None:
    """Exponential moving average of weights and batch statistics, in place."""
    old, new = [], []
    for key, value in network.state_dict().items():
        if value.is_floating_point():
            old.append(average[key])
            new.append(value)
    torch._foreach_lerp_(old, new, 1 - decay)


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
