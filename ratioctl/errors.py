"""Exceptions. Each class carries the exit code with which the command line ends.

Every error names the thing, the reason and the next step; `cli` prints them in one place.
"""


class RatioctlError(Exception):
    """Base class: an error that is reported as one message.

    Args:
        thing: what the message is about (a path, an option, a key), shown as given.
        reason: what is wrong with it, one clause or sentence.
        next_step: what the user can do about it; may be empty where nothing can be done.
    """

    exit_code: int = 1
    headline: str = ""  # replaces "thing: reason" in the message

    def __init__(self, thing: object, reason: str, next_step: str = "") -> None:
        self.thing = str(thing)
        self.reason = reason
        self.next_step = next_step
        super().__init__(self.thing, reason, next_step)

    def __str__(self) -> str:
        head = self.headline or f"{self.thing}: {self.reason}"
        head = head if head.endswith((".", "!", "?")) else head + "."
        return f"{head} {self.next_step}".rstrip()


class UsageError(RatioctlError):
    """Wrong usage: unknown class, bad range, an option that does not fit."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be read, has an unknown key or an impossible value."""


class SourceError(UsageError):
    """A data SOURCE that is missing, empty or does not fit the model's labels."""


class OutputError(UsageError):
    """Output that cannot be written: no permission, a file where a folder should be."""


class ImageError(RatioctlError):
    """An image that cannot be read; a row with an error where there are several."""

    exit_code = 3


class PackageError(RatioctlError):
    """A package or ONNX file that is missing, damaged or of an unknown format."""

    exit_code = 5


class LogitsError(PackageError, ValueError):
    """Logits that are not finite: finite weights whose products overflow."""


class UncalibratedError(PackageError):
    """A package without the temperature or threshold that the command needs."""


class DiskError(RatioctlError):
    """The disk is full or failed while writing."""

    exit_code = 6


class TrainingError(RatioctlError):
    """Training cannot continue, for example because the loss is not finite. The last checkpoint is kept."""


class Interrupted(RatioctlError):  # noqa: N818 - it is a request, not an error
    """Stopped by a signal after saving. `signum` 2 (SIGINT) or 15 (SIGTERM)."""

    def __init__(self, thing: object, reason: str, next_step: str = "", *, signum: int = 2) -> None:
        super().__init__(thing, reason, next_step)
        self.exit_code = 128 + signum
