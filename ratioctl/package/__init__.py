"""Model packages: one directory that holds a model and everything needed to trust and use it.

    model.safetensors   weights
    config.json         the root: labels, input, calibration, and the SHA-256 of every other file
    recipe.toml         how it was trained (absent for models trained elsewhere)
    README.md           the model card
    model.onnx          optional export

**Readable at every moment.** A new package is written to a sibling folder and renamed into place. A
change to an existing one goes in two steps, each complete in itself: new content is written, synced and
renamed to a name with its hash (`README-1a2b3c4d.md`) and `config.json`, which names every file, is replaced
with one `os.replace`: from here on the package is the new one. Then the content gets its plain name, a
name `config.json` no longer mentioned, and a second `os.replace` makes `config.json` name it; the hashed
names go last. Whatever dies in between leaves a `config.json` whose files are all there; the next change
finishes the tidying, which removes whatever lies under these names without standing in `config.json`
(an export from before a calibration, say), and nothing else. A reader that meets a change half-way sees
that `config.json` moved on and starts over.

**Digest.** The SHA-256 of the JSON (sorted keys, no spaces, ASCII) of `architecture`,
`architecture_options`, `label_names`, `input_size`, `mean`, `std`, `interpolation`, `temperature`,
`thresholds` and `weights`, the SHA-256 of the weights file; numbers that may be fractions are written as
floats. Metrics, cards and exports do not change it. It is recorded as `ratio.digest`, so that an edit of
those parts of `config.json` by hand is noticed (`ModelPackage.edited`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import html
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ratioctl.errors import OutputError, PackageError, RatioctlError, UncalibratedError, UsageError
from ratioctl.utils import resources
from ratioctl.utils.atomic_files import alive, lock, sync_folder, write_synced, writing
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.suggest import did_you_mean
from ratioctl.utils.text import safe_text

__all__ = [
    "DEFAULT_MODEL",
    "FORMAT",
    "ModelPackage",
    "Spec",
    "bundled",
    "check",
    "find",
    "parse_config",
    "parse_document",
    "parse_weights",
    "portable_config",
    "read",
    "render_card",
    "safe_text",
    "threshold",
    "update",
    "weights",
    "write",
]

FORMAT = 1
SCORE = "max-softmax"
MAX_CONFIG_BYTES = 32 * 2**20
MAX_DEPTH = 64
LARGEST = 1e6  # of temperatures and normalisations, and its inverse the smallest: float32 computes with them
MAX_HEADER_BYTES = 64 * 2**20
AGAIN = "Get the package again, or package it again from its checkpoint."

ROLES = WEIGHTS, RECIPE, CARD, ONNX = "model.safetensors", "recipe.toml", "README.md", "model.onnx"
_STAGED = re.compile(r"(model|recipe|README)-[0-9a-f]{8}(\.safetensors|\.toml|\.md|\.onnx)")
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What a checked `config.json`, or the block in an ONNX file's metadata, says about a model.

    Attributes:
        config: the whole document, plain JSON values.
        name: `ratio.name`, or the name of the folder or file.
        label_names: K different names, in the order of the logits.
        input_size: (C, H, W).
        mean, std: C values each, of pixels in [0,1].
        temperature: above 0; logits are divided by it before the softmax.
        thresholds: name ("tpr95") to confidence in [0,1]; empty where the model is not calibrated.
        ladders: counterfactual budgets by norm name ("1", "1.5", "2", "inf"), ascending.
    """

    config: dict[str, Any] = dataclasses.field(repr=False)
    name: str
    architecture: str
    architecture_options: dict[str, Any]
    label_names: tuple[str, ...]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    temperature: float
    thresholds: dict[str, float]
    ladders: dict[str, tuple[float, ...]]

    @property
    def calibrated(self) -> bool:
        return bool(self.thresholds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPackage(Spec):
    """A package on disk, read and checked.

    Attributes:
        path: the folder.
        digest: see the module; what results are filed under.
        edited: the recorded digest is another one, so `config.json` was changed by hand.
        weights_path, onnx_path: the files; the export may be absent.
        recipe_text, card: contents of recipe.toml and README.md, where present.
    """

    path: Path
    digest: str
    edited: bool
    weights_path: Path
    onnx_path: Path | None
    recipe_text: str | None = dataclasses.field(repr=False)
    card: str | None = dataclasses.field(repr=False)


# Finding ------------------------------------------------------------------------------------------------


def bundled() -> list[str]:
    """Names of the models that come with ratioctl, sorted."""
    return sorted(path.parent.name for path in _models().glob("*/config.json"))


def _models() -> Path:
    return resources.folder("assets") / "models"


def find(model: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The package folder meant by a path or the name of a bundled model.

    A folder of that name with a config.json goes before a bundled model.

    Raises:
        PackageError: neither; the nearest bundled name is suggested.
    """
    path = Path(model)
    names = bundled()
    text = os.fspath(model)
    try:
        if (path / "config.json").is_file():
            return path
        if text in names:
            return _models() / text
        if path.is_dir():
            if (path / "package" / "config.json").is_file():
                raise PackageError(path, "is a run folder", f"Its package is {path / 'package'}.")
            raise PackageError(path, "has no config.json, so it is not a package", _hint(text, names))
        if path.is_file() and path.suffix == ".onnx":
            reason = "is an exported ONNX file, which has no weights to work on"
            step = "Name the package it was made from; `ood-score` and `inspect` take the file itself."
            raise PackageError(path, reason, step)
        if path.exists():
            raise PackageError(path, "is a file, not a package folder", "Name the folder it is in.")
    except PermissionError as error:
        raise PackageError(text, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    except (OSError, ValueError):  # a name no file system can hold
        pass
    raise PackageError(text, "no such package folder or bundled model", _hint(text, names))


def _hint(text: str, names: Sequence[str]) -> str:
    known = f"Bundled models: {', '.join(names)}." if names else "No models are bundled with this install."
    return f"{did_you_mean(text, names)} {known}".lstrip()


# Reading ------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], *, verify: bool = True) -> ModelPackage:
    """Read a package folder; with `verify` every file is compared with its recorded SHA-256.

    Raises:
        PackageError: missing, damaged, of an unknown format, or a value that cannot be; one message each.
    """
    folder = Path(path)
    for _ in range(4):
        raw = _config_bytes(folder)
        try:
            return _read(folder, raw, verify=verify)
        except PackageError:
            if _config_bytes(folder) == raw:
                raise
    return _read(folder, _config_bytes(folder), verify=verify)


def check(path: str | os.PathLike[str]) -> list[tuple[str, str | None]]:
    """Every file of a package with what is wrong with it, None where nothing is; `config.json` first.

    Unlike `read` it goes on after the first fault.
    """
    folder = Path(path)
    shown = folder / "config.json"
    try:
        config = parse_document(_config_bytes(folder), shown)
        spec = parse_config(config, shown, name=_folder_name(folder))
        files = _files(config, shown)
    except PackageError as error:
        return [("config.json", error.reason)]
    findings: list[tuple[str, str | None]] = []
    for name, recorded in sorted(files.items()):
        fault = None
        try:
            _check_file(folder / name, recorded)
            if _plain(name) == WEIGHTS:
                parse_weights(_bytes(folder / name), folder / name)
        except PackageError as error:
            fault = error.reason
        findings.append((name, fault))
    edited = config["ratio"].get("digest") not in (None, _digest(spec, files))
    return [("config.json", "was edited: its recorded digest is another one" if edited else None), *findings]


def weights(package: ModelPackage) -> dict[str, np.ndarray]:
    """The tensors of a package, named as in the state dict, in the stored type (bfloat16, which numpy
    lacks, as float32).

    Raises:
        PackageError: the file changed since, is damaged, or holds a value that is not finite.
    """
    data = _bytes(package.weights_path)
    if hashlib.sha256(data).hexdigest() != package.config["ratio"]["files"].get(package.weights_path.name):
        raise _mismatch(package.weights_path)
    return parse_weights(data, package.weights_path)


def names(packages: Sequence[ModelPackage]) -> list[str]:
    """The packages' names, numbered where one occurs again."""
    found: list[str] = []
    for package in packages:
        name, k = package.name, 2
        while name in found:
            name, k = f"{package.name}-{k}", k + 1
        found.append(name)
    return found


def threshold(spec: Spec, which: str | float = "tpr95") -> float:
    """The confidence below which an image is out of distribution.

    Args:
        which: a stored name such as "tpr95", or a number in [0,1] (also as text).

    Raises:
        UncalibratedError: a name, and the model has no thresholds.
        UsageError: a name that the model does not have (its own are listed), or a number outside [0,1].
    """
    if isinstance(which, str) and which in spec.thresholds:
        return spec.thresholds[which]
    try:
        number = float(which)
    except ValueError:
        number = None
    if number is not None:
        if 0 <= number <= 1:  # false for nan
            return number
        raise UsageError(f"threshold {which}", "is not a confidence in [0,1]", "For example: 0.35.")
    named = re.fullmatch(r"tpr[0-9.]+", str(which))
    if not spec.thresholds and named:
        raise UncalibratedError(
            spec.name, f"has no threshold {which}: it is not calibrated", "Run `ratioctl calibrate` on it."
        )
    stored = ", ".join(sorted(spec.thresholds)) or "none"
    reason = f"{spec.name} has no such threshold" if named else "is neither a name nor a number"
    step = f"{spec.name} has {stored}; a confidence in [0,1] works too, for example 0.35."
    raise UsageError(f"threshold {str(which)!r:.40}", reason, step)


def portable_config(spec: Spec) -> dict[str, Any]:
    """The config without `ratio.files`: the block an ONNX file carries in its metadata."""
    ratio = {key: value for key, value in spec.config["ratio"].items() if key != "files"}
    return {**spec.config, "ratio": {"name": spec.name, **ratio}}


def parse_config(config: object, where: object, *, name: str) -> Spec:
    """Check a config document (the one in a package, or in an ONNX file's metadata).

    Args:
        config: plain JSON values.
        where: what messages call it.
        name: the model's name where `ratio.name` is absent.

    Raises:
        PackageError: not ours, an unknown format, or a value that cannot be.
    """
    if not isinstance(config, dict) or not isinstance(config.get("ratio"), dict):
        raise PackageError(
            where, 'has no "ratio" part, so ratioctl did not write it', "Use `ratioctl package`."
        )
    ratio = config["ratio"]
    version = ratio.get("format")
    if type(version) is not int or version != FORMAT:
        newer = type(version) is int and version > FORMAT
        raise PackageError(
            where,
            f"has format {version!r:.40}; this ratioctl reads format {FORMAT}",
            "Update ratioctl." if newer else AGAIN,
        )

    def bad(key: str, what: str) -> PackageError:
        return PackageError(where, f'"{key}" {what}', AGAIN)

    labels = config.get("label_names")
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(x, str) and x for x in labels):
        raise bad("label_names", "must be a list of two or more names")
    if any("\ud800" <= ch <= "\udfff" for label in labels for ch in label):
        raise bad("label_names", "is not valid Unicode")
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise bad("label_names", f'holds "{twice}" twice, and labels are matched by name')
    if config.get("num_classes", len(labels)) != len(labels):
        raise bad("num_classes", f"is {config['num_classes']!r:.40}, but there are {len(labels)} label names")

    architecture = config.get("architecture")
    if not isinstance(architecture, str) or not architecture:
        raise bad("architecture", "must be a name")
    options = config.get("architecture_options", {})
    if not isinstance(options, dict):
        raise bad("architecture_options", "must be a table of options")

    pixels = config.get("pretrained_cfg")
    if not isinstance(pixels, dict):
        raise bad("pretrained_cfg", "is missing")
    size = pixels.get("input_size")
    if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and n > 0 for n in size)):
        raise bad("pretrained_cfg.input_size", "must be [channels, height, width]")
    if size[0] not in (1, 3) or max(size[1:]) > 16384:
        raise bad("pretrained_cfg.input_size", f"is {size}; channels are 1 or 3, sides at most 16384")
    mean = _numbers(pixels.get("mean"), size[0])
    if mean is None or max(map(abs, mean)) > LARGEST:
        raise bad("pretrained_cfg.mean", f"must be {size[0]} number(s) of at most {LARGEST:g} in size")
    std = _numbers(pixels.get("std"), size[0])
    if std is None or not 1 / LARGEST <= min(std) <= max(std) <= LARGEST:
        raise bad("pretrained_cfg.std", f"must be {size[0]} number(s) from {1 / LARGEST:g} to {LARGEST:g}")
    interpolation = pixels.get("interpolation", "bicubic")
    if not isinstance(interpolation, str):
        raise bad("pretrained_cfg.interpolation", "must be a name")

    score = ratio.get("score", SCORE)
    if score != SCORE:
        raise bad("ratio.score", f'is {score!r:.40}; this ratioctl knows "{SCORE}"')
    temperature = _number(ratio.get("temperature", 1.0))
    if temperature is None or not 1 / LARGEST <= temperature <= LARGEST:
        raise bad("ratio.temperature", f"must be a number from {1 / LARGEST:g} to {LARGEST:g}")
    thresholds = ratio.get("thresholds", {})
    checked = {key: _number(value) for key, value in _table(thresholds, bad, "ratio.thresholds").items()}
    if any(value is None or not 0 <= value <= 1 for value in checked.values()):
        raise bad("ratio.thresholds", "must be confidences in [0,1]")
    ladders = {}
    for norm, budgets in _table(ratio.get("ladders", {}), bad, "ratio.ladders").items():
        ladder = _numbers(budgets, None)
        if norm not in ("1", "1.5", "2", "inf") or not ladder or min(ladder) <= 0:
            raise bad("ratio.ladders", "must hold lists of radii above 0 for the norms 1, 1.5, 2 and inf")
        ladders[norm] = tuple(sorted(ladder))
    return Spec(
        config=config,
        name=ratio["name"] if isinstance(ratio.get("name"), str) and ratio["name"] else name,
        architecture=architecture,
        architecture_options=options,
        label_names=tuple(labels),
        input_size=(size[0], size[1], size[2]),
        mean=mean,
        std=std,
        interpolation=interpolation,
        temperature=temperature,
        thresholds={key: value for key, value in checked.items() if value is not None},
        ladders=ladders,
    )


