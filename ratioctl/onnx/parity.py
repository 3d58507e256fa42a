"""Agreement of an exported file with torch, and its latency."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ratioctl import metrics
from ratioctl.data import out_distribution
from ratioctl.errors import RatioctlError
from ratioctl.onnx import runtime
from ratioctl.onnx.explainer import Explainer
from ratioctl.package import Spec
from ratioctl.recipe import default_ladder
from ratioctl.utils.atomic_files import write_file

if TYPE_CHECKING:
    from ratioctl.models.predict import Predictor

TOLERANCE = 1e-4  # of logits up to 32 in size; beyond, float32 itself has less


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two backends agree on the same images.

    Attributes:
        n: number of images; all of them are counted.
        difference: the largest absolute difference of their logits.
        labels, flags: how many predictions, and how many OOD flags, differ by more than the difference of the
            logits explains.
        changed_labels, changed_flags: how many differ at all.
        probability_difference: the largest absolute difference of probabilities.
    """

    n: int
    difference: float
    labels: int
    flags: int
    changed_labels: int = 0
    changed_flags: int = 0
    probability_difference: float = 0.0


@contextlib.contextmanager
def scratch(data: bytes) -> Iterator[tuple[Path, runtime.Runtime]]:
    """The file in a temporary folder, loaded as any user would load it."""
    with tempfile.TemporaryDirectory(prefix="ratioctl-export-") as folder:
        path = Path(folder) / "model.onnx"
        write_file(path, data)
        yield path, runtime.load(path)


