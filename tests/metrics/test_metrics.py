"""Metrics against cases solved on paper, brute force and scikit-learn."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
    roc_curve,
)

from ratioctl import metrics as m

quick = settings(deadline=None, max_examples=60)
scores = st.lists(st.integers(-4, 4), min_size=1, max_size=25).map(lambda v: np.array(v) / 4)
seeds = st.integers(0, 2**32 - 1)


# --- probabilities -----------------------------------------------------------------------------------------


def test_softmax_on_paper():
    logits = np.log([[1.0, 3.0], [2.0, 2.0]])
    np.testing.assert_allclose(m.softmax(logits), [[0.25, 0.75], [0.5, 0.5]], atol=1e-15)
    np.testing.assert_allclose(m.softmax(logits, 0.5), [[0.1, 0.9], [0.5, 0.5]], atol=1e-15)
    np.testing.assert_allclose(m.confidence(logits, 0.5), [0.9, 0.5], atol=1e-15)
    np.testing.assert_allclose(m.ood_score([0.9, 0.5]), [0.1, 0.5], atol=1e-15)


def test_softmax_survives_enormous_logits():
    assert m.softmax([1e300, 0.0]).tolist() == [1, 0]
    np.testing.assert_allclose(m.log_softmax([[1000.0, 0.0]]), [[0, -1000]])
    np.testing.assert_allclose(m.log_softmax([[-1000.0, -1000.0]]), [[-math.log(2)] * 2])
    assert m.softmax(np.zeros((2, 3, 4))).shape == (2, 3, 4)


@pytest.mark.parametrize("bad", [[np.nan, 0], [np.inf, 0], [-np.inf, -np.inf], [], 3.0])
def test_impossible_logits(bad):
    with pytest.raises(ValueError):
        m.softmax(bad)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_impossible_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature"):
        m.softmax([0.0, 1.0], temperature)


# --- accuracy and calibration ------------------------------------------------------------------------------


def test_accuracy_on_paper():
    assert m.accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75


def test_ece_on_paper():
    """Two bins on [0.5, 1]: two right of three around 0.6, one right of two around 0.95."""
    confidences, correct = [0.5, 0.6, 0.7, 0.9, 1.0], [True, True, False, True, False]
    expected = 3 / 5 * abs(2 / 3 - 0.6) + 2 / 5 * abs(1 / 2 - 0.95)
    assert m.ece(confidences, correct, 2, 0.5) == pytest.approx(expected, abs=1e-12)
    diagram = m.reliability(confidences, correct, 2, 0.5)
    assert diagram.count.tolist() == [3, 2]
    np.testing.assert_allclose(diagram.edges, [0.5, 0.75, 1])
    np.testing.assert_allclose(diagram.accuracy, [2 / 3, 1 / 2])
    np.testing.assert_allclose(diagram.confidence, [0.6, 0.95])
    assert m.ece(confidences, correct, 2, 0.0) == pytest.approx(abs(3 / 5 - 0.74), abs=1e-12)


def test_edges_belong_to_the_bin_above_and_one_to_the_last():
    diagram = m.reliability([0.5, 0.75, 1.0], [1, 1, 1], 2, 0.5)
    assert diagram.count.tolist() == [1, 2]
    assert m.ece([1.0, 1.0], [True, True], 15, 0.1) == 0
    assert m.ece([1.0, 1.0], [False, False], 15, 0.1) == 1


def test_float32_rounding_does_not_leave_the_range():
    c = np.array([np.float32(0.1), 1.0000001, 0.0999999], dtype=np.float32)
    assert m.reliability(c, [0, 1, 0], 10, 0.1).count.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="below the lowest"):
        m.ece([0.05, 0.9], [0, 1], 10, 0.1)


@quick
@given(seeds, st.integers(1, 20), st.integers(2, 20))
def test_ece_equals_equation_9_written_out(seed, bins, classes):
    g = np.random.default_rng(seed)
    n, low = int(g.integers(1, 60)), 1 / classes
    c = np.where(g.random(n) < 0.2, 1.0, low + (1 - low) * g.random(n))
    correct = g.random(n) < c
    edges = [low + (1 - low) * b / bins for b in range(bins + 1)]
    total = 0.0
    for b in range(bins):
        last = b == bins - 1
        held = [i for i in range(n) if edges[b] <= c[i] and (c[i] < edges[b + 1] or last)]
        if held:
            acc = sum(float(correct[i]) for i in held) / len(held)
            conf = sum(c[i] for i in held) / len(held)
            total += len(held) / n * abs(acc - conf)
    assert m.ece(c, correct, bins, low) == pytest.approx(total, abs=1e-9)


def test_ece_takes_probabilities_of_being_correct():
    """Out-images count as right with probability 1/K in the mixture."""
    assert m.ece([0.1, 0.1], [0.1, 0.1], 10, 0.1) == pytest.approx(0, abs=1e-15)


def test_adaptive_ece_on_paper():
    c, right = [0.9, 0.2, 0.6, 0.3], [1, 0, 1, 1]  # bins {0.2, 0.3} and {0.6, 0.9}
    assert m.adaptive_ece(c, right, 2) == pytest.approx(0.5 * abs(0.5 - 0.25) + 0.5 * abs(1 - 0.75))
    assert m.adaptive_ece([0.5] * 7, [1, 0, 1, 0, 1, 0, 1], 3) == pytest.approx(4 / 7 - 0.5)
    assert m.adaptive_ece([0.7], [1], 15) == pytest.approx(0.3)


@quick
@given(seeds)
def test_calibration_does_not_depend_on_the_order(seed):
    g = np.random.default_rng(seed)
    c, right = np.round(0.5 + g.random(40) / 2, 1), g.random(40) < 0.7
    order = g.permutation(40)
    for measure in (lambda c, r: m.ece(c, r, 15, 0.5), m.adaptive_ece):
        assert measure(c, right) == pytest.approx(measure(c[order], right[order]), abs=1e-12)


@quick
@given(seeds, st.sampled_from([0.5, 1.0, 2.0]))
def test_nll_and_brier_agree_with_scikit_learn(seed, temperature):
    g = np.random.default_rng(seed)
    logits, labels = g.normal(0, 3, (30, 4)), g.integers(0, 4, 30)
    p = m.softmax(logits, temperature)
    assert m.nll(logits, labels, temperature) == pytest.approx(log_loss(labels, p, labels=range(4)), abs=1e-9)
    two = p[:, :2] / p[:, :2].sum(1, keepdims=True)
    binary = labels % 2
    assert m.brier(two, binary) == pytest.approx(2 * brier_score_loss(binary, two[:, 1]), abs=1e-9)


def test_brier_and_nll_on_paper():
    assert m.brier([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]], [1, 0]) == pytest.approx((0.49 + 0.64 + 0.01 + 2) / 2)
    assert m.nll([[0.0, 0.0], [math.log(3), 0.0]], [0, 0]) == pytest.approx(
        (math.log(2) + math.log(4 / 3)) / 2
    )


# --- detection ---------------------------------------------------------------------------------------------


def test_auroc_on_paper():
    """Pairs: 0.5 > 0.1, 0.5 = 0.5, 0.8 > both: (3 + 1/2) / 4, or 3 / 4."""
    assert m.auroc([0.1, 0.5], [0.5, 0.8]) == 0.875
    assert m.conservative_auroc([0.1, 0.5], [0.5, 0.8]) == 0.75
    assert m.auroc([0.0] * 3, [0.0] * 4) == 0.5
    assert m.conservative_auroc([0.0] * 3, [0.0] * 4) == 0
    assert m.auroc([0, 1], [2, 3]) == m.conservative_auroc([0, 1], [2, 3]) == 1
    assert m.auroc([2, 3], [0, 1]) == 0


@quick
@given(scores, scores)
def test_auroc_equals_counting_pairs_and_scikit_learn(inside, outside):
    pairs = [(i, o) for i in inside for o in outside]
    half = sum((o > i) + 0.5 * (o == i) for i, o in pairs) / len(pairs)
    assert m.auroc(inside, outside) == pytest.approx(half, abs=1e-12)
    assert m.conservative_auroc(inside, outside) == pytest.approx(
        sum(o > i for i, o in pairs) / len(pairs), abs=1e-12
    )
    truth = np.repeat([0, 1], [len(inside), len(outside)])
    assert m.auroc(inside, outside) == pytest.approx(roc_auc_score(truth, np.r_[inside, outside]), abs=1e-9)
    assert m.auroc(inside, outside) == pytest.approx(m.auroc(-outside, -inside), abs=1e-12)


@quick
@given(scores, scores)
def test_average_precision_agrees_with_scikit_learn(inside, outside):
    truth, all_scores = np.repeat([0, 1], [len(inside), len(outside)]), np.r_[inside, outside]
    assert m.aupr_out(inside, outside) == pytest.approx(average_precision_score(truth, all_scores), abs=1e-9)
    assert m.aupr_in(inside, outside) == pytest.approx(
        average_precision_score(1 - truth, -all_scores), abs=1e-9
    )


def test_average_precision_on_paper():
    """Ranking out, in, out: recall 1/2 at precision 1, recall 1 at precision 2/3."""
    assert m.aupr_out([0.5], [0.9, 0.1]) == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 3)
    assert m.aupr_out([0.5, 0.5], [0.5]) == pytest.approx(1 / 3)
    assert m.aupr_in([0.5], [0.9, 0.1]) == pytest.approx(1 / 2)


@quick
@given(scores, scores, st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_fpr_at_tpr_equals_trying_every_threshold(inside, outside, tpr):
    tries = [np.mean(inside >= t) for t in outside if np.mean(outside >= t) >= tpr]
    assert m.fpr_at_tpr(inside, outside, tpr) == min(tries)
    truth, all_scores = np.repeat([0, 1], [len(inside), len(outside)]), np.r_[inside, outside]
    fpr, recall, _ = roc_curve(truth, all_scores, drop_intermediate=False)
    assert m.fpr_at_tpr(inside, outside, tpr) == pytest.approx(fpr[np.argmax(recall >= tpr)], abs=1e-9)


def test_fpr_at_95_tpr_on_paper():
    outside = np.arange(20.0)  # 19 of 20 are flagged from 1 on
    assert m.fpr_at_95_tpr([0.0, 0.5, 1.0, 7.0], outside) == 0.5
    assert m.fpr_at_95_tpr([-1.0], outside) == 0
    assert m.fpr_at_95_tpr([0.3], [0.3]) == 1


def test_mmc():
    assert m.mmc([0.2, 0.4]) == pytest.approx(0.3)


def test_thresholds_on_paper():
    c = np.random.default_rng(0).permutation(np.arange(100) / 100)
    assert m.threshold_at_tpr(c, 95) == 0.05
    assert m.threshold_at_tpr(c, 99) == 0.01
    assert m.threshold_at_tpr(c, 100) == 0
    assert m.threshold_at_tpr(c[:10], 99.5) == c[:10].min()
    assert m.threshold_at_tpr(np.arange(10.0) / 10, 90) == 0.1  # (1 - 0.9) * 10 is 0.9999999999999998
    for bad in (0, -1, 101):
        with pytest.raises(ValueError, match="percent"):
            m.threshold_at_tpr(c, bad)


@quick
@given(scores, st.sampled_from([50, 90, 95, 97.5, 99]))
def test_thresholds_keep_what_they_promise(c, percent):
    threshold = m.threshold_at_tpr(c, percent)
    assert threshold in c
    kept, _ = m.operating_point(c, [0.0], threshold)
    assert kept >= percent / 100 - 1e-12


def test_operating_point():
    assert m.operating_point([0.2, 0.5, 0.9, 0.95], [0.1, 0.5], 0.5) == (0.75, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        m.operating_point([0.1], [0.1], math.nan)


# --- intervals ---------------------------------------------------------------------------------------------


def test_wilson_on_paper():
    z = NormalDist().inv_cdf(0.975)
    low, high = m.wilson_interval(8, 10)
    for edge in (low, high):  # the defining equation
        assert (0.8 - edge) ** 2 == pytest.approx(z**2 * edge * (1 - edge) / 10, abs=1e-12)
    assert low < 0.8 < high
    assert m.wilson_interval(0, 10) == (0.0, pytest.approx(z**2 / (10 + z**2)))
    assert m.wilson_interval(10, 10) == (pytest.approx(10 / (10 + z**2)), 1.0)
    wide, narrow = m.wilson_interval(80, 100, 0.99), m.wilson_interval(80, 100, 0.5)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]


def test_auroc_interval():
    low, high = m.auroc_interval(0.9, 1000, 1000)
    # Hanley and McNeil 1982: sqrt((A(1-A) + 999 (A/(2-A) - A^2) + 999 (2A^2/(1+A) - A^2)) / 10^6)
    q1, q2 = 0.9 / 1.1, 2 * 0.81 / 1.9
    deviation = math.sqrt((0.09 + 999 * (q1 - 0.81) + 999 * (q2 - 0.81)) / 1e6)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.02)
    assert low < 0.9 < high
    certain = m.auroc_interval(1.0, 50, 50)
    assert certain[1] == 1
    assert 0.9 < certain[0] < 0.99
    assert m.auroc_interval(0.0, 50, 50) == (0.0, pytest.approx(1 - certain[0]))


def test_auroc_interval_covers_the_truth():
    g = np.random.default_rng(3)
    truth = NormalDist().cdf(1 / math.sqrt(2))
    held = 0
    for _ in range(400):
        value = m.auroc(g.normal(size=60), g.normal(1, size=40))
        low, high = m.auroc_interval(value, 60, 40)
        held += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.98


def test_mean_interval():
    values = np.array([0.4, 0.5, 0.6, 0.5])
    half = NormalDist().inv_cdf(0.975) * values.std(ddof=1) / 2
    assert m.mean_interval(values) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    assert m.mean_interval([0.0, 1.0]) == (0.0, 1.0)
    assert m.mean_interval([0.3]) == (0.0, 1.0)


def test_bootstrap_interval():
    g = np.random.default_rng(0)
    x = g.normal(3, 1, 200)
    low, high = m.bootstrap_interval(np.mean, [[x]], generator=np.random.default_rng(1))
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(200), rel=0.15)
    again = m.bootstrap_interval(np.mean, [[x]], generator=np.random.default_rng(1))
    assert again == (low, high)


def test_bootstrap_keeps_groups_together_and_apart():
    pairs = (np.arange(30), np.arange(30) * 2)

    def linked(a, b, c):
        assert (b == 2 * a).all()
        assert len(c) == 5
        return float(a.mean())

    m.bootstrap_interval(linked, [pairs, [np.arange(5)]], generator=np.random.default_rng(0), samples=20)
    for groups in ([[np.arange(3), np.arange(4)]], [[]], [[np.array([])]]):
        with pytest.raises(ValueError, match="group"):
            m.bootstrap_interval(linked, groups, generator=np.random.default_rng(0))


@pytest.mark.parametrize("bad", [[], [np.nan], [[0.5]], [np.inf], 0.5])
def test_bad_arrays_are_refused_everywhere(bad):
    good = [0.5, 0.6]
    calls = [
        lambda: m.ood_score(bad),
        lambda: m.mmc(bad),
        lambda: m.mean_interval(bad),
        lambda: m.threshold_at_tpr(bad, 95),
        lambda: m.operating_point(good, bad, 0.5),
        lambda: m.ece(bad, [1], 10, 0.0),
        lambda: m.adaptive_ece(bad, [1]),
        lambda: m.ece(good, bad, 10, 0.0),
    ]
    for measure in (m.auroc, m.conservative_auroc, m.fpr_at_95_tpr, m.aupr_in, m.aupr_out):
        calls += [lambda f=measure: f(bad, good), lambda f=measure: f(good, bad)]
    for call in calls:
        with pytest.raises(ValueError):
            call()


def test_arguments_that_do_not_fit():
    for call in (
        lambda: m.accuracy([0, 1], [0]),
        lambda: m.accuracy([], []),
        lambda: m.ece([0.5, 0.5], [1], 10, 0.0),
        lambda: m.ece([0.5], [2], 10, 0.0),
        lambda: m.ece([0.5], [1], 0, 0.0),
        lambda: m.ece([0.5], [1], 10, 1.0),
        lambda: m.ece([1.1], [1], 10, 0.0),
        lambda: m.nll([[0.0, 0.0]], [2]),
        lambda: m.nll([[0.0, 0.0]], [-1]),
        lambda: m.nll([[0.0, 0.0]], [0.5]),
        lambda: m.brier([[np.nan, 1.0]], [0]),
        lambda: m.brier([0.5, 0.5], [0]),
        lambda: m.fpr_at_tpr([0.0], [1.0], 0.0),
        lambda: m.wilson_interval(3, 2),
        lambda: m.wilson_interval(0, 0),
        lambda: m.wilson_interval(1, 2, 1.0),
        lambda: m.auroc_interval(1.1, 5, 5),
        lambda: m.auroc_interval(0.5, 0, 5),
        lambda: m.bootstrap_interval(np.mean, [[[1.0]]], generator=np.random.default_rng(0), samples=0),
    ):
        with pytest.raises(ValueError):
            call()


def _calibrated(g, n, shift):
    c = 0.1 + 0.9 * g.beta(4, 2, n)
    return c, (g.random(n) < np.clip(c - shift, 0, 1)).astype(float)


@pytest.mark.parametrize(("shift", "n"), [(0.0, 300), (0.0, 2000), (0.1, 300), (0.03, 2000)])
def test_ece_interval_covers_the_truth(shift, n):
    """Calibrated confidences have an ECE of 0; confidences that are all too high by d one of d."""
    g, held = np.random.default_rng(1), 0
    for _ in range(80):
        c, right = _calibrated(g, n, shift)
        low, high = m.ece_interval(c, right, 15, 0.1, generator=g, samples=100)
        truth = float(np.mean(c - np.clip(c - shift, 0, 1)))
        held += low <= truth <= high
        assert 0 <= low <= m.ece(c, right, 15, 0.1) + 1e-12
        assert m.ece(c, right, 15, 0.1) < high <= 1
    assert held >= 69


def test_a_percentile_bootstrap_of_the_ece_would_miss_calibration():
    """Why `ece_interval` exists."""
    g = np.random.default_rng(2)
    c, right = _calibrated(g, 1000, 0.0)
    low, _ = m.bootstrap_interval(lambda c, r: m.ece(c, r, 15, 0.1), [[c, right]], generator=g, samples=100)
    assert low > 0.01
    assert m.ece_interval(c, right, 15, 0.1, generator=g)[0] == 0
    assert m.ece_interval(c, right, 15, None, generator=g)[0] == 0


def test_mcnemar_on_paper():
    """Six images are right for one model alone, none for the other: 2 * (1/2)^6."""
    first = np.array([1] * 6 + [1, 0, 1, 0])
    second = np.array([0] * 6 + [1, 0, 1, 0])
    assert m.mcnemar(first, second) == m.mcnemar(second, first) == pytest.approx(2 / 64)
    assert m.mcnemar(first, first) == 1
    with pytest.raises(ValueError):
        m.mcnemar(first, second[1:])


def test_the_paired_auroc_test_holds_its_level_and_sees_what_intervals_do_not():
    g, rejected = np.random.default_rng(3), 0
    for _ in range(300):
        i, o = g.normal(size=80), [g.normal(1, size=60), g.normal(2, size=40)]
        pair = [(i + g.normal(0, 0.5, 80), [s + g.normal(0, 0.5, len(s)) for s in o]) for _ in range(2)]
        rejected += m.paired_auroc_test(*pair) < 0.05
    assert 5 <= rejected <= 27
    i, o = g.normal(size=400), g.normal(1, size=400)
    worse = (i + g.normal(0, 0.8, 400), [o + g.normal(0, 0.8, 400)])
    values = [m.auroc(i, o), m.auroc(worse[0], worse[1][0])]
    ends = [m.auroc_interval(v, 400, 400) for v in values]
    assert ends[0][0] < ends[1][1], "the intervals overlap"
    assert m.paired_auroc_test((i, [o]), worse) < 0.01
    assert m.paired_auroc_test((i, [o]), (i, [o])) == 1
    with pytest.raises(ValueError, match="same images"):
        m.paired_auroc_test((i, [o]), (i[1:], [o]))


def test_the_paired_mean_test():
    a = np.linspace(0, 1, 50)
    assert m.paired_mean_test([a], [a]) == 1
    assert m.paired_mean_test([a], [a + 0.01]) == 0  # every pair differs by the same
    shaken = a + np.resize([0.1, -0.1], 50)
    assert m.paired_mean_test([a], [shaken]) == pytest.approx(1)
    half = NormalDist().inv_cdf(0.975) * np.std(shaken - a, ddof=1) / math.sqrt(50)
    assert m.paired_mean_test([a], [shaken + half]) == pytest.approx(0.05)
