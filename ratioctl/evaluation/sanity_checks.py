"""Checks of an evaluation's own numbers: each returns a warning sentence, or None where it passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from ratioctl.data.in_distribution import Images
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball, Calibration

FEW, FEW_EXPLANATIONS = 1000, 100  # examples
STUCK = 0.01  # fraction of images with zero gradient that is reported
CONVERGED = 0.05  # fraction of survivors, or confidence, that a longer search may still gain
SATURATED = 0.02  # at this distance of the mean confidence from 1 a longer search cannot gain much


def zero_gradients(what: str, stuck: int, attacked: int) -> str | None:
    """An attack whose gradient is zero does not search."""
    if attacked and stuck > STUCK * attacked:
        return (
            f"{what}: the gradient was zero on {stuck} of {attacked} images, so the attack did not search "
            "there; the number may be too good"
        )
    return None


def randomized(first: np.ndarray, second: np.ndarray) -> str | None:
    """The same images must give the same logits twice."""
    gap = float(np.abs(first - second).max()) if first.size else 0.0
    if gap > 1e-5 * max(1.0, float(np.abs(first).max())):
        return (
            f"the model is randomized: its logits for the same images differ by up to {gap:.3g}; attacks and "
            "measurements would have to average over the randomness"
        )
    return None


def probabilities(logits: np.ndarray) -> str | None:
    """Probabilities in place of logits: a second softmax is applied, and gradients vanish."""
    rows = np.asarray(logits, np.float64)
    if rows.min() >= 0 and rows.max() <= 1 and np.abs(rows.sum(1) - 1).max() < 1e-3:
        return (
            "the model's outputs are probabilities, not logits: softmax is applied twice and gradients "
            "vanish; package the model without its softmax"
        )
    return None


def exceeds_guarantee(name: str, ball: Ball, reached: np.ndarray, bounds: np.ndarray) -> str | None:
    """An attack inside the ball must not exceed the guarantee; both as log-odds (N,)."""
    beyond = int((reached > bounds).sum())
    if beyond:
        return (
            f"{name}: an attack in {ball} exceeds the guaranteed confidence on {beyond} of {len(bounds)} "
            "images; the guarantee does not hold. Please report it"
        )
    return None


def square_wins(ball: Ball, by: np.ndarray, attacks: Sequence[str]) -> str | None:
    """A black-box attack that succeeds where gradient attacks failed indicates masked gradients."""
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
    """A longer attack must not succeed on many survivors."""
    if len(broken) and broken.sum() > max(1, CONVERGED * len(broken)):
        return (
            f"robust accuracy ({ball}): a search of {steps} steps broke {int(broken.sum())} of {len(broken)} "
            "survivors; the attack is too weak, the number too good"
        )
    return None


def not_converged_outside(
    name: str, ball: Ball, found: np.ndarray, longer: np.ndarray, steps: int
) -> str | None:
    """A longer search must not raise the mean worst-case confidence much, nor halve its distance to 1."""
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
    """Attacked confidence must not be below clean confidence: the image itself is in the ball."""
    k = int((attacked < clean - 1e-6).sum())
    if k:
        return (
            f"worst case on {name}: attacked confidence is below clean confidence on {k} of {len(clean)} "
            "images"
        )
    return None


def temperature_at_end(temperature: float, spec: Calibration, calibrated: bool) -> str | None:
    """A temperature at the end of its grid: the optimum may be outside."""
    if calibrated and not spec.low * 1.0001 < temperature < spec.high * 0.9999:
        return (
            f"the temperature {temperature:.4g} is at the end of its grid [{spec.low:g}, {spec.high:g}]: the "
            "optimum may be outside"
        )
    return None


def uncalibrated(package: ModelPackage) -> str | None:
    if package.calibrated:
        return None
    return (
        "the model is not calibrated: temperature 1 and no thresholds, so no operating points; run "
        "`ratioctl calibrate` first"
    )


def few(counts: Mapping[str, int], least: int = FEW) -> str | None:
    """Sets with fewer than `least` examples."""
    small = {name: n for name, n in counts.items() if n < least}
    if not small:
        return None
    listed = ", ".join(f"{name} ({n})" for name, n in small.items())
    return f"fewer than {least:,} examples, so intervals are wide: {listed}"


def duplicates(sets: Mapping[str, Images]) -> list[str]:
    """Images that are pixel-identical to another image of their set or of another set."""
    found: list[str] = []
    seen: dict[str, np.ndarray] = {}
    for name, images in sets.items():
        keys = np.array([hash(np.ascontiguousarray(image).tobytes()) for image in images.pixels])
        once, counts = np.unique(keys, return_counts=True)
        twice = int((counts - 1).sum())
        if twice:
            found.append(
                f"duplicates: {twice} of the {len(keys)} images of {name} are copies of another image in it"
            )
        for other, theirs in seen.items():
            k = int(np.isin(keys, theirs).sum())
            if k:
                found.append(f"duplicates: {k} of the {len(keys)} images of {name} are also in {other}")
        seen[name] = once
    return found


def trained_on(
    package: ModelPackage, fingerprints: Mapping[str, str], sources: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Sets (name to fingerprint) that are the model's training, selection or calibration data.

    Args:
        sources: SOURCE of a set, by name: one that training took its ID images from, or drew OOD images of.
    """
    ratio: Any = package.config["ratio"]
    known = dict((ratio.get("provenance") or {}).get("data") or {})
    known["calibration"] = (ratio.get("calibration") or {}).get("fingerprint")
    said = {
        "train": "was trained on",
        "train_source": "was trained on",
        "outside": "was trained on as OOD data",
    }
    found: dict[str, str] = {}
    for name, fingerprint in fingerprints.items():
        for role, theirs in known.items():
            if theirs is not None and theirs == fingerprint:
                what = said.get(role, "was selected or calibrated on")
                found.setdefault(name, f"{name} is data that the model {what}")
    named = (ratio.get("provenance") or {}).get("sources") or {}
    train, outside = str(named.get("train")), named.get("outside") or ()
    for name, source in sources.items():
        if source == train.removeprefix("split:train:"):
            step = f"use split:test:{source}" if train != source else "use a split that was kept for the test"
            found.setdefault(name, f"{name} holds the images that the model was trained on; {step}")
        elif source in outside:
            text = f"{name} is an OOD source that the model was trained on, so its figures are too good"
            found.setdefault(name, f"{text}; give --ood NAME=SOURCE with images such as may reach the model")
    return list(found.values())
