"""Searches of many images, targets and radii in one batch of the attack engine. Loads torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ratioctl import images as pixels_of
from ratioctl import recipe
from ratioctl.attacks import engine, goals
from ratioctl.counterfactuals.request import CounterfactualRequest
from ratioctl.counterfactuals.search import SearchRequest, seed_of
from ratioctl.models.device import ComputeConfig
from ratioctl.models.predict import Predictor
from ratioctl.package import ModelPackage

Job = tuple[np.ndarray, int]  # 8-bit input (H, W, C), target class
Search = Callable[[Sequence[tuple[Job, SearchRequest]], Callable[[float], None]], list[np.ndarray]]

_CUDA = 256 * 1024  # pixels a batch on a GPU: 256 rows of a CIFAR model
_CPU = 96 * 1024  # more is no faster per row, and takes memory
_CPU_ROWS = 12  # rows of a thread up to which a CPU gains: 4.7, 3.6, 2.8, 2.5 ms a row with 3, 6, 12, 24


def jobs_together(compute: ComputeConfig, question: CounterfactualRequest, size: int) -> int:
    """How many images and targets share a batch.

    Rounding depends on the shape of a batch, so on how many of them there are.
    """
    rows = len(question.beyond) + len(question.eps)
    most = _CUDA // size**2 if compute.device.type == "cuda" else _CPU_ROWS * torch.get_num_threads()
    return max(1, most // rows)


def searcher(
    predict: Predictor, spec: ModelPackage, question: CounterfactualRequest, compute: ComputeConfig
) -> Search:
    """The function that grants wishes of one number of steps and restarts, in batches of per-example radii.

    channels_last weights and images halve the time of a narrow network on a CPU (ResNet-18 of width 16 and
    32, measured). A batch that does not fit into a GPU's memory is halved. With a region all jobs must have
    the same image: the network may be called with any part of a batch, and pixels outside are taken from it.
    """
    network = copy.deepcopy(predict.network).to(memory_format=torch.channels_last)
    channels, size, _ = spec.input_size
    widest = (channels * size * size) ** (1 / question.p)  # the whole box fits into this ball
    most = max((_CUDA if compute.device.type == "cuda" else _CPU) // size**2, 1)
    mask = None
    if question.region is not None:
        mask = torch.from_numpy(question.region).to(compute.device)[None, None]

    def one_batch(
        rows: Sequence[tuple[Job, float]],
        init: np.ndarray | None,
        steps: int,
        restarts: int,
        callback: Callable[[float], None],
    ) -> np.ndarray:
        pixels = np.stack([job[0] for job, _ in rows])
        targets = torch.tensor([job[1] for job, _ in rows], device=compute.device)
        x0 = _on(compute, pixels_of.to_pixels(pixels))
        calls = 0

        def count(step: int, x: torch.Tensor, value: torch.Tensor) -> None:
            nonlocal calls
            calls += 1
            callback(min(1.0, calls / (restarts * (steps + 1))))

        def logits_of(x: torch.Tensor) -> torch.Tensor:
            free = x if mask is None else torch.where(mask, x, x0[:1])
            with compute.autocast():
                return network(free)

        generators = None
        if restarts > 1:
            labels = spec.label_names
            generators = [
                torch.Generator().manual_seed(seed_of(question.seed, image, labels[target], eps))
                for (image, target), eps in rows
            ]
        best = engine.perturb(
            logits_of,
            x0,
            goals.log_probability(targets, spec.temperature),
            recipe.Attack(
                ball=recipe.Ball(p=question.p, eps=1.0),
                method="afw" if question.p == 1.5 else "apgd",
                steps=steps,
                restarts=restarts,
            ),
            generator=generators,
            eps=torch.tensor([min(eps, widest) for _, eps in rows], dtype=torch.float64),
            init=None if init is None else _on(compute, init),
            callback=count,
        ).x
        best = best if mask is None else torch.where(mask, best, x0)
        return best.cpu().contiguous().numpy()

    def in_memory(
        rows: Sequence[tuple[Job, float]],
        init: np.ndarray | None,
        steps: int,
        restarts: int,
        callback: Callable[[float], None],
    ) -> np.ndarray:
        nonlocal most
        found: list[np.ndarray] = []
        start = 0
        while start < len(rows):
            end = min(start + most, len(rows))

            def part(share: float, start: int = start, end: int = end) -> None:
                callback((start + (end - start) * share) / len(rows))

            try:
                begun = None if init is None else init[start:end]
                found.append(one_batch(rows[start:end], begun, steps, restarts, part))
            except torch.OutOfMemoryError:
                if end - start == 1:
                    raise
                most = (end - start) // 2
                torch.cuda.empty_cache()
                continue
            start = end
        return np.concatenate(found)

    def search(
        wishes: Sequence[tuple[Job, SearchRequest]], callback: Callable[[float], None]
    ) -> list[np.ndarray]:
        rows = [(job, eps) for job, find in wishes for eps in find.radii]
        begins = [find.init for _, find in wishes if find.init is not None]
        init = np.concatenate(begins) if begins else None
        found = in_memory(rows, init, wishes[0][1].steps, wishes[0][1].restarts, callback)
        return np.split(found, np.cumsum([len(find.radii) for _, find in wishes])[:-1])

    return search


def _on(compute: ComputeConfig, images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).to(compute.device).contiguous(memory_format=torch.channels_last)
