"""Recipes: TOML <-> frozen values that are both the schema of the file and what the code runs on.

`Ball`, `Attack`, `Term` and `Objective` are the vocabulary of the method (Augustin, Meinke, Hein 2020,
eq. 4-8); `Recipe` is a whole experiment. There is no second "config" class behind them.
"""

from ratioctl.recipe.schema import (
    ATTACKS,
    LADDER_STEPS,
    NORMS,
    Attack,
    Augment,
    Ball,
    Calibration,
    Certified,
    Data,
    Energy,
    Evaluation,
    GoalName,
    Model,
    Objective,
    Optim,
    Recipe,
    Term,
    default_ladder,
    norm_name,
)
from ratioctl.recipe.toml import available, dumps, find, load, loads, parse
