"""Inference with exported ONNX files through onnxruntime, without torch."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from ratioctl.errors import PackageError
from ratioctl.package import (
    ModelPackage,
    Spec,
    Stored,
    certified_radius,
    parse_config,
    parse_document,
    resolve,
)
from ratioctl.scores import Threshold
from ratioctl.utils import resources

EXPORT = "Export it again with `ratioctl export`."
MAX_BYTES = 2**31 - 1  # of one file in the format's encoding
CONFIG, ABOUT = "ratioctl", "ratioctl.export"  # metadata: the package's config; what holds of the graph alone
THRESHOLD = "threshold"  # the optional input of `export --threshold-input`
OUTPUTS = ("logits", "probabilities", "label", "confidence", "ood_score", "is_ood")
GUARANTEED = "guaranteed_confidence"  # the further output of packages with a certified head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """A loaded ONNX file. `predict` may be called from several threads.

    Attributes:
        path: the file.
        spec: the config block it carries: labels, input size, temperature, thresholds.
        input_type: "float" for graphs that take float32 NCHW in [0,1], "uint8" for uint8 NHWC.
        threshold: the threshold of the graph's `is_ood`, with those per class where it has them; None in
            files that do not record it.
        weights: how the file stores the weights; it computes in fp32 with either.
        session: the onnxruntime session.
    """

    path: Path
    spec: Spec
    input_type: Literal["float", "uint8"]
    threshold: Threshold | None
    weights: Stored
    session: Any = dataclasses.field(repr=False)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits (N, K) float32, before temperature.

        Args:
            images: float32 (N, C, H, W) in [0,1] or uint8 (N, H, W, C), whichever the graph takes: the
                other is converted (floats are rounded to 8 bits for a uint8 graph).
        """
        return self.run(images, ("logits",))["logits"]

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """(N, K) float32, after temperature; images as for `predict`."""
        return self.run(images, ("probabilities",))["probabilities"]

    def guaranteed(self, images: np.ndarray) -> np.ndarray:
        """(N,) float32 confidence that no image in the linf ball of radius `spec.certified` exceeds.

        Raises:
            UsageError: the model has no certified head.
        """
        return self.predict_guaranteed(images)[1]

    def predict_guaranteed(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The results of `predict` and `guaranteed`, computed together."""
        self.check_guaranteed()
        found = self.run(images, ("logits", GUARANTEED))
        return found["logits"], found[GUARANTEED]

    def check_guaranteed(self) -> None:
        """Raises UsageError: the model has no certified head. PackageError: the graph does not bound it."""
        certified_radius(self.spec)
        if GUARANTEED not in (output.name for output in self.session.get_outputs()):
            raise PackageError(self.path, f"has no output {GUARANTEED}", EXPORT)

    def run(self, images: np.ndarray, outputs: Sequence[str] = OUTPUTS) -> dict[str, np.ndarray]:
        """The named outputs of the graph, first axis N; images as for `predict`.

        Raises:
            PackageError: the graph fails, or its outputs have unexpected shapes.
        """
        prepared = self.prepare(images)
        try:
            values = self.session.run(list(outputs), {"image": prepared})
        except Exception as error:  # onnxruntime's own classes share no base
            raise PackageError(self.path, f"cannot compute ({_detail(error)})", EXPORT) from None
        found = dict(zip(outputs, values, strict=True))
        for name, value in found.items():
            each = (len(self.spec.label_names),) if name in ("logits", "probabilities") else ()
            if value.shape != (len(images), *each):
                reason = f"computes {name} of shape {value.shape} for {len(images)} images"
                raise PackageError(self.path, reason, EXPORT)
        return found

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """The images in the type and layout of the graph's input, contiguous; images as for `predict`.

        Raises:
            ValueError: another shape than the model's.
        """
        channels, height, width = self.spec.input_size
        eight_bits = images.dtype == np.uint8
        wanted = (height, width, channels) if eight_bits else (channels, height, width)
        if images.ndim != 4 or images.shape[1:] != wanted:
            layout = "uint8 NHWC" if eight_bits else "float NCHW"
            raise ValueError(f"images of shape {images.shape} where {layout} (N, {wanted}) is needed")
        if eight_bits and self.input_type == "float":
            images = images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
        elif not eight_bits and self.input_type == "uint8":
            images = np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(
            images if images.dtype == np.uint8 else images.astype(np.float32, copy=False)
        )


def load(
    model: str | os.PathLike[str] | ModelPackage, *, threads: int | None = None, device: str = "cpu"
) -> Runtime:
    """Load an exported file, or the one inside a package.

    Args:
        model: an `.onnx` file, or a package (folder, bundled name or value) that contains `model.onnx`.
        threads: intra-op threads; None uses every processor available to this process.
        device: "cpu", or "cuda"/"cuda:N" where onnxruntime was built for it.

    Raises:
        PackageError: missing, damaged, not written by ratioctl, with tensors in other files, or inside a
            package that is another model.
    """
    path, package = _file(model)
    return from_opened(open_file(path, threads, device), package)


def from_opened(opened: Opened, package: ModelPackage | None = None) -> Runtime:
    """The file for scoring; `package` contains it, if any. Raises PackageError, as `load`."""
    path, spec = opened.path, opened.spec
    if opened.about.get("explain") is not None:
        step = "Give it to `ratioctl counterfactual`, or export the package without --explain."
        raise PackageError(
            path, "computes counterfactuals and no scores: it was exported with --explain", step
        )
    try:  # onnxruntime decodes texts on access
        input_type = _input_type(opened.session, spec, path)
    except UnicodeDecodeError:
        raise _no_text(path) from None
    if package and (spec.label_names, spec.input_size) != (package.label_names, package.input_size):
        raise PackageError(path, "has other classes or another input than its package", EXPORT)
    return Runtime(
        path=path,
        spec=spec,
        input_type=input_type,
        threshold=opened.threshold,
        weights=opened.weights,
        session=opened.session,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A file of `ratioctl export` in a session, its metadata checked, its graph not.

    Attributes:
        about: the metadata that describe the graph alone; {} in files without.
    """

    path: Path
    session: Any = dataclasses.field(repr=False)
    spec: Spec
    about: dict[str, Any]

    @property
    def weights(self) -> Stored:
        """How the file stores them."""
        return "fp16" if self.about.get("weights") == "fp16" else "fp32"

    @property
    def threshold(self) -> Threshold | None:
        """The threshold of the graph's `is_ood`; None in files that do not record it."""
        try:
            classes = self.about.get("classes")
            own = None if classes is None else tuple(map(float, classes))
            return Threshold(float(self.about["threshold"]), own)
        except (KeyError, ValueError, TypeError, OverflowError):
            return None


def open_file(path: Path, threads: int | None = None, device: str = "cpu") -> Opened:
    """Load a file and its metadata. Raises PackageError, as `load`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PackageError(path, "is not a plain file", EXPORT)
        if status.st_size == 0:
            raise PackageError(path, "is empty", EXPORT)
        if status.st_size > MAX_BYTES:
            raise PackageError(path, "is larger than 2 GiB, so it is not an ONNX file", EXPORT)
        data = path.read_bytes()
    except FileNotFoundError:
        raise PackageError(path, "there is no such file", EXPORT) from None
    except OSError as error:
        raise PackageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    _check_self_contained(data, path)
    session = _session(data, path, threads, device)
    try:  # onnxruntime decodes texts on access
        metadata = session.get_modelmeta().custom_metadata_map
        return Opened(path=path, session=session, spec=_spec(metadata, path), about=_about(metadata))
    except UnicodeDecodeError:
        raise _no_text(path) from None


def _no_text(path: Path) -> PackageError:
    return PackageError(path, "holds names or metadata that are not UTF-8 text", EXPORT)


def is_onnx_file(model: str | os.PathLike[str] | ModelPackage) -> TypeGuard[str | os.PathLike[str]]:
    """Whether `model` names an exported file rather than a package."""
    return (
        not isinstance(model, ModelPackage)
        and os.fspath(model).endswith(".onnx")
        and not Path(model).is_dir()
    )


def _file(model: str | os.PathLike[str] | ModelPackage) -> tuple[Path, ModelPackage | None]:
    """The file, and the package that contains it, if any."""
    if is_onnx_file(model):
        return Path(model), None
    model = resolve(model)
    if model.onnx_path is None:
        raise PackageError(model.path, "contains no model.onnx", "`ratioctl export` writes one.")
    return model.onnx_path, model


def _check_self_contained(data: bytes, path: Path) -> None:
    """Refuse a graph with tensors in other files, which ratioctl never writes."""
    if b"location" not in data:  # the key under which the format keeps a file's name
        return
    import onnx
    from google.protobuf.message import DecodeError, Message

    def outside(message: Message) -> str | None:
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            return next((entry.value for entry in message.external_data if entry.key == "location"), "?")
        for field, value in message.ListFields():
            if field.message_type is None:  # numbers and bytes, some of them millions long
                continue
            for part in [value] if isinstance(value, Message) else value:
                if (found := outside(part)) is not None:
                    return found
        return None

    try:
        found = outside(onnx.load_model_from_string(data))
    except DecodeError:
        return  # onnxruntime says what is wrong with it
    if found is not None:
        reason = f'keeps its weights in another file, "{found:.80}", and is not read'
        raise PackageError(path, reason, EXPORT)


def cannot_compute(path: Path, error: BaseException) -> PackageError:
    return PackageError(path, f"cannot compute ({_detail(error)})", EXPORT)


def _detail(error: BaseException) -> str:
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", " ".join(str(error).split()))[:160]


def _session(data: bytes, path: Path, threads: int | None, device: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or resources.processors()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.startswith("cuda"):
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise PackageError(
                f"--device {device}", "this onnxruntime has no CUDA", "Use --device cpu, or onnxruntime-gpu."
            )
        index = int(device.partition(":")[2] or 0)
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": index}))
    logging.getLogger(__name__).info(
        "Computing on %s (onnxruntime, %d threads), fp32", device, options.intra_op_num_threads
    )
    try:
        # Bytes, not the path: what was checked is what is loaded, without access to a folder.
        return onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # onnxruntime's own classes share no base
        raise PackageError(path, f"is damaged or not an ONNX file ({_detail(error)})", EXPORT) from None


def _spec(metadata: dict[str, str], path: Path) -> Spec:
    text = metadata.get(CONFIG)
    if text is None:
        raise PackageError(
            path,
            'was not exported by ratioctl: its metadata has no "ratioctl" entry',
            "See `ratioctl export`.",
        )
    config = parse_document(text.encode("utf-8", "surrogatepass"), f"{path} (metadata {CONFIG})")
    return parse_config(config, path, name=path.stem)


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    try:
        found = json.loads(metadata[ABOUT])
    except (KeyError, ValueError, RecursionError):
        return {}  # optional
    return found if isinstance(found, dict) else {}


def _input_type(session: Any, spec: Spec, path: Path) -> Literal["float", "uint8"]:
    """Check the graph's inputs and outputs against the config it carries."""
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name: value for value in session.get_outputs()}
    missing = [name for name in OUTPUTS if name not in outputs]
    if set(inputs) != {"image"} or missing:
        lacks = f"no output {', '.join(missing)}" if missing else "inputs other than image"
        raise PackageError(path, f"is not a graph of ratioctl: it has {lacks}", EXPORT)
    channels, height, width = spec.input_size
    kinds: dict[str, tuple[Literal["float", "uint8"], tuple[int, int, int]]] = {
        "tensor(float)": ("float", (channels, height, width)),
        "tensor(uint8)": ("uint8", (height, width, channels)),
    }
    kind, shape = kinds.get(inputs["image"].type, (None, None))
    if kind is None or tuple(inputs["image"].shape[1:]) != shape:
        raise PackageError(path, "takes another input than its metadata says", EXPORT)
    if outputs["logits"].shape[1:] not in ([len(spec.label_names)],):
        raise PackageError(path, "has another number of classes than its metadata says", EXPORT)
    return kind
