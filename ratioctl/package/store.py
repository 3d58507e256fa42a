"""Package folders on disk: find, read, verify, and change them atomically.

    model.safetensors   weights
    config.json         the root: labels, input, calibration, and the SHA-256 of every other file
    recipe.toml         how it was trained (absent for models trained elsewhere)
    README.md           the model card
    model.onnx          optional export

**Readable at every moment.** A new package is written to a sibling folder and renamed into place. A
change to an existing one has two steps, each complete in itself. First, new content is written, synced and
renamed to a name with its hash (`README-1a2b3c4d.md`), and `config.json`, which names every file, is replaced
with one `os.replace`: from here on the package is the new one. Second, the content gets its plain name,
which `config.json` no longer mentioned, another `os.replace` makes `config.json` name it, and the hashed
names are removed. A process that dies in between leaves a `config.json` whose files all exist; the next
change completes the clean-up, which removes files under these names that `config.json` does not list (an
export from before a calibration, for example) and nothing else. A reader that sees `config.json` change
meanwhile starts over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl.errors import OutputError, PackageError, RatioctlError
from ratioctl.package.card import render_card, rerender
from ratioctl.package.config import (
    AGAIN,
    CARD,
    FORMAT,
    MAX_CONFIG_BYTES,
    ONNX,
    RECIPE,
    ROLES,
    SCORE,
    STAGED,
    WEIGHTS,
    Spec,
    digest_of,
    parse_config,
    parse_document,
    plain_name,
    recorded_files,
)
from ratioctl.package.weights import parse_weights, serialize
from ratioctl.utils import resources
from ratioctl.utils.atomic_files import alive, lock, sync_folder, write_synced, writing
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.suggest import did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPackage(Spec):
    """A package on disk, read and checked.

    Attributes:
        path: the folder.
        digest: identifies the model, see `ratioctl.package.config`; the key of cached results.
        edited: the recorded digest differs, so `config.json` was changed by hand.
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


def bundled() -> list[str]:
    """Names of the models that come with ratioctl, sorted."""
    return sorted(path.parent.name for path in _models().glob("*/config.json"))


def _models() -> Path:
    return resources.folder("assets") / "models"


def find(model: str | os.PathLike[str] = DEFAULT_MODEL) -> Path:
    """The package folder meant by a path or the name of a bundled model.

    A folder of that name with a config.json takes precedence over a bundled model.

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


def resolve(model: str | os.PathLike[str] | ModelPackage = DEFAULT_MODEL) -> ModelPackage:
    """The package meant by a value, a folder or a bundled name, read and verified.

    Raises:
        PackageError: as `find` and `read`.
    """
    return model if isinstance(model, ModelPackage) else read(find(model))


def is_bundled(package: ModelPackage) -> bool:
    """Whether the package belongs to the installation, where it is read-only."""
    return resources.folder("assets").resolve() in package.path.resolve().parents


def check_writable(package: ModelPackage) -> None:
    """Raise OutputError for a bundled package."""
    if is_bundled(package):
        reason = "is a bundled model, which is read-only"
        raise OutputError(package.name, reason, "Write a changed copy with --out DIR.")


def _hint(text: str, names: Sequence[str]) -> str:
    known = f"Bundled models: {', '.join(names)}." if names else "No models are installed with ratioctl."
    return f"{did_you_mean(text, names)} {known}".lstrip()


def read(path: str | os.PathLike[str], *, verify: bool = True) -> ModelPackage:
    """Read a package folder; with `verify` every file is compared with its recorded SHA-256.

    Raises:
        PackageError: missing, damaged, of an unknown format, or an impossible value.
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
    """Every file of a package with its fault or None, `config.json` first; unlike `read`, all faults."""
    folder = Path(path)
    shown = folder / "config.json"
    try:
        config = parse_document(_config_bytes(folder), shown)
        spec = parse_config(config, shown, name=_folder_name(folder))
        files = recorded_files(config, shown)
    except PackageError as error:
        return [("config.json", error.reason)]
    findings: list[tuple[str, str | None]] = []
    for name, recorded in sorted(files.items()):
        fault = None
        try:
            _check_file(folder / name, recorded)
            if plain_name(name) == WEIGHTS:
                parse_weights(_bytes(folder / name), folder / name)
        except PackageError as error:
            fault = error.reason
        findings.append((name, fault))
    edited = config["ratio"].get("digest") not in (None, digest_of(spec, files))
    return [("config.json", "was edited: its recorded digest differs" if edited else None), *findings]


def read_weights(package: ModelPackage) -> dict[str, np.ndarray]:
    """The tensors of a package, named as in the state dict, in the stored type (bfloat16, which numpy
    lacks, as float32).

    Raises:
        PackageError: the file changed since, is damaged, or holds a value that is not finite.
    """
    data = _bytes(package.weights_path)
    if hashlib.sha256(data).hexdigest() != package.config["ratio"]["files"].get(package.weights_path.name):
        raise _mismatch(package.weights_path)
    return parse_weights(data, package.weights_path)


