"""An update reads no tensor's value: on a GPU every read waits for all that was started before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ratioctl import recipe as recipes
from ratioctl.training import loop
from ratioctl.training.loop import fit

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["digits-ratio", "cifar10-ratio-0.25"])
def test_an_update_reads_no_value(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.get_num_threads() == 1, "the mode sees this thread alone"
    small = [
        "model.architecture=wideresnet-10-1",
        "model.width=",
        "optim.batch_size=8",
        "optim.batch_size_out=8",
        "optim.epochs=0.03",
    ]
    small += [
        'data.outside="noise:uniform"',
        "optim.validate_images=8",
        "optim.ema=0.9",
        "optim.grad_clip=1.0",
    ]
    base = recipes.load(name).objective
    recipe = recipes.load("digits-ratio", small).model_copy(update={"objective": base})
    monkeypatch.setattr(loop, "_NAN_EVERY", 10**9)
    recorder, updates = Recorder(), []
    whole, last = loop.losses, loop._step

    def recorded(*arguments: Any, **options: Any) -> Any:
        with recorder:
            return whole(*arguments, **options)

    def stepped(run: Any, state: Any, *arguments: Any, **options: Any) -> None:
        with recorder:
            last(run, state, *arguments, **{**options, "check": False})
        updates.append(state.update)

    monkeypatch.setattr(loop, "losses", recorded)
    monkeypatch.setattr(loop, "_step", stepped)
    fit(recipe, tmp_path)
    assert len(updates) > 3
    assert recorder.reads == []
