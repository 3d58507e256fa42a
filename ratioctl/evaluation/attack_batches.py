"""One batch of each kind of computation in an evaluation: pixels in, plain arrays out.

Attacks may compute in bf16; every decision and every confidence comes from the fp32 network on the point
found. Random numbers of an image are derived from (seed, attack, pixels), so its result does not depend on
the rest of the batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratioctl import metrics
from ratioctl.attacks import autoattack, goals
from ratioctl.attacks import balls as geometry
from ratioctl.attacks.autoattack import AttackBudget, Backend
from ratioctl.attacks.engine import perturb
from ratioctl.attacks.goals import Goal
from ratioctl.attacks.registry import strongest
from ratioctl.attacks.visited import LogitsOf
from ratioctl.attacks.worst_case import WorstCase, worst_case_confidence
from ratioctl.data.loader import to_float
from ratioctl.models import Classifier
from ratioctl.models.device import ComputeConfig
from ratioctl.models.predict import Predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball
from ratioctl.scores import OodScore
from ratioctl.utils.result_cache import Arrays


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model under evaluation.

    Attributes:
        network: what attacks differentiate; in eval mode, BatchNorm folded. May round differently from
            `predictor`.
        predictor: the exact fp32 network, used for decisions and confidences.
    """

    package: ModelPackage
    network: Classifier
    predictor: Predictor
    compute: ComputeConfig
    seed: int

    @property
    def temperature(self) -> float:
        return self.package.temperature

    def logits_of(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K) for attacks, in the precision of the compute configuration."""
        with self.compute.autocast():
            return self.network(x)

    @torch.no_grad()
    def logits(self, x: Tensor) -> np.ndarray:
        """(B, C, H, W) -> (B, K) in exact fp32, for decisions and confidences."""
        return self.predictor.exact(x).cpu().numpy()

    def confidences(self, x: Tensor) -> np.ndarray:
        """(B,) largest probability after the temperature."""
        return metrics.confidence(self.logits(x), self.temperature)

    def log_odds(self, x: Tensor) -> np.ndarray:
        """(B,) log-odds of the confidence: the same order without ties at 1."""
        return metrics.log_odds(self.logits(x), self.temperature)

    def random(self, pixels: np.ndarray, purpose: str) -> list[torch.Generator]:
        """One generator per image (N, H, W, C)."""
        return [
            torch.Generator().manual_seed(
                int.from_bytes(
                    hashlib.sha256(f"{self.seed}/{purpose}/".encode() + image.tobytes()).digest()[:7], "big"
                )
            )
            for image in pixels
        ]


def clean(subject: Subject, pixels: np.ndarray) -> Arrays:
    """Logits of unchanged images."""
    return {"logits": subject.predictor.predict(pixels)}


def robust(
    subject: Subject,
    pixels: np.ndarray,
    labels: np.ndarray,
    ball: Ball,
    attack: str,
    budget: AttackBudget,
    *,
    backend: Backend = "own",
    keep: bool = False,
) -> Arrays:
    """One attack of an ensemble on the survivors of those before it.

    Returns:
        "broken" (B,) bool: the attack succeeded; "confidence", "log_odds", "predicted" and "distance" (B,) of
        the adversarial point (of the image itself for survivors); "stuck" (B,) bool: the gradient was zero
        everywhere; with `keep` "x" (B', C, H, W) float32, the adversarial points.
    """
    x = to_float(pixels, subject.compute.device)
    found = autoattack.robust_verdicts(
        subject.predictor.exact,
        x,
        torch.from_numpy(labels).to(x.device),
        ball,
        attacks=(attack,),
        budget=budget,
        batch_size=max(len(x), 1),
        seed=subject.seed,
        backend=backend,
        search_logits_of=subject.logits_of,
    )
    logits = subject.logits(found.x_adv)
    broken = ~found.robust
    arrays = {
        "broken": broken.cpu().numpy(),
        "confidence": metrics.confidence(logits, subject.temperature),
        "log_odds": metrics.log_odds(logits, subject.temperature),
        "predicted": logits.argmax(1),
        "distance": geometry.distance(found.x_adv, x, ball.p).cpu().numpy(),
        "stuck": found.stuck_images.cpu().numpy(),
    }
    return {**arrays, "x": found.x_adv[broken].cpu().numpy()} if keep else arrays


def _worst(subject: Subject, x: Tensor, ball: Ball, **options: Any) -> WorstCase:
    networks = {"logits_of": subject.predictor.exact, "search_logits_of": subject.logits_of}
    return worst_case_confidence(
        x0=x,
        ball=ball,
        temperature=subject.temperature,
        batch_size=max(len(x), 1),
        seed=subject.seed,
        **{**networks, **options},
    )


def _near(subject: Subject, score: OodScore, logits_of: LogitsOf) -> LogitsOf:
    """The network with the score's own computation before it."""
    near, temperature = score.near, subject.temperature
    assert near is not None
    return lambda x: near(logits_of, x, temperature)


@torch.no_grad()
def _score_logits(subject: Subject, score: OodScore, x: Tensor) -> np.ndarray:
    """(B, K) logits that the score is computed from, in exact fp32."""
    exact = subject.predictor.exact
    return (exact if score.near is None else _near(subject, score, exact))(x).cpu().numpy()


def score_logits(subject: Subject, pixels: np.ndarray, score: OodScore) -> Arrays:
    """ "logits" (B, K) that a score is computed from, for one that looks at the network near the image."""
    return {"logits": _score_logits(subject, score, to_float(pixels, subject.compute.device))}


def worst_case(
    subject: Subject,
    pixels: np.ndarray,
    ball: Ball,
    *,
    steps: int,
    restarts: int,
    targets: int,
    method: str | None = None,
    keep: bool = False,
) -> Arrays:
    """Highest confidence in the ball, over several searches and the image itself.

    Returns:
        "confidence", "log_odds", "predicted", "distance" (B,) of the best point; "by" (B,) the number of its
        search from 1, 0 for the image itself; "clean" (B,) the image's own confidence; "picture"
        (B, H, W, C) the best point rounded to 8 bits; "stuck" (B,) bool: every gradient was zero; with `keep`
        "x" (B, C, H, W) float32, the best point.
    """
    x = to_float(pixels, subject.compute.device)
    found = _worst(subject, x, ball, steps=steps, restarts=restarts, targets=targets, method=method)
    logits = subject.logits(found.x)
    arrays = {
        "clean": subject.confidences(x),
        "confidence": metrics.confidence(logits, subject.temperature),
        "log_odds": metrics.log_odds(logits, subject.temperature),
        "predicted": logits.argmax(1),
        "distance": geometry.distance(found.x, x, ball.p).cpu().numpy(),
        "by": found.by.cpu().numpy().astype(np.int8),
        "picture": _pictures(found.x),
        "stuck": found.stuck.cpu().numpy(),
    }
    return {**arrays, "x": found.x.cpu().numpy()} if keep else arrays


def guaranteed(subject: Subject, pixels: np.ndarray, eps: float) -> Arrays:
    """ "confidence" and "log_odds" (B,) that no image in the linf ball of radius `eps` exceeds."""
    x = to_float(pixels, subject.compute.device)
    log_odds = subject.predictor.guaranteed_log_odds(x, eps, subject.temperature)
    return {"confidence": 1 / (1 + np.exp(-log_odds)), "log_odds": log_odds}


def highest(subject: Subject, pixels: np.ndarray, ball: Ball, steps: int) -> Arrays:
    """ "log_odds" (B,) of the highest confidence that an attack of two searches finds in the ball."""
    found = _worst(
        subject, to_float(pixels, subject.compute.device), ball, steps=steps, restarts=1, targets=0
    )
    return {"log_odds": subject.log_odds(found.x)}


def worst_case_score(
    subject: Subject, pixels: np.ndarray, ball: Ball, score: OodScore, *, steps: int, restarts: int
) -> Arrays:
    """Highest acceptance of an OOD score in the ball, over several searches and the image itself.

    A score that looks at the network near the image is attacked through that computation.

    Returns:
        "acceptance" (B,) float64 in exact fp32 logits; "stuck" (B,) bool: no search found a gradient.
    """
    x = to_float(pixels, subject.compute.device)

    def acceptance(logits: Tensor) -> Tensor:
        return score.acceptance_tensor(logits.float(), subject.temperature)

    options: dict[str, Any] = {}
    if score.near is not None:
        options["logits_of"] = _near(subject, score, subject.predictor.exact)
        options["search_logits_of"] = _near(subject, score, subject.logits_of)
    found = _worst(
        subject, x, ball, steps=steps, restarts=restarts, targets=0, acceptance=acceptance, **options
    )
    return {
        "acceptance": score.acceptance(_score_logits(subject, score, found.x), subject.temperature),
        "stuck": found.stuck.cpu().numpy(),
    }


def lowest(subject: Subject, pixels: np.ndarray, ball: Ball, *, steps: int, keep: bool = False) -> Arrays:
    """Lowest confidence in the ball, for ID images.

    Auto-PGD minimizes the log-odds of the most likely class, and the cross-entropy to the uniform
    distribution.

    Returns:
        "confidence", "log_odds", "predicted", "distance" (B,) of the best point, the image itself included;
        with `keep` "x" (B, C, H, W) float32, that point.
    """
    x = to_float(pixels, subject.compute.device)
    high, even = goals.log_odds(subject.temperature), goals.uniform_cross_entropy()
    searches: list[Goal] = [lambda f: -high(f), lambda f: -even(f / subject.temperature)]
    attack = strongest(ball, steps)
    best, best_x = subject.log_odds(x), x.clone()
    for goal in searches:
        ended = perturb(subject.logits_of, x, goal, attack)
        reached = subject.log_odds(ended.x)
        lower = torch.from_numpy(reached < best).to(x.device)
        best = np.minimum(best, reached)
        best_x[lower] = ended.x[lower]
    logits = subject.logits(best_x)
    arrays = {
        "confidence": metrics.confidence(logits, subject.temperature),
        "log_odds": best,
        "predicted": logits.argmax(1),
        "distance": geometry.distance(best_x, x, ball.p).cpu().numpy(),
    }
    return {**arrays, "x": best_x.cpu().numpy()} if keep else arrays


def curve(
    subject: Subject, pixels: np.ndarray, labels: np.ndarray | None, radii: tuple[float, ...], steps: int
) -> Arrays:
    """Confidence over the l2 radius (Figure 5), all radii of an image in one batch.

    With labels the lowest probability of the true class found within each radius, otherwise the highest
    confidence. Points of a smaller ball also lie in the larger one, so the curves are monotone.

    Returns:
        "values" (B, 1 + R), the first column at radius 0.
    """
    x = to_float(pixels, subject.compute.device)
    n, r = len(x), len(radii)
    many = x.repeat_interleave(r, 0)
    eps = torch.tensor(radii, dtype=torch.float64).repeat(n)
    y = None if labels is None else torch.from_numpy(np.repeat(labels, r)).to(x.device)
    goal = goals.log_odds(subject.temperature) if y is None else goals.cross_entropy(y)
    ended = perturb(subject.logits_of, many, goal, strongest(Ball(p=2.0, eps=max(radii)), steps), eps=eps)

    def value(points: Tensor, at: np.ndarray | None) -> np.ndarray:
        p = metrics.softmax(subject.logits(points), subject.temperature)
        return p.max(1) if at is None else p[np.arange(len(p)), at]

    first = value(x, labels)[:, None]
    rest = value(ended.x, None if labels is None else np.repeat(labels, r)).reshape(n, r)
    values = np.concatenate([first, rest], axis=1)
    fold = np.maximum if labels is None else np.minimum
    return {"values": fold.accumulate(values, axis=1)}


def probe_inside(subject: Subject, pixels: np.ndarray, labels: np.ndarray, ball: Ball, steps: int) -> Arrays:
    """A longer fp32 attack on the logit margin, for survivors.

    Returns:
        "broken" (B,) bool; "stuck" (B,) bool: the gradient was zero everywhere.
    """
    x = to_float(pixels, subject.compute.device)
    y = torch.from_numpy(labels).to(x.device)
    attack = strongest(ball, steps, start="random")
    ended = perturb(
        subject.predictor.exact, x, goals.margin(y), attack, generator=subject.random(pixels, f"probe/{ball}")
    )
    broken = subject.logits(ended.x).argmax(1) != labels
    return {"broken": broken, "stuck": ended.stuck.cpu().numpy()}


def probe_outside(subject: Subject, pixels: np.ndarray, ball: Ball, steps: int) -> Arrays:
    """Confidence reached by a longer fp32 search from a random start: "confidence" (B,)."""
    x = to_float(pixels, subject.compute.device)
    attack = strongest(ball, steps, start="random")
    goal = goals.log_odds(subject.temperature)
    ended = perturb(
        subject.predictor.exact, x, goal, attack, generator=subject.random(pixels, f"probe/{ball}")
    )
    return {"confidence": subject.confidences(ended.x)}


def longer(steps: int) -> int:
    """Steps of a self-check's search: enough to improve on a search that was too short."""
    return max(4 * steps, 50)


def forward_seconds(subject: Subject, pixels: np.ndarray) -> float:
    """Measured seconds per image of a forward pass, in such a batch."""
    x = to_float(pixels, subject.compute.device)
    return max(_seconds(lambda: subject.logits(x)) / len(x), 1e-9)


def step_seconds(subject: Subject, pixels: np.ndarray, forward: float) -> float:
    """Measured seconds per image of a step of a gradient search; `forward` is that of a forward pass."""
    x = to_float(pixels, subject.compute.device)
    goal, steps = goals.log_confidence(), 3
    attack = strongest(Ball(p=2.0, eps=1.0), steps)
    taken = _seconds(lambda: perturb(subject.logits_of, x, goal, attack).value.cpu())
    return max(taken / len(x) - forward, forward) / steps


def _seconds(compute: Callable[[], object]) -> float:
    """Seconds of the second of two calls."""
    compute()
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started


def surviving_fraction(
    subject: Subject, pixels: np.ndarray, labels: np.ndarray, ball: Ball, steps: int
) -> float:
    """Fraction of images that survive a short attack, for the time estimate of a long one."""
    found = robust(subject, pixels, labels, ball, "apgd-ce", AttackBudget(steps=steps))
    return (int((~found["broken"]).sum()) + 0.5) / (len(pixels) + 1)


def _pictures(x: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0,1] -> (B, H, W, C) uint8."""
    return x.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
