"""The ensemble against the reference package, and its bookkeeping."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ratioctl.attacks import autoattack
from ratioctl.attacks import balls as geometry
from ratioctl.attacks.autoattack import AttackBudget, ensemble_name, robust_verdicts
from ratioctl.attacks.worst_case import worst_case_confidence
from ratioctl.recipe import Ball

Case = tuple[nn.Module, Tensor, Tensor]
QUICK = AttackBudget(steps=5, targets=2, queries=20)


def _train(classes: int) -> Case:
    """A small network on the first `classes` digits, and held-out images."""
    from sklearn.datasets import load_digits

    data = load_digits(n_class=classes)
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    n = len(x) * 3 // 4
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(144, classes),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(8):
            for rows in torch.randperm(n).split(64):
                loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    optimizer.zero_grad()
    return net.eval(), x[n:], y[n:]


@pytest.fixture(scope="module")
def digits() -> Case:
    return _train(10)


@pytest.mark.parametrize(("p", "name", "eps"), [(2.0, "L2", 0.35), (math.inf, "Linf", 0.05)])
def test_verdicts_agree_with_the_package(digits: Case, p: float, name: str, eps: float) -> None:
    """They differ on no more images than the package's own do between two seeds, plus one."""
    from pyautoattack import AutoAttack

    net, x, y = digits
    x, y = x[:48], y[:48]

    def package(seed: int) -> Tensor:
        attack = AutoAttack(
            net, attacks=["apgd-ce", "apgd-t"], device="cpu", eps=eps, norm=name, seed=seed, version="custom"
        )
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = 40
        attack.apgd.n_restarts = 1
        attack.apgd_targeted.n_target_classes = 3
        with torch.random.fork_rng():
            x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=64)
        with torch.no_grad():
            return net(x_adv).argmax(1) == y

    first, second = package(0), package(1)
    budget = AttackBudget(steps=40, targets=3)
    ours = robust_verdicts(net, x, y, Ball(p=p, eps=eps), attacks=["apgd-ce", "apgd-t"], budget=budget)
    assert 0.1 < first.float().mean() < 0.9
    assert int((ours.robust != first).sum()) <= int((first != second).sum()) + 1


def test_all_four_attacks_leave_everything_as_it_was(digits: Case) -> None:
    net, x, y = digits
    x, y = x[:40], y[:40].clone()
    y[0] = (y[0] + 1) % 10
    net.requires_grad_(True)
    kept, state = x.clone(), torch.get_rng_state()
    seen: list[tuple[str, int]] = []
    ball = Ball(p=2.0, eps=0.25)
    found = robust_verdicts(
        net,
        x,
        y,
        ball,
        budget=QUICK,
        batch_size=16,
        progress=lambda name, images: seen.append((name, images)),
    )
    assert torch.equal(x, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.training
    with torch.no_grad():
        decided = net(found.x_adv).argmax(1)
        clean = net(x).argmax(1) == y
    assert torch.equal(found.correct, clean)
    assert torch.equal(found.robust, decided == y)
    assert (geometry.distance(found.x_adv, x, 2) <= ball.eps * (1 + 1e-5)).all()
    assert torch.equal(found.x_adv[found.robust], x[found.robust])
    assert found.attacked[0] == int(clean.sum())
    for k in range(1, 4):
        assert found.attacked[k] == found.attacked[k - 1] - found.broken[k - 1]
    assert sum(found.broken) == int((clean & ~found.robust).sum())
    assert {name for name, _ in seen} == set(autoattack.STANDARD)
    assert max(images for _, images in seen) == 16
    assert found.stuck == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["fab-t", "square"])
