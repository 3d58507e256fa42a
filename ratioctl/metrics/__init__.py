"""Metrics of classifiers: accuracy, calibration, out-of-distribution (OOD) detection, and their intervals.

Functions take arrays and return Python floats, computed in float64. Values are fractions in [0, 1], not
percent. `scores` are OOD scores: larger values are more outlying. Pass the negated confidence rather than
`1 - confidence`: the order is the same and rounding creates no ties. NaN, empty arrays and wrong shapes raise
ValueError.

Positive class: OOD images for `auroc`, `fpr_at_95_tpr` and `aupr_out`; in-distribution (ID) images for
`aupr_in` and for the thresholds of `threshold_at_tpr` (`tpr95`).
"""

from ratioctl.metrics.calibration import Reliability, adaptive_ece, ece, ece_interval, reliability
from ratioctl.metrics.classification import (
    accuracy,
    brier,
    confidence,
    finite_logits,
    log_odds,
    log_softmax,
    mmc,
    nll,
    ood_score,
    softmax,
)
from ratioctl.metrics.detection import (
    aupr_in,
    aupr_out,
    auroc,
    conservative_auroc,
    fpr_at_95_tpr,
    fpr_at_tpr,
    operating_point,
    threshold_at_tpr,
)
from ratioctl.metrics.intervals import (
    auroc_interval,
    bootstrap_interval,
    clopper_pearson_interval,
    mean_interval,
    wilson_interval,
)
from ratioctl.metrics.paired import mcnemar, paired_auroc_test, paired_mean_test
from ratioctl.metrics.selective import aurc, coverage_at_risk, risk_coverage
