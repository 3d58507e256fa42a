"""`ratioctl verify`."""

from __future__ import annotations

from typing import Annotated

import typer

from ratioctl.cli._common import DEFAULT_MODEL, MODEL_HELP, Context, command, emit_json
from ratioctl.errors import PackageError
from ratioctl.text import safe_text


@command
def verify(
    context: Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = DEFAULT_MODEL,
) -> int | None:
    """Compare every file of a package with its recorded SHA-256."""
    from ratioctl import package

    path = package.find(model)
    findings = package.check(path)
    faults = [name for name, fault in findings if fault is not None]
    if context.json:
        files = [{"file": name, "ok": fault is None, "fault": fault} for name, fault in findings]
        emit_json({"path": path, "ok": not faults, "files": files})
    else:
        for name, fault in findings:
            state = "ok" if fault is None else f"FAULT: {fault}"
            context.out.print(f"{safe_text(name)}: {safe_text(state)}", soft_wrap=True)
    if faults:
        raise PackageError(
            path,
            f"{len(faults)} of {len(findings)} files are not what was packaged ({', '.join(faults)})",
            "Get the package again, or package it again from its checkpoint.",
        )
    return None
