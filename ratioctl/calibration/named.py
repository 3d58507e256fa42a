"""Thresholds by rules on in-distribution (ID) images and sets of out-of-distribution (OOD) images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ratioctl import metrics, scores
from ratioctl.calibration import thresholds
from ratioctl.calibration.rules import Rule, Scored
from ratioctl.calibration.thresholds import ScoredSet
from ratioctl.calibration.worst_case import attacked
from ratioctl.data import in_distribution, out_distribution
from ratioctl.data.in_distribution import Images
from ratioctl.models.predict import Predictor
from ratioctl.package import ModelPackage
from ratioctl.package.records import records as stored_records
from ratioctl.scores import OodScore


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Results: `thresholds` of the score, `confidences` of "msp" (the same for it), and what is stored."""

    confidences: dict[str, float]
    thresholds: dict[str, float]
    records: tuple[dict[str, Any], ...]
    acceptance: dict[str, Any]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoredSets:
    """What thresholds are chosen from: the ID images with their logits (N, K), and the OOD images by name."""

    package: ModelPackage
    kind: OodScore
    temperature: float
    network: Predictor
    logits: np.ndarray
    inside: Images
    outside: Mapping[str, Images]

    def choose(
        self, rules: Sequence[Rule], per_class: bool, on_search: Callable[[int], object] | None
    ) -> Chosen:
        """`tpr95` and `tpr99`, the thresholds of the rules, and earlier ones that still hold."""
        kind, labels = self.kind, self.package.label_names
        base = thresholds.tpr_thresholds(metrics.confidence(self.logits, self.temperature))
        confidences: dict[str, float] = {}
        old: list[dict[str, Any]] = []
        removed: tuple[str, ...] = ()
        if kind.name != scores.DEFAULT:
            confidences, old, removed = self._earlier(scores.by_name(scores.DEFAULT), [])
            confidences |= base
            base = thresholds.score_thresholds(kind, self.logits, self.temperature)
        scored = Scored.of(self.logits, self.temperature, kind, self.inside.labels)
        name = in_distribution.short_name(self.inside.source)
        inside = ScoredSet(name=name, scored=scored, fingerprint=self.inside.fingerprint)
        clean = {name: self._scored(name, images) for name, images in self.outside.items()}
        attacks = dict.fromkeys(attack for attack in (rule.attack for rule in rules) if attack is not None)
        worst = {attack: self._attacked(*attack, on_search) for attack in attacks}
        sets = [inside, *clean.values(), *worst.values()]
        chosen, records, warnings = self._earlier(kind, [rule.name for rule in rules])
        warnings += removed
        for rule in [*thresholds.tpr_rules(), *rules]:
            outside = {name: part.scored for name, part in clean.items()}
            if rule.attack is not None:
                outside = {str(rule.ood): worst[rule.attack].scored}
            elif rule.ood is not None:
                outside = {rule.ood: outside[rule.ood]}
            elif rule.kind != "cost":
                outside = {}
            reasons: dict[str, str] = {}
            if rule.name in base:
                threshold = thresholds.Threshold(base[rule.name])
            else:
                names = labels if per_class else None
                threshold, reasons = thresholds.by_rule(rule, kind, scored, outside, names)
            chosen[rule.name] = threshold
            records.append(thresholds.record(rule, threshold, kind, sets, reasons, labels))
            warnings += _class_warnings(rule, reasons, labels)
        if kind.name == scores.DEFAULT:
            warnings += tuple(
                f"the threshold {name} rounds to confidence 1, above which images cannot be told apart: "
                "calibrate another score, for example --score energy"
                for name, value in chosen.items()
                if value >= 1.0
            )
        return Chosen(
            confidences=confidences or chosen,
            thresholds=chosen,
            records=(*old, *records),
            acceptance=thresholds.acceptance_record(kind, sets),
            warnings=(*warnings, *in_distribution.unreadable(dict(self.outside))),
        )

    def _scored(self, name: str, images: Images) -> ScoredSet:
        logits = self.network.predict(images.pixels)
        scored = Scored.of(logits, self.temperature, self.kind, None)
        return ScoredSet(name=name, scored=scored, fingerprint=images.fingerprint)

    def _attacked(
        self, name: str, eps: float, images: int, steps: int, on_search: Callable[[int], object] | None
    ) -> ScoredSet:
        every = self.outside[name]
        index = np.linspace(0, len(every) - 1, min(len(every), images)).round().astype(int)
        pixels = every.pixels[index]
        if on_search is not None:
            on_search(len(pixels))
        logits = attacked(self.network, pixels, eps, self.kind, self.temperature, steps)
        return ScoredSet(
            name=name,
            scored=Scored.of(logits, self.temperature, self.kind, None),
            fingerprint=every.fingerprint,
            ball={"p": "2", "eps": eps},
            attack=f"APGD, {steps} steps x 3 searches, or the image",
        )

    def _earlier(
        self, kind: OodScore, names: Sequence[str]
    ) -> tuple[dict[str, float], list[dict[str, Any]], tuple[str, ...]]:
        """Thresholds under other names that stay, their records, and a warning about those that do not."""
        stored = thresholds.kept_from(self.package.thresholds_of(kind.name), names)
        if stored and self.temperature != self.package.temperature:
            listed = ", ".join(stored)
            said = f"the thresholds {listed} were chosen at another temperature and are removed"
            return {}, [], (f"{said}; choose them again with --threshold",)
        known = {record.name for record in stored_records(self.package, kind.name)} & stored.keys()
        rows = self.package.config["ratio"].get("threshold_records", [])
        return stored, [r for r in rows if r["score"] == kind.config_name and r["name"] in known], ()


def _class_warnings(rule: Rule, reasons: Mapping[str, str], labels: Sequence[str]) -> tuple[str, ...]:
    if not reasons:
        return ()
    first = next(iter(reasons))
    more = ", ..." if len(reasons) > 1 else ""
    return (
        f"threshold {rule.name}: {len(reasons)} of {len(labels)} classes use the common threshold "
        f"({first}: {reasons[first]}{more})",
    )


def ood_sources(ood: Sequence[str] | Mapping[str, str], data: str | None) -> dict[str, str]:
    """SOURCEs by name; a SOURCE without a name is called by its last part."""
    if not ood:
        return {}
    if isinstance(ood, Mapping):
        return out_distribution.named(ood, data or "")
    pairs = [text if "=" in text else f"{in_distribution.short_name(text)}={text}" for text in ood]
    return out_distribution.named(pairs, data or "")


def ood_sets(package: ModelPackage, sources: Mapping[str, str], download: bool) -> dict[str, Images]:
    """The images of these SOURCEs at the package's input size."""
    channels, size = package.input_size[0], package.frame
    return {
        name: out_distribution.load([source], size, channels, download=download)
        for name, source in sources.items()
    }
