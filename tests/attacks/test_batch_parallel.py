"""Passes in parts by several threads: the same answers, repeatable, and torch's settings left alone."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ratioctl.attacks import goals
from ratioctl.attacks.batch_parallel import in_parts, one_each
from ratioctl.attacks.engine import Perturbed, perturb
from ratioctl.models import build, fold_batchnorm
from ratioctl.recipe import Attack, Ball

CPU = torch.device("cpu")


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return fold_batchnorm(build("resnet18", num_classes=5, width=4, mean=(0.5,) * 3, std=(0.25,) * 3))


def _attacked(net: torch.nn.Module, x: Tensor) -> Perturbed:
    y = torch.arange(len(x)) % 5
    attack = Attack(ball=Ball(p=2, eps=0.5), method="apgd", steps=6)
    return perturb(net, x, goals.cross_entropy(y), attack)


@pytest.mark.parametrize("rows", [1, 2, 7, 200])
def test_parts_give_the_same_logits_and_gradients(net: torch.nn.Module, rows: int) -> None:
    x = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(rows))
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole, parts = net(leaf), in_parts(net, 3)(other)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    weight = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    (wanted,) = torch.autograd.grad((whole * weight).sum(), leaf)
    (found,) = torch.autograd.grad((parts * weight).sum(), other)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not in_parts(net, 3)(other).requires_grad


def test_an_attack_by_several_threads_finds_what_one_finds(net: torch.nn.Module, three_threads: None) -> None:
    x = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    several, again = _attacked(net, x), _attacked(net, x)
    assert torch.equal(several.x, again.x)
    torch.set_num_threads(1)
    alone = _attacked(net, x)
    torch.testing.assert_close(several.value, alone.value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(several.x, alone.x, rtol=0, atol=1e-3)


def test_the_number_of_threads_is_as_before_and_one_inside(three_threads: None) -> None:
    seen: dict[str, int] = {}

    def logits_of(x: Tensor) -> Tensor:
        seen[threading.current_thread().name] = torch.get_num_threads()
        barrier.wait()  # so that each part has its own thread
        return x.flatten(1)[:, :2]

    barrier = threading.Barrier(3, timeout=20)
    with one_each(CPU) as count:
        assert count == 3
        in_parts(logits_of, count)(torch.rand(3, 1, 2, 2))
        with one_each(CPU) as inner:
            assert inner == 1
    assert len(seen) == 3
    assert set(seen.values()) == {1}
    assert torch.get_num_threads() == 3
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [3]


def test_a_fault_in_any_part_is_raised_and_the_setting_restored(three_threads: None) -> None:
    def logits_of(x: Tensor) -> Tensor:
        if bool((x > 1).any()):
            raise ZeroDivisionError("in a part")
        return x.flatten(1)

    x = torch.zeros(9, 1, 2, 2)
    for row in (0, 8):
        bad = x.clone()
        bad[row] = 2
        with pytest.raises(ZeroDivisionError, match="in a part"), one_each(CPU) as count:
            in_parts(logits_of, count)(bad)
        assert torch.get_num_threads() == 3
    with one_each(CPU) as count:
        assert in_parts(logits_of, count)(x).shape == (9, 4)
