"""Checks that the processes of a run train the same thing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ratioctl import recipe as recipes
from ratioctl._version import __version__
from ratioctl.data import loader
from ratioctl.errors import RecipeError, UsageError
from ratioctl.models.device import ComputeConfig
from ratioctl.recipe import Recipe
from ratioctl.training.checkpoint import changes
from ratioctl.training.distributed import Processes, of_all


def check_arguments(
    recipe: Recipe, processes: Processes, compute: ComputeConfig, arguments: Mapping[str, Any]
) -> None:
    """Refuse processes that were started differently, or more of them than images in a batch.

    Raises:
        RecipeError, UsageError: in every process; the first that differs from rank 0 is named.
    """
    if processes.world == 1:
        return
    texts = processes.gathered(recipes.dumps(recipe))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            differ = changes(recipes.loads(texts[0]), recipes.loads(text))
            reason = f"has another recipe than rank 0; different: {', '.join(differ)}"
            step = "Start every process with the same recipe and --set options."
            raise of_all(RecipeError(processes.describe(rank), reason, step))
    facts = {
        "version of ratioctl": __version__,
        "version of torch": torch.__version__,
        "kind of device": compute.device.type,
        "precision": "bf16" if compute.bf16 else "fp32",
        **{f"value of {name}": value for name, value in arguments.items()},
    }
    processes.check_same(
        facts, "Start every process with the same options, --device and --precision included."
    )
    if recipe.objective.energy is not None:
        reason = "is trained by one process only: its samples are kept in one replay buffer"
        raise of_all(RecipeError("objective.energy", reason, "Start it without torchrun."))
    if recipe.objective.certified is not None:
        reason = "is trained by one process only: a head takes minutes"
        raise of_all(RecipeError("objective.certified", reason, "Start it without torchrun."))
    sizes = {"batch_size": recipe.optim.batch_size}
    if recipe.objective.outside is not None:
        sizes["batch_size_out"] = recipe.optim.batch_size_out
    for name, size in sizes.items():
        if size < processes.world:
            reason = f"there are {processes.world} processes, and each needs an image of every batch"
            raise of_all(
                RecipeError(f"optim.{name} = {size}", reason, "Start fewer, or choose a larger batch.")
            )


def check_data(splits: loader.Splits, processes: Processes) -> None:
    """Refuse processes that have read other images; raises UsageError."""
    parts = {
        "data.train": (splits.train, splits.held_out),
        "data.outside": (splits.outside,),
        "data.outside_test": (splits.outside_test,),
    }
    facts = {
        f"set of images for {name}": " ".join(part.fingerprint for part in several if part is not None)
        for name, several in parts.items()
    }
    processes.check_same(facts, "Give every machine the same files, or a folder that all of them share.")


def check_folder(out: Path, processes: Processes) -> None:
    """Refuse a process that does not see the run folder of process 0; raises UsageError."""

    def visible() -> None:
        if not (out / "checkpoint").is_dir():
            step = "With several machines, --out must be on a file system that they share."
            raise UsageError(out, "the run folder of rank 0 is not there", step)

    if processes.world > 1:
        processes.everywhere(visible)
