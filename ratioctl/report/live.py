"""What a page needs to search counterfactuals itself: a file of `export --explain` and onnxruntime-web."""

from __future__ import annotations

import base64
import dataclasses
import gzip
from pathlib import Path

from ratioctl.errors import OutputError, UsageError

# Of the folder `dist` of the npm package: the library in one module, and WebAssembly with SIMD.
FILES = {"library": "ort.wasm.bundle.min.mjs", "runtime": "ort-wasm-simd-threaded.wasm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Live:
    """The parts of a page that searches itself.

    Attributes:
        parts: base64 of the compressed "library", "runtime" and "model".
        side, channels: of the model's images.
        radii: that the form offers.
    """

    parts: dict[str, str]
    side: int
    channels: int
    radii: tuple[float, ...]


def load(dist: Path, model: Path, input_size: tuple[int, int, int], radii: tuple[float, ...]) -> Live:
    """Read the parts.

    Args:
        dist: the folder `dist` of the npm package onnxruntime-web.
        model: a file of `ratioctl export --explain`; input_size: (C, H, W) of its images.

    Raises:
        UsageError: `dist` is not that folder. OutputError: a file cannot be read.
    """
    paths = {name: dist / file for name, file in FILES.items()}
    missing = next((path for path in paths.values() if not path.is_file()), None)
    if missing is not None:
        step = "Run `npm install onnxruntime-web`, and name node_modules/onnxruntime-web/dist."
        raise UsageError(f"--live {dist}", f"has no {missing.name}, a file of onnxruntime-web", step)
    try:
        contents = {name: path.read_bytes() for name, path in {**paths, "model": model}.items()}
    except OSError as error:
        raise OutputError(error.filename, f"cannot be read: {error.strerror}", "Check it.") from None
    parts = {
        name: base64.b64encode(gzip.compress(content, 9, mtime=0)).decode("ascii")
        for name, content in contents.items()
    }
    return Live(parts=parts, side=input_size[1], channels=input_size[0], radii=radii)
