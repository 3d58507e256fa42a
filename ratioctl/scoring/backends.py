"""Backends of scoring: onnxruntime where it suffices, else torch; and the worst case of a score."""

from __future__ import annotations

import functools
import pathlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ratioctl import scores

if TYPE_CHECKING:
    from os import PathLike

    import numpy as np

    from ratioctl.models.device import ComputeConfig
    from ratioctl.models.predict import Predictor
    from ratioctl.onnx.explainer import Explainer
    from ratioctl.onnx.runtime import Runtime
    from ratioctl.package import ModelPackage
    from ratioctl.scoring.pipeline import Model

    Path = str | PathLike[str]

WORST_CASE_STEPS = 100  # of each of the three searches for a worst case


def open_model(
    model: Path | ModelPackage,
    threshold: str | float | None,
    *,
    device: str = "auto",
    precision: str = "auto",
    worst_case: float | None = None,
    certified: bool = False,
    seed: int = 0,
    score: str | None = None,
) -> Model:
    """Load a model for `ratioctl.scoring.pipeline`: onnxruntime where it suffices, else torch.

    Args:
        threshold: checked before torch is loaded; None skips the check.
        score: name of the OOD score, see `ratioctl.scores`; None takes the package's.
        worst_case: l2 radius of the worst-case search, which needs torch; None: no search.
        certified: also bound the confidence, see `Model.guaranteed`.
        precision: of that search.

    Raises:
        PackageError: a model that is missing or damaged. UncalibratedError: it has no thresholds.
        UsageError: an unknown threshold, a radius that is not positive, or one with an ONNX file; a model
            without a certified head where `certified` asks for one.
    """
    from ratioctl import package as packages
    from ratioctl.errors import UsageError
    from ratioctl.onnx import runtime

    if worst_case is not None and not 0 < worst_case < float("inf"):
        raise UsageError(f"--worst-case {worst_case}", "is not a radius", "Give a number above 0.")
    gpu = device.startswith("cuda")
    if runtime.is_onnx_file(model):
        if worst_case is not None:
            step = "Give the package it was exported from."
            raise UsageError("--worst-case", "needs a package: an ONNX file has no gradients", step)
        load = functools.partial(runtime.load, model, threads=1, device=device if gpu else "cpu")
        return _by_onnxruntime(load, score, certified=certified)
    found = packages.resolve(model)
    name = score or found.score
    radius = packages.certified_radius(found) if certified else None
    if threshold is not None:
        packages.threshold(found, threshold, score)
    if found.onnx_path is not None and worst_case is None and not gpu:
        load = functools.partial(runtime.load, found, threads=1)
        return _by_onnxruntime(load, score, found, certified=certified)

    from ratioctl.models.device import select_device
    from ratioctl.models.predict import predictor
    from ratioctl.scoring.pipeline import Model

    requested = worst_case is not None and precision != "auto"
    why = "scores always are" if worst_case is None else "a worst case is searched in it by default"
    compute = select_device(device, precision) if requested else select_device(device, "fp32", reason=why)
    network = predictor(found, compute.device)
    # One batch at a time: torch uses all processors for it, and the other workers decode meanwhile.
    one_batch = threading.Lock()

    def predict(images: np.ndarray) -> np.ndarray:
        with one_batch:
            return network.predict(images)

    attacked = pace = None
    if worst_case is not None:
        bound = packages.threshold(found, "tpr95" if threshold is None else threshold, name)
        attacked, pace = _worst_case(network, compute, found, worst_case, seed, one_batch, name, bound)
    return Model(
        spec=found,
        predict=predict,
        backend="torch",
        parallel=False,
        score=name,
        worst_case=attacked,
        worst_case_pace=pace,
        guaranteed=None if radius is None else _guaranteed(network, radius, found.temperature, one_batch),
    )


