"""OOD scores: definitions, agreement of NumPy and torch, saturation, the registry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy

from ratioctl import scores
from ratioctl.errors import UsageError

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 5, (200, 7)).astype(np.float32)
DEFINITIONS = {
    "msp": lambda f, t: 1 - softmax(f / t, axis=1).max(1),
    "max_logit": lambda f, t: -f.max(1),
    "energy": lambda f, t: -t * logsumexp(f / t, axis=1),
    "entropy": lambda f, t: entropy(softmax(f / t, axis=1), axis=1),
}


def test_the_registry_holds_these_scores_and_the_default_comes_first() -> None:
    assert scores.names() == ("msp", "energy", "entropy", "max_logit")
    assert scores.DEFAULT == "msp"


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_a_score_is_what_its_paper_defines(name: str, temperature: float) -> None:
    score = scores.by_name(name)
    expected = DEFINITIONS[name](LOGITS.astype(np.float64), temperature)
    np.testing.assert_allclose(score.from_logits(LOGITS, temperature), expected, rtol=1e-9, atol=1e-12)
    tensor = score.from_tensor(torch.from_numpy(LOGITS).double(), temperature)
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_acceptance_orders_images_as_the_negated_score_does(name: str) -> None:
    score = scores.by_name(name)
    order = np.argsort(-score.from_logits(LOGITS, 0.7), kind="stable")
    np.testing.assert_array_equal(np.argsort(score.acceptance(LOGITS, 0.7), kind="stable"), order)
    tensor = score.acceptance_tensor(torch.from_numpy(LOGITS).double(), 0.7).numpy()
    np.testing.assert_allclose(tensor, score.acceptance(LOGITS, 0.7), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_a_threshold_taken_from_an_image_flags_exactly_the_less_acceptable_ones(name: str) -> None:
    score = scores.by_name(name)
    order = np.argsort(score.acceptance(LOGITS, 0.7))
    threshold = float(score.threshold_of(LOGITS, 0.7)[order[50]])
    flagged = score.is_ood(LOGITS, 0.7, threshold)
    assert set(np.flatnonzero(flagged)) == set(order[:50])
    other = np.delete(np.arange(len(LOGITS)), order[50])  # that image itself is at the bound, up to rounding
    by_bound = score.acceptance(LOGITS, 0.7) < score.acceptance_bound(threshold)
    np.testing.assert_array_equal(by_bound[other], flagged[other])


def test_msp_flags_as_its_confidence_does_and_still_tells_images_apart_where_that_is_1() -> None:
    score = scores.by_name("msp")
    confidence = softmax(LOGITS.astype(np.float64), axis=1).max(1)
    flagged = score.acceptance(LOGITS, 1.0) < score.acceptance_bound(0.9)
    np.testing.assert_array_equal(flagged, confidence < 0.9)
    sharp = np.array([[60.0, 0.0, 0.0], [80.0, 0.0, 0.0]])
    np.testing.assert_array_equal(score.from_logits(sharp, 1.0), [0, 0])
    low, high = score.acceptance(sharp, 1.0)
    assert (low, high) == pytest.approx((60 - math.log(2), 80 - math.log(2)))
    assert score.acceptance_bound(0.0) == -math.inf
    around_1 = np.array([[36.0, 0.0], [38.0, 0.0]])  # confidences just below 1, and rounded to 1
    np.testing.assert_array_equal(score.is_ood(around_1, 1.0, 1.0), [True, False])
    np.testing.assert_array_equal(
        score.acceptance(around_1, 1.0) < score.acceptance_bound(1.0), [True, False]
    )


def test_an_image_between_two_classes_has_finite_log_odds_and_a_gradient() -> None:
    score = scores.by_name("msp")
    logits = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = score.acceptance_tensor(logits, 1.0)
    p = 1 / (2 + math.exp(-1))
    assert value.item() == pytest.approx(math.log(p / (1 - p)))
    value.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    logits = LOGITS[:2].copy()
    logits[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        scores.by_name(name).from_logits(logits, 1.0)


def test_unknown_and_duplicate_names_are_refused() -> None:
    with pytest.raises(UsageError, match="msp, energy, entropy, max_logit"):
        scores.by_name("knn")
    with pytest.raises(ValueError, match="already a score"):
        scores.register_score(scores.by_name("msp"))
    assert scores.by_config_name("max-softmax") is scores.by_name("msp")
    assert scores.by_config_name("knn") is None
