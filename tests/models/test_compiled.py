"""Compiled attacks: eager execution where compiling fails. Real compilation: tests/slow/test_compiled.py."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from ratioctl.models import build, fold_batchnorm
from ratioctl.models.compiled import compiled


@pytest.mark.parametrize("fails", ["at once", "forward", "backward"])
def test_a_failure_is_logged_once_and_the_network_runs_eagerly(
    fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = fold_batchnorm(build("resnet18", num_classes=3, width=2, mean=[0.5] * 3, std=[0.25] * 3))

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler")

    def compiling(module: torch.nn.Module, **options: Any) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            if fails == "forward":
                raise RuntimeError("no compiler")
            return Backward.apply(module(x))

        if fails == "at once":
            raise RuntimeError("no compiler")
        return run

    monkeypatch.setattr(torch, "compile", compiling)
    logits_of = compiled(network)
    with caplog.at_level(logging.WARNING, "ratioctl"):
        for _ in range(2):
            x = torch.rand(2, 3, 8, 8, requires_grad=True)
            logits = logits_of(x)
            (gradient,) = torch.autograd.grad(logits.sum(), x)
            assert torch.equal(logits, network(x))
            assert gradient.abs().max() > 0
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile failed, so attacks run without it: no compiler"
    ]
