"""Packages that only some commands need: the one place that says how to install them."""

from __future__ import annotations

from ratioctl.errors import UsageError

# Top-level modules by the extra of pyproject.toml that brings them.
_EXTRAS = {
    "torch": (
        *("torch", "torchvision", "onnx", "onnxscript", "jinja2", "markdown_it", "matplotlib"),
        *("pyarrow", "pyautoattack", "scipy", "sklearn", "textual_image", "tomli_w"),
    ),
    "medical": ("pydicom",),
    "sign": ("minisign",),
}
_EXTRA_OF = {module: extra for extra, modules in _EXTRAS.items() for module in modules}


def missing_package(error: ImportError, what: str = "this") -> UsageError | None:
    """`error` as a UsageError that names the extra to install; None where no extra brings the module.

    Args:
        what: what needs the module, named by the message.
    """
    module = (error.name or "").partition(".")[0]
    extra = _EXTRA_OF.get(module)
    if extra is None:
        return None
    return UsageError(
        what, f"needs {module}, which is not installed", f'Run: pip install "ratioctl[{extra}]"'
    )
