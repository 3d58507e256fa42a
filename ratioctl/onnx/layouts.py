"""Layouts of an export: one file, or the model folder of a server.

A layout is a function registered under its name; `--layout`, its help and its messages come from here:

    @register_layout("triton")
    def triton(root: Path, name: str, model: bytes, spec: Spec, input_type: Input) -> dict[Path, bytes]: ...

Light to import: the command line lists the names in its help.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ratioctl.errors import UsageError
from ratioctl.utils.suggest import one_of

if TYPE_CHECKING:
    from ratioctl.package import Spec

Input = Literal["float", "uint8"]
Contents = Callable[[Path, str, bytes, "Spec", Input], dict[Path, bytes]]

DEFAULT = "file"
MAX_BATCH = 64  # of Triton's dynamic batcher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How an export is written.

    Attributes:
        name: of `--layout`.
        is_folder: whether the output is a folder, into which `contents` writes, or the file itself.
        contents: (output, model name, ONNX bytes, spec, input type) -> bytes by path, the ONNX file first,
            in the order in which they appear on disk.
    """

    name: str
    is_folder: bool
    contents: Contents


_LAYOUTS: dict[str, Layout] = {}


def register_layout(name: str, *, is_folder: bool = True) -> Callable[[Contents], Contents]:
    """Register a layout under its name."""

    def register(contents: Contents) -> Contents:
        if name in _LAYOUTS:
            raise ValueError(f'there is already a layout named "{name}"')
        _LAYOUTS[name] = Layout(name=name, is_folder=is_folder, contents=contents)
        return contents

    return register


def layout_names() -> list[str]:
    """Names of all layouts, the default one first."""
    return sorted(_LAYOUTS, key=lambda name: name != DEFAULT)


def find_layout(name: str) -> Layout:
    """The layout of that name. Raises UsageError for an unknown one; all are listed."""
    if name not in _LAYOUTS:
        raise UsageError(f"--layout {name}", "unknown layout", one_of(name, layout_names()))
    return _LAYOUTS[name]


def safe_name(name: str) -> str:
    """`name` with the characters that folders, Triton models and ONNX graphs accept."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"


@register_layout("file", is_folder=False)
def file(output: Path, name: str, model: bytes, spec: Spec, input_type: Input) -> dict[Path, bytes]:
    """The ONNX file alone."""
    return {output: model}


@register_layout("triton")
def triton(root: Path, name: str, model: bytes, spec: Spec, input_type: Input) -> dict[Path, bytes]:
    """A model repository of Triton; the configuration is last, so a polling server finds it complete."""
    return {
        root / name / "1" / "model.onnx": model,
        root / name / "labels.txt": _label_lines(spec).encode(),
        root / name / "config.pbtxt": triton_config(name, spec, input_type).encode(),
    }


@register_layout("kserve")
def kserve(root: Path, name: str, model: bytes, spec: Spec, input_type: Input) -> dict[Path, bytes]:
    """Triton's repository and an InferenceService that serves it."""
    manifest = {root / "inferenceservice.yaml": kserve_manifest(name).encode()}
    return triton(root, name, model, spec, input_type) | manifest


def _label_lines(package: Spec) -> str:
    return "".join(re.sub(r"[\r\n]+", " ", label) + "\n" for label in package.label_names)


def triton_config(name: str, package: Spec, input_type: Input) -> str:
    """`config.pbtxt`. With batching, dims exclude the batch axis; outputs of one number per image are
    declared as [1] and reshaped to the graph's empty shape.
    """
    from ratioctl.onnx.runtime import GUARANTEED, OUTPUTS

    channels, height, width = package.input_size
    count = len(package.label_names)
    shape = [height, width, channels] if input_type == "uint8" else [channels, height, width]
    kind = "TYPE_UINT8" if input_type == "uint8" else "TYPE_FP32"
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {MAX_BATCH}",
        "input [",
        f'  {{ name: "image" data_type: {kind} dims: {shape} }}',
        "]",
        "output [",
    ]
    kinds = {"label": "TYPE_INT64", "is_ood": "TYPE_BOOL"}
    entries = []
    for output in (*OUTPUTS, *([GUARANTEED] if package.certified is not None else [])):
        if output in ("logits", "probabilities"):
            rest = f'dims: [ {count} ] label_filename: "labels.txt"'
        else:
            rest = "dims: [ 1 ] reshape { shape: [ ] }"
        entries.append(f'  {{ name: "{output}" data_type: {kinds.get(output, "TYPE_FP32")} {rest} }}')
    return "\n".join([*lines, ",\n".join(entries), "]", "dynamic_batching { }", ""])


def kserve_manifest(name: str) -> str:
    """An InferenceService for KServe's Triton runtime; the user fills in the storage location."""
    host = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:50] or "model"
    return "\n".join(
        [
            "apiVersion: serving.kserve.io/v1beta1",
            "kind: InferenceService",
            "metadata:",
            f"  name: {json.dumps(host)}",
            "spec:",
            "  predictor:",
            "    model:",
            "      modelFormat:",
            "        name: onnx",
            '        version: "1"',
            "      protocolVersion: v2",
            "      runtime: kserve-tritonserver",
            f"      # The folder that holds {name}/, for example a volume or a bucket.",
            '      storageUri: "pvc://models/repository"',
            "",
        ]
    )
