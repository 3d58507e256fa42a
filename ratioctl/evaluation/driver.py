"""`run`: an evaluation from end to end: load models and data, run the stages, assemble the reports."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ratioctl import package as packages
from ratioctl import scores
from ratioctl._version import __version__
from ratioctl.attacks.autoattack import Backend
from ratioctl.data import in_distribution, out_distribution
from ratioctl.errors import LogitsError, OutputError, PackageError, UsageError
from ratioctl.evaluation import measurements, protocols, sanity_checks, sharding, suites
from ratioctl.evaluation.adversarial import AttackedImages
from ratioctl.evaluation.attack_batches import Subject
from ratioctl.evaluation.context import Batches, Context, Examples, Results
from ratioctl.evaluation.datasets import Datasets, EvaluationData, stratified_indices
from ratioctl.evaluation.judge import Judge
from ratioctl.evaluation.progress import Callback, Plan
from ratioctl.evaluation.stages import STAGES
from ratioctl.evaluation.suites import SUITES, Suite
from ratioctl.models import fold_batchnorm, from_package
from ratioctl.models.device import ComputeConfig, select_device
from ratioctl.models.environment import environment
from ratioctl.models.predict import Predictor
from ratioctl.package import ModelPackage
from ratioctl.types import Evaluated, Evaluation, Measurement, Report
from ratioctl.utils.atomic_files import lock, make_folder, writing
from ratioctl.utils.result_cache import ResultCache
from ratioctl.utils.sharding import Shard
from ratioctl.utils.suggest import one_of

Model = str | Path | ModelPackage

FORMAT = 5  # of cached batches; increase when their arrays change


def run(
    models: Sequence[Model] = (),
    *,
    data: str,
    ood: Sequence[str] | Mapping[str, str] = (),
    suite: str | Suite = "quick",
    protocol: str | None = None,
    limit: int | None = None,
    resume: bool = False,
    write: bool = False,
    out: str | Path | None = None,
    backend: Backend | None = None,
    save_adversarial: bool = False,
    judge: Model | None = None,
    score: Sequence[str] = (),
    certified: bool = False,
    shard: str | None = None,
    parts: Sequence[sharding.Part] = (),
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    download: bool = False,
    callback: Callback | None = None,
    finish: Callable[[Evaluation], object] | None = None,
) -> Evaluation:
    """Evaluate models on labelled images and OOD sets; a run that was interrupted in `out` is continued.

    Args:
        models: packages, their folders or names of bundled models; empty means the default model.
        data: a labelled SOURCE; classes are matched to the models' labels by name.
        ood: "NAME=SOURCE" each, or a mapping; empty means the built-in noise sets.
        suite: "clean", "quick", "paper", "full", "explanations", or a `Suite`.
        protocol: a published protocol instead of a suite, a name of `protocols.PROTOCOLS`.
        limit: maximum number of images per set, stratified by class where there are labels.
        resume: also reuse the batches of a finished run in `out`.
        write: store the measurements in the packages' config and card.
        out: folder of the result cache; None keeps nothing.
        backend: of the robust accuracy: "reference" runs `pyautoattack`'s standard version, "own" the same
            attacks of this package, also where the reference does not exist; None uses the suite's.
        save_adversarial: also save the attacked images, see `adversarial`; requires `out`.
        judge: a second model that scores the counterfactuals (suite "explanations").
        score: names of further OOD scores to measure, see `ratioctl.scores`.
        certified: measure what the certified heads of the models guarantee.
        shard: "I/N": compute part I of N of the batches into `out`; the returned evaluation has no models.
        parts: finished shards; their batches are used, and one that they lack is an error.
        precision: of the attacks; "auto" uses bf16 where it is faster, except in `exact` suites.
        callback: called with {"event": "plan", "seconds", "phases"}, {"event": "batch", "model", "what",
            "share", "seconds_left"} and {"event": "file", "path"}.
        finish: called with the result before the cache is complete; writes the reports.

    Raises:
        UsageError: unknown suite, a bad NAME=SOURCE, a name given twice, an option without effect.
        SourceError: data that is missing or has class folders that are no labels of a model.
        PackageError: a model that cannot be read, with `write` one that changed; LogitsError.
        OutputError: with `write`, a package that cannot be written, before anything is computed.
    """
    published = None if protocol is None else _protocol(protocol, suite, write, ood)
    chosen = published.suite if published else suite
    chosen = _resolve(chosen, backend, save_adversarial, judge is not None, write, out is not None)
    named = _named(published, ood, data)
    loaded = [packages.resolve(model) for model in (models or (packages.DEFAULT_MODEL,))]
    chosen = _with_guarantees(_with_scores(chosen, score), loaded if certified else ())
    _check_writable(loaded if write else ())
    compute = _compute(device, precision, chosen)
    given: dict[str, Any] = {"data": data, "suite": suite, "protocol": protocol, "limit": limit}
    given |= {"backend": backend, "score": list(score), "save_adversarial": save_adversarial}
    given |= {"device": device, "precision": precision, "seed": seed, "download": download}
    job = _Job(
        data=Datasets(data=data, ood=named, suite=chosen, limit=limit, seed=seed, download=download),
        models=loaded,
        compute=compute,
        judge=None if judge is None else Judge.of(packages.resolve(judge), loaded, compute),
        folder=None if out is None else make_folder(Path(out)),
        save=save_adversarial,
        shard=None if shard is None else _shard(shard, suite, write, out),
        parts=tuple(parts),
        published=published,
        arguments={**given, "certified": certified, **_recorded(loaded, named, judge)},
    )
    return _run(job, resume, write, callback or (lambda event: None), finish)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """A checked evaluation. `arguments` are those of `run` that shards record."""

    data: Datasets
    models: Sequence[ModelPackage]
    compute: ComputeConfig
    judge: Judge | None
    folder: Path | None
    save: bool
    shard: Shard | None
    parts: tuple[sharding.Part, ...]
    published: protocols.Protocol | None
    arguments: Mapping[str, object]


def _run(
    job: _Job,
    resume: bool,
    write: bool,
    callback: Callback,
    finish: Callable[[Evaluation], object] | None,
) -> Evaluation:
    with contextlib.ExitStack() as stack:
        if job.folder is not None:
            stack.enter_context(lock(job.folder))
        others = [_cache_folder(part.folder) for part in job.parts]
        folder = None if job.folder is None else _cache_folder(job.folder)
        cache = ResultCache(folder, keep=resume, others=others)
        contexts = _contexts(job, cache, plan := Plan((), callback))
        facts = [{**one.batches.facts, "judge": job.judge and job.judge.package.digest} for one in contexts]
        prints = {f"{c.name}, {key}": text for c in contexts for key, text in c.data.fingerprints.items()}
        sharding.check(job.parts, facts, prints)
        _announce(plan, contexts)
        if job.shard is not None and job.folder is not None:
            sharding.begin(job.folder)
            for one in contexts:
                _compute_shard(one)
            sharding.finish(job.folder, job.shard, job.arguments, facts, prints)
            contexts = []
        evaluation = _evaluation(contexts, job)
        if finish is not None and contexts:
            finish(evaluation)
        for one, part in zip(contexts, evaluation.models if write else (), strict=write):
            _write_measurements(one.package, part.report, evaluation, one.data)
        cache.finish()
    return evaluation


def _contexts(job: _Job, cache: ResultCache, plan: Plan) -> list[Context]:
    """One for each model."""
    saved = AttackedImages(job.folder / "adversarial") if job.save and job.folder else None
    contexts = []
    for name, package in zip(packages.names(job.models), job.models, strict=True):
        sets, subject = job.data.of(package), _subject(package, job.compute, job.data.seed)
        batches = Batches(
            cache=cache,
            plan=plan,
            facts=_facts(subject),
            size=_batch_size(job.compute),
            shard=job.shard,
            stored=bool(job.parts),
        )
        one = Context(name=name, subject=subject, data=sets, suite=job.data.suite, batches=batches)
        contexts.append(dataclasses.replace(one, saved=saved, judge=job.judge))
    return contexts


def _cache_folder(out: Path) -> Path:
    """Where finished batches are kept. Before version 0.3 the folder was called .journal."""
    folder, earlier = out / ".result-cache", out / ".journal"
    if earlier.is_dir() and not folder.exists():
        with writing(folder):
            earlier.rename(folder)
    return folder


# --- options -----------------------------------------------------------------------------------------------


def _protocol(
    name: str, suite: str | Suite, write: bool, ood: Sequence[str] | Mapping[str, str]
) -> protocols.Protocol:
    """The protocol of that name; raises UsageError for options that do not go with it."""
    found = protocols.by_name(name)
    option = f"--protocol {name}"
    if suite != "quick":
        raise UsageError(option, "says itself what is measured", "Leave out --suite.")
    if write:
        raise UsageError("--write", f"has no effect with {option}", "A card shows the figures of a suite.")
    if ood and not found.detects:
        raise UsageError("--ood", f"has no effect with {option}, which measures ID images", "Leave it out.")
    return found


def _named(
    published: protocols.Protocol | None, ood: Sequence[str] | Mapping[str, str], data: str
) -> dict[str, str]:
    """OOD sets by name; raises UsageError for names that the protocol needs to know."""
    if published is not None and not published.detects:
        return {}
    named = dict(out_distribution.named(ood, data))
    if published is not None and published.groups:
        for name in named:
            protocols.group_of(name)
    return named


def _resolve(
    suite: str | Suite, backend: Backend | None, save: bool, judged: bool, write: bool, has_folder: bool
) -> Suite:
    """The suite with its backend; raises UsageError for options that do not fit it."""
    if isinstance(suite, str):
        if suite not in SUITES:
            raise UsageError(f"--suite {suite}", "no such suite", one_of(suite, SUITES))
        suite = SUITES[suite]
    attacks = "robust" in suite.stages
    for option, given, fits, step in (
        ("--judge", judged, suite.explains, "Use --suite explanations."),
        ("--write", write, not suite.explains, "A card shows accuracy and detection only."),
        ("--backend", backend is not None, attacks, "Use --suite quick, paper or full."),
        ("--save-adversarial", save, attacks, "Use --suite quick, paper or full."),
    ):
        if given and not fits:
            raise UsageError(option, f"has no effect in the suite {suite.name}", step)
    if save and not has_folder:
        raise UsageError("save_adversarial", "needs a folder to save into", "Set out.")
    if backend is None or backend == suite.backend:
        return suite
    if backend not in ("own", "reference"):
        raise UsageError(f"--backend {backend}", "no such backend", "Use own or reference.")
    if backend == "reference" and not suite.standard:
        raise UsageError(
            "--backend reference",
            f"runs AutoAttack's standard version, which the suite {suite.name} does not use",
            "Use --suite paper (--limit N shortens it).",
        )
    return dataclasses.replace(suite, backend=backend)


def _shard(shard: str, suite: str | Suite, write: bool, out: str | Path | None) -> Shard:
    """Raises UsageError: no shard, or one whose batches `merge` could not use."""
    parsed = Shard.parse(shard)
    if write:
        raise UsageError("--write", "has no effect with --shard", "Merge the shards first.")
    if out is None:
        raise UsageError("--shard", "needs a folder for its batches", "Set out.")
    if not isinstance(suite, str):
        raise UsageError("--shard", "needs a suite by its name", f"Use one of {', '.join(SUITES)}.")
    return parsed


def _recorded(
    loaded: Sequence[ModelPackage], ood: Mapping[str, str], judge: Model | None
) -> dict[str, object]:
    """Models and OOD sets as JSON values that `run` takes."""

    def name(package: ModelPackage) -> str:  # a bundled model is elsewhere on another machine
        return package.name if packages.is_bundled(package) else str(package.path)

    return {
        "models": [name(package) for package in loaded],
        "ood": [f"{name}={source}" for name, source in ood.items()],
        "judge": None if judge is None else name(packages.resolve(judge)),
    }


def _with_scores(suite: Suite, names: Sequence[str]) -> Suite:
    """The suite with a stage for further OOD scores."""
    further = tuple(dict.fromkeys(scores.by_name(name, network=True).name for name in names))
    if not further:
        return suite
    if suite.explains:
        raise UsageError("--score", f"has no effect in the suite {suite.name}", "Use another --suite.")
    return dataclasses.replace(suite, scores=further, stages=(*suite.stages, "scores"))


def _with_guarantees(suite: Suite, loaded: Sequence[ModelPackage]) -> Suite:
    """The suite with the stage for certified heads, which each of the models must have."""
    if loaded and "ood" not in suite.stages:
        reason = f"has no effect in {suite.name}, which does not measure OOD detection"
        raise UsageError("--certified", reason, "Leave it out.")
    for package in loaded:
        packages.certified_radius(package)
    if not loaded or "certified" in suite.stages:
        return suite
    return dataclasses.replace(suite, stages=(*suite.stages, "certified"))


def _check_writable(loaded: Sequence[ModelPackage]) -> None:
    for package in loaded:
        if packages.is_bundled(package):
            raise OutputError(
                package.path,
                "is a bundled model, which is read-only",
                "Leave --write out, or copy the folder and evaluate the copy.",
            )
        if not os.access(package.path, os.W_OK):
            raise OutputError(
                package.path,
                "cannot be written, and --write stores the measurements in it",
                "Leave --write out, or evaluate a copy.",
            )


def _compute(device: str, precision: str, suite: Suite) -> ComputeConfig:
    if precision == "auto" and suite.exact:
        return select_device(device, "fp32", reason="this suite attacks in it")
    return select_device(device, precision)


def _batch_size(compute: ComputeConfig) -> int:
    return 128 if compute.device.type == "cpu" else 512


# --- models and reports ------------------------------------------------------------------------------------


def _subject(package: ModelPackage, compute: ComputeConfig, seed: int) -> Subject:
    network = fold_batchnorm(from_package(package)).to(compute.device)
    network = network.to(memory_format=torch.channels_last)
    predictor = Predictor(network=network, device=compute.device)
    return Subject(package=package, network=network, predictor=predictor, compute=compute, seed=seed)


@contextlib.contextmanager
def _naming(package: ModelPackage) -> Iterator[None]:
    """LogitsError with the package in it."""
    try:
        yield
    except LogitsError as error:
        raise LogitsError(package.path, error.reason, error.next_step) from None


def _facts(subject: Subject) -> dict[str, object]:
    """What determines a batch besides its images and settings."""
    return {
        "format": FORMAT,
        "model": subject.package.digest,
        "seed": subject.seed,
        "device": subject.compute.device.type,
        "bf16": subject.compute.bf16,
        "torch": torch.__version__,
        "ratioctl": __version__,
        "pyautoattack": importlib.metadata.version("pyautoattack"),  # FAB-T and Square come from it
    }


def _announce(plan: Plan, contexts: Sequence[Context]) -> None:
    """Estimate the time of all stages."""
    for context in contexts:
        with _naming(context.package):
            plan.add(phase for name in context.suite.stages for phase in STAGES[name].plan(context))
    plan.announce()


def _compute_shard(context: Context) -> None:
    """The batches of one model that this shard computes."""
    context.batches.plan.start(context.name)
    with _naming(context.package):
        for name in context.suite.stages:
            STAGES[name].compute(context)


def _evaluation(contexts: Sequence[Context], job: _Job) -> Evaluation:
    """Run the stages of every model."""
    suite, limit, judge, published = job.data.suite, job.data.limit, job.judge, job.published
    names = ("search", "score") if suite.explains else ("attack", "verdict")
    protocol = str(suite)
    if judge is not None:
        protocol += f"; judged by {judge.package.name}"
    if limit is not None:
        protocol += f"; at most {limit:,} images of a set"
    parts = tuple(_evaluated(context, published) for context in contexts)
    compared = None
    if published is not None and contexts:
        data = contexts[0].data
        compared = protocols.comparison(published, parts, data.name, list(data.outside))
    return Evaluation(
        suite=suite.name,
        protocol=protocol,
        data=tuple(in_distribution.described(contexts[0].data.all())) if contexts else (),
        environment=environment(job.compute, *(f"{name}_precision" for name in names)),
        models=parts,
        comparison=compared,
    )


def _evaluated(context: Context, published: protocols.Protocol | None) -> Evaluated:
    """All stages of one model, and its report."""
    context.batches.plan.start(context.name)
    results = Results(examples=Examples(context.name, context.data.all()))
    with _naming(context.package):
        for name in context.suite.stages:
            STAGES[name].run(context, results)
    data = context.data
    if "ood" in context.suite.stages:
        results.measurements += measurements.mean_over_sets(
            results.measurements, list(data.outside), data.name, context.seed
        )
    if published is not None and published.groups:
        results.measurements += protocols.group_means(
            results.measurements, list(data.outside), data.name, context.seed
        )
    results.warnings += _common_warnings(context)
    return Evaluated(
        name=context.name,
        report=Report(
            package_digest=context.package.digest,
            seed=context.seed,
            measurements=tuple(results.measurements),
            warnings=tuple(dict.fromkeys(text for text in results.warnings if text is not None)),
        ),
        figures=results.figures,
        gallery=tuple(results.gallery),
        examples=results.examples.columns(),
    )


def _common_warnings(context: Context) -> Iterator[str | None]:
    """Checks of model and data that do not depend on the stages."""
    package, data = context.package, context.data
    yield sanity_checks.uncalibrated(package)
    spec = suites.calibration(package)
    yield sanity_checks.temperature_at_end(package.temperature, spec, package.calibrated)
    yield from sanity_checks.trained_on(package, data.fingerprints, data.sources)
    yield from sanity_checks.duplicates(data.all())
    yield from in_distribution.unreadable(data.all())
    least = sanity_checks.FEW_EXPLANATIONS if context.suite.explains else sanity_checks.FEW
    yield sanity_checks.few(_counts(context), least)


def _counts(context: Context) -> dict[str, int]:
    """Numbers of examples by set, clean and attacked."""
    sets, suite = context.data.all(), context.suite
    if suite.explains:
        return {name: len(images) for name, images in sets.items()}
    counts = {}
    for name, images in sets.items():
        counts[f"{name}, clean"] = len(images)
        attacked = suite.inside if images.labels is not None else suite.outside
        if "robust" in suite.stages:
            counts[f"{name}, attacked"] = len(stratified_indices(images, attacked, 0))
    return counts


# --- measurements in the package ---------------------------------------------------------------------------


def _write_measurements(
    package: ModelPackage, report: Report, evaluation: Evaluation, data: EvaluationData
) -> None:
    """Store the measurements in the package's config and, where it was rendered, its card."""
    if packages.read(package.path, verify=False).digest != package.digest:
        raise PackageError(
            package.path,
            "was changed while it was evaluated, so the measurements do not belong to it",
            "Evaluate it again. The reports are written and describe the earlier version.",
        )
    stored = {
        "suite": evaluation.suite,
        "protocol": evaluation.protocol,
        "seed": report.seed,
        "versions": evaluation.environment["versions"],
        "hardware": evaluation.environment["hardware"],
        "data": [
            {key: value for key, value in entry.items() if key != "source"}  # a path of this machine
            for entry in in_distribution.described(data.all())
        ],
        "measurements": [row.to_json() for row in report.measurements if _headline(row)],
        "warnings": list(report.warnings),
    }
    packages.update(package, config_changes={"ratio": {"metrics": stored}})


def _headline(row: Measurement) -> bool:
    """Whether a card shows it: no breakdowns, no variants."""
    left_out = ("_attacked", "_uncalibrated", "accuracy_after_", "accuracy_before_", "conservative_", "aupr_")
    return not any(part in row.name for part in left_out)
