"""The self-checks: each takes what was found and returns a sentence, or None where all is well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ratioctl.data.in_distribution import Images
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball, Calibration

FEW = 1000
STUCK = 0.01  # share of zero gradients that is worth a word
CONVERGED = 0.05  # of the survivors, or of confidence, that a longer search may still find
SATURATED = 0.02  # below this distance of the mean confidence from 1 there is nothing left to find


def zero_gradients(what: str, stuck: int, attacked: int) -> str | None:
    """An attack that saw no gradient searched nothing."""
    if attacked and stuck > STUCK * attacked:
        return (
            f"{what}: the gradient was zero on {stuck} of {attacked} images, which it therefore did not "
            "search; the number may be too good"
        )
    return None


def randomised(first: np.ndarray, second: np.ndarray) -> str | None:
    """The same images twice must give the same logits."""
    gap = float(np.abs(first - second).max()) if first.size else 0.0
    if gap > 1e-5 * max(1.0, float(np.abs(first).max())):
        return (
            f"the model is randomised: its logits for the same images differ by up to {gap:.3g}; attacks and "
            "numbers would have to average over that"
        )
    return None


def probabilities(logits: np.ndarray) -> str | None:
    """Outputs that are probabilities get a second softmax, and attacks vanishing gradients."""
    rows = np.asarray(logits, np.float64)
    if rows.min() >= 0 and rows.max() <= 1 and np.abs(rows.sum(1) - 1).max() < 1e-3:
        return (
            "the model's outputs are probabilities, not logits: confidences are softmaxed twice and attacks "
            "see vanishing gradients; package it without its softmax"
        )
    return None


def square_wins(ball: Ball, by: np.ndarray, attacks: Sequence[str]) -> str | None:
    """A black-box attack that breaks what gradients could not is a sign of masked gradients."""
    if "square" not in attacks:
        return None
    number = attacks.index("square") + 1
    black, white = int((by == number).sum()), int(((by > 0) & (by != number)).sum())
    if black > max(1, 0.01 * len(by)):
        return (
            f"robust accuracy ({ball}): Square, which uses no gradients, broke {black} images that survived "
            f"the gradient attacks (they broke {white}): gradients are masked, the number may be too good"
        )
    return None


def not_converged_inside(ball: Ball, broken: np.ndarray, steps: int) -> str | None:
    """A longer search must not break much of what survived."""
    if len(broken) and broken.sum() > max(1, CONVERGED * len(broken)):
        return (
            f"robust accuracy ({ball}): a search of {steps} steps broke {int(broken.sum())} of {len(broken)} "
            "images that had survived; the attack is too weak, the number too good"
        )
    return None


def not_converged_outside(
    name: str, ball: Ball, found: np.ndarray, longer: np.ndarray, steps: int
) -> str | None:
    """A longer search must not raise the worst-case confidence much, nor halve what is missing to 1."""
    if not len(found):
        return None
    missing, after = 1 - float(found.mean()), 1 - float(np.maximum(longer, found).mean())
    if missing - after > CONVERGED or (missing > SATURATED and after < missing / 2):
        return (
            f"worst case on {name} ({ball}): a search of {steps} steps raised the mean confidence from "
            f"{found.mean():.3f} to {np.maximum(longer, found).mean():.3f}; the attack is too weak, the "
            "number too good"
        )
    return None


def below_clean(name: str, clean: np.ndarray, attacked: np.ndarray) -> str | None:
    """The image itself lies in the ball, so attacked confidence is never below clean confidence."""
    k = int((attacked < clean - 1e-6).sum())
    if k:
        return f"worst case on {name}: attacked confidence is below clean confidence on {k} of {len(clean)}"
    return None


def temperature_at_end(temperature: float, spec: Calibration, calibrated: bool) -> str | None:
    """The best temperature may lie outside the grid it was searched on."""
    if calibrated and not spec.low * 1.0001 < temperature < spec.high * 0.9999:
        return (
            f"the temperature {temperature:.4g} is at the end of its grid [{spec.low:g}, {spec.high:g}]: the "
            "best one may lie outside"
        )
    return None


def uncalibrated(package: ModelPackage) -> str | None:
    if package.calibrated:
        return None
    return (
        "the model is not calibrated: temperature 1 and no thresholds, so no operating points; run "
        "`ratioctl calibrate` first"
    )


def few(counts: Mapping[str, int]) -> str | None:
    """Numbers on few examples, in one sentence."""
    small = {name: n for name, n in counts.items() if n < FEW}
    if not small:
        return None
    listed = ", ".join(f"{name} ({n})" for name, n in small.items())
    return f"fewer than {FEW:,} examples, mind the intervals: {listed}"


def duplicates(sets: Mapping[str, Images]) -> list[str]:
    """Images that stand in two sets, or twice in one, pixel for pixel."""
    found: list[str] = []
    seen: dict[str, np.ndarray] = {}
    for name, images in sets.items():
        keys = np.array([hash(np.ascontiguousarray(image).tobytes()) for image in images.pixels])
        once, counts = np.unique(keys, return_counts=True)
        twice = int((counts - 1).sum())
        if twice:
            found.append(
                f"duplicates: {twice} of the {len(keys)} images of {name} are copies of another one in it"
            )
        for other, theirs in seen.items():
            k = int(np.isin(keys, theirs).sum())
            if k:
                found.append(f"duplicates: {k} of the {len(keys)} images of {name} also stand in {other}")
        seen[name] = once
    return found


def trained_on(package: ModelPackage, fingerprints: Mapping[str, str]) -> list[str]:
    """Sets (name to fingerprint) that are the model's training or calibration data."""
    ratio: Any = package.config["ratio"]
    known = dict((ratio.get("provenance") or {}).get("data") or {})
    known["calibration"] = (ratio.get("calibration") or {}).get("fingerprint")
    said = {
        "train": "was trained on",
        "train_source": "was trained on",
        "outside": "was trained on as its out-distribution",
    }
    found: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        for role, theirs in known.items():
            if theirs is not None and theirs == fingerprint:
                what = said.get(role, "was selected or calibrated on")
                found.setdefault(name, f"{name} is the very data the model {what}")
    return list(found.values())
