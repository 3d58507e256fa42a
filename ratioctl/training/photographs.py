"""`ratioctl train PHOTOS`: the recipe of `ratioctl init`, kept in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ratioctl import recipe as recipes
from ratioctl.data import proposal
from ratioctl.data.proposal import Proposal
from ratioctl.recipe import Recipe
from ratioctl.training import starts
from ratioctl.training.starts import Start
from ratioctl.utils import atomic_files as files


def recipe_of(
    argument: str,
    settings: Sequence[str],
    out: Path | None,
    *,
    start: Start | None,
    resume: bool = False,
    download: bool = False,
) -> tuple[Recipe, Path, Proposal | None, Start | None]:
    """(recipe, run folder, what was found about photographs, start) of an argument of `train`.

    For photographs the recipe is written to `recipe.toml` in the run folder, where a resumed run reads it.
    Without a start they may get a bundled one.

    Raises:
        RecipeError, SourceError, UsageError.
    """
    if not proposal.is_photos(argument):
        loaded = recipes.load(argument, settings)
        return loaded, out or Path("runs") / loaded.name, None, start
    name = proposal.name_of(argument)
    folder = out or Path("runs") / name
    path = folder / "recipe.toml"
    if resume and path.is_file():
        return recipes.load(path, settings), folder, None, start
    known = None
    if start is not None:
        known = proposal.Start(
            name=start.name,
            architecture=start.architecture,
            options=start.options,
            input_size=start.input_size,
            channels=len(start.mean),
        )
    found = proposal.propose(argument, start=known, download=download)
    files.make_folder(folder)
    proposal.write(found, path, again=True)
    if start is None and found.init is not None:
        start = starts.resolve(found.init)
    return recipes.load(path, settings), folder, found, start
