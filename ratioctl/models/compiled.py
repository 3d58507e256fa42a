"""`torch.compile` for the network that attacks differentiate, with eager execution where it fails.

Off by default, because compiling takes a minute or more: set the environment variable RATIOCTL_COMPILE=1.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

Logits = Callable[[Tensor], Tensor]


def requested() -> bool:
    """Whether RATIOCTL_COMPILE is 1."""
    return os.environ.get("RATIOCTL_COMPILE") == "1"


def compiled(network: nn.Module) -> Logits:
    """`network`, whose parameters get no gradient, compiled for every shape of a batch.

    A shape's first call tries a forward pass, and the pass for the input's gradient where one is recorded. If
    either fails, that is logged and the network is run eagerly from then on.
    """
    fast: Logits | None = None
    tried: set[tuple[torch.Size, bool]] = set()

    def logits_of(x: Tensor) -> Tensor:
        nonlocal fast
        key = (x.shape, torch.is_grad_enabled() and x.requires_grad)
        if not tried:
            fast = _attempt(lambda: torch.compile(network, dynamic=False))
        if fast is not None and key not in tried:
            fast = _attempt(lambda: _trial(fast, x.detach().requires_grad_(key[1])))
        tried.add(key)
        return network(x) if fast is None else fast(x)

    return logits_of


def _trial(fast: Logits | None, x: Tensor) -> Logits:
    assert fast is not None
    logits = fast(x)
    if x.requires_grad:
        torch.autograd.grad(logits.float().sum(), x)
    return fast


def _attempt(work: Callable[[], Logits]) -> Logits | None:
    try:
        return work()
    except Exception as error:  # compilers raise what they like
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        logging.getLogger("ratioctl").warning("torch.compile failed, so attacks run without it: %s", detail)
        return None
