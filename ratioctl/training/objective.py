"""The objective: a batch and a model to named losses (eq. 4-6; the published methods are rows of weights)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.data.loader import Batch
from ratioctl.recipe import Objective, Term
from ratioctl.utils.shares import WHOLE, PartOfBatch, Share

Logits = Callable[[Tensor], Tensor]


def attacked(
    logits_of: Logits,
    x: Tensor,
    y: Tensor | None,
    term: Term,
    *,
    generator: torch.Generator | PartOfBatch | None = None,
    shrink: float = 1.0,
) -> Tensor:
    """The approximate inner maximizer of a term, (B, C, H, W).

    Args:
        logits_of: the network in eval mode (running batch statistics), as in the authors' training.
        y: labels (B,) inside, None outside, where the target is the uniform distribution.
        shrink: factor on the radius, for a ramp.
    """
    assert term.attack is not None
    clean = None
    if term.against == "clean":
        with torch.no_grad():
            clean = logits_of(x)
    if term.goal is not None:
        goal = goals.by_name(term.goal, y, clean)
    elif term.against == "clean":
        goal = goals.by_name("kl", y, clean)
    else:
        goal = goals.by_name("uniform-cross-entropy" if y is None else "cross-entropy", y)
    eps = None if shrink >= 1 else term.attack.ball.eps * shrink
    return perturb(logits_of, x, goal, term.attack, generator=generator, eps=eps).x


def losses(
    model: Logits,
    logits_of: Logits,
    batch: Batch,
    objective: Objective,
    *,
    generator: torch.Generator | None = None,
    shrink: tuple[float, float] = (1.0, 1.0),
    class_weights: Tensor | None = None,
    share: Share = WHOLE,
    counts: tuple[int, int] | None = None,
    samples: Tensor | None = None,
) -> dict[str, Tensor]:
    """Named scalar losses of one update, means over the images, and their weighted sum "total".

    Clean and attacked, ID and OOD images go through one forward pass of `model` in train mode, so that
    batch normalization uses statistics of the mixture, as in the authors' training.

    Args:
        model: the network being trained, in train mode.
        logits_of: the same function in eval mode, for the attacks (`models.fold_batchnorm`).
        batch: pixels in [0,1].
        shrink: factors on the radii of the ID and OOD attacks.
        class_weights: (K,), of the cross-entropies of labelled images; None weighs them equally.
        share: the part that `batch` is of the batch of all processes, which has `counts` ID and OOD images.
            The mean of "total" over the processes is the loss of the whole batch.
        samples: (S, C, H, W) of the model's density, for the energy term.

    Returns:
        "inside.clean", "inside.robust", "outside.clean", "outside.robust" where their weight is not 0,
        "energy", E(x) - E(x~) of clean ID images and samples, where the objective has that term
        (and "inside.accuracy", without gradient, of the images the model was updated on), and "total".
    """
    parts: list[Tensor] = []
    where: dict[str, slice] = {}

    def add(name: str, x: Tensor) -> None:
        start = sum(len(part) for part in parts)
        parts.append(x)
        where[name] = slice(start, start + len(x))

    wholes = counts or (len(batch.x_in), 0 if batch.x_out is None else len(batch.x_out))
    sides: list[tuple[str, Term, Tensor, Tensor | None, float, int]]
    sides = [("inside", objective.inside, batch.x_in, batch.y_in, shrink[0], wholes[0])]
    if objective.outside is not None:
        if batch.x_out is None:
            raise ValueError("the objective has an OOD term, the batch has no OOD images")
        sides.append(("outside", objective.outside, batch.x_out, None, shrink[1], wholes[1]))
    for name, term, x, y, factor, whole in sides:
        if term.clean > 0 or term.against == "clean":
            add(f"{name}.clean", x)
        if term.robust > 0:
            numbers = _of_rows(generator, whole, share)
            add(f"{name}.robust", attacked(logits_of, x, y, term, generator=numbers, shrink=factor))
    if objective.energy is not None:
        if samples is None:
            raise ValueError("the objective has an energy term, and there are no samples")
        add("energy", samples)

    logits = model(torch.cat(parts)).float()
    named, total = dict[str, Tensor](), logits.new_zeros(())
    for name, term, _, y, _, whole in sides:
        if term.clean > 0:
            named[f"{name}.clean"] = _cross_entropy(logits[where[f"{name}.clean"]], y, class_weights)
            total = total + share.weight(whole) * term.clean * named[f"{name}.clean"]
        if term.robust > 0:
            moved = logits[where[f"{name}.robust"]]
            if term.against == "clean":
                named[f"{name}.robust"] = _divergence(logits[where[f"{name}.clean"]], moved)
            else:
                named[f"{name}.robust"] = _cross_entropy(moved, y, class_weights)
            total = total + share.weight(whole) * term.robust * named[f"{name}.robust"]
    if objective.energy is not None:
        named["energy"] = _energy_difference(logits[where["inside.clean"]], logits[where["energy"]])
        total = total + objective.energy.weight * named["energy"]
    with torch.no_grad():
        seen = logits[where.get("inside.robust", where.get("inside.clean"))]
        named["inside.accuracy"] = (seen.argmax(1) == batch.y_in).float().mean()
    named["total"] = total
    return named


def _of_rows(generator: torch.Generator | None, count: int, share: Share) -> PartOfBatch | None:
    """Numbers for this process's rows of a batch of `count` images."""
    if generator is None:
        return None
    return PartOfBatch(generator=generator, count=count, rows=share.rows(count))


def _energy_difference(clean: Tensor, samples: Tensor) -> Tensor:
    """Mean E(x) of clean images less that of samples, from their logits; E = -log sum exp."""
    return samples.logsumexp(1).mean() - clean.logsumexp(1).mean()


def _cross_entropy(logits: Tensor, y: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy to the labels, or to the uniform distribution where y is None."""
    if y is None:
        return -F.log_softmax(logits, dim=1).mean()
    if weights is not None:
        return (weights[y] * F.cross_entropy(logits, y, reduction="none")).mean()
    return F.cross_entropy(logits, y)


def _divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """KL(p_clean || p_moved), mean over images; gradients flow through both sides (TRADES)."""
    log_clean, log_moved = F.log_softmax(clean, dim=1), F.log_softmax(moved, dim=1)
    return (log_clean.exp() * (log_clean - log_moved)).sum(1).mean()
