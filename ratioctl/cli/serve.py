"""`ratioctl serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ratioctl.cli._common import Context, command, emit_json
from ratioctl.utils.defaults import DEFAULT_MODEL

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL|FILE.onnx...",
        help="Packages, bundled models or exported files; a file of `export --explain` adds "
        "counterfactuals, without torch, to the model it was exported from. [default: cifar10-ratio]",
    ),
]
Host = Annotated[
    str,
    typer.Option(
        "--host", metavar="HOST", help="Address to listen on; any but a loopback address needs a token."
    ),
]
Port = Annotated[
    int, typer.Option("--port", min=0, max=65535, metavar="PORT", help="Port; 0 takes a free one.")
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar="RATIOCTL_SERVE_TOKEN",
        show_envvar=False,
        help="Require this token of every request. Command lines are visible to others: prefer the variable "
        "RATIOCTL_SERVE_TOKEN.",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", metavar="NAME", help="A further host name of the server, for example behind a proxy."
    ),
]
MaxBody = Annotated[
    int, typer.Option("--max-body", min=1, max=1024, metavar="MIB", help="Largest request, in MiB.")
]
MaxPixels = Annotated[
    int,
    typer.Option(
        "--max-pixels", min=1, max=89, metavar="MILLIONS", help="Largest image, in millions of pixels."
    ),
]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", min=1, metavar="N", help="Images that may wait to be scored.")
]
LiveFolder = Annotated[
    Path | None,
    typer.Option(
        "--live",
        metavar="DIR",
        help="Let pages of results search in the browser: DIR is node_modules/onnxruntime-web/dist. Needs a "
        "file of `export --explain` among the models.",
    ),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout", min=0.1, metavar="SECONDS", help="Time for sending a request, and for answering it."
    ),
]


@command
def serve(
    context: Context,
    models: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token: Token = None,
    allow_host: AllowHost = None,
    max_body: MaxBody = 32,
    max_pixels: MaxPixels = 50,
    max_queue: MaxQueue = 2048,
    timeout: Timeout = 30.0,
    live: LiveFolder = None,
) -> int | None:
    """Serve models: a page for people and an HTTP API."""
    from ratioctl.server import Settings

    settings = Settings(
        host=host,
        port=port,
        token=token,
        allowed_hosts=tuple(allow_host or ()),
        max_body=max_body * 2**20,
        max_held=8 * max_body * 2**20,
        max_pixels=max_pixels * 1_000_000,
        max_queue=max_queue,
        timeout=timeout,
    )
    from ratioctl.server import run
    from ratioctl.server.service import Service

    listening = run.listen(settings)
    with listening:
        service = Service(
            models or [DEFAULT_MODEL],
            settings,
            device=context.device,
            precision=context.precision,
            live=None if live is None else str(live),
        )
        url = run.url_of(listening)
        names = list(service.models)
        if context.json:
            emit_json({"url": url, "port": listening.getsockname()[1], "models": names})
        context.note(f"Serving {', '.join(names)} at {url} (Ctrl-C stops)")
        for served in service.models.values():
            if (why_not := served.unexplained()) is not None:
                context.note(f"No counterfactuals: {why_not}")
        try:
            run.serve(service, listening)
        finally:
            service.close()
    return None
