"""`ratioctl sign`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import COMPUTE, Context, command, emit_json
from ratioctl.errors import UsageError
from ratioctl.utils.text import safe_text

PASSWORD = "RATIOCTL_KEY_PASSWORD"


@command(unused=COMPUTE)
def sign(
    context: Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A package folder.", show_default=False)
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="Secret key in minisign's format.")
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option("--new-key", metavar="NAME", help="Create the key pair NAME.key and NAME.pub instead."),
    ] = None,
) -> int | None:
    """Sign a package, or create a key pair.

    The password of the key is read from RATIOCTL_KEY_PASSWORD (empty for none), or prompted for.
    """
    from ratioctl import package
    from ratioctl.package import signing

    if new_key is not None:
        if model is not None or key is not None:
            raise UsageError("--new-key", "creates a key and signs nothing", "Sign with a second command.")
        secret, public = signing.new_key(new_key, _password(f"Password for {new_key}.key (empty: none)"))
        if context.json:
            emit_json({"key": secret, "public_key": public})
        context.out.print(f"secret key: {safe_text(secret)} (keep it private)", soft_wrap=True)
        context.out.print(f"public key: {safe_text(public)} (publish it)", soft_wrap=True)
        return None
    if model is None or key is None:
        raise UsageError(
            "sign", "requires a package and a key", "For example: ratioctl sign MODEL --key me.key"
        )
    path = package.find(model)
    password = _password(f"Password for {key}") if signing.is_encrypted(key) else None
    signed = signing.sign(path, key, password)
    if context.json:
        emit_json(
            {"path": path, "signature": signed.path, "key_id": signed.key_id, "comment": signed.comment}
        )
    context.out.print(f"{safe_text(signed.path)}: signed by {signed.key_id}", soft_wrap=True)
    return None


def _password(question: str) -> str:
    if PASSWORD in os.environ:
        return os.environ[PASSWORD]
    if not sys.stdin.isatty():
        raise UsageError(
            "password", "there is no terminal to prompt for it", f"Set {PASSWORD} (empty: none)."
        )
    return str(typer.prompt(question, hide_input=True, default="", show_default=False, err=True))
