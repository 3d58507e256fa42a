"""Packages that only some features need: the one place that says how to install them."""

from __future__ import annotations

import importlib
from typing import Any

from ratioctl.errors import UsageError

# Top-level modules by the extra of pyproject.toml that installs them.
EXTRAS = {
    "torch": (
        *("torch", "torchvision", "onnx", "onnxscript", "pyarrow", "pyautoattack"),
        *("scipy", "sklearn", "textual_image", "tomli_w"),
    ),
    "medical": ("pydicom",),
    "openvino": ("openvino",),
    "remote": ("fsspec", "pyarrow"),
    "ray": ("pyarrow", "ray"),
    "serve": ("fastapi", "uvicorn", "httptools", "prometheus_client", "python_multipart", "uvloop"),
    "sign": ("minisign",),
    "tensorboard": ("tensorboard",),
    "mlflow": ("mlflow",),
    "wandb": ("wandb",),
}
# The first extra where several install a module.
_EXTRA_OF = {module: extra for extra, modules in reversed(EXTRAS.items()) for module in modules}


def install_command(module: str) -> str:
    """The command that installs `module`, one of `EXTRAS`."""
    return f'pip install "ratioctl[{_EXTRA_OF[module]}]"'


def missing_package(error: ImportError, what: str) -> UsageError | None:
    """`error` as a UsageError that says what to install; None where no extra installs the module.

    Args:
        what: what needs the module.
    """
    module = (error.name or "").partition(".")[0]
    if module not in _EXTRA_OF:
        return None
    return UsageError(what, f"needs {module}, which is not installed", f"Run: {install_command(module)}")


def load(module: str, what: str) -> Any:
    """Import one of `EXTRAS`. Raises UsageError where it is not installed; `what` needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_package(error, what) or error from None
