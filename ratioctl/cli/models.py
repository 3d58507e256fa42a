"""`ratioctl models`."""

from ratioctl.cli._common import Context, command, not_yet


@command
def models(context: Context) -> int | None:
    """Soon."""
    not_yet(context, "models")
