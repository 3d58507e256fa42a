"""A minimal recipe, and the message of a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from ratioctl import recipe as recipes
from ratioctl.errors import RecipeError
from ratioctl.utils import resources

FOLDER = resources.folder("recipes")
NAMES = recipes.available()


MINIMAL = 'name = "a"\n[data]\ntrain = "digits:train"\n'


INSIDE = "[objective.inside]\nrobust = 1.0\n[objective.inside.attack]\n"


def refusal(path: Path | str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, settings)
    assert caught.value.exit_code == 2
    assert caught.value.next_step, "every refusal says what to do next"
    return str(caught.value)
