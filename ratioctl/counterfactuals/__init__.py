"""Counterfactuals: how an image would have to change, within a ball, to be predicted as another class.

The search is the attack engine with the goal log p(target). The result is the 8-bit picture made of the best
point: it is rounded so that it stays in the ball, scored again like any image, and never less confident than
the picture of a smaller budget. All numbers are those of that picture.

Reading order: `request` (what is requested, checked), `sources`, `search` (one image and target), `rounding`
(pictures in the ball), `batches` (many searches at once), `pipeline` (a request from end to end). torch is
loaded only when the search begins, so that wrong usage is reported at once.
"""

from ratioctl.counterfactuals.pipeline import explain
from ratioctl.counterfactuals.request import SCHEMA, CounterfactualRequest, PreparedRequest, prepare
from ratioctl.counterfactuals.rounding import distances, round_into_ball
from ratioctl.counterfactuals.search import Preview, run_searches, search_target, seed_of
from ratioctl.counterfactuals.sources import Picture, Source, files_of, load
from ratioctl.counterfactuals.targets import resolve_targets

__all__ = [
    "SCHEMA",
    "CounterfactualRequest",
    "Picture",
    "PreparedRequest",
    "Preview",
    "Source",
    "distances",
    "explain",
    "files_of",
    "load",
    "prepare",
    "resolve_targets",
    "round_into_ball",
    "run_searches",
    "search_target",
    "seed_of",
]
