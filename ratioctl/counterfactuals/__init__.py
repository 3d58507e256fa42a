"""Counterfactuals: how an image would have to change, within a ball, to be seen as another class.

The search is the one attack engine with the goal log p(target); every budget of a target runs in one batch
of per-example radii. What is handed out is not the point the search found but the 8-bit picture made of it,
and every number belongs to that picture: it is rounded so that it stays in the ball, scored again on the road
that scores any image, and never less confident than the picture of a smaller budget.

Reading order: `question` (what is asked, checked), `answer` (one image and target), `rounding` (pictures in
the ball), `batches` (many searches at once), `run` (a request from end to end), `suite` (how good they are).
torch is loaded only when the search begins, so that a wrong question is answered at once.
"""

from ratioctl.counterfactuals.pipeline import explain
from ratioctl.counterfactuals.request import (
    SCHEMA,
    CounterfactualRequest,
    Picture,
    PreparedRequest,
    Source,
    files_of,
    load,
    prepare,
    resolve_targets,
)
from ratioctl.counterfactuals.rounding import distances, round_into_ball
from ratioctl.counterfactuals.search import drive, search_target, seed_of

__all__ = [
    "SCHEMA",
    "CounterfactualRequest",
    "Picture",
    "PreparedRequest",
    "Source",
    "distances",
    "drive",
    "explain",
    "files_of",
    "load",
    "prepare",
    "resolve_targets",
    "round_into_ball",
    "search_target",
    "seed_of",
]
