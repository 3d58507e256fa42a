"""Agreement of exported files with torch on every available runtime, and their speed: `ratioctl parity`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ratioctl import package as packages
from ratioctl.data import in_distribution, out_distribution
from ratioctl.errors import PackageError, SourceError
from ratioctl.models import from_package
from ratioctl.models.device import select_device
from ratioctl.models.environment import environment
from ratioctl.models.predict import predictor
from ratioctl.onnx import certificate, runtime
from ratioctl.onnx.parity import TOLERANCE, agreement, latency_ms
from ratioctl.package import ModelPackage
from ratioctl.utils import resources

CPU = "CPUExecutionProvider"
NOT_HERE = (CPU, "AzureExecutionProvider")  # the latter calls a service
SYNTHETIC = 64  # images of each generated kind


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Set:
    name: str
    source: str
    pixels: np.ndarray  # uint8 (N, H, W, C)

    def facts(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes()).hexdigest()
        return {"name": self.name, "source": self.source, "n": len(self.pixels), "fingerprint": digest}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpenVino:
    """A loaded file that computes with OpenVINO on the CPU; `run` and `predict` as of `runtime.Runtime`."""

    loaded: runtime.Runtime
    compiled: Any

    @classmethod
    def of(cls, loaded: runtime.Runtime, threads: int | None = None) -> OpenVino:
        import openvino

        core = openvino.Core()
        # It computes in bf16 where the processor can, unless it is told not to.
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        return cls(loaded=loaded, compiled=core.compile_model(core.read_model(loaded.path), "CPU", options))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        found = self.compiled({"image": self.loaded.prepare(images)})
        return {name: np.asarray(found[name]) for name in runtime.OUTPUTS}

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.run(images)["logits"]


def certify(
    model: str | os.PathLike[str] | ModelPackage,
    files: Sequence[str | os.PathLike[str]],
    *,
    data: str,
    tolerance: float | None = None,
    limit: int | None = None,
    timing: bool = True,
    download: bool = False,
    on_step: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Compare files with the package they were exported from, on every image; the certificate.

    Files that store weights in fp16 are compared with torch on these weights.

    A label or flag counts as explained where the difference of the logits is large enough to change it: an
    image may lie exactly on a threshold. A file passes where its logits differ by at most the tolerance and
    no label or flag differs unexplained.

    Args:
        data: a SOURCE of images; noise, photographs, plain colors and saturated images are added.
        tolerance: largest difference of logits; None allows what float32 explains, and does not judge
            quantized files.
        limit: use so many images of `data`, evenly spaced.
        timing: measure latency and throughput too.
        on_step: called with what is done next.

    Raises:
        PackageError: the package or a file is damaged, or the file has other classes or another input.
        SourceError: `data` cannot be read or holds no images.
    """
    package = packages.resolve(model)
    loaded = [_load(package, file) for file in files]
    sets = _sets(package, data, limit, download)
    references = {
        weights: predictor(from_package(package, "cpu", weights_as=weights), "cpu").predict
        for weights in dict.fromkeys(file.weights for file in loaded)
    }
    expected = {
        weights: {part.name: reference(part.pixels) for part in sets}
        for weights, reference in references.items()
    }
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    times: list[dict[str, Any]] = []
    for file in loaded:
        for backend, opened in _backends(file, skipped):
            on_step(f"{file.path.name} with {backend}")
            for part in sets:
                row = _result(package, file, opened, part, expected[file.weights][part.name], tolerance)
                results.append({"file": os.fspath(file.path), "backend": backend, **row})
    if timing:
        on_step("latency and throughput")
        times = list(_timing(loaded, references[loaded[0].weights], sets[0].pixels))
    document = {
        "schema": certificate.SCHEMA,
        "ok": all(row["ok"] is not False for row in results),
        "model": {"name": package.name, "digest": package.digest, "temperature": package.temperature},
        "files": [_file_facts(file, package) for file in loaded],
        "tolerance": tolerance,
        "sets": [part.facts() for part in sets],
        "results": results,
        "skipped": skipped,
        "timing": times,
        "environment": _environment(),
    }
    return certificate.sealed(document)


def _load(package: ModelPackage, file: str | os.PathLike[str]) -> runtime.Runtime:
    found = runtime.load(file)
    if (found.spec.label_names, found.spec.input_size) != (package.label_names, package.input_size):
        step = "Name the package that it was exported from."
        raise PackageError(file, f"has other classes or another input than {package.name}", step)
    if found.threshold is None:
        raise PackageError(file, "does not record the threshold of its flags", runtime.EXPORT)
    return found


def _backends(file: runtime.Runtime, skipped: list[dict[str, str]]) -> Iterator[tuple[str, Any]]:
    """Runtimes of a file by name; those that cannot load it are added to `skipped`."""
    import onnxruntime

    yield "onnxruntime CPU", file
    for provider in onnxruntime.get_available_providers():
        if provider not in NOT_HERE:
            session = onnxruntime.InferenceSession(os.fspath(file.path), providers=[provider, CPU])
            name = f"onnxruntime {provider.removesuffix('ExecutionProvider')}"
            if session.get_providers()[0] == provider:
                yield name, dataclasses.replace(file, session=session)
            else:
                skipped.append({"file": os.fspath(file.path), "backend": name, "reason": "did not start"})
    if importlib.util.find_spec("openvino") is None:
        reason = 'not installed: pip install "ratioctl[openvino]"'
        skipped.append({"file": os.fspath(file.path), "backend": "OpenVINO", "reason": reason})
        return
    try:
        opened = OpenVino.of(file)
    except Exception as error:  # its errors share no base
        reason = f"cannot load the file: {str(error).strip()[-200:]}"
        skipped.append({"file": os.fspath(file.path), "backend": "OpenVINO", "reason": reason})
        return
    yield "OpenVINO CPU", opened


