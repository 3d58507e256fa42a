"""Searches of many images, targets and radii in one batch of the attack engine. Loads torch."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from ratioctl import images as pixels_of
from ratioctl.attacks import engine, goals
from ratioctl.attacks.balls import box_diameter
from ratioctl.attacks.registry import strongest
from ratioctl.counterfactuals.request import CounterfactualRequest
from ratioctl.counterfactuals.search import LADDER_STAGES, SATURATED, WIDE_STAGES, SearchRequest, seed_of
from ratioctl.models.device import ComputeConfig
from ratioctl.models.predict import Predictor
from ratioctl.package import ModelPackage
from ratioctl.recipe import Attack, Ball

Job = tuple[np.ndarray, int]  # 8-bit input (H, W, C), target class
Progress = Callable[[float], None]  # is called with the share that is done
Show = Callable[[int, float, np.ndarray, float], None]  # target, radius, image (H, W, C) uint8, confidence

_CUDA = 256 * 1024  # pixels per batch on a GPU: 256 rows of a CIFAR model
_CPU = 96 * 1024  # more is no faster per row, and takes memory
_SHOW_SECONDS = 0.2  # between two previews
_CPU_ROWS = 12  # rows per thread up to which a CPU gains: 4.7, 3.6, 2.8, 2.5 ms a row with 3, 6, 12, 24


def jobs_together(compute: ComputeConfig, request: CounterfactualRequest, area: int) -> int:
    """How many images and targets share a batch. Rounding depends on the batch's shape, so on this."""
    rows = len(request.extra_radii) + len(request.eps)
    most = _CUDA // area if compute.device.type == "cuda" else _CPU_ROWS * torch.get_num_threads()
    return max(1, most // rows)


class BatchSearch:
    """Carries out search requests, in batches with one radius per row.

    channels_last weights and images halve the time of a narrow network on a CPU (ResNet-18 of width 16 and
    32, measured). A batch that does not fit into a GPU's memory is halved. With a region all jobs of a call
    must have the same image: the network may be called with any part of a batch, and the pixels outside the
    region are taken from that image.
    """

    def __init__(
        self,
        predict: Predictor,
        spec: ModelPackage,
        request: CounterfactualRequest,
        compute: ComputeConfig,
        show: Show | None = None,
    ) -> None:
        self.network = copy.deepcopy(predict.network).to(memory_format=torch.channels_last)
        self.spec, self.request, self.compute = spec, request, compute
        self.most = max((_CUDA if compute.device.type == "cuda" else _CPU) // spec.frame.area, 1)
        self.mask: torch.Tensor | None = None
        self.show, self.showing, self.shown = show, False, 0.0

    def __call__(
        self,
        requests: Sequence[tuple[Job, SearchRequest]],
        progress: Progress,
        region: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """For each request of one stage its points (R, C, H, W), which change in `region` (H, W) only."""
        first = requests[0][1]
        self.showing = self.show is not None and first.stage < LADDER_STAGES
        self.mask = None
        if region is not None:
            self.mask = torch.from_numpy(region).to(self.compute.device)[None, None]
        rows = [(job, eps) for job, request in requests for eps in request.radii]
        inits = [request.init for _, request in requests if request.init is not None]
        init = np.concatenate(inits) if inits else None
        attack = strongest(
            Ball(p=self.request.p, eps=1.0),
            first.steps,
            restarts=first.restarts,
            start="random" if first.random else "centre",
        )
        enough = None if first.stage < WIDE_STAGES else math.log(SATURATED)

        def part(start: int, end: int) -> np.ndarray:
            begin = None if init is None else init[start:end]
            share = (end - start) / len(rows)
            return self._points(
                rows[start:end],
                begin,
                attack,
                enough,
                lambda done: progress(start / len(rows) + done * share),
            )

        points = self._in_memory(len(rows), part)
        return np.split(points, np.cumsum([len(request.radii) for _, request in requests])[:-1])

    def _in_memory(self, count: int, part: Callable[[int, int], np.ndarray]) -> np.ndarray:
        """`part(start, end)` of `count` rows, in parts that fit into memory."""
        parts: list[np.ndarray] = []
        start = 0
        while start < count:
            end = min(start + self.most, count)
            try:
                parts.append(part(start, end))
            except torch.OutOfMemoryError:
                if end - start == 1:
                    raise
                self.most = (end - start) // 2
                torch.cuda.empty_cache()
                continue
            start = end
        return np.concatenate(parts)

    def _points(
        self,
        rows: Sequence[tuple[Job, float]],
        init: np.ndarray | None,
        attack: Attack,
        enough: float | None,
        progress: Progress,
    ) -> np.ndarray:
        """Points (R, C, H, W) for rows of image, target and radius, whose search ends at log p `enough`."""
        request, device = self.request, self.compute.device
        targets = torch.tensor([job[1] for job, _ in rows], device=device)
        x0 = self._on_device(pixels_of.to_pixels(np.stack([job[0] for job, _ in rows])))
        calls, diameter = 0, box_diameter(x0[0].numel(), request.p)

        def count(step: int, x: torch.Tensor, value: torch.Tensor) -> None:
            nonlocal calls
            calls += 1
            if self.showing:
                self._show(rows, x if self.mask is None else torch.where(self.mask, x, x0), value)
            progress(min(1.0, calls / (attack.restarts * (attack.steps + 1))))

        def logits_of(x: torch.Tensor) -> torch.Tensor:
            free = x if self.mask is None else torch.where(self.mask, x, x0[:1])
            with self.compute.autocast():
                return self.network(free)

        generators = None
        if attack.start == "random" or attack.restarts > 1:
            labels = self.spec.label_names
            generators = [
                torch.Generator().manual_seed(seed_of(request.seed, image, labels[target], eps))
                for (image, target), eps in rows
            ]
        best = engine.perturb(
            logits_of,
            x0,
            goals.log_probability(targets, self.spec.temperature),
            attack,
            generator=generators,
            eps=torch.tensor([min(eps, diameter) for _, eps in rows], dtype=torch.float64),
            init=None if init is None else self._on_device(init),
            callback=count,
            enough=enough,
        ).x
        best = best if self.mask is None else torch.where(self.mask, best, x0)
        return best.cpu().contiguous().numpy()

    def _show(self, rows: Sequence[tuple[Job, float]], x: torch.Tensor, value: torch.Tensor) -> None:
        """Pass on, every _SHOW_SECONDS, each target's best point at its largest radius that is a budget."""
        now = time.monotonic()
        if self.show is None or now < self.shown + _SHOW_SECONDS:
            return
        self.shown = now
        best: dict[int, tuple[float, float, int]] = {}  # target: radius, log p, row
        for row, (((_, target), eps), reached) in enumerate(zip(rows, value.tolist(), strict=True)):
            if eps <= self.request.eps[-1]:
                best[target] = max(best.get(target, (0.0, 0.0, -1)), (eps, reached, row))
        for target, (eps, reached, row) in best.items():
            image = pixels_of.to_uint8(x[row : row + 1].float().cpu().numpy())[0]
            self.show(target, eps, image, math.exp(reached))

    def _on_device(self, images: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images).to(self.compute.device).contiguous(memory_format=torch.channels_last)
