"""Goals against their formulas written out by hand."""

import math

import pytest
import torch

from ratioctl.attacks import goals

LOGITS = torch.tensor([[2.0, 1.0, -1.0, 0.5], [0.0, 3.0, 1.0, 2.0]])
Y = torch.tensor([0, 2])
TARGET = torch.tensor([3, 0])
P = LOGITS.exp() / LOGITS.exp().sum(1, keepdim=True)


def _check(goal: goals.Goal, expected: list[float]) -> None:
    torch.testing.assert_close(goal(LOGITS), torch.tensor(expected))


def test_goals_equal_their_formulas() -> None:
    _check(goals.cross_entropy(Y), [-math.log(P[0, 0]), -math.log(P[1, 2])])
    _check(goals.margin(Y), [1.0 - 2.0, 3.0 - 1.0])
    _check(goals.targeted_margin(Y, TARGET), [0.5 - 2.0, 0.0 - 1.0])
    _check(goals.dlr(Y), [(1.0 - 2.0) / (2.0 - 0.5), (3.0 - 1.0) / (3.0 - 1.0)])
    _check(goals.targeted_dlr(Y, TARGET), [-1.5 / (2.0 - (0.5 - 1.0) / 2), -1.0 / (3.0 - (1.0 + 0.0) / 2)])
    _check(goals.uniform_cross_entropy(), (-P.log().mean(1)).tolist())
    _check(goals.confidence(), [P[0, 0].item(), P[1, 1].item()])
    _check(goals.log_confidence(), [math.log(P[0, 0]), math.log(P[1, 1])])
    _check(goals.log_probability(TARGET), [math.log(P[0, 3]), math.log(P[1, 0])])


def test_temperature_divides_the_logits() -> None:
    cold = (LOGITS / 0.5).softmax(1)
    _check(goals.confidence(0.5), cold.max(1).values.tolist())
    _check(goals.log_confidence(0.5), cold.max(1).values.log().tolist())
    _check(goals.log_probability(TARGET, 0.5), [cold[0, 3].log().item(), cold[1, 0].log().item()])


def test_kl_is_zero_with_zero_gradient_at_the_clean_prediction_and_counts_from_it() -> None:
    goal = goals.by_name("kl", clean_logits=LOGITS)
    logits = LOGITS.clone().requires_grad_()
    value = goal(logits)
    torch.testing.assert_close(value, torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), logits)[0], torch.zeros(2, 4))
    other = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, -2.0]])
    q = other.softmax(1)
    torch.testing.assert_close(goal(other), (P * (P / q).log()).sum(1))


def test_a_wrong_decision_is_a_positive_margin_and_dlr_ignores_scale_and_shift() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(200, 5), torch.randint(5, (200,))
    wrong = logits.argmax(1) != y
    assert torch.equal(goals.margin(y)(logits) > 0, wrong)
    assert torch.equal(goals.dlr(y)(logits) > 0, wrong)
    torch.testing.assert_close(goals.dlr(y)(7 * logits + 3), goals.dlr(y)(logits), atol=1e-4, rtol=1e-4)


def test_goals_are_fp32_whatever_the_logits() -> None:
    every = [
        goals.cross_entropy(Y),
        goals.margin(Y),
        goals.dlr(Y),
        goals.targeted_dlr(Y, TARGET),
        goals.uniform_cross_entropy(),
        goals.kl(P),
        goals.confidence(),
        goals.log_confidence(),
        goals.log_probability(TARGET),
    ]
    for goal in every:
        value = goal(LOGITS.bfloat16())
        assert value.dtype == torch.float32
        assert value.shape == (2,)


def test_the_margin_works_for_two_classes_and_dlr_says_what_to_use() -> None:
    two = LOGITS[:, :2]
    y = torch.tensor([0, 1])
    torch.testing.assert_close(goals.margin(y)(two), torch.tensor([-1.0, -3.0]))
    with pytest.raises(ValueError, match="margin"):
        goals.dlr(y)(two)
    with pytest.raises(ValueError, match="margin"):
        goals.targeted_dlr(y, 1 - y)(LOGITS[:, :3])


def test_by_name_builds_each_goal_and_misses_what_it_needs() -> None:
    _check(goals.by_name("cross-entropy", Y), goals.cross_entropy(Y)(LOGITS).tolist())
    _check(goals.by_name("margin", Y), goals.margin(Y)(LOGITS).tolist())
    _check(goals.by_name("dlr", Y), goals.dlr(Y)(LOGITS).tolist())
    _check(goals.by_name("uniform-cross-entropy"), goals.uniform_cross_entropy()(LOGITS).tolist())
    _check(goals.by_name("confidence"), goals.log_confidence()(LOGITS).tolist())
    with pytest.raises(ValueError, match="labels"):
        goals.by_name("margin")
    with pytest.raises(ValueError, match="clean"):
        goals.by_name("kl")
    with pytest.raises(ValueError, match="unknown"):
        goals.by_name("none")  # type: ignore[arg-type]
