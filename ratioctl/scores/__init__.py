"""Out-of-distribution scores: functions of the logits that are larger for more outlying images.

Each score is one module that calls `register_score`; the command line, `calibrate`, `evaluate`, `ood-score`
and `export` take the names from the registry.
"""

from ratioctl.scores.registry import (
    DEFAULT,
    OodScore,
    Threshold,
    by_config_name,
    by_name,
    names,
    register_score,
)

__all__ = ["DEFAULT", "OodScore", "Threshold", "by_config_name", "by_name", "names", "register_score"]