def test_the_packages_attacks_break_images_of_their_own(digits: Case, name: str) -> None:
    net, x, y = digits
    found = robust_verdicts(
        net, x[:30], y[:30], Ball(p=2.0, eps=1.5), attacks=[name], budget=AttackBudget(steps=10, queries=60)
    )
    assert found.broken[0] > 0.3 * found.attacked[0]
    torch.rand(3)
    again = robust_verdicts(
        net, x[:30], y[:30], Ball(p=2.0, eps=1.5), attacks=[name], budget=AttackBudget(steps=10, queries=60)
    )
    assert torch.equal(found.broken_by, again.broken_by)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_work(classes: int) -> None:
    net, x, y = _train(classes)
    for p, eps in ((2.0, 0.5), (math.inf, 0.08)):
        found = robust_verdicts(net, x[:12], y[:12], Ball(p=p, eps=eps), budget=QUICK)
        large = robust_verdicts(net, x[:12], y[:12], Ball(p=p, eps=8 * eps), budget=QUICK)
        assert found.robust.sum() > 0
        assert large.robust.sum() == 0


@pytest.mark.parametrize(("p", "eps"), [(1.0, 6.0), (1.5, 2.0)])
def test_other_norms_run_what_exists(digits: Case, p: float, eps: float) -> None:
    net, x, y = digits
    ours = ("apgd-ce", "apgd-t")
    found = robust_verdicts(net, x[:20], y[:20], Ball(p=p, eps=eps), attacks=ours, budget=QUICK)
    assert found.robust.sum() <= 2
    assert found.name.startswith("AFW-CE" if p == 1.5 else "APGD-CE")
    if p == 1.5:
        with pytest.raises(ValueError, match=r"l1\.5"):
            robust_verdicts(net, x[:2], y[:2], Ball(p=p, eps=eps))
    with pytest.raises(ValueError, match="unknown attack"):
        robust_verdicts(net, x[:2], y[:2], Ball(p=p, eps=eps), attacks=["pgd"])


def test_the_verdict_is_that_of_the_fp32_network(digits: Case) -> None:
    """A search network that calls everything wrong breaks nothing by itself."""
    net, x, y = digits
    x, y = x[:20], y[:20]
    ball = Ball(p=2.0, eps=0.01)
    found = robust_verdicts(net, x, y, ball, attacks=["apgd-ce"], budget=QUICK, search_logits_of=constant)
    assert torch.equal(found.robust, found.correct)


def constant(images: Tensor) -> Tensor:
    """Class 0 everywhere, without a gradient."""
    return torch.zeros(len(images), 10) + 0 * images.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("attack", autoattack.STANDARD)
def test_a_search_is_repeated_where_its_network_errs(digits: Case, attack: str) -> None:
    """Points that only the search network takes for wrong do not end the search of their images."""
    net, x, y = digits
    x, y = x[y != 0][:20], y[y != 0][:20]
    ball = Ball(p=2.0, eps=0.5)
    exact = robust_verdicts(net, x, y, ball, attacks=[attack], budget=QUICK)
    found = robust_verdicts(net, x, y, ball, attacks=[attack], budget=QUICK, search_logits_of=constant)
    assert torch.equal(found.broken_by, exact.broken_by)
    assert found.broken[0] > 0
    assert found.stuck[0] == 0, "the repeated search had a gradient"


@pytest.mark.parametrize("attack", ["fab-t", "square"])
def test_the_search_network_answers_the_queries(digits: Case, attack: str) -> None:
    """In bf16, say: the network of the verdicts sees the images and the points found."""
    net, x, y = digits
    x, y = x[:20], y[:20]
    ball = Ball(p=2.0, eps=0.5)
    seen = {"search": 0, "verdicts": 0}

    def counted(name: str) -> Callable[[Tensor], Tensor]:
        def logits_of(images: Tensor) -> Tensor:
            seen[name] += len(images)
            return net(images)

        return logits_of

    exact = robust_verdicts(net, x, y, ball, attacks=[attack], budget=QUICK)
    found = robust_verdicts(
        counted("verdicts"), x, y, ball, attacks=[attack], budget=QUICK, search_logits_of=counted("search")
    )
    assert torch.equal(found.broken_by, exact.broken_by)
    assert seen["verdicts"] == 20 + int(found.correct.sum())
    assert seen["search"] > 5 * seen["verdicts"]


