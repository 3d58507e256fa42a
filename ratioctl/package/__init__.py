"""Model packages: one directory that holds a model and everything needed to verify and use it.

`store` reads, verifies and changes the folder, `config` checks `config.json`, `weights` the tensors, `card`
renders README.md and `signing` signs. Import from this package; the modules are its implementation.
"""

from ratioctl.package.card import inline, render_card
from ratioctl.package.config import (
    FORMAT,
    Spec,
    certified_radius,
    names,
    parse_config,
    parse_document,
    portable_config,
    threshold,
)
from ratioctl.package.store import (
    ModelPackage,
    bundled,
    check,
    check_writable,
    find,
    is_bundled,
    read,
    read_weights,
    resolve,
    update,
    write,
)
from ratioctl.package.weights import Stored, parse_weights, stored_as, to_half
from ratioctl.utils.defaults import CERTIFIED, DEFAULT_MODEL

__all__ = [
    "CERTIFIED",
    "DEFAULT_MODEL",
    "FORMAT",
    "ModelPackage",
    "Spec",
    "Stored",
    "bundled",
    "certified_radius",
    "check",
    "check_writable",
    "find",
    "inline",
    "is_bundled",
    "names",
    "parse_config",
    "parse_document",
    "parse_weights",
    "portable_config",
    "read",
    "read_weights",
    "render_card",
    "resolve",
    "stored_as",
    "threshold",
    "to_half",
    "update",
    "write",
]
