"""AutoAugment."""

from __future__ import annotations

import pytest
import torch

from ratioctl.data.autoaugment import SIGNED, apply, autoaugment, policies
from tests.data.helpers import FILL, seeded, some


def test_autoaugment_tables_are_whole() -> None:
    for name in ("cifar10", "svhn", "imagenet"):
        assert len(policies(name)) == 25  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_autoaugment_is_a_function_of_its_seed(channels: int) -> None:
    x = some(60, channels=channels)
    before = torch.get_rng_state()
    first = autoaugment(x, "cifar10", seeded(5), FILL[:channels])
    assert torch.equal(first, autoaugment(x, "cifar10", seeded(5), FILL[:channels]))
    assert not torch.equal(first, autoaugment(x, "cifar10", seeded(6), FILL[:channels]))
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    assert first.dtype == torch.uint8
    assert float((first != x).flatten(1).any(1).float().mean()) > 0.5, "most images change"


def test_autoaugment_matches_torchvision_operation_by_operation() -> None:
    from torchvision.transforms import AutoAugment, InterpolationMode
    from torchvision.transforms import autoaugment as tv

    space = AutoAugment()._augmentation_space(10, (16, 16))
    x = some(3)
    for name, (magnitudes, signed) in space.items():
        level = 6 if magnitudes.ndim else None
        m = float(magnitudes[6]) if magnitudes.ndim else 0.0
        ours = apply(x, name, level, False, [0.0, 0.0, 0.0])
        theirs = tv._apply_op(x, name, m, InterpolationMode.NEAREST, [0.0, 0.0, 0.0])
        assert (name in SIGNED) == bool(signed)
        # The two interfaces of torchvision round a blend differently, by one level at most.
        assert int((ours.int() - theirs.int()).abs().max()) <= 1, name