def _read(folder: Path, raw: bytes, *, verify: bool) -> ModelPackage:
    where = folder / "config.json"
    config = parse_document(raw, where)
    spec = parse_config(config, where, name=_folder_name(folder))
    files = recorded_files(config, where)
    for name, recorded in files.items():
        if verify:
            _check_file(folder / name, recorded)
        else:
            _regular(folder / name)
    actual = {plain_name(name): folder / name for name in files}
    texts = {}
    for role in (RECIPE, CARD):
        if role in actual:
            if _regular(actual[role]).st_size > MAX_CONFIG_BYTES:
                raise PackageError(actual[role], f"is larger than {MAX_CONFIG_BYTES >> 20} MiB", AGAIN)
            try:
                texts[role] = _bytes(actual[role]).decode("utf-8")
            except UnicodeDecodeError:
                raise PackageError(actual[role], "is not UTF-8 text", AGAIN) from None
    digest = digest_of(spec, files)
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
        DiskError: the disk is full or failed. In every case no partial file stays.
    """
    folder = Path(path)
    document = _complete(config, _folder_name(folder))
    parse_config(document, folder / "config.json", name="")
    data = bytes(weights) if isinstance(weights, bytes | bytearray) else serialize(weights)
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
        card: the new README.md. None renders it again where the present one was rendered, keeping text
            appended to it, and leaves a card written by hand.
        onnx: the export. None keeps the present one, with the new config in its metadata, unless the digest
            changes: an export that contains the old temperature or thresholds is removed.

    Raises:
        OutputError: also for a bundled package. The others as `write`.
    """
    check_writable(package)
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
        elif (rendered := rerender(old.card, old.config, document)) is not None:
            contents[CARD] = rendered.encode()
        if onnx is not None:
            contents[ONNX] = _given(onnx)
        elif digest_of(spec, kept) != old.digest:
            kept = {name: recorded for name, recorded in kept.items() if plain_name(name) != ONNX}
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
        return data  # not an ONNX file; loading it reports that
    for entry in model.metadata_props:
        if entry.key == "ratioctl":
            entry.value = json.dumps(config)
    stamped: bytes = model.SerializeToString()
    return stamped


def _complete(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy with defaults filled in and without the values computed on writing."""
    ratio = config.get("ratio", {})
    if not isinstance(ratio, Mapping):
        raise PackageError("config", '"ratio" must be a table', AGAIN)
    defaults = {"name": name, "format": FORMAT, "score": SCORE, "temperature": 1.0, "thresholds": {}}
    document = {**config, "ratio": {**defaults, **ratio}}
    for computed in ("files", "digest"):
        document["ratio"].pop(computed, None)
    labels = config.get("label_names")
    if isinstance(labels, Sequence):
        document.setdefault("num_classes", len(labels))
    try:
        plain: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PackageError("config", f"has no JSON form: {error}", "Use plain, finite values.") from None
    return plain


def _given(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else bytes(content)


def _config_text(config: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """config.json's bytes for these files, digest included."""
    ratio = {key: value for key, value in config["ratio"].items() if key not in ("files", "digest")}
    spec = parse_config({**config, "ratio": ratio}, "config.json", name="")
    ratio = {**ratio, "digest": digest_of(spec, files), "files": dict(sorted(files.items()))}
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
    files = {name: recorded for name, recorded in kept.items() if plain_name(name) not in contents}
    made: list[Path] = []
    try:
        for role, data in contents.items():
            recorded = hashlib.sha256(data).hexdigest()
            same = next((n for n, h in kept.items() if plain_name(n) == role and h == recorded), None)
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
    # The change is complete. The rest only restores plain names: a fault here is harmless, because every
    # state is complete and the next change repeats it.
    with contextlib.suppress(OSError):
        plain = {}
        for name, recorded in files.items():
            role = plain_name(name)
            if role != name:
                _link(folder / name, folder / role)
            plain[role] = recorded
        if plain != files:
            _put_config(folder, _config_text(config, plain))
        for path in folder.iterdir():
            ours = path.name in ROLES or STAGED.fullmatch(path.name) or path.name.endswith(".tmp~")
            if ours and path.name not in plain:
                path.unlink()


def _named_now(folder: Path) -> set[str]:
    try:
        config = parse_document(_config_bytes(folder), "")
        return set(recorded_files(config, folder)) if isinstance(config.get("ratio"), dict) else set()
    except (PackageError, AttributeError):
        return set()


def _put_config(folder: Path, text: bytes) -> None:
    _put(folder / "config.json", text)
    sync_folder(folder)


def _put(path: Path, data: bytes) -> None:
    """Write a file completely or not at all; the caller syncs the folder."""
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
    """Remove the partial folders of killed writers of this package."""
    for partial in target.parent.glob(f".{glob.escape(target.name)}.*-*.partial"):
        writer = partial.name.rsplit(".", 2)[1].partition("-")[0]
        with contextlib.suppress(OSError, RatioctlError):
            dead = writer.isdecimal() and not alive(int(writer))
            if dead or time.time() - partial.stat().st_mtime > 60:
                with lock(partial):
                    shutil.rmtree(partial)