def _by_onnxruntime(
    load: Callable[[], Runtime], score: str | None, package: ModelPackage | None = None, *, certified: bool
) -> Model:
    """The model of a file with a session of one thread: the pipeline predicts several batches at once.

    Args:
        package: contains the file, if any, and may have other thresholds.
    """
    with ThreadPoolExecutor(1) as pool:  # no daemon: one inside onnxruntime aborts a process that ends
        loading = pool.submit(load)
        # Takes 40 ms, with Pillow and the decoders; creating the session takes 15 to 150 ms.
        from ratioctl.scoring.pipeline import Model

        graph = loading.result()
    if certified:
        graph.check_guaranteed()
    spec = graph.spec if package is None else package
    own = package is None and (score is None or score == spec.score)
    return Model(
        spec=spec,
        predict=graph.predict,
        guaranteed=graph.predict_guaranteed if certified else None,
        backend="onnx",
        parallel=True,
        own_threshold=graph.threshold if own else None,
        score=score or spec.score,
    )


def _guaranteed(
    network: Predictor, eps: float, temperature: float, one_batch: threading.Lock
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """`Model.guaranteed` of a package with a certified head, computed by torch."""

    def predict(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with one_batch:
            return network.predict(images), network.guaranteed(images, eps, temperature)

    return predict


def digest_of(model: Path | ModelPackage) -> str:
    """What identifies a model in the outputs of shards: a package's digest, or the SHA-256 of a file."""
    import hashlib

    from ratioctl import package as packages
    from ratioctl.onnx import runtime

    if runtime.is_onnx_file(model):
        with open(model, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return packages.resolve(model).digest


def open_explainer(model: Path | ModelPackage | Explainer) -> Explainer | None:
    """A file of `export --explain`; None where `model` names a package. Raises PackageError."""
    from ratioctl.onnx import explainer, runtime

    if isinstance(model, explainer.Explainer):
        return model
    return explainer.load(model) if runtime.is_onnx_file(model) else None


def searches(model: Path) -> Explainer | None:
    """As `open_explainer`; None for a file that scores, too."""
    from ratioctl.onnx import explainer, runtime

    if not runtime.is_onnx_file(model):
        return None
    opened = runtime.open_file(pathlib.Path(model))
    return explainer.from_opened(opened) if "explain" in opened.about else None


def _worst_case(
    network: Predictor,
    compute: ComputeConfig,
    package: ModelPackage,
    eps: float,
    seed: int,
    one_batch: threading.Lock,
    score: str,
    threshold: float,
) -> tuple[Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], Callable[[int], float]]:
    """The search for the lowest OOD score in the l2 ball of radius `eps`, and a measurement of its pace.

    See `ratioctl.scoring.pipeline.Model`: `worst_case`, and number of images -> seconds each.
    """
    import copy
    import time

    import torch

    from ratioctl.attacks.worst_case import worst_case_confidence
    from ratioctl.images import to_pixels
    from ratioctl.recipe import Ball
    from ratioctl.scoring.pipeline import batch_size

    searched = copy.deepcopy(network.network).to(memory_format=torch.channels_last)

    def logits_of(x: torch.Tensor) -> torch.Tensor:
        with compute.autocast():
            return searched(x)

    kind, temperature = scores.by_name(score), package.temperature
    acceptance = None if score == scores.DEFAULT else lambda f: kind.acceptance_tensor(f.float(), temperature)

    def attack(x: torch.Tensor, steps: int) -> tuple[np.ndarray, np.ndarray]:
        found = worst_case_confidence(
            network.exact,
            x.contiguous(memory_format=torch.channels_last),
            Ball(p=2.0, eps=eps),
            temperature=package.temperature,
            steps=steps,
            restarts=1,
            seed=seed,
            search_logits_of=logits_of,
            acceptance=acceptance,
        )
        confidence = found.confidence.cpu().numpy()
        if acceptance is None and getattr(threshold, "classes", None) is None:
            return confidence, confidence < threshold
        return confidence, kind.is_ood(network.predict(found.x.cpu().numpy()), temperature, threshold)

    def search(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with one_batch:
            return attack(torch.from_numpy(to_pixels(images)).to(network.device), WORST_CASE_STEPS)

    def pace(images: int) -> float:
        channels, height, width = package.input_size
        few = max(1, min(images, batch_size(height * width)))
        x = torch.full((few, channels, height, width), 0.5, device=network.device)
        attack(x, 1)  # warm-up
        started, steps = time.perf_counter(), 4
        attack(x, steps)
        # Forward passes before and after the steps cost about as much as one more step.
        return (time.perf_counter() - started) / few * (WORST_CASE_STEPS + 1) / (steps + 1)

    return search, pace
