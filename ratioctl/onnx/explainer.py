"""Counterfactuals with a file of `ratioctl export --explain`, through onnxruntime and without torch."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl.errors import PackageError
from ratioctl.onnx import runtime
from ratioctl.package import Spec, Stored
from ratioctl.recipe import norm_name

INPUTS = ("image", "target", "radii", "steps")
OUTPUTS = ("counterfactual", "confidence", "probabilities", "is_ood", "distance", "confidence_float")
NORMS = {"2": 2.0, "inf": math.inf}  # of the balls that a graph can search
_CHUNK = 64  # images scored at once
_WAIT_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explainer(Spec):
    """A loaded file: the config block that it carries, and the search.

    Attributes:
        path: the file.
        digest: of the package that it was exported from.
        p: the norm of its balls.
        threshold: the threshold of the graph's `is_ood`; None in files that do not record it.
        weights: how the file stores the weights; it computes in fp32 with either.
        session: the onnxruntime session.
        card: None; the file carries no model card.
    """

    path: Path
    digest: str
    p: float
    threshold: float | None
    weights: Stored
    session: Any = dataclasses.field(repr=False)
    card: str | None = None

    @property
    def norm(self) -> str:
        """The name of `p`, as in `ladders`."""
        return norm_name(self.p)

    def search(
        self,
        images: np.ndarray,
        targets: Sequence[int],
        radii: Sequence[float],
        steps: int,
        on_wait: Callable[[], object] | None = None,
    ) -> dict[str, np.ndarray]:
        """The graph's outputs, one row per radius.

        Args:
            images: uint8 (1 or R, H, W, C); targets: 1 or R class numbers; radii: R, pixels in [0,1].
            steps: of the search, at most 10,000 have an effect; with 0 pictures are the images.
            on_wait: called a few times per second while the graph runs; what it raises ends the search.

        Raises:
            ValueError: shapes that do not fit, an unknown class, or a radius that is negative or not finite.
            PackageError: the graph fails.
        """
        channels, height, width = self.input_size
        rows = len(radii)
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
            raise ValueError(
                f"images of shape {images.shape} where uint8 {height, width, channels} is needed"
            )
        if rows < 1 or len(images) not in (1, rows) or len(targets) not in (1, rows):
            raise ValueError(f"{len(images)} images and {len(targets)} targets for {rows} radii")
        if not all(0 <= target < len(self.label_names) for target in targets):
            raise ValueError(f"targets {list(targets)} of a model with {len(self.label_names)} classes")
        if not all(math.isfinite(eps) and eps >= 0 for eps in radii):
            raise ValueError(f"radii {list(radii)} must be finite and not negative")
        given = {
            "image": np.ascontiguousarray(images),
            "target": np.asarray(targets, np.int64),
            "radii": np.asarray(radii, np.float64),
            "steps": np.asarray([steps], np.int64),
        }
        return dict(zip(OUTPUTS, self._run(given, on_wait), strict=True))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, K) float32 after temperature, of uint8 (N, H, W, C)."""
        parts = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
        return np.concatenate(
            [self.search(part, [0], [0.0] * len(part), 0)["probabilities"] for part in parts]
        )

    def _run(
        self, given: dict[str, np.ndarray], on_wait: Callable[[], object] | None = None
    ) -> list[np.ndarray]:
        """In another thread, so that SIGINT ends a search."""
        import onnxruntime

        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(self.session.run, list(OUTPUTS), given, options)
            try:
                while on_wait is not None and not concurrent.futures.wait([running], _WAIT_SECONDS).done:
                    on_wait()
                failed = running.exception()  # onnxruntime's own classes share no base
            except BaseException:
                options.terminate = True
                raise
            if failed is not None:
                raise runtime.cannot_compute(self.path, failed)
            return list(running.result())


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Explainer:
    """Load a file of `ratioctl export --explain`.

    Args:
        threads: intra-op threads; None uses every processor available to this process.

    Raises:
        PackageError: missing, damaged, not written by ratioctl, or an export without `--explain`.
    """
    return from_opened(runtime.open_file(Path(path), threads))


def from_opened(opened: runtime.Opened) -> Explainer:
    """The file for searches. Raises PackageError, as `load`."""
    path = opened.path
    about = opened.about.get("explain")
    if not isinstance(about, dict) or about.get("norm") not in NORMS:
        step = "Export one with `ratioctl export MODEL --explain`."
        raise PackageError(path, "computes scores and no counterfactuals", step)
    spec, session = opened.spec, opened.session
    channels, height, width = spec.input_size
    inputs = {value.name: list(value.shape[1:]) for value in session.get_inputs()}
    outputs = {value.name: list(value.shape[1:]) for value in session.get_outputs()}
    pixels = [height, width, channels]
    if (
        tuple(inputs) != INPUTS
        or not set(OUTPUTS) <= set(outputs)
        or (inputs["image"], outputs["counterfactual"]) != (pixels, pixels)
        or outputs["probabilities"] != [len(spec.label_names)]
    ):
        raise PackageError(path, "has other inputs or outputs than its metadata say", runtime.EXPORT)
    return Explainer(
        **{field.name: getattr(spec, field.name) for field in dataclasses.fields(Spec)},
        path=path,
        digest=str(spec.config["ratio"].get("digest", "")),
        p=NORMS[about["norm"]],
        threshold=opened.threshold,
        weights=opened.weights,
        session=session,
    )
