"""Searches carried out by an ONNX file of `ratioctl export --explain`, without torch.

The pictures of the budgets are those that the graph returns. The radii of flips are searched for as with
torch, each short search being a call of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ratioctl import images as pixels_of
from ratioctl.counterfactuals.request import CounterfactualRequest
from ratioctl.counterfactuals.search import (
    FLIP,
    FLIP_RADII,
    SearchedImage,
    SearchRequest,
    TargetSearch,
    finish_target,
)

if TYPE_CHECKING:
    from ratioctl.scoring.backends import Explainer


class GraphSearch:
    """Carries out search requests with a graph, one after the other; `on_wait` as for `Explainer.search`."""

    def __init__(
        self, graph: Explainer, request: CounterfactualRequest, on_wait: Callable[[], object] | None = None
    ) -> None:
        self.graph, self.request, self.on_wait = graph, request, on_wait

    def search_target(
        self,
        pixels: np.ndarray,
        target: int,
        *,
        original: np.ndarray,
        labels: Sequence[str],
        request: CounterfactualRequest,
    ) -> TargetSearch:
        """As `ratioctl.counterfactuals.search_target`."""
        image = SearchedImage(pixels=pixels, target=target, request=request)
        radii = (*request.extra_radii, *request.eps)
        found = self.graph.search(pixels[None], [target], radii, request.steps, self.on_wait)
        pictures = found["counterfactual"]
        best = list(zip(pictures, found["probabilities"], map(float, found["confidence_float"]), strict=True))
        done = len(radii) / (len(radii) + 2 * FLIP_RADII * FLIP)
        points = pixels_of.to_pixels(pictures)
        return (yield from finish_target(image, radii, points, best, original, labels, done))

    def __call__(
        self,
        requests: Sequence[tuple[tuple[np.ndarray, int], SearchRequest]],
        progress: Callable[[float], None],
        region: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """For each request its points (R, C, H, W), which are pictures; starts are the graph's own."""
        results = []
        for number, ((pixels, target), request) in enumerate(requests, 1):
            found = self.graph.search(pixels[None], [target], request.radii, request.steps, self.on_wait)
            results.append(pixels_of.to_pixels(found["counterfactual"]))
            progress(number / len(requests))
        return results