def test_our_attacks_do_not_depend_on_the_batch(digits: Case) -> None:
    net, x, y = digits
    x, y = x[:30], y[:30]
    ball, ours = Ball(p=2.0, eps=0.35), ("apgd-ce", "apgd-t")
    whole = robust_verdicts(net, x, y, ball, attacks=ours, budget=QUICK)
    small = robust_verdicts(net, x.flip(0), y.flip(0), ball, attacks=ours, budget=QUICK, batch_size=7)
    assert torch.equal(whole.broken_by, small.broken_by.flip(0))
    assert 0 < int(whole.robust.sum()) < 30


def test_names_are_honest() -> None:
    full = autoattack.STANDARD
    assert ensemble_name(full, AttackBudget(), 2.0, 10) == "AutoAttack (standard)"
    assert ensemble_name(full, AttackBudget(), math.inf, 2) == "AutoAttack (standard)"
    assert ensemble_name(full, AttackBudget(queries=1000), 2.0, 10).split(" + ") == [
        "APGD-CE 100 steps",
        "APGD-T 100 steps x 9 target(s)",
        "FAB-T 100 steps x 9 target(s)",
        "Square 1000 queries",
    ]
    quick = AttackBudget(steps=50, targets=3)
    assert ensemble_name(full[:2], quick, 2.0, 10) == "APGD-CE 50 steps + APGD-T 50 steps x 3 target(s)"
    assert "standard" not in ensemble_name(full, AttackBudget(), 1.0, 10)
    assert "standard" not in ensemble_name(full, autoattack.standard_budget(1.0), 1.0, 10)
    for missing in range(4):
        assert "standard" not in ensemble_name(full[:missing] + full[missing + 1 :], AttackBudget(), 2.0, 10)


def test_worst_case_confidence_is_the_best_of_its_searches_and_the_image(digits: Case) -> None:
    net, x, _ = digits
    x = x[:24] * 0.5 + 0.25
    confidence: Callable[[Tensor], Tensor] = lambda z: (net(z) / 2.0).softmax(1).max(1).values  # noqa: E731
    ball = Ball(p=2.0, eps=0.5)
    found = worst_case_confidence(net, x, ball, temperature=2.0, steps=10, restarts=2, targets=2)
    with torch.no_grad():
        torch.testing.assert_close(found.clean, confidence(x))
        torch.testing.assert_close(found.confidence, confidence(found.x), atol=1e-5, rtol=1e-4)
    assert (found.confidence >= found.clean).all()
    assert (found.confidence > found.clean + 0.01).float().mean() > 0.8
    assert (geometry.distance(found.x, x, 2) <= 0.5).all()
    assert found.searches == ("log-confidence", "margin", "target 2", "target 3")
    assert ((found.by == 0) == (found.confidence == found.clean)).all()
    assert not found.stuck.any()
    fewer = worst_case_confidence(net, x, ball, temperature=2.0, steps=10, restarts=2, targets=0)
    assert (found.confidence >= fewer.confidence - 1e-6).all()


def test_worst_case_confidence_sees_through_a_saturated_softmax(digits: Case) -> None:
    """Logits so sharp that p is flat in fp32: the logarithm and the margin still move."""
    net, x, _ = digits
    x = x[:24]

    def sharp(z: Tensor) -> Tensor:
        return 200 * net(z)

    with torch.no_grad():
        unsure = x.new_zeros(24, 1, 8, 8) + 0.5 * (x + x.flip(0))  # blends of two digits
        start = sharp(unsure).softmax(1).max(1).values
    found = worst_case_confidence(sharp, unsure, Ball(p=2.0, eps=1.0), steps=10, restarts=1)
    assert (found.confidence >= start).all()
    assert found.confidence.min() > 0.99


