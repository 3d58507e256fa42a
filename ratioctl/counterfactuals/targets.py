"""Target classes: names, numbers, and the keywords "predicted", "second" and "all"."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from ratioctl.errors import UsageError
from ratioctl.package import Spec
from ratioctl.utils.suggest import nearest
from ratioctl.utils.text import nfc

KEYWORDS = ("predicted", "second", "all")


def resolve_targets(target: str | Sequence[str], spec: Spec) -> tuple[str, ...]:
    """The classes that `target` names: exactly, else ignoring case, else by their number from 0.

    Class names may contain commas.

    Raises:
        UsageError: an unknown class; the message lists the classes and suggests the closest.
    """
    labels = spec.label_names
    is_text = isinstance(target, str)
    pieces = target.split(",") if isinstance(target, str) else [str(one) for one in target]
    classes: list[str] = []
    start = 0
    while start < len(pieces):
        for end in range(len(pieces) if is_text else start + 1, start, -1):
            label = _label(",".join(pieces[start:end]).strip(), labels)
            if label is not None:
                break
        else:
            raise _unknown_class(pieces[start].strip(), spec)
        classes.append(label)
        start = end
    if not classes:
        raise UsageError("--target", "names no class", "Name one, or predicted, second or all.")
    return tuple(dict.fromkeys(classes))


def _label(name: str, labels: Sequence[str]) -> str | None:
    if name in KEYWORDS:
        return name
    exact = next((label for label in labels if nfc(label) == nfc(name)), None)
    if exact is not None:
        return exact
    alike = [label for label in labels if nfc(label).casefold() == nfc(name).casefold()]
    if not alike and re.fullmatch(r"[0-9]{1,9}", name) and int(name) < len(labels):
        return labels[int(name)]
    return alike[0] if len(alike) == 1 else None


def _unknown_class(name: str, spec: Spec) -> UsageError:
    labels = spec.label_names
    folded = {label.casefold(): label for label in (*labels, *KEYWORDS)}
    near = nearest(name.casefold(), folded, cutoff=0.5)
    hint = f'Did you mean "{folded[near]}"? ' if near else ""
    shown = ", ".join(labels[:60]) + (f" and {len(labels) - 60} more" if len(labels) > 60 else "")
    reason = f"{spec.name} has no such class" if name else "a class name is missing"
    if name.isdecimal():
        reason += f"; numbers go from 0 to {len(labels) - 1}"
    return UsageError(f'--target "{name}"', reason, f"{hint}Its classes: {shown}.")


def classes_of(targets: Sequence[str], probabilities: np.ndarray, labels: Sequence[str]) -> list[int]:
    """Indices of the target classes of one image; a class with the name of a keyword takes precedence.

    "all" leaves out the predicted class.
    """
    ranked = np.argsort(-probabilities, kind="stable")
    classes: list[int] = []
    for target in targets:
        if target in labels:
            classes.append(labels.index(target))
        elif target == "predicted":
            classes.append(int(ranked[0]))
        elif target == "second":
            classes.append(int(ranked[min(1, len(ranked) - 1)]))
        else:
            classes.extend(k for k in range(len(labels)) if k != ranked[0] or len(labels) == 1)
    return list(dict.fromkeys(classes))
