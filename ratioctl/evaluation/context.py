"""What a stage receives (`Context`) and what it adds to (`Results`)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ratioctl.data.in_distribution import Images
from ratioctl.errors import SourceError
from ratioctl.evaluation import attack_batches, measurements
from ratioctl.evaluation.adversarial import AttackedImages
from ratioctl.evaluation.attack_batches import Subject
from ratioctl.evaluation.datasets import EvaluationData
from ratioctl.evaluation.judge import Judge
from ratioctl.evaluation.measurements import Confidences
from ratioctl.evaluation.progress import Phase, Plan
from ratioctl.evaluation.suites import Suite
from ratioctl.package import ModelPackage
from ratioctl.types import Attacked, Measurement
from ratioctl.utils.result_cache import Arrays, ResultCache, key_of
from ratioctl.utils.sharding import Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Splits sets into batches and computes each one that is not in the result cache.

    A shard computes its part of the batches only, and returns only these. Batches that belong together (see
    `blocks`) are computed by one shard.

    Attributes:
        facts: everything besides images and settings that determines a result; part of the cache key.
        size: images per batch.
        shard: None computes everything.
        stored: shards have computed everything, so a batch that is not in the cache is an error, except
            those that need the results of all images.
    """

    cache: ResultCache
    plan: Plan
    facts: Mapping[str, Any]
    size: int
    shard: Shard | None = None
    stored: bool = False

    def owned(self, unit: str, number: int) -> bool:
        """Whether block `number` of a unit is computed here."""
        return self.shard is None or self.shard.owns(f"{self.facts['model']} {unit}", number)

    def unsharded(self) -> Batches:
        """The same, but everything is computed here."""
        return dataclasses.replace(self, shard=None)

    def run(
        self,
        what: str,
        pixels: np.ndarray,
        compute: Callable[[slice], Arrays],
        *,
        labels: np.ndarray | None = None,
        settings: Sequence[Any] = (),
        size: int | None = None,
        unit: str | None = None,
        blocks: np.ndarray | None = None,
        needs_all: bool = False,
    ) -> list[Arrays]:
        """`compute(batch)` for every batch; see `stream`."""
        return self.stream(
            what,
            pixels,
            lambda missing: map(compute, missing),
            labels=labels,
            settings=settings,
            size=size,
            unit=unit,
            blocks=blocks,
            needs_all=needs_all,
        )

    def stream(
        self,
        what: str,
        pixels: np.ndarray,
        compute: Callable[[list[slice]], Iterator[Arrays]],
        *,
        labels: np.ndarray | None = None,
        settings: Sequence[Any] = (),
        size: int | None = None,
        unit: str | None = None,
        blocks: np.ndarray | None = None,
        needs_all: bool = False,
    ) -> list[Arrays]:
        """Results of all batches in order; of a shard, those that it computes.

        Args:
            what: name of the phase in the plan.
            compute: yields one result for each of the batches that are not cached, in order.
            settings: JSON values that determine the result besides model and images.
            size: images per batch; None uses the default.
            unit: name of what shards part; None uses `what`.
            blocks: (N,) ascending numbers of blocks of images; no batch reaches over the end of one, and a
                shard computes whole blocks. None: every batch is a block.
            needs_all: the batch follows from results of all images, which no shard has.

        Raises:
            SourceError: with `stored`, a batch that is missing.
        """
        if not len(pixels):
            self.plan.skip(what)
            return []
        size = size or self.size
        slices = [at for number, at in _slices(len(pixels), size, blocks) if self.owned(unit or what, number)]
        if not slices:
            self.plan.skip(what)
            return []
        images = sum(at.stop - at.start for at in slices)
        keys = [
            self._key(what, pixels[at], None if labels is None else labels[at], settings) for at in slices
        ]
        parts = [self.cache.get(key) for key in keys]
        if self.stored and not needs_all and any(part is None for part in parts):
            raise SourceError(
                "the shards",
                f"lack {sum(part is None for part in parts)} of {len(parts)} batches of: {what}",
                "Run the shards again where these images and versions are, or merge where they ran.",
            )
        computed = compute([at for at, part in zip(slices, parts, strict=True) if part is None])
        for k, (at, key) in enumerate(zip(slices, keys, strict=True)):
            part, seconds = parts[k], None
            if part is None:
                part = parts[k] = self.cache.get_or_compute(key, lambda: next(computed))
                seconds = float(part["seconds"])
            self.plan.advance(what, (at.stop - at.start) / images, seconds)
        return [part for part in parts if part is not None]

    def _key(self, what: str, pixels: np.ndarray, labels: np.ndarray | None, settings: Sequence[Any]) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes())
        if labels is not None:
            digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
        facts = {**self.facts, "what": what, "settings": list(settings), "images": digest.hexdigest()}
        return key_of(facts)


