"""`ratioctl verify`."""

from __future__ import annotations

from pathlib import Path
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
    parity: Annotated[
        Path | None,
        typer.Option("--parity", metavar="FILE.json", help="Also check this certificate of `parity`."),
    ] = None,
) -> int | None:
    """Check every file of a package, and its signature.

    Every file is compared with the SHA-256 recorded in config.json; with --public-key, config.json must have
    a valid signature by that key. With --parity, the certificate must be unchanged and passed, and refer to
    this package and the files that it names.
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
    certified = _certified(path, parity) if parity is not None and not faults else []
    wrong = [f"{name}: {fault}" for name, fault in certified if fault is not None]
    if context.json:
        files = [{"file": name, "ok": fault is None, "fault": fault} for name, fault in findings]
        document = {"path": path, "ok": not faults and refused is None and not wrong, "files": files}
        if parity is not None:
            document["parity"] = [{"about": n, "ok": f is None, "fault": f} for n, f in certified]
        if public_keys:
            document["signature"] = {
                "ok": signed is not None,
                "key_id": signed and signed.key_id,
                "comment": signed and signed.comment,
                "fault": refused and refused.reason,
            }
        emit_json(document)
    else:
        for name, fault in [*findings, *certified]:
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
    if wrong:
        raise PackageError(parity, "; ".join(wrong), "Compare again with `ratioctl parity`.")
    if not public_keys and (path / signing.SIGNATURE).exists():
        context.note(f"{path} has a signature, which was not checked; --public-key checks it.")
    return None


def _certified(path: Path, parity: Path) -> list[tuple[str, str | None]]:
    from ratioctl import package
    from ratioctl.onnx import certificate

    return list(certificate.faults(certificate.read(parity), package.read(path), parity.parent))
