"""Weights files: every type is read, damaged files are refused with the reason."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from ratioctl import package
from ratioctl.errors import PackageError


def safetensors(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def test_other_readers_understand_the_weights(
    pkg: package.ModelPackage, tensors: dict[str, np.ndarray]
) -> None:
    from safetensors import safe_open

    with safe_open(pkg.weights_path, framework="np") as stream:
        assert stream.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(stream.get_tensor("conv.weight"), tensors["conv.weight"])


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = np.array([1, 2], "<f4").tobytes()


def test_parse_weights_reads_every_type() -> None:
    halves = np.array([0x3F80, 0xC000], "<u2").tobytes()  # 1.0 and -2.0 in bfloat16
    header = {
        "__metadata__": {"format": "pt"},
        "a": F32,
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
        "c": {"dtype": "BOOL", "shape": [], "data_offsets": [12, 13]},
        "d": {"dtype": "I64", "shape": [0, 3], "data_offsets": [13, 13]},
    }
    tensors = package.parse_weights(safetensors(header, EIGHT + halves + b"\x01"), "w")
    assert {name: (array.dtype.str, array.tolist()) for name, array in tensors.items()} == {
        "a": ("<f4", [1, 2]),
        "b": ("<f4", [1, -2]),
        "c": ("|b1", True),
        "d": ("<i8", []),
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"abc", "header too small"),
        (safetensors({"a": F32}, EIGHT, length=2**63), "header too large"),
        (safetensors({"a": F32}, EIGHT, length=10**6), "invalid header length"),
        (safetensors(b"{" * 10, EIGHT), "invalid JSON in header"),
        (safetensors(b'{"a":' * 100_000, EIGHT), "recursion limit exceeded"),
        (safetensors([1], EIGHT), "invalid type: sequence"),
        (safetensors({}, b""), "holds no tensors"),
        (safetensors(b'{"a": 1, "a": 2}'), "invalid type: integer"),
        (safetensors({"a": 3}, EIGHT), "expected struct TensorInfo"),
        (safetensors({"a": {**F32, "shape": [-2]}}, EIGHT), "invalid value: integer `-2`"),
        (safetensors({"a": {**F32, "shape": [2.0]}}, EIGHT), "invalid type: floating point"),
        (safetensors({"a": {**F32, "data_offsets": [0]}}, EIGHT), "expected a tuple of size 2"),
        (safetensors({"a": {**F32, "dtype": "F8_E5M2", "shape": [8]}}, EIGHT), "not supported"),
        (safetensors({"a": {**F32, "data_offsets": [0, 2**62]}}, EIGHT), "invalid shape"),
        (safetensors({"a": {**F32, "shape": [2**40, 2**40]}}, EIGHT), "overflow"),
        (safetensors({"a": {**F32, "data_offsets": [8, 0]}}, EIGHT), "invalid offset for tensor"),
        (safetensors({"a": F32}, EIGHT[:4]), "file not fully covered"),
        (safetensors({"a": F32, "b": F32}, EIGHT), "invalid offset for tensor"),
        (safetensors({"a": {**F32, "data_offsets": [4, 12]}}, EIGHT + b"1234"), "invalid offset for tensor"),
        (safetensors({"a": F32}, EIGHT + b"more"), "file not fully covered"),
        (safetensors({"a": F32}, np.array([1, np.nan], "<f4").tobytes()), 'not finite .* in "a"'),
        (safetensors({"a": F32}, np.array([np.inf, 0], "<f4").tobytes()), "not finite"),
    ],
)
def test_weights_that_lie_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(PackageError, match=said):
        package.parse_weights(data, "model.safetensors")
