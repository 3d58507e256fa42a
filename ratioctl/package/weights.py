"""The weights file of a package: safetensors in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from ratioctl.errors import PackageError

Stored = Literal["fp32", "fp16"]

_AGAIN = "Get the package again, or package it again from its checkpoint."
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}
_DTYPES = _FLOATS | _INTEGERS


def parse_weights(data: bytes, where: object) -> dict[str, np.ndarray]:
    """Tensors in the bytes of a safetensors file, as arrays that own their memory.

    The safetensors library refuses headers that lie about lengths, gaps and overlaps. bfloat16, which numpy
    lacks, becomes float32.

    Raises:
        PackageError: not a valid file, no tensors, an unsupported type, or a value that is not finite.
    """
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(data)
    except SafetensorError as error:
        detail = str(error).removeprefix("Error while deserializing: ")
        raise PackageError(where, f"is not a valid safetensors file: {detail:.120}", _AGAIN) from None
    if not entries:
        raise PackageError(where, "holds no tensors", _AGAIN)
    tensors = {}
    for name, entry in sorted(entries):
        if entry["dtype"] not in _DTYPES:
            reason = f'stores "{name}" as {entry["dtype"]:.40}, which is not supported'
            raise PackageError(where, reason, "Save float32, float16 or bfloat16 tensors.")
        try:
            array = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except ValueError:  # empty tensors may claim sides, and more axes, than numpy has
            raise PackageError(where, f'has an impossible shape for the tensor "{name}"', _AGAIN) from None
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << np.uint32(16)).view("<f4")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise PackageError(
                where, f'holds values that are not finite (NaN or infinity) in "{name}"', _AGAIN
            )
        tensors[name] = array
    return tensors


def serialize(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Bytes of a safetensors file, which PyTorch's loaders accept as well."""
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    return save(arrays, metadata={"format": "pt"})


def to_half(tensors: Mapping[str, np.ndarray], where: object) -> dict[str, np.ndarray]:
    """Kernels and matrices in float16; vectors (biases, batch statistics) as they are.

    Raises:
        PackageError: a value beyond 65504, which float16 lacks.
    """
    halved = {}
    for name, array in tensors.items():
        if array.ndim > 1 and array.dtype.kind == "f":
            if array.size and np.abs(array).max() > np.finfo(np.float16).max:
                raise PackageError(where, f'holds values in "{name}" that fp16 lacks', "Keep fp32 weights.")
            array = array.astype(np.float16)
        halved[name] = array
    return halved


def stored_as(path: Path) -> Stored:
    """ "fp16" for a weights file with float16 tensors, else "fp32"; either is computed with in fp32."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        return "fp16" if any(file.get_slice(name).get_dtype() == "F16" for name in names) else "fp32"
