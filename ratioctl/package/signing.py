"""Detached signatures of packages: a pipeline can refuse a model that its owner did not release.

`config.json.minisig` beside `config.json` is a signature in minisign's format (Ed25519 over BLAKE2b-512) that
other programs verify as well: `minisign -V -p release.pub -m config.json`. It covers every byte of that file,
which lists every other file with its SHA-256: a changed weight, threshold, metric or card needs a new
signature. Requires the extra `ratioctl[sign]` (py-minisign, on top of cryptography).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ratioctl.errors import OutputError, PackageError, UsageError
from ratioctl.package import config, store
from ratioctl.utils import optional
from ratioctl.utils.atomic_files import lock, make_folder, sync_folder, write_file, writing
from ratioctl.utils.text import safe_text

SIGNATURE = "config.json.minisig"
MAX_BYTES = 64 * 2**10  # of a key or a signature; honest ones have some hundred
SIGN_AGAIN = (
    "If the change was intended, have its owner sign it again (`ratioctl sign`); else get the package again."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signed:
    """A valid signature.

    Attributes:
        path: the signature file.
        key_id: of the signing key, as minisign prints it: 16 hexadecimal digits.
        comment: the trusted comment, which the signature covers as well.
    """

    path: Path
    key_id: str
    comment: str


def new_key(stem: Path, password: str | None = None) -> tuple[Path, Path]:
    """Create a key pair: `stem`.key, readable only by its owner, and `stem`.pub, to be published.

    Args:
        password: encrypts the secret key (scrypt); None leaves it unencrypted, for unattended signing.

    Raises:
        UsageError: the path has no file name.
        OutputError, DiskError: a file exists already or cannot be written; partial files are removed.
    """
    if not stem.name:
        raise UsageError(stem, "is not a file name", "For example: release, for release.key and release.pub.")
    minisign = _minisign()
    secret, public = stem.with_name(stem.name + ".key"), stem.with_name(stem.name + ".pub")
    for path in (secret, public):
        if os.path.lexists(path):
            raise OutputError(
                path, "exists already, and a replaced key cannot be recovered", "Choose another name."
            )
    pair = minisign.KeyPair.generate()
    if password:
        pair.secret_key.encrypt(password)
    make_folder(stem.parent)
    with writing(secret):
        descriptor = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(bytes(pair.secret_key) + b"\n")
                stream.flush()
                os.fsync(descriptor)
            sync_folder(secret.parent)
            write_file(public, bytes(pair.public_key) + b"\n")
        except BaseException:
            secret.unlink()
            raise
    return secret, public


def is_encrypted(key: Path) -> bool:
    """Whether a secret key needs its password. Raises UsageError as `sign`."""
    return bool(_secret_key(key).is_encrypted())


def sign(folder: Path, key: Path, password: str | None = None) -> Signed:
    """Sign a package without faults, replacing its signature if it has one.

    Raises:
        PackageError: a file differs from its recorded hash, or is not listed in `config.json`.
        UsageError: not a secret key in minisign's format, or the wrong password.
        OutputError, DiskError: the signature cannot be written.
    """
    secret = _secret_key(key)
    if secret.is_encrypted():
        if password is None:
            raise UsageError(key, "is encrypted", "Give its password.")
        try:
            secret.decrypt(password)
        except ValueError:
            raise UsageError(key, "the password is wrong", "Try again.") from None
    with writing(folder), lock(folder):
        raw = _sound(folder)
        digest = store.read(folder, verify=False).digest
        comment = f"timestamp:{int(time.time())}\tfile:config.json\tdigest:{digest}"
        signature = secret.sign(raw, trusted_comment=comment)
        write_file(folder / SIGNATURE, bytes(signature) + b"\n")
    return Signed(path=folder / SIGNATURE, key_id=_key_id(secret.get_public_key()), comment=comment)


def verify(folder: Path, keys: Sequence[str | os.PathLike[str]]) -> Signed:
    """Check that one of `keys` signed this package and that every file is unchanged since.

    Args:
        keys: public keys, each a file or the key itself ("RW..."); one match is enough.

    Raises:
        PackageError: not signed, signed by another key, changed since, or containing unsigned files.
        UsageError: not a public key.
    """
    known = {_key_id(key): key for key in map(_public_key, keys)}
    path = folder / SIGNATURE
    raw = _config(folder)
    try:
        signature = _minisign().Signature.from_bytes(_read(path))
    except FileNotFoundError:
        raise PackageError(
            folder, f"is not signed: there is no {SIGNATURE}", "Have its owner sign it: `ratioctl sign`."
        ) from None
    except OSError as error:
        raise PackageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    except ValueError as error:
        raise PackageError(path, f"is not a signature in minisign's format ({error})", SIGN_AGAIN) from None
    made_by = _key_id(signature)
    if made_by not in known:
        trusted = ", ".join(known)
        raise PackageError(
            folder, f"is signed by the key {made_by}, not by {trusted}", "Get it from its owner."
        )
    try:
        known[made_by].verify(raw, signature)
    except ValueError:
        raise PackageError(
            folder, f"its signature is not valid: config.json or {SIGNATURE} was changed", SIGN_AGAIN
        ) from None
    if _sound(folder) != raw:
        raise PackageError(folder, "changed while it was being verified", "Try again.")
    return Signed(path=path, key_id=made_by, comment=signature.trusted_comment)


def unlisted(folder: Path, named: Sequence[str]) -> list[str]:
    """Files of a package that `config.json` does not list and no hash covers; hidden ones are ignored."""
    known = {*named, "config.json", SIGNATURE}
    return sorted(name for name in os.listdir(folder) if name not in known and not name.startswith("."))


def _sound(folder: Path) -> bytes:
    """The bytes of config.json of a package without faults and without unlisted files."""
    raw = _config(folder)
    findings = store.check(folder)
    for name, fault in findings:
        if fault is not None:
            raise PackageError(folder / name, fault, "Get the package again.")
    if unknown := unlisted(folder, [name for name, _ in findings]):
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        reason = f"holds {safe_text(unknown[0])}{more}, which config.json does not list, so no hash covers it"
        raise PackageError(folder, reason, "Remove it.")
    if _config(folder) != raw:
        raise PackageError(folder, "is being changed by another process", "Try again.")
    return raw


def _config(folder: Path) -> bytes:
    path = folder / "config.json"
    try:
        return _read(path, config.MAX_CONFIG_BYTES)
    except OSError as error:
        raise PackageError(path, f"cannot be read: {error.strerror}", "Check its permissions.") from None
    except ValueError as error:
        raise PackageError(path, str(error), "Get the package again.") from None


def _read(path: Path, most: int = MAX_BYTES) -> bytes:
    """Contents of a plain file of at most `most` bytes. Raises OSError or ValueError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("is not a plain file")
    with path.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise ValueError(f"is larger than {most} bytes")
    return data


def _key_id(value: Any) -> str:
    """minisign's id of a key, or of a signature's key: eight bytes as a little-endian number."""
    raw = bytes(value).splitlines()[1]  # algorithm (2 bytes), key id (8), key or signature
    return base64.b64decode(raw)[2:10][::-1].hex().upper()


def _public_key(key: str | os.PathLike[str]) -> Any:
    minisign = _minisign()
    with _key_errors(key, "public key"):
        text = os.fspath(key)
        if not os.path.exists(text) and text.startswith("RW") and len(text) == 56:
            return minisign.PublicKey.from_base64(text)
        return minisign.PublicKey.from_bytes(_read(Path(text)))


def _secret_key(key: Path) -> Any:
    minisign = _minisign()
    with _key_errors(key, "secret key"):
        return minisign.SecretKey.from_bytes(_read(key))


@contextlib.contextmanager
def _key_errors(key: str | os.PathLike[str], kind: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(key, f"cannot be read: {error.strerror}", f"Name the file of a {kind}.") from None
    except ValueError as error:
        raise UsageError(
            key, f"is not a {kind} in minisign's format ({error})", "See `ratioctl sign`."
        ) from None


def _minisign() -> Any:
    return optional.load("minisign", "signing")
