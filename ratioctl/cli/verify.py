"""`ratioctl verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from ratioctl.cli._common import COMPUTE, MODEL_HELP, Context, command, emit_json
from ratioctl.errors import PackageError
from ratioctl.utils.defaults import DEFAULT_MODEL
from ratioctl.utils.text import safe_text


@command(unused=COMPUTE)
def verify(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = DEFAULT_MODEL,
    public_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--public-key",
            metavar="FILE|KEY",
            help="Also require a signature by this key, or by one of several, and no unsigned files.",
        ),
    ] = None,
) -> int | None:
    """Check every file of a package, and its signature.

    Every file is compared with the SHA-256 recorded in config.json; with --public-key, config.json must have
    a valid signature by that key.
    """
    from ratioctl import package
    from ratioctl.package import signing

    path = package.find(model)
    findings = package.check(path)
    faults = [name for name, fault in findings if fault is not None]
    signed, refused = None, None
    if public_keys and not faults:
        try:
            signed = signing.verify(path, public_keys)
        except PackageError as error:
            refused = error
    if context.json:
        files = [{"file": name, "ok": fault is None, "fault": fault} for name, fault in findings]
        document = {"path": path, "ok": not faults and refused is None, "files": files}
        if public_keys:
            document["signature"] = {
                "ok": signed is not None,
                "key_id": signed and signed.key_id,
                "comment": signed and signed.comment,
                "fault": refused and refused.reason,
            }
        emit_json(document)
    else:
        for name, fault in findings:
            state = "ok" if fault is None else f"FAULT: {fault}"
            context.out.print(f"{safe_text(name)}: {safe_text(state)}", soft_wrap=True)
        if signed is not None:
            context.out.print(
                f"{signing.SIGNATURE}: ok, signed by {signed.key_id} ({safe_text(signed.comment)})",
                soft_wrap=True,
            )
    if faults:
        raise PackageError(
            path,
            f"{len(faults)} of {len(findings)} files differ from what was packaged ({', '.join(faults)})",
            "Get the package again, or package it again from its checkpoint.",
        )
    if refused is not None:
        raise refused
    if not public_keys and (path / signing.SIGNATURE).exists():
        context.note(f"{path} has a signature, which was not checked; --public-key checks it.")
    return None