def _result(
    package: ModelPackage,
    file: runtime.Runtime,
    opened: Any,
    part: _Set,
    expected: np.ndarray,
    tolerance: float | None,
) -> dict[str, Any]:
    assert file.threshold is not None
    found = agreement(part.pixels, lambda pixels: expected, opened, package, file.threshold)
    judged = tolerance is not None or not _quantized(file)
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()) / 32) if tolerance is None else tolerance
    passes = found.difference <= allowed and not found.labels and not found.flags
    return {
        "set": part.name,
        "n": found.n,
        "logits_difference": _finite(found.difference),
        "probability_difference": _finite(found.probability_difference),
        "changed_labels": found.changed_labels,
        "changed_flags": found.changed_flags,
        "unexplained_labels": found.labels,
        "unexplained_flags": found.flags,
        "tolerance": allowed if judged else None,
        "ok": passes if judged else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sets(package: ModelPackage, data: str, limit: int | None, download: bool) -> list[_Set]:
    channels, size = package.input_size[0], package.frame
    images = in_distribution.load(data, size, channels, download=download)
    if not len(images):
        raise SourceError(data, "holds no images that can be read", "Name another SOURCE with --data.")
    index = np.arange(len(images))
    if limit is not None and limit < len(index):
        index = np.linspace(0, len(index) - 1, limit).round().astype(int)
    real = images.pixels[index]
    generated = out_distribution.load(out_distribution.GENERATED, size, channels, count=SYNTHETIC).pixels
    corners = np.indices((2,) * channels).reshape(channels, -1).T * 255  # black, white and the pure colors
    plain = np.broadcast_to(
        corners[:, None, None, :], (len(corners), size.height, size.width, channels)
    ).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 2, (SYNTHETIC, size.height, size.width, channels)) * 255
    hard = np.clip((real[:SYNTHETIC].astype(int) - 128) * 8 + 128, 0, 255)
    return [
        _Set(name=in_distribution.short_name(data), source=data, pixels=real),
        _Set(name="photographs and noise", source=", ".join(out_distribution.GENERATED), pixels=generated),
        _Set(name="black, white and pure colors", source="generated", pixels=plain),
        _Set(name="noise of 0 and 255", source="generated", pixels=noise.astype(np.uint8)),
        _Set(name="saturated images", source=f"{data}, contrast x 8", pixels=hard.astype(np.uint8)),
    ]


def _quantized(file: runtime.Runtime) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in onnx.load(file.path).graph.node)


def _file_facts(file: runtime.Runtime, package: ModelPackage) -> dict[str, Any]:
    data = file.path.read_bytes()
    model = onnx.load_model_from_string(data)
    return {
        "path": os.fspath(file.path),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "input": file.input_type,
        "threshold": float(file.threshold or 0.0),
        "quantized": _quantized(file),
        "opset": next((entry.version for entry in model.opset_import if not entry.domain), None),
        "ir_version": model.ir_version,
        "same_package": file.spec.config["ratio"].get("digest") == package.digest,
    }


def _timing(
    files: Sequence[runtime.Runtime],
    reference: Callable[[np.ndarray], np.ndarray],
    pixels: np.ndarray,
) -> Iterator[dict[str, Any]]:
    """Median milliseconds and images a second of batches of 1 and 32, with one thread and with all."""
    everything = resources.processors()
    for threads in dict.fromkeys((1, everything)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield from _times("torch", None, threads, reference, pixels)
        finally:
            torch.set_num_threads(before)
        for file in files:
            opened = runtime.load(file.path, threads=threads)
            yield from _times("onnxruntime CPU", file.path, threads, opened.predict, pixels)
            if importlib.util.find_spec("openvino") is not None:
                try:
                    other = OpenVino.of(opened, threads)
                except Exception:  # recorded as skipped before
                    continue
                yield from _times("OpenVINO CPU", file.path, threads, other.predict, pixels)


def _times(
    backend: str,
    file: Path | None,
    threads: int,
    predict: Callable[[np.ndarray], np.ndarray],
    pixels: np.ndarray,
) -> Iterator[dict[str, Any]]:
    for batch, ms in latency_ms(predict, pixels).items():
        yield {
            "backend": backend,
            "file": None if file is None else os.fspath(file),
            "threads": threads,
            "batch": batch,
            "ms": ms,
            "images_per_second": 1000 * batch / ms,
        }


def _environment() -> dict[str, Any]:
    found = environment(select_device("cpu", "fp32"), "search", "score")
    versions = {key: found["versions"][key] for key in ("ratioctl", "torch", "numpy", "python")}
    for name in ("onnx", "onnxruntime", "openvino"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {"versions": versions, "hardware": found["hardware"]}
