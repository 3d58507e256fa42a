"""`ratioctl inspect`."""

from ratioctl.cli._common import Context, command, not_yet


@command
def inspect(context: Context) -> int | None:
    """Soon."""
    not_yet(context, "inspect")