def _slices(n: int, size: int, blocks: np.ndarray | None) -> Iterator[tuple[int, slice]]:
    """(number of its block, batch) for n images."""
    if blocks is None:
        yield from ((k // size, slice(k, min(k + size, n))) for k in range(0, n, size))
        return
    for number in np.unique(blocks).tolist():
        start, stop = np.searchsorted(blocks, [number, number + 1]).tolist()
        yield from ((number, slice(k, min(k + size, stop))) for k in range(start, stop, size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """One model of an evaluation.

    Attributes:
        name: of the model, unique within the evaluation.
        saved: where attacked images are saved; None keeps none.
        judge: another model that judges counterfactuals (suite "explanations").
    """

    name: str
    subject: Subject
    data: EvaluationData
    suite: Suite
    batches: Batches
    saved: AttackedImages | None = None
    judge: Judge | None = None

    @property
    def package(self) -> ModelPackage:
        return self.subject.package

    @property
    def seed(self) -> int:
        return self.subject.seed

    @functools.cached_property
    def forward_seconds(self) -> float:
        """Measured seconds per image of a forward pass."""
        return attack_batches.forward_seconds(self.subject, self._sample)

    @functools.cached_property
    def step_seconds(self) -> float:
        """Measured seconds per image of a step of a gradient attack."""
        return attack_batches.step_seconds(self.subject, self._sample, self.forward_seconds)

    @property
    def _sample(self) -> np.ndarray:
        return self.data.inside.pixels[: self.batches.size]

    def phase(self, what: str, kind: str, images: float, seconds_each: float) -> Phase:
        """A phase of this model's plan."""
        parts = self.batches.shard.count if self.batches.shard else 1  # estimates of shards are coarse
        return Phase(model=self.name, what=what, kind=kind, seconds=images * seconds_each / parts)

    def source(self, name: str, images: Images, parts: Iterable[Arrays]) -> measurements.Source:
        """The origin of measurements on a set, with the time its batches took."""
        taken = round(measurements.seconds(parts), 3)
        return measurements.Source(name=name, images=images, seed=self.seed, seconds=taken)

    def save_attacked(self, name: str, **arrays: np.ndarray) -> None:
        """Write attacked images, if they are kept."""
        if self.saved is not None:
            path = self.saved.write(f"{self.name} {name}", **arrays)
            self.batches.plan.tell({"event": "file", "path": str(path)})


class Examples:
    """Columns of `examples.parquet`; `path` is inside the SOURCE, None for generated images."""

    def __init__(self, model: str, sets: Mapping[str, Images]) -> None:
        self.model, self.sets = model, sets
        self.parts: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        dataset: str,
        index: np.ndarray,
        attack: str,
        labels: np.ndarray | None,
        predicted: np.ndarray,
        confidences: Confidences,
        verdict: np.ndarray | None,
        distance: np.ndarray | None = None,
    ) -> None:
        """Append (N,) rows. `verdict`: whether the decision is correct; None where no decision is."""
        n = len(index)
        columns = {
            "dataset": np.full(n, dataset, dtype=object),
            "index": np.asarray(index, np.int64),
            "attack": np.full(n, attack, dtype=object),
            "label": np.full(n, -1, np.int64) if labels is None else np.asarray(labels, np.int64),
            "predicted": np.asarray(predicted, np.int64),
            "confidence": np.asarray(confidences.confidence, np.float64),
            "log_odds": np.asarray(confidences.log_odds, np.float64),
            "verdict": np.full(n, -1, np.int8) if verdict is None else np.asarray(verdict, np.int8),
            "distance": np.zeros(n) if distance is None else np.asarray(distance, np.float64),
        }
        self.extend(columns)

    def extend(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows of one set given as columns, without "model" and "path"."""
        n = len(columns["index"])
        names = self.sets[columns["dataset"][0]].names if n else ()
        added = {
            "path": np.array([names[k] if names else None for k in columns["index"]], dtype=object),
            "model": np.full(n, self.model, dtype=object),
        }
        for key, column in {**added, **columns}.items():
            self.parts.setdefault(key, []).append(column)

    def columns(self) -> dict[str, np.ndarray]:
        return {key: np.concatenate(parts) for key, parts in self.parts.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clean:
    """Results of stage "clean" that later stages use: `logits` (N, K), `predicted` (N,) of the ID images."""

    logits: np.ndarray
    confidences: Confidences
    predicted: np.ndarray
    parts: list[Arrays]


@dataclasses.dataclass(kw_only=True)
class Results:
    """What the stages of one model add to.

    Attributes:
        warnings: sentences, None for checks that passed.
        clean: set by stage "clean"; outside and outside_logits: clean confidences and logits of the OOD
            sets, set by stage "ood".
    """

    examples: Examples
    measurements: list[Measurement] = dataclasses.field(default_factory=list)
    warnings: list[str | None] = dataclasses.field(default_factory=list)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    gallery: list[Attacked] = dataclasses.field(default_factory=list)
    outside: dict[str, Confidences] = dataclasses.field(default_factory=dict)
    outside_logits: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    stored_clean: Clean | None = None

    @property
    def clean(self) -> Clean:
        assert self.stored_clean is not None, 'stage "clean" runs first'
        return self.stored_clean


def joined(parts: Sequence[Arrays]) -> Arrays:
    """Concatenated arrays of batches."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0] if parts[0][key].ndim}