def sample_images(package: Spec) -> np.ndarray:
    """uint8 (N, H, W, C): crops of two photographs, uniform and smooth noise, a quarter each."""
    channels, size = package.input_size[0], package.frame
    count = max(8, min(64, 2**20 // size.area))
    return out_distribution.load(out_distribution.GENERATED, size, channels, count=count).pixels


def agreement(
    pixels: np.ndarray,
    reference: Callable[[np.ndarray], np.ndarray],
    other: runtime.Runtime,
    package: Spec,
    threshold: float,
) -> Agreement:
    """Compare the graph's outputs with what follows from logits, on every image.

    A label or flag differs where it is not the one that `ood-score` derives from the graph's own logits, or
    where it is not the reference's and the difference of the logits does not explain that: images may lie
    exactly on the threshold, as the one that calibration chose it by does.

    Args:
        pixels: uint8 (N, H, W, C), given to the graph in batches of 1, 2 and 32.

    Raises:
        LogitsError: the reference's logits are not finite.
    """
    logits = reference(pixels)
    metrics.finite_logits(logits)
    cuts = [0, 1, 3, *range(35, len(pixels), 32), len(pixels)]
    runs = [other.run(pixels[a:b]) for a, b in itertools.pairwise(cuts) if b > a]
    found = {name: np.concatenate([run[name] for run in runs]) for name in runtime.OUTPUTS}
    own = found["logits"]
    difference = float(np.abs(logits - own).max())
    score, temperature = package.ood_score, package.temperature
    top = np.sort(logits, axis=1)
    tie = top[:, -1] - top[:, -2] <= 2 * difference
    distance = np.abs(score.acceptance(logits, temperature) - score.bounds(threshold, logits.argmax(axis=1)))
    near = distance <= 4 * difference / min(temperature, 1.0)
    label, flag = found["label"], found["is_ood"]
    labels = (label != own.argmax(axis=1)) | ((label != logits.argmax(axis=1)) & ~tie)
    changed = flag != score.is_ood(logits, temperature, threshold)
    flags = (flag != score.is_ood(own, temperature, threshold)) | (changed & ~near)
    probabilities = np.abs(metrics.softmax(logits, temperature) - found["probabilities"])
    return Agreement(
        n=len(pixels),
        difference=difference,
        labels=int(labels.sum()),
        flags=int(flags.sum()),
        changed_labels=int((label != logits.argmax(axis=1)).sum()),
        changed_flags=int(changed.sum()),
        probability_difference=float(probabilities.max()),
    )


def between(logits: Sequence[np.ndarray], package: Spec, threshold: float) -> Agreement:
    """Agreement of the decisions that follow from two backends' logits (N, K)."""
    labels = [z.argmax(axis=1) for z in logits]
    flags = [package.ood_score.is_ood(z, package.temperature, threshold) for z in logits]
    changed_labels, changed_flags = (int((a != b).sum()) for a, b in (labels, flags))
    return Agreement(
        n=len(logits[0]),
        difference=float(np.abs(logits[0] - logits[1]).max()),
        labels=changed_labels,
        flags=changed_flags,
        changed_labels=changed_labels,
        changed_flags=changed_flags,
    )


def explained(
    pixels: np.ndarray, reference: Callable[[np.ndarray], np.ndarray], explainer: Explainer, threshold: float
) -> Agreement:
    """Agreement on the pictures that a graph finds in a few steps, one per image; `difference` is that of
    probabilities.

    Raises:
        RatioctlError: a picture is outside its ball, or less confident than its image.
    """
    classes, (eps, *_) = len(explainer.label_names), default_ladder(explainer.p, *explainer.input_size[:2])
    targets = [k % classes for k in range(len(pixels))]
    found = explainer.search(pixels, targets, [eps] * len(pixels), 10)
    pictures = found["counterfactual"]
    logits = reference(pictures)
    expected = metrics.softmax(logits, explainer.temperature)
    before = metrics.softmax(reference(pixels), explainer.temperature)[np.arange(len(pixels)), targets]
    d = (pictures.astype(np.float64) - pixels).reshape(len(pixels), -1) / 255
    length = np.linalg.norm(d, ord=explainer.p, axis=1)
    outside = int((length > eps * (1 + 1e-12)).sum())
    worse = int((found["confidence"] < before - TOLERANCE).sum())
    if outside or worse:
        reason = (
            f"{outside} pictures are outside their balls, and {worse} are less confident than their images"
        )
        raise RatioctlError("the exported file", reason, "Nothing was written. Please report it.")
    top = np.sort(expected, axis=1)
    score = explainer.ood_score
    far = np.abs(score.acceptance(logits, explainer.temperature) - score.acceptance_bound(threshold)) > 1e-3
    flags = found["is_ood"] != score.is_ood(logits, explainer.temperature, threshold)
    labels = found["probabilities"].argmax(axis=1) != expected.argmax(axis=1)
    return Agreement(
        n=len(pixels),
        difference=float(np.abs(found["probabilities"] - expected).max()),
        labels=int((labels & (top[:, -1] - top[:, -2] > TOLERANCE)).sum()),
        flags=int((flags & far).sum()),
    )


def check_gradient(base: bytes, package: Spec, reference: Predictor) -> float:
    """The relative difference of the graph's gradient from that of `reference` on a few images, the median.

    Raises:
        RatioctlError: above 1 %, or above 20 % on any image. A wrong rule shows on every image; a unit on the
            other side of zero by rounding shows on its own one.
    """
    import onnx
    import onnxruntime
    import torch

    from ratioctl.attacks import goals
    from ratioctl.onnx.explain import gradient_graph

    pixels = sample_images(package)[::3][:6]
    images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
    targets = np.arange(len(images)) % len(package.label_names)
    graph = gradient_graph(
        onnx.load_model_from_string(base), temperature=package.temperature, name=package.name
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (ours,) = session.run(["gradient"], {"image": images, "target": targets})
    x = torch.from_numpy(images).requires_grad_()
    goal = goals.log_probability(torch.from_numpy(targets), package.temperature)
    (theirs,) = torch.autograd.grad(goal(reference.network(x)).sum(), x)
    size = np.linalg.norm(theirs.numpy().reshape(len(images), -1), axis=1)
    wrong = np.linalg.norm((ours - theirs.numpy()).reshape(len(images), -1), axis=1)
    relative = wrong / np.maximum(size, 1e-12)
    found = float(np.median(relative))
    if not (found < 0.01 and relative.max() < 0.2):
        reason = f"has gradients that differ from torch's by {found:.2g} of their length"
        raise RatioctlError("the exported file", reason, "Nothing was written. Please report it.")
    return found


def check_parity(parity: Agreement, logits: np.ndarray) -> None:
    """Raise RatioctlError where a file differs from torch by more than float32 rounding explains."""
    allowed = TOLERANCE * max(1.0, float(np.abs(logits).max()) / 32)
    if parity.difference <= allowed and not parity.labels and not parity.flags:
        return
    reason = (
        f"does not agree with torch on {parity.n} images: logits differ by {parity.difference:.2g}, "
        f"{parity.labels} labels and {parity.flags} flags differ"
    )
    raise RatioctlError("the exported file", reason, "Nothing was written. Please report it.")


def latency_ms(predict: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray) -> dict[int, float]:
    """{batch size: median milliseconds of one call}, batches of 1 and 32."""
    found = {}
    for batch in (1, 32):
        part = np.ascontiguousarray(np.resize(pixels, (batch, *pixels.shape[1:])))
        predict(part)
        times: list[float] = []
        while len(times) < 3 or (len(times) < 50 and sum(times) < 0.5):
            started = time.perf_counter()
            predict(part)
            times.append(time.perf_counter() - started)
        found[batch] = 1000 * statistics.median(times)
    return found
