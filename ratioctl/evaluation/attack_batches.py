"""The batches an evaluation consists of: pixels in, plain arrays out. Nothing here knows of sets or reports.

Attacks may compute in bf16; every verdict and every confidence is that of the fp32 network on the point
found. Random numbers of an image come from (seed, attack, pixels), so its result does not depend on its
companions in the batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time

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
from ratioctl.attacks.worst_case import worst_case_confidence
from ratioctl.data.loader import to_float
from ratioctl.models import Classifier
from ratioctl.models.device import ComputeConfig
from ratioctl.models.predict import Predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Ball
from ratioctl.utils.result_cache import Arrays


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model under evaluation: `network`, which is searched on, is in eval mode, frozen and quick, and may
    round otherwise than `predictor`, its exact fp32 road.
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
        """What attacks differentiate: (B, C, H, W) -> (B, K)."""
        with self.compute.autocast():
            return self.network(x)

    @torch.no_grad()
    def logits(self, x: Tensor) -> np.ndarray:
        """(B, C, H, W) -> (B, K): what every verdict and score is made of, the predictor's exact fp32."""
        return self.predictor.exact(x).cpu().numpy()

    def confidences(self, x: Tensor) -> np.ndarray:
        """(B,) largest probability after the temperature."""
        return metrics.confidence(self.logits(x), self.temperature)

    def odds(self, x: Tensor) -> np.ndarray:
        """(B,) their log-odds, which rank alike and do not round to 1."""
        return metrics.log_odds(self.logits(x), self.temperature)

    def random(self, pixels: np.ndarray, purpose: str) -> list[torch.Generator]:
        """One generator an image (N, H, W, C)."""
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
    """One attack of an ensemble on images that survived those before it.

    Returns:
        "broken" (B,) bool; "confidence", "odds", "predicted" and "distance" (B,) of the point that broke it
        (of the image itself where nothing did); "stuck" (B,) bool: the gradient was zero everywhere; with
        `keep` "x" (B', C, H, W) float32, the points of the broken ones.
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
        "odds": metrics.log_odds(logits, subject.temperature),
        "predicted": logits.argmax(1),
        "distance": geometry.distance(found.x_adv, x, ball.p).cpu().numpy(),
        "stuck": found.stuck_images.cpu().numpy(),
    }
    return {**arrays, "x": found.x_adv[broken].cpu().numpy()} if keep else arrays


def worst_case(
    subject: Subject,
    pixels: np.ndarray,
    ball: Ball,
    *,
    steps: int,
    restarts: int,
    targets: int,
    keep: bool = False,
) -> Arrays:
    """The largest confidence in the ball, over several searches and the image itself.

    Returns:
        "confidence", "odds" (see `metrics.log_odds`), "predicted", "distance" (B,) of the best point, "by"
        (B,) the number of its search from 1, 0 for the image itself; "clean" (B,) the image's own confidence;
        "picture" (B, H, W, C) the best point rounded to 8 bits; "stuck" (B,) bool: no search saw a gradient;
        with `keep` "x" (B, C, H, W) float32, the best point itself.
    """
    x = to_float(pixels, subject.compute.device)
    found = worst_case_confidence(
        subject.predictor.exact,
        x,
        ball,
        temperature=subject.temperature,
        steps=steps,
        restarts=restarts,
        targets=targets,
        batch_size=max(len(x), 1),
        seed=subject.seed,
        search_logits_of=subject.logits_of,
    )
    logits = subject.logits(found.x)
    arrays = {
        "clean": subject.confidences(x),
        "confidence": metrics.confidence(logits, subject.temperature),
        "odds": metrics.log_odds(logits, subject.temperature),
        "predicted": logits.argmax(1),
        "distance": geometry.distance(found.x, x, ball.p).cpu().numpy(),
        "by": found.by.cpu().numpy().astype(np.int8),
        "picture": _pictures(found.x),
        "stuck": found.stuck.cpu().numpy(),
    }
    return {**arrays, "x": found.x.cpu().numpy()} if keep else arrays


def lowest(subject: Subject, pixels: np.ndarray, ball: Ball, *, steps: int, keep: bool = False) -> Arrays:
    """The smallest largest probability in the ball: how outlying an in-image can be made to look.

    Searches: Auto-PGD downwards on the log-odds of the likeliest class, and on the cross-entropy to uniform.

    Returns:
        "confidence", "odds", "predicted", "distance" (B,) of the best point, the image itself included; with
        `keep` "x" (B, C, H, W) float32, that point.
    """
    x = to_float(pixels, subject.compute.device)
    high, even = goals.log_odds(subject.temperature), goals.uniform_cross_entropy()
    searches: list[Goal] = [lambda f: -high(f), lambda f: -even(f / subject.temperature)]
    attack = strongest(ball, steps)
    best, best_x = subject.odds(x), x.clone()
    for goal in searches:
        ended = perturb(subject.logits_of, x, goal, attack)
        reached = subject.odds(ended.x)
        lower = torch.from_numpy(reached < best).to(x.device)
        best = np.minimum(best, reached)
        best_x[lower] = ended.x[lower]
    logits = subject.logits(best_x)
    arrays = {
        "confidence": metrics.confidence(logits, subject.temperature),
        "odds": best,
        "predicted": logits.argmax(1),
        "distance": geometry.distance(best_x, x, ball.p).cpu().numpy(),
    }
    return {**arrays, "x": best_x.cpu().numpy()} if keep else arrays


def curve(
    subject: Subject, pixels: np.ndarray, labels: np.ndarray | None, radii: tuple[float, ...], steps: int
) -> Arrays:
    """Figure 5: how confidence changes over the radius (l2), all radii of an image in one batch.

    With labels the lowest probability of the true class found within each radius, without them the largest
    confidence. A smaller ball's point lies in the larger ball too, so the curves never turn.

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
    """Does a longer search in fp32, on the logit margin, break what survived?

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
    """The confidence a longer search in fp32 from a random start reaches: "confidence" (B,)."""
    x = to_float(pixels, subject.compute.device)
    attack = strongest(ball, steps, start="random")
    goal = goals.log_odds(subject.temperature)
    ended = perturb(
        subject.predictor.exact, x, goal, attack, generator=subject.random(pixels, f"probe/{ball}")
    )
    return {"confidence": subject.confidences(ended.x)}


def steadiness(subject: Subject, pixels: np.ndarray) -> Arrays:
    """Logits of the same images twice: "first" and "second" (B, K)."""
    return {"first": subject.predictor.predict(pixels), "second": subject.predictor.predict(pixels)}


def paces(subject: Subject, pixels: np.ndarray) -> tuple[float, float]:
    """Seconds an image takes for a forward pass, and for a step of a gradient search, in such a batch."""
    x = to_float(pixels, subject.compute.device)
    goal, attack = goals.log_confidence(), strongest(Ball(p=2.0, eps=1.0), 3)
    subject.logits(x)
    perturb(subject.logits_of, x, goal, strongest(Ball(p=2.0, eps=1.0), 1))
    times = [time.perf_counter()]
    subject.logits(x)
    times.append(time.perf_counter())
    perturb(subject.logits_of, x, goal, attack).value.cpu()
    times.append(time.perf_counter())
    forward = max((times[1] - times[0]) / len(x), 1e-9)
    return forward, max((times[2] - times[1]) / len(x) - forward, forward) / attack.steps


def survivors(subject: Subject, pixels: np.ndarray, labels: np.ndarray, ball: Ball, steps: int) -> float:
    """Share of images that a short search leaves standing: what a long one will mostly work on."""
    found = robust(subject, pixels, labels, ball, "apgd-ce", AttackBudget(steps=steps))
    return (int((~found["broken"]).sum()) + 0.5) / (len(pixels) + 1)


def _pictures(x: Tensor) -> np.ndarray:
    """(B, C, H, W) in [0,1] -> (B, H, W, C) uint8."""
    return x.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
