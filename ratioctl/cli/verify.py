"""`ratioctl verify`."""

from ratioctl.cli._common import Context, command, not_yet


@command
def verify(context: Context) -> int | None:
    """Soon."""
    not_yet(context, "verify")
