"""The JSON certificate of `ratioctl parity`: its digest, and the check that `ratioctl verify` does. Light."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ratioctl.errors import PackageError
from ratioctl.package import ModelPackage, parse_document

SCHEMA = "ratioctl/parity/1"
AGAIN = "Make it again with `ratioctl parity`."
MAX_BYTES = 16 * 2**20


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its own SHA-256, so that a changed number is noticed; it is no signature."""
    return {**document, "sha256": _digest(document)}


def _digest(document: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """A certificate. Raises PackageError where it is missing, not JSON or another document."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PackageError(path, "is too large for a certificate", AGAIN)
        document = parse_document(path.read_bytes(), path)
    except OSError as error:
        raise PackageError(path, f"cannot be read: {error.strerror}", AGAIN) from None
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise PackageError(path, "is not a certificate of ratioctl parity", AGAIN)
    return document


def faults(
    document: Mapping[str, Any], package: ModelPackage, folder: Path
) -> Iterator[tuple[str, str | None]]:
    """What the certificate is about, each with its fault or None.

    Args:
        folder: of the certificate; a file that is not found under its path is looked for there, and in the
            package.
    """
    changed = None if document.get("sha256") == _digest(document) else "was changed after it was written"
    yield "certificate", changed
    if changed is not None:
        return
    try:
        same = document["model"]["digest"] == package.digest
        yield "model", None if same else "the certificate is about another package (its digest differs)"
        for file in document["files"]:
            yield file["path"], _file_fault(file, package, folder)
        failed = [row for row in document["results"] if row["ok"] is False]
        said = f"{len(failed)} of {len(document['results'])} comparisons exceeded the tolerance"
        yield "results", said if failed or document["ok"] is not True else None
    except (KeyError, TypeError):
        yield "certificate", "lacks a part that ratioctl writes"


def _file_fault(file: Mapping[str, Any], package: ModelPackage, folder: Path) -> str | None:
    given, beside = Path(file["path"]), package.path / Path(file["path"]).name
    others = []
    for path in (given, folder / given.name, beside):
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            continue
        if found == file["sha256"]:
            return None
        others.append(path)
    if others and others != [beside]:  # a package has its own file of the usual name
        return f"{others[0]} is another file than the certified one"
    return "not found, neither here nor beside the certificate nor in the package"
