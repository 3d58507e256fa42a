"""The engine against known optima, laws that relate its runs, and the reference implementation."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ratioctl.attacks import balls as ball
from ratioctl.attacks import goals
from ratioctl.attacks.engine import Perturbed, perturb
from ratioctl.recipe import Attack, Ball

INF = math.inf
LEGAL = [(p, m) for p in (1.0, 1.5, 2.0, INF) for m in ("pgd", "apgd", "afw") if p != 1.5 or m == "afw"]
DUAL = {1.0: INF, 1.5: 3.0, 2.0: 2.0, INF: 1.0}
EPS = {1.0: 2.0, 1.5: 0.8, 2.0: 0.5, INF: 0.05}


def _attack(p: float, method: str, steps: int = 10, eps: float | None = None, **more: object) -> Attack:
    radius = EPS[p] if eps is None else eps
    return Attack.model_validate({"ball": Ball(p=p, eps=radius), "method": method, "steps": steps, **more})


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """A smooth untrained network with saturating and batch-normalized parts, in eval mode."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    net(torch.rand(64, 3, 8, 8))
    net[5].weight.data.mul_(10)
    return net.eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 8, 8, generator=generator), torch.randint(5, (6,), generator=generator)


def _assert_feasible(result: Perturbed, x0: Tensor, p: float, eps: float | Tensor) -> None:
    size = torch.linalg.vector_norm((result.x.double() - x0.double()).flatten(1), ord=p, dim=1)
    assert (size <= eps).all()
    assert result.x.min() >= 0
    assert result.x.max() <= 1
    torch.testing.assert_close(result.distance, size.float())


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_linear_classifiers_are_solved(p: float, method: str) -> None:
    """Away from the box the best gain of a linear goal is eps times the dual norm of its weights."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 3 * 6 * 6, generator=generator)
    x0 = torch.full((5, 3, 6, 6), 0.5)
    y, target = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])
    eps = torch.tensor([0.01, 0.05, 0.1, 0.2, 0.4])
    w = weight[target] - weight[y]

    def logits_of(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    goal = goals.targeted_margin(y, target)
    result = perturb(logits_of, x0, goal, _attack(p, method, steps=20), eps=eps)
    gain = result.value - goal(logits_of(x0))
    best = eps * torch.linalg.vector_norm(w, ord=DUAL[p], dim=1)
    torch.testing.assert_close(gain / best, torch.ones(5), atol=5e-4, rtol=0)
    _assert_feasible(result, x0, p, eps)
    assert not result.stuck.any()


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, INF])
def test_afw_solves_linear_classifiers_at_the_box_too(p: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(2, 48, generator=generator)
    x0 = torch.rand(4, 3, 4, 4, generator=generator).mul(1.6).sub(0.3).clamp(0, 1)
    goal = goals.targeted_margin(torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long))
    eps = {1.0: 6.0, 1.5: 3.0, 2.0: 2.0, INF: 0.4}[p]
    result = perturb(lambda x: x.flatten(1) @ weight.T, x0, goal, _attack(p, "afw", 20, eps))
    w = (weight[1] - weight[0]).expand(4, -1).view_as(x0)
    best = ball.linear_maximizer(w, x0, p, eps)
    torch.testing.assert_close(result.value, goal(best.flatten(1) @ weight.T), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("p", "method"), LEGAL)
@pytest.mark.parametrize("start", ["centre", "random"])
def test_results_are_feasible_honest_and_never_below_the_input(
    net: nn.Module, batch: tuple[Tensor, Tensor], p: float, method: str, start: str
) -> None:
    x0, y = batch
    goal = goals.cross_entropy(y)
    attack = _attack(p, method, start=start, restarts=2)
    result = perturb(net, x0, goal, attack, generator=torch.Generator().manual_seed(0))
    _assert_feasible(result, x0, p, attack.ball.eps)
    with torch.no_grad():
        torch.testing.assert_close(result.value, goal(net(result.x)), atol=1e-5, rtol=1e-4)
        clean = goal(net(x0))
    assert (result.value > clean + 0.1).all()
    assert not result.stuck.any()


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_radius_zero_returns_the_input(
    net: nn.Module, batch: tuple[Tensor, Tensor], p: float, method: str
) -> None:
    x0, y = batch
    goal = goals.margin(y)
    eps = torch.tensor([0.0, 1, 1, 0, 1, 1]) * EPS[p]
    attack = _attack(p, method, start="random", restarts=2)
    result = perturb(net, x0, goal, attack, generator=torch.Generator().manual_seed(0), eps=eps)
    still = eps == 0
    assert torch.equal(result.x[still], x0[still])
    assert torch.equal(result.distance == 0, still)
    with torch.no_grad():
        torch.testing.assert_close(result.value[still], goal(net(x0))[still])


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_more_restarts_never_lower_the_value(
    net: nn.Module, batch: tuple[Tensor, Tensor], p: float, method: str
) -> None:
    x0, y = batch
    values = [
        perturb(
            net,
            x0,
            goals.margin(y),
            _attack(p, method, 3, restarts=n),
            generator=torch.Generator().manual_seed(5),
        ).value
        for n in (1, 2, 4)
    ]
    assert (values[1] >= values[0]).all()
    assert (values[2] >= values[1]).all()


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_splitting_and_permuting_a_batch_does_so_to_the_result(
    net: nn.Module, batch: tuple[Tensor, Tensor], p: float, method: str
) -> None:
    """Each example has its own generator, radius and label."""
    x0, y = batch
    eps = EPS[p] * torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0, 1.2])
    attack = _attack(p, method, 5, start="random", restarts=2)

    def run(rows: list[int]) -> Perturbed:
        # fp64 inside the network keeps rounding from growing along the attack's branches
        double = net.double()
        return perturb(
            lambda x: double(x.double()),
            x0[rows],
            goals.cross_entropy(y[rows]),
            attack,
            generator=_generators(rows),
            eps=eps[rows],
        )

    try:
        whole = run([0, 1, 2, 3, 4, 5])
        order = [4, 2, 0, 5, 1, 3]
        permuted = run(order)
        torch.testing.assert_close(permuted.x, whole.x[order], atol=1e-4, rtol=0)
        torch.testing.assert_close(permuted.value, whole.value[order], atol=1e-4, rtol=1e-4)
        alone = run([3])
        torch.testing.assert_close(alone.x, whole.x[3:4], atol=1e-4, rtol=0)
    finally:
        net.float()


def test_repeating_a_run_repeats_its_bits(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x0, y = batch
    attack = _attack(2.0, "apgd", start="random", restarts=2)
    first, again = (
        perturb(net, x0, goals.margin(y), attack, generator=_generators(list(range(6)))) for _ in range(2)
    )
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.value, again.value)


def test_the_memory_format_is_kept_and_changes_nothing(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x0, y = batch
    x1 = x0.to(memory_format=torch.channels_last)
    for p, method in LEGAL:
        attack = _attack(p, method, 4, start="random")
        one = perturb(net, x0, goals.margin(y), attack, generator=torch.Generator().manual_seed(2))
        two = perturb(net, x1, goals.margin(y), attack, generator=torch.Generator().manual_seed(2))
        assert one.x.is_contiguous()
        assert two.x.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(one.value, two.value, atol=1e-2, rtol=1e-3)


def test_the_input_network_and_generators_are_left_alone(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 5), nn.Dropout(0.0))
    net.eval()
    net[3].train()
    x0, y = batch
    kept = x0.clone()
    net[2].weight.grad = torch.ones_like(net[2].weight)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    global_state = torch.get_rng_state()
    for p, method in LEGAL:
        attack = _attack(p, method, 2, restarts=2)
        with torch.no_grad():  # the caller's mode is neither needed nor changed
            perturb(net, x0, goals.margin(y), attack, generator=torch.Generator().manual_seed(0))
            assert not torch.is_grad_enabled()
    assert torch.equal(x0, kept)
    assert not x0.requires_grad
    assert torch.equal(net[2].weight.grad, torch.ones_like(net[2].weight))
    assert net[2].bias.grad is None
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), global_state)


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_stuck_marks_exactly_the_examples_without_any_gradient(p: float, method: str) -> None:
    weight = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))

    def logits_of(x: Tensor) -> Tensor:
        open_gate = (x[:, :1, 0, 0] > 0.25).float()  # images with a dark first pixel see constant logits
        return (x.flatten(1) @ weight.T) * open_gate

    x0 = torch.full((3, 3, 4, 4), 0.5)
    x0[1, :, 0, 0] = 0.0
    goal = goals.margin(torch.tensor([0, 1, 2]))
    result = perturb(logits_of, x0, goal, _attack(p, method, 5, eps=0.05))
    assert result.stuck.tolist() == [False, True, False]
    assert torch.equal(result.x[1], x0[1])
    assert (result.distance[[0, 2]] > 0.01).all()


def test_nan_is_not_an_optimum(batch: tuple[Tensor, Tensor]) -> None:
    """A network that breaks away from the input cannot make its NaN the best value."""
    x0, y = batch
    weight = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))

    def logits_of(x: Tensor) -> Tensor:
        moved = (x - x0).flatten(1).norm(dim=1, keepdim=True) > 0.2
        return (x.flatten(1) @ weight.T).masked_fill(moved, torch.nan)

    for p, method in LEGAL:
        result = perturb(logits_of, x0, goals.margin(y), _attack(p, method, 5))
        assert torch.isfinite(result.value).all()
        assert torch.isfinite(result.x).all()


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_passes_are_counted_and_watched(
    net: nn.Module, batch: tuple[Tensor, Tensor], p: float, method: str
) -> None:
    """T points with a gradient, one without; the best of the watched values is the result."""
    x0, y = batch
    calls: list[bool] = []
    seen: list[tuple[int, Tensor]] = []

    def logits_of(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return net(x)

    def callback(step: int, x: Tensor, value: Tensor) -> None:
        assert x.shape == x0.shape
        seen.append((step, value.clone()))

    result = perturb(logits_of, x0, goals.margin(y), _attack(p, method, 7), callback=callback)
    assert calls == [True] * 7 + [False]
    assert [step for step, _ in seen] == list(range(8))
    assert torch.equal(torch.stack([value for _, value in seen]).max(0).values, result.value)


def test_the_step_of_pgd_is_the_papers() -> None:
    """One step of the given length along the gradient; a radius of one's own scales it."""
    weight = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    x0 = torch.full((2, 3, 4, 4), 0.5)
    zero, one = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    goal = goals.targeted_margin(zero, one)

    def logits_of(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.T

    attack = _attack(2.0, "pgd", 1, 0.5, step_size=0.1)
    torch.testing.assert_close(perturb(logits_of, x0, goal, attack).distance, torch.tensor([0.1, 0.1]))
    result = perturb(logits_of, x0, goal, attack, eps=torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(result.distance, torch.tensor([0.05, 0.1]))
    attack = _attack(INF, "pgd", 1, 8 / 255, step_size=2 / 255)
    result = perturb(logits_of, x0, goal, attack)
    torch.testing.assert_close(
        (result.x - x0).flatten(1), (2 / 255) * (weight[1] - weight[0]).sign().expand(2, -1)
    )


def test_bf16_logits_leave_the_result_feasible_and_fp32(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x0, y = batch

    def logits_of(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    for p, method in LEGAL:
        result = perturb(logits_of, x0, goals.margin(y), _attack(p, method))
        assert result.x.dtype == result.value.dtype == result.distance.dtype == torch.float32
        _assert_feasible(result, x0, p, EPS[p])


def test_mistakes_are_refused(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x0, y = batch
    goal = goals.margin(y)
    for more in ({"start": "random"}, {"restarts": 2}):
        with pytest.raises(ValueError, match="generator"):
            perturb(net, x0, goal, _attack(2.0, "pgd", **more))
    for eps in (
        torch.ones(5),
        torch.ones(6, 1),
        torch.tensor(-1.0),
        torch.tensor([1.0, 1, 1, 1, 1, torch.nan]),
    ):
        with pytest.raises(ValueError, match="eps"):
            perturb(net, x0, goal, _attack(2.0, "pgd"), eps=eps)


def test_an_empty_batch_is_an_empty_result(net: nn.Module) -> None:
    result = perturb(net, torch.zeros(0, 3, 8, 8), goals.log_confidence(), _attack(2.0, "apgd"))
    assert result.x.shape == (0, 3, 8, 8)
    assert result.value.shape == result.distance.shape == result.stuck.shape == (0,)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A convolutional network trained for seconds on scikit-learn's digits, and held-out images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(12):
        for rows in torch.randperm(1297).split(100):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval(), x[1297:], y[1297:]


@pytest.mark.parametrize(("p", "name", "eps"), [(2.0, "L2", 0.7), (INF, "Linf", 0.1)])
def test_apgd_finds_as_many_adversarial_examples_as_the_reference(
    digits: tuple[nn.Module, Tensor, Tensor], p: float, name: str, eps: float
) -> None:
    """Same network, images, steps and radius; the counts over three seeds agree within 1 % of n."""
    from pyautoattack.autopgd_base import APGDAttack

    net, x, y = digits

    def fooled(x_adv: Tensor) -> int:
        with torch.no_grad():
            return int((net(x_adv).argmax(1) != y).sum())

    ours: dict[str, int] = {"centre": 0, "random": 0}
    theirs, steps = 0, 20
    state = torch.get_rng_state()
    for seed in range(3):
        reference = APGDAttack(
            net, n_iter=steps, norm=name, n_restarts=1, eps=eps, seed=seed, loss="ce", device="cpu"
        )
        theirs += fooled(reference.perturb(x, y))
        for start in ours:
            result = perturb(
                net,
                x,
                goals.cross_entropy(y),
                _attack(p, "apgd", steps, eps, start=start),
                generator=torch.Generator().manual_seed(seed),
            )
            ours[start] += fooled(result.x)
    torch.set_rng_state(state)
    assert 0.2 < theirs / (3 * len(y)) < 0.95
    for count in ours.values():
        assert abs(count - theirs) <= 0.01 * 3 * len(y)


def test_apgd_beats_pgd_and_l1_is_sparse(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = digits
    x, y = x[:200], y[:200]

    def run(p: float, method: str) -> Perturbed:
        return perturb(net, x, goals.cross_entropy(y), _attack(p, method, 20))

    value: Callable[[float, str], float] = lambda p, method: run(p, method).value.mean().item()  # noqa: E731
    for p in (1.0, 2.0, INF):
        assert value(p, "apgd") > value(p, "pgd")
        assert value(p, "afw") > 0.97 * value(p, "apgd")
    changed = (run(1.0, "apgd").x != x).flatten(1).float().mean().item()
    assert changed < 0.25
    assert (run(2.0, "apgd").x != x).flatten(1).float().mean().item() > 0.5


@pytest.mark.parametrize(("p", "method"), LEGAL)
def test_points_to_begin_from_are_candidates(
    net: nn.Module, batch: tuple[Tensor, Tensor], p: float, method: str
) -> None:
    """What comes back is no worse than where it began, nor than the input where that was a bad place."""
    x0, y = batch
    goal = goals.cross_entropy(y)
    good = perturb(net, x0, goal, _attack(p, method, steps=20))
    again = perturb(net, x0, goal, _attack(p, method, steps=1), init=good.x)
    assert (again.value >= good.value - 1e-5).all()
    _assert_feasible(again, x0, p, EPS[p])
    bad = perturb(net, x0, lambda f: -goal(f), _attack(p, method, steps=20)).x
    result = perturb(net, x0, goal, _attack(p, method, steps=1), init=bad)
    with torch.no_grad():
        assert (goal(net(bad)) < goal(net(x0))).any()
        assert (result.value >= goal(net(x0)) - 1e-5).all()


@pytest.mark.parametrize(("p", "method"), [(2.0, "apgd"), (INF, "pgd"), (1.5, "afw"), (1.0, "apgd")])
def test_examples_that_reached_enough_leave_the_passes(
    net: nn.Module, batch: tuple[Tensor, Tensor], p: float, method: str
) -> None:
    x, y = batch
    goal = goals.log_probability((y + 1) % 5, 0.2)
    attack = _attack(p, method, 20, restarts=2)
    whole = perturb(net, x, goal, attack, generator=_generators([*range(6)]))
    enough = float(whole.value.median()) - 1e-3
    rows, seen = [], []

    def counted(images: Tensor) -> Tensor:
        rows.append(len(images))
        return net(images)

    result = perturb(
        counted,
        x,
        goal,
        attack,
        generator=_generators([*range(6)]),
        enough=enough,
        callback=lambda step, image, value: seen.append((step, value.clone())),
    )
    _assert_feasible(result, x, p, EPS[p])
    reached = whole.value >= enough
    assert 0 < int(reached.sum()) < 6
    torch.testing.assert_close(result.value[~reached], whole.value[~reached])  # the others go on as before
    assert (result.value[reached] >= enough).all()
    torch.testing.assert_close(goal(net(result.x)), result.value)  # the point is the one of the value
    assert sum(rows) < 2 * 21 * 6
    assert rows == sorted(rows, reverse=True)  # nobody comes back, not in the second restart either
    last = seen[-1][1]
    assert (last[reached] >= enough).all()  # a preview keeps the value with which an example left


def test_nothing_is_computed_once_all_examples_reached_enough(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    calls = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return net(images)

    goal = goals.log_probability(y)
    result = perturb(counted, x, goal, _attack(2.0, "apgd", 10), enough=-50.0)
    assert sum(calls) == len(x)  # the input itself is enough
    torch.testing.assert_close(result.x, x)
    torch.testing.assert_close(result.value, goal(net(x)))
