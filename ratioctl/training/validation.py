"""Validation during training: accuracies on held-out images and confidence on held-out OOD images."""

from __future__ import annotations

import copy
import hashlib

import numpy as np
import torch
from torch import Tensor

from ratioctl import models
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.data import loader
from ratioctl.errors import TrainingError
from ratioctl.models.device import ComputeConfig, in_precision
from ratioctl.models.network import Classifier
from ratioctl.recipe import Recipe
from ratioctl.training import certified
from ratioctl.training.checkpoint import State
from ratioctl.training.distributed import ALONE, Processes, of_all
from ratioctl.utils.seeding import seed_from_key
from ratioctl.utils.shares import PartOfBatch

_BATCH = 256


def validate(
    recipe: Recipe,
    state: State,
    splits: loader.Splits,
    compute: ComputeConfig,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Clean and attacked accuracy on held-out ID images; mean confidence on held-out OOD images, and with a
    certified head the mean of the confidences that their balls cannot exceed.

    Every process works on its share of the images; the results are those of all.
    """
    model = state.model if state.average is None else _with_weights(state.model, state.average)
    logits_of = in_precision(models.fold_batchnorm(model), compute)
    held, share = splits.held_out, processes.share
    assert held.labels is not None
    count = min(len(held), recipe.optim.validate_images)
    picked = np.sort(np.random.default_rng([recipe.seed, 4]).permutation(len(held))[:count])
    attack = recipe.objective.inside.attack if recipe.objective.inside.robust > 0 else None
    clean = robust = 0
    for start in range(0, count, _BATCH):
        whole = picked[start : start + _BATCH]
        index = whole[share.rows(len(whole))]
        if not len(index):
            continue
        x = loader.to_float(held.pixels[index], compute.device)
        y = torch.from_numpy(held.labels[index]).to(compute.device)
        with torch.no_grad():
            clean += int((logits_of(x).argmax(1) == y).sum())
        if attack is not None:
            generator = torch.Generator(compute.device).manual_seed(seed_from_key(recipe.seed, start, 5))
            numbers = PartOfBatch(generator=generator, count=len(whole), rows=share.rows(len(whole)))
            found = perturb(logits_of, x, goals.margin(y), attack, generator=numbers)
            robust += int((found.value <= 0).sum())
    confidence, bounds, outside = 0.0, 0.0, 0
    spec = recipe.objective.certified
    if splits.outside_test is not None:
        pixels = splits.outside_test.pixels
        chosen = np.random.default_rng([recipe.seed, 6]).permutation(len(pixels))[:count]
        outside = len(chosen)
        for start in range(0, outside, _BATCH):
            whole = np.sort(chosen[start : start + _BATCH])
            index = whole[share.rows(len(whole))]
            if not len(index):
                continue
            x = loader.to_float(pixels[index], compute.device)
            with torch.no_grad():
                confidence += float(logits_of(x).float().softmax(1).amax(1).sum())
            if spec is not None:
                bounds += float(certified.guaranteed(model, x, spec.eps).sum())
    clean_of_all, robust_of_all, confidence, bounds = processes.total([clean, robust, confidence, bounds])
    result = {"validation.clean": clean_of_all / count, "validation.n": float(count)}
    if attack is not None:
        result["validation.attacked"] = robust_of_all / count
    result["score"] = (robust_of_all if attack is not None else clean_of_all) / count
    if splits.outside_test is not None:
        result["validation.out_confidence"] = confidence / outside
        if spec is not None:
            result["validation.out_guaranteed"] = bounds / outside
    return result


def check_replicas(state: State, processes: Processes) -> None:
    """Raise TrainingError where a process has other weights, averaged weights or batch statistics."""
    if processes.world == 1:
        return
    digest = hashlib.sha256()
    for tensors in (state.model.network.state_dict(), state.average or {}):
        for value in tensors.values():
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    digests = processes.gathered(digest.hexdigest())
    for rank, theirs in enumerate(digests):
        if theirs != digests[0]:
            reason = f"has other weights than rank 0 after update {state.update}"
            step = (
                "This is a fault of that machine or of ours. Continue from the last checkpoint with --resume."
            )
            raise of_all(TrainingError(processes.describe(rank), reason, step))


def _with_weights(model: Classifier, weights: dict[str, Tensor]) -> Classifier:
    other = copy.deepcopy(model)
    models.load_weights(other, weights, where="averaged weights")
    return other