def parse_weights(data: bytes, where: object) -> dict[str, np.ndarray]:
    """The tensors in the bytes of a safetensors file, as arrays of their own.

    Follows the format's description: 8 bytes header length, a JSON header, then the values, without gaps
    or overlaps.

    Raises:
        PackageError: the header claims what the file cannot hold, or a value is not finite.
    """

    def bad(reason: str) -> PackageError:
        return PackageError(where, reason, AGAIN)

    if len(data) < 8:
        raise bad("is too short for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise bad(f"claims a header of {length} bytes in a file of {len(data)}")
    header = parse_document(data[8 : 8 + length], f"{where} (header)")
    if not isinstance(header, dict):
        raise bad("has a header that is no table of tensors")
    body = memoryview(data)[8 + length :]
    spans, tensors = [], {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = entry.get("shape") if isinstance(entry, dict) else None
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (_counts(shape) and _counts(offsets) and len(offsets) == 2):
            raise bad(f'has a damaged entry for the tensor "{name}"')
        dtype = _DTYPES.get(str(entry.get("dtype")))
        if dtype is None:
            raise bad(f'stores "{name}" as {entry.get("dtype")!r:.40}, which is not supported')
        begin, end = offsets
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if begin > end or end > len(body) or end - begin != size or len(shape) > 32:
            raise bad(f'claims {size} bytes for the tensor "{name}" where the file has others')
        spans.append((begin, end))
        try:
            array = np.frombuffer(body[begin:end], dtype=dtype).reshape(shape)
        except ValueError:  # no values, and a side that no array can have
            raise bad(f'claims an impossible shape for the tensor "{name}"') from None
        if entry["dtype"] == "BF16":
            array = (array.astype("<u4") << np.uint32(16)).view("<f4")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise bad(f'holds values that are not finite (NaN or infinity) in "{name}"')
        tensors[name] = array.copy()
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise bad("has gaps or overlaps between its tensors")
        position = end
    if position != len(body):
        raise bad(f"has {len(body) - position} bytes that belong to no tensor")
    if not tensors:
        raise bad("holds no tensors")
    return tensors


def _read(folder: Path, raw: bytes, *, verify: bool) -> ModelPackage:
    where = folder / "config.json"
    config = parse_document(raw, where)
    spec = parse_config(config, where, name=_folder_name(folder))
    files = _files(config, where)
    for name, recorded in files.items():
        if verify:
            _check_file(folder / name, recorded)
        else:
            _regular(folder / name)
    actual = {_plain(name): folder / name for name in files}
    texts = {}
    for role in (RECIPE, CARD):
        if role in actual:
            if _regular(actual[role]).st_size > MAX_CONFIG_BYTES:
                raise PackageError(actual[role], f"is larger than {MAX_CONFIG_BYTES >> 20} MiB", AGAIN)
            try:
                texts[role] = _bytes(actual[role]).decode("utf-8")
            except UnicodeDecodeError:
                raise PackageError(actual[role], "is not UTF-8 text", AGAIN) from None
    digest = _digest(spec, files)
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(Spec)}
    return ModelPackage(
        **fields,
        path=folder,
        digest=digest,
        edited=config["ratio"].get("digest") not in (None, digest),
        weights_path=actual[WEIGHTS],
        onnx_path=actual.get(ONNX),
        recipe_text=texts.get(RECIPE),
        card=texts.get(CARD),
    )


def _folder_name(folder: Path) -> str:
    here = folder.absolute()
    return here.parent.name if here.name == "package" else here.name


def _config_bytes(folder: Path) -> bytes:
    where = folder / "config.json"
    if not folder.is_dir():
        raise PackageError(folder, "there is no such package folder", _hint(str(folder), bundled()))
    if _regular(where).st_size > MAX_CONFIG_BYTES:
        raise PackageError(where, f"is larger than {MAX_CONFIG_BYTES >> 20} MiB", AGAIN)
    return _bytes(where)


def _regular(path: Path) -> os.stat_result:
    """The status of a plain file. Raises PackageError for anything else, so that nothing waits on a FIFO."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise PackageError(path, "is missing", AGAIN) from None
    except OSError as error:
        raise PackageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    if not stat.S_ISREG(status.st_mode):
        raise PackageError(path, "is not a plain file", AGAIN)
    if path.is_symlink() and _leads_out(path):
        step = "Copy the package with the files in it: cp -rL."
        raise PackageError(path, "is a link that leads out of the package", step)
    return status


def _leads_out(path: Path) -> bool:
    """Whether a link's target lies outside its folder; installers may link what is bundled."""
    inside = path.parent.resolve() in path.resolve().parents
    return not inside and _models().absolute() not in path.absolute().parents


def _bytes(path: Path) -> bytes:
    _regular(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None


def _check_file(path: Path, recorded: str) -> None:
    _regular(path)
    try:
        with path.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PackageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    if actual != recorded:
        raise _mismatch(path)


def _mismatch(path: Path) -> PackageError:
    return PackageError(path, "does not match its recorded SHA-256; it changed after packaging", AGAIN)


def parse_document(raw: bytes, where: object) -> Any:
    """JSON without duplicate keys, NaN or infinity, at most MAX_DEPTH deep.

    Raises:
        PackageError: anything else; `where` is what the message calls it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, value in pairs:
            if key in table:
                raise ValueError(f'"{key}" stands there twice')
            table[key] = value
        return table

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is no finite number")
        return number

    try:
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
        if _deeper_than(document, MAX_DEPTH):
            raise RecursionError
        return document
    except RecursionError:
        reason = "nested too deeply"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except ValueError as error:  # includes JSONDecodeError
        reason = str(error)
    raise PackageError(where, f"is not valid JSON: {reason}", AGAIN)


def _deeper_than(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return True


def _files(config: dict[str, Any], where: Path) -> dict[str, str]:
    """`ratio.files`, checked: plain names inside the folder, one per role, weights among them."""
    files = config["ratio"].get("files")
    if not isinstance(files, dict):
        raise PackageError(where, '"ratio.files" is missing', AGAIN)
    for name, recorded in files.items():
        inside = name and not name.startswith(".") and not any(ch in "/\\:\0" for ch in name)
        if not inside or name == "config.json" or name != safe_text(name) or len(os.fsencode(name)) > 255:
            raise PackageError(
                where, f'"ratio.files" holds {name!r:.80}, which is no name of a file here', AGAIN
            )
        if not isinstance(recorded, str) or not re.fullmatch(r"[0-9a-f]{64}", recorded):
            raise PackageError(where, f'"ratio.files" has no SHA-256 for {name}', AGAIN)
    roles = [_plain(name) for name in files]
    if len(set(roles)) != len(roles):
        raise PackageError(where, '"ratio.files" names two files for the same thing', AGAIN)
    if WEIGHTS not in roles:
        raise PackageError(where, f'"ratio.files" does not name {WEIGHTS}', AGAIN)
    return files


def _plain(name: str) -> str:
    """ "README.md" for "README-1a2b3c4d.md"; other names unchanged."""
    staged = _STAGED.fullmatch(name)
    return staged[1] + staged[2] if staged else name


def _digest(spec: Spec, files: Mapping[str, str]) -> str:
    decisive = {
        "architecture": spec.architecture,
        "architecture_options": spec.architecture_options,
        "label_names": spec.label_names,
        "input_size": spec.input_size,
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "temperature": spec.temperature,
        "thresholds": spec.thresholds,
        "weights": next(recorded for name, recorded in files.items() if _plain(name) == WEIGHTS),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _number(value: object) -> float | None:
    """A finite number as a float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(value: object, count: int | None) -> tuple[float, ...] | None:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        return None
    numbers = [_number(item) for item in value]
    return tuple(n for n in numbers if n is not None) if None not in numbers else None


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _table(value: object, bad: Callable[[str, str], PackageError], key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad(key, "must be a table")
    return value


# Writing ------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    weights: bytes | Mapping[str, np.ndarray],
    recipe_text: str | None = None,
    card: str | None = None,
    onnx: bytes | Path | None = None,
) -> ModelPackage:
    """Write a package folder, or replace the package that is there; all or nothing.

    Args:
        config: as in `config.json`; `num_classes`, and of `ratio` the `name` (the folder's), `format`,
            `score`, `temperature` (1) and `thresholds` (none) are filled in where they are missing, `files`
            and `digest` always.
        weights: the bytes of a safetensors file, or arrays by name.
        card: README.md; None renders one from the config.

    Raises:
        PackageError: a config or weights that `read` would refuse.
        OutputError: not allowed, a folder with other things in it, or another process is writing it.
        DiskError: the disk is full or failed. In every case nothing half-written stays.
    """
    folder = Path(path)
    document = _complete(config, _folder_name(folder))
    parse_config(document, folder / "config.json", name="")
    data = bytes(weights) if isinstance(weights, bytes | bytearray) else _safetensors(weights)
    parse_weights(data, folder / WEIGHTS)
    contents = {WEIGHTS: data}
    if recipe_text is not None:
        contents[RECIPE] = recipe_text.encode()
    contents[CARD] = (render_card(document) if card is None else card).encode()
    if onnx is not None:
        contents[ONNX] = _given(onnx)
    with writing(folder):
        if (folder / "config.json").is_file():
            with lock(folder):
                _replace(folder, document, {}, contents)
        elif folder.is_dir() and any(folder.iterdir()):
            raise OutputError(folder, "is not empty and not a package", "Name a new folder.")
        else:
            _fresh(folder, document, contents)
    return _read_again(folder)


def update(
    package: ModelPackage,
    *,
    config_changes: Mapping[str, Any] | None = None,
    card: str | None = None,
    onnx: bytes | Path | None = None,
) -> ModelPackage:
    """Change a package on disk: calibration, measurements, card, export. Atomic, see the module.

    The folder is read again under the lock, so what another process wrote in the meantime stays.

    Args:
        config_changes: merged key by key at the top and within `ratio` and `pretrained_cfg`; deeper values
            are replaced whole.
        card: the new README.md. None renders it anew where the present one was rendered, keeping what was
            added at its end, and leaves one that somebody wrote.
        onnx: the export. None keeps the present one, with the new config in its metadata, unless the digest
            changes: an export with the old temperature or thresholds inside is removed.

    Raises:
        as `write`.
    """
    folder = package.path
    with writing(folder), lock(folder):
        old = _read_again(folder, verify=False)
        document = {**old.config, "ratio": dict(old.config["ratio"])}
        for key, value in (config_changes or {}).items():
            nested = key in ("ratio", "pretrained_cfg") and isinstance(value, Mapping)
            document[key] = {**document.get(key, {}), **value} if nested else value
        kept = dict(old.config["ratio"]["files"])
        document = _complete(document, old.name)
        spec = parse_config(document, folder / "config.json", name="")
        contents: dict[str, bytes] = {}
        if card is not None:
            contents[CARD] = card.encode()
        elif old.card is None:
            contents[CARD] = render_card(document).encode()
        elif old.card.startswith(rendered := render_card(old.config)):
            contents[CARD] = (render_card(document) + old.card.removeprefix(rendered)).encode()
        if onnx is not None:
            contents[ONNX] = _given(onnx)
        elif _digest(spec, kept) != old.digest:
            kept = {name: recorded for name, recorded in kept.items() if _plain(name) != ONNX}
        elif old.onnx_path is not None and config_changes:
            stated = {**document["ratio"], "digest": old.digest}
            data = _bytes(old.onnx_path)
            if hashlib.sha256(data).hexdigest() != kept[old.onnx_path.name]:  # no new hash for damage
                raise _mismatch(old.onnx_path)
            contents[ONNX] = _restamped(data, {**document, "ratio": stated})
        _replace(folder, document, kept, contents)
    return _read_again(folder)


def _read_again(folder: Path, *, verify: bool = True) -> ModelPackage:
    """A package that was there a moment ago; raises DiskError where it is gone, else as `read`."""
    with writing(folder):
        folder.stat()
    return read(folder, verify=verify)


def _restamped(data: bytes, config: Mapping[str, Any]) -> bytes:
    """An exported file whose metadata hold `config`; its graph stays as it is."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except DecodeError:
        return data  # no ONNX file: for whoever loads it to say
    for entry in model.metadata_props:
        if entry.key == "ratioctl":
            entry.value = json.dumps(config)
    stamped: bytes = model.SerializeToString()
    return stamped


def _complete(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy with the defaults filled in, free of what is worked out when writing."""
    ratio = config.get("ratio", {})
    if not isinstance(ratio, Mapping):
        raise PackageError("config", '"ratio" must be a table', AGAIN)
    defaults = {"name": name, "format": FORMAT, "score": SCORE, "temperature": 1.0, "thresholds": {}}
    document = {**config, "ratio": {**defaults, **ratio}}
    for worked_out in ("files", "digest"):
        document["ratio"].pop(worked_out, None)
    labels = config.get("label_names")
    if isinstance(labels, Sequence):
        document.setdefault("num_classes", len(labels))
    try:
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PackageError("config", f"has no JSON form: {error}", "Use plain, finite values.") from None
    return plain


def _safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    return save(arrays, metadata={"format": "pt"})


def _given(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else bytes(content)


def _config_text(config: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """config.json's bytes for these files, digest included."""
    ratio = {key: value for key, value in config["ratio"].items() if key not in ("files", "digest")}
    spec = parse_config({**config, "ratio": ratio}, "config.json", name="")
    ratio = {**ratio, "digest": _digest(spec, files), "files": dict(sorted(files.items()))}
    return (json.dumps({**config, "ratio": ratio}, indent=2) + "\n").encode()


def _fresh(folder: Path, config: dict[str, Any], contents: Mapping[str, bytes]) -> None:
    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_siblings(target)
    partial = target.parent / f".{target.name}.{os.getpid()}-{time.monotonic_ns()}.partial"
    partial.mkdir()
    try:
        with lock(partial):
            for name, data in contents.items():
                write_synced(partial / name, data)
            files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
            write_synced(partial / "config.json", _config_text(config, files))
        sync_folder(partial)
        try:
            os.rename(partial, target)  # replaces an empty folder, refuses a full one
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise OutputError(folder, "was written by another process meanwhile", "Try again.") from None
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _replace(
    folder: Path, config: dict[str, Any], kept: Mapping[str, str], contents: Mapping[str, bytes]
) -> None:
    """Make the package in `folder` hold `config`, the `kept` files and the new `contents`; locked by caller.

    Args:
        kept: present files with their SHA-256, as `config.json` has them now; those of a role in
            `contents` are superseded.
        contents: new bytes by plain name.
    """
    files = {name: recorded for name, recorded in kept.items() if _plain(name) not in contents}
    made: list[Path] = []
    try:
        for role, data in contents.items():
            recorded = hashlib.sha256(data).hexdigest()
            same = next((n for n, h in kept.items() if _plain(n) == role and h == recorded), None)
            stem, suffix = os.path.splitext(role)
            name = same or f"{stem}-{recorded[:8]}{suffix}"
            if same is None:
                made.append(folder / name)
                _put(folder / name, data)
            files[name] = recorded
        _put_config(folder, _config_text(config, files))
    except BaseException:
        named = _named_now(folder)
        for path in made:
            if path.name not in named:
                path.unlink(missing_ok=True)
        raise
    # The change is made. What follows only gives plain names back, so a fault here costs nothing:
    # every state is complete, and the next change comes by here again.
    with contextlib.suppress(OSError):
        plain = {}
        for name, recorded in files.items():
            role = _plain(name)
            if role != name:
                _link(folder / name, folder / role)
            plain[role] = recorded
        if plain != files:
            _put_config(folder, _config_text(config, plain))
        for path in folder.iterdir():
            ours = path.name in ROLES or _STAGED.fullmatch(path.name) or path.name.endswith(".tmp~")
            if ours and path.name not in plain:
                path.unlink()


def _named_now(folder: Path) -> set[str]:
    try:
        config = parse_document(_config_bytes(folder), "")
        return set(_files(config, folder)) if isinstance(config.get("ratio"), dict) else set()
    except (PackageError, AttributeError):
        return set()


def _put_config(folder: Path, text: bytes) -> None:
    _put(folder / "config.json", text)
    sync_folder(folder)


def _put(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all; the folder is the caller's to sync."""
    temporary = path.with_name(f".{path.name}.tmp~")
    try:
        write_synced(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _link(source: Path, target: Path) -> None:
    """Give `source` a second name, in one step; a copy where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}.tmp~")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_synced(temporary, source.read_bytes())
    os.replace(temporary, target)


def _sweep_siblings(target: Path) -> None:
    """Remove what writers of this package left when they were killed."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*-*.partial"):
        writer = partial.name.rsplit(".", 2)[1].partition("-")[0]
        with contextlib.suppress(OSError, RatioctlError):
            dead = writer.isdecimal() and not alive(int(writer))
            if dead or time.time() - partial.stat().st_mtime > 60:
                with lock(partial):
                    shutil.rmtree(partial)


# The model card -----------------------------------------------------------------------------------------


def render_card(config: Mapping[str, Any]) -> str:
    """README.md for a config: Markdown with the YAML front matter that model hubs read.

    States only what the config holds. `ratio.metrics` is a list of measurements (`{"name", "value", "n",
    "interval", "dataset", "ball"}`), or a table with such `measurements` and a list of `warnings`.
    `ratio.files` and `ratio.digest` are not used, so writing files does not change the card.
    """
    spec = parse_config({**config, "ratio": {**config["ratio"]}}, "config", name="model")
    ratio = config["ratio"]
    channels, height, width = spec.input_size
    front = {
        "library_name": "ratioctl",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "adversarial-robustness", "out-of-distribution-detection", "ratio"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {_md(spec.name)}", ""]
    summary = f"A {_md(spec.architecture)}{_options(spec.architecture_options)} image classifier with "
    summary += f"{len(spec.label_names)} classes for {channels}x{height}x{width} input, packaged by ratioctl."
    lines += [summary, ""]
    if ratio.get("objective"):
        lines += [f"Training objective: {_md(_inline(ratio['objective']))}.", ""]

    lines += ["## Use", "", "```python", "import ratioctl", ""]
    lines += [
        'model = ratioctl.load_model("path/to/this/folder")  # pixels in [0,1], NCHW, to logits',
        "```",
        "",
    ]
    lines += ["Normalisation is part of the model: give it pixels in [0,1] and nothing else.", ""]

    shown, rest = spec.label_names[:100], len(spec.label_names) - 100
    more = f" and {rest} more, listed in config.json" if rest > 0 else ""
    lines += ["## Classes", "", ", ".join(_md(label) for label in shown) + more, ""]

    lines += ["## Calibration", ""]
    if spec.calibrated:
        lines += [
            f"Logits are divided by the temperature {spec.temperature:.6g} before the softmax. An image "
        ]
        lines[-1] += "counts as out of distribution where its highest probability is below the threshold:"
        lines += ["", "| threshold | confidence |", "|---|---|"]
        lines += [f"| {_md(key)} | {value:.6g} |" for key, value in sorted(spec.thresholds.items())]
        lines += ["", "`tpr95` keeps 95 % of the in-distribution images it was chosen on."]
    else:
        lines += [
            "**Not calibrated**: temperature 1, no thresholds. Its confidences mean little, and it cannot "
        ]
        lines[-1] += "flag images; run `ratioctl calibrate` first."
    calibration = ratio.get("calibration")
    if isinstance(calibration, Mapping) and calibration:
        lines += ["", "| calibration | |", "|---|---|"]
        lines += [f"| {_md(key)} | {_md(_inline(value))} |" for key, value in calibration.items()]
    lines += [""]

    lines += ["## Measurements", "", *_measurements(ratio.get("metrics")), ""]

    lines += ["## Limits", ""]
    lines += [
        "- It knows only the classes above. The flag is a statistical statement: some images of other things "
    ]
    lines[-1] += "pass, and about as many known ones are flagged as the threshold's name says."
    lines += [
        "- Robustness holds for small changes in the norms and radii it was measured at, not for other ones."
    ]
    lines += [
        "- Counterfactuals show what this model reacts to, which need not be what is true of the world."
    ]
    lines += [""]

    provenance = ratio.get("provenance")
    if isinstance(provenance, Mapping) and provenance:
        lines += ["## Provenance", "", "| | |", "|---|---|"]
        lines += [f"| {_md(key)} | {_md(_inline(value))} |" for key, value in provenance.items()]
        lines += [
            "",
            "The complete recipe is in `recipe.toml` where the model was trained with ratioctl.",
            "",
        ]
    return "\n".join(lines)


def _measurements(metrics: Any) -> list[str]:
    warnings: Any = []
    if isinstance(metrics, Mapping) and "measurements" in metrics:
        metrics, warnings = metrics["measurements"], metrics.get("warnings", [])
    if isinstance(metrics, Mapping):
        metrics = [{"name": key, "value": value} for key, value in metrics.items()]
    rows = [row for row in metrics if isinstance(row, Mapping)] if isinstance(metrics, list) else []
    if not rows:
        return ["None yet: nothing is claimed about its accuracy, robustness or detection."]
    lines = ["| measurement | value | 95 % interval | n | data | ball |", "|---|---|---|---|---|---|"]
    for row in rows:
        interval = row.get("interval")
        shown = " to ".join(_inline(end) for end in interval) if isinstance(interval, list | tuple) else "-"
        cells = [_inline(row.get("name")), _inline(row.get("value")), shown]
        cells += [_inline(row[key]) if row.get(key) is not None else "-" for key in ("n", "dataset", "ball")]
        if row.get("ball") is not None and row.get("attack"):  # a rate under attack is worth what attacked it
            cells[-1] += f" ({_inline(row['attack'])})"
        lines.append("| " + " | ".join(_md(cell) for cell in cells) + " |")
    if isinstance(warnings, list) and warnings:
        lines += ["", *(f"- Warning: {_md(_inline(warning))}" for warning in warnings)]
    return lines


def _inline(value: object) -> str:
    """A JSON value in one line of prose."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if set(value) == {"p", "eps"}:
            return f"l{value['p']} {_inline(value['eps'])}"
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_inline(item) for item in value)
    return str(value)


def _options(options: Mapping[str, Any]) -> str:
    return f" ({_md(_inline(options))})" if options else ""


def _md(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(safe_text(text), quote=False))