class Linear(nn.Module):
    """Logits linear in the pixels: the distance to every decision boundary is known."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = torch.randn(classes, 192, generator=torch.Generator().manual_seed(classes))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("p", [2.0, math.inf, 1.0])
def test_few_classes_agree_with_brute_force_on_a_linear_model(classes: int, p: float) -> None:
    """Robust exactly where no other class' boundary, at distance gap / dual norm, lies in the ball."""
    net = Linear(classes)
    x = 0.5 + 0.1 * (torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5)
    logits = net(x)
    y = logits.argmax(1)
    dual = {2.0: 2.0, math.inf: 1.0, 1.0: math.inf}[p]
    least = torch.full((60,), math.inf)
    for k in range(classes):
        norms = torch.linalg.vector_norm(net.weight[y] - net.weight[k], ord=dual, dim=1)
        gap = (logits.gather(1, y[:, None]).squeeze(1) - logits[:, k]) / norms
        least = torch.where(y == k, least, torch.minimum(least, gap))
    eps = float(least.median())
    clear = (least - eps).abs() > 0.05 * eps  # what lies on the boundary may fall on either side
    assert clear.sum() > 40
    found = robust_verdicts(
        net, x, y, Ball(p=p, eps=eps), attacks=["apgd-ce", "apgd-t"], budget=AttackBudget(steps=60)
    )
    assert torch.equal(found.robust[clear], (least > eps)[clear])
    all_four = robust_verdicts(net, x, y, Ball(p=p, eps=eps), budget=AttackBudget(steps=20, queries=50))
    assert not (all_four.robust & (least < eps) & clear).any()
    assert (all_four.robust | (least < eps) | ~clear).all()


@pytest.mark.slow
def test_the_reference_is_the_package_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attack by attack on batches of survivors: the same points as one call on all images."""
    import sys

    from pyautoattack import AutoAttack
    from pyautoattack.square import SquareAttack

    net, x, y = _train(4)  # three targets: four classes are the fewest the package can deal with
    x, y = x[:14], y[:14].clone()
    y[3] = (y[3] + 1) % 4
    ball = Ball(p=math.inf, eps=0.12)
    package = AutoAttack(net, eps=ball.eps, norm="Linf", seed=5, version="standard")
    package.square.n_queries = 30
    package.apgd_targeted.n_target_classes = package.fab.n_target_classes = 3
    with torch.random.fork_rng():
        theirs, _ = package.run_standard_evaluation(x, y, batch_size=8)
    # `version="standard"` sets the queries itself, so they are cut where they are used.
    single = SquareAttack.attack_single_run
    monkeypatch.setattr(
        SquareAttack,
        "attack_single_run",
        lambda self, a, b: (setattr(self, "n_queries", 30), single(self, a, b))[1],
    )
    state, trace = torch.get_rng_state(), sys.gettrace()
    net.zero_grad()  # the package leaves gradients behind
    ours = robust_verdicts(net, x, y, ball, backend="reference", batch_size=8, seed=5)
    assert torch.equal(ours.x_adv, theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert sys.gettrace() is trace
    assert all(parameter.grad is None for parameter in net.parameters())
    assert 0 < int(ours.robust.sum()) < 13
    assert ours.name == "AutoAttack (standard)"
    assert ours.backend.startswith("pyautoattack ")
    first = robust_verdicts(net, x, y, ball, attacks=["apgd-ce"], backend="reference", batch_size=8)
    assert first.name == "APGD-CE of AutoAttack"


@pytest.mark.parametrize(("p", "classes"), [(1.5, 10), (2.0, 3)])
def test_the_reference_is_refused_where_the_package_has_no_answer(p: float, classes: int) -> None:
    net, x = Linear(classes), torch.rand(2, 3, 8, 8)
    y = net(x).argmax(1)
    with pytest.raises(ValueError, match="reference"):
        robust_verdicts(net, x, y, Ball(p=p, eps=0.1), attacks=["apgd-ce"], backend="reference")
    with pytest.raises(ValueError, match="budget"):
        robust_verdicts(net, x, y, Ball(p=2, eps=0.1), budget=QUICK, backend="reference")
