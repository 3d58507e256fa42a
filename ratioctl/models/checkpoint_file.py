"""Files of weights written elsewhere: safetensors, and PyTorch files read without running their code."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratioctl import package as packages
from ratioctl.errors import PackageError, UsageError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Keys under which training scripts store the weights, likeliest first.
NESTS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
EMA_NESTS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "model_ema_state_dict", "params_ema"),
    *("ema", "averaged_model"),
)
MAX_NEST = 8  # tables in tables; a pickle may contain itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file of weights.

    Attributes:
        state: tensors by name, as stored.
        nest: the keys under which they were found, "" for none.
        sha256: of the file.
        notes: messages for the user.
    """

    path: Path
    state: dict[str, Tensor]
    nest: str
    sha256: str
    notes: tuple[str, ...] = ()


def read(path: str | Path, *, ema: bool | None = None) -> Checkpoint:
    """The tensors of a `.safetensors` file or a PyTorch state dict; no code in the file is run.

    Args:
        ema: take the averaged (EMA) weights where the file has both; None takes the plain ones and says so.

    Raises:
        UsageError: no such file, another kind of file, or `ema` without averaged weights.
        PackageError: damaged, or it holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(path, "is a folder, not a file of weights", f"Name a {' or '.join(SUFFIXES[:3])}.")
    if not path.exists():
        raise UsageError(path, "does not exist", "Check the spelling of the path.")
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(path, "is of an unknown kind", f"Weights are read from {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise UsageError(path, "is not a plain file", "Copy the weights into one.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix.lower() == ".safetensors":
        state = {k: torch.from_numpy(v) for k, v in packages.parse_weights(data, path).items()}
        return Checkpoint(path=path, state=state, nest="", sha256=digest)
    state, nest, notes = _state(_load(data, path), path, ema)
    for name, tensor in state.items():
        if not _plain(tensor):
            reason = f'holds "{name}" as {tensor.dtype} in another form than plain numbers'
            raise PackageError(path, reason, "Save float tensors: quantize and prune after the export.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            reason = f'holds values that are not finite in "{name}"'
            raise PackageError(path, reason, "Use the weights of another epoch.")
    return Checkpoint(path=path, state=state, nest=nest, sha256=digest, notes=notes)


def _load(data: bytes, path: Path) -> object:
    _check_archive(data, path)
    try:
        with warnings.catch_warnings():  # about TorchScript archives, which are reported below
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        if not re.search(r"GLOBAL|Unsupported class|instantiate|TorchScript", str(error)):
            raise _damaged(path, error) from None
        reason = "holds more than tensors: code that would run on loading, which is refused"
        step = "Save its state dict alone: torch.save(model.state_dict(), ...)."
        raise PackageError(path, reason, step) from None
    except (EOFError, ValueError, KeyError, TypeError, OSError) as error:
        raise _damaged(path, error) from None
    except (AttributeError, IndexError, struct.error, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _check_archive(data: bytes, path: Path) -> None:
    """Refuse a zip file that unpacks to more than its size: PyTorch stores its members uncompressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, UnicodeDecodeError):
        return  # torch.load reports what is wrong with it
    total = sum(member.file_size for member in members)
    if total > len(data) or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        reason = f"holds compressed members, {total / 2**20:.0f} MiB in a file of {len(data) / 2**20:.0f} MiB"
        raise PackageError(path, reason, "PyTorch never writes them. Save it again with torch.save.")


def _plain(tensor: Tensor) -> bool:
    """Whether the file holds every one of its real numbers: neither sparse, quantized nor repeated views."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _damaged(path: Path, error: Exception) -> PackageError:
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return PackageError(path, f"is damaged or not a PyTorch file ({detail})", "Download or save it again.")


def _state(loaded: object, path: Path, ema: bool | None) -> tuple[dict[str, Tensor], str, tuple[str, ...]]:
    """The table of tensors in what was loaded, where it was, and notes about the choice."""
    nest: list[str] = []
    notes: list[str] = []
    averaged = False
    while isinstance(loaded, Mapping) and len(nest) < MAX_NEST:
        plain, average = _table(loaded, NESTS), _table(loaded, EMA_NESTS)
        tensors = {str(k): v.detach() for k, v in loaded.items() if isinstance(v, Tensor)}
        averaged = averaged or average is not None
        if average is not None and (plain is not None or len(tensors) > 1) and ema is None:
            taken = "the table itself" if plain is None else f'"{plain}"'
            notes.append(
                f'holds two sets of weights: used {taken}; --ema takes the averaged ones, "{average}"'
            )
        inner = average if average is not None and (ema or (plain is None and len(tensors) < 2)) else plain
        if inner is None and len(tensors) > 1:
            if ema and not averaged:
                raise UsageError("--ema", f"{path} holds no averaged weights", "Leave out --ema.")
            return tensors, ".".join(nest), tuple(notes)
        if inner is None:
            keys = ", ".join(str(k) for k in list(loaded)[:8])
            reason = f"holds no table of weights; it has {keys}" if keys else "is empty"
            raise PackageError(path, reason, "Save model.state_dict().")
        nest.append(inner)
        loaded = loaded[inner]
    raise PackageError(path, f"holds a {type(loaded).__name__}, not a state dict", "Save model.state_dict().")


def _table(loaded: Mapping[Any, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(loaded.get(name), Mapping)), None)
