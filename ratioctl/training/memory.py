"""An estimate of the memory that training takes, made before anything large is allocated."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ratioctl.errors import RecipeError, UsageError
from ratioctl.models.registry import build_network
from ratioctl.recipe import Recipe
from ratioctl.utils import resources

# Their outputs share memory with their inputs, or are not kept for the backward pass.
_FREE = (nn.ReLU, nn.SiLU, nn.GELU, nn.Identity, nn.Dropout, nn.Flatten)


def estimate(recipe: Recipe, classes: int, *, bf16: bool = False) -> int | None:
    """Bytes of weights, gradients, momentum, activations and batches; None for networks that hide them.

    The network is built without storage and sees one image without values, so nothing is computed.
    """
    data, optim = recipe.data, recipe.optim
    activations = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal activations
        if isinstance(output, Tensor) and not isinstance(module, _FREE):
            activations += output.numel()

    try:
        with torch.device("meta"):
            network = build_network(
                recipe.model.architecture,
                num_classes=classes,
                channels=data.channels,
                input_size=data.frame.built_for,
                width=recipe.model.width,
                stem_stride=recipe.model.stem_stride,
                **(recipe.model.options or {}),
            ).eval()
            for module in network.modules():
                if not any(True for _ in module.children()):
                    module.register_forward_hook(count)
            network(torch.empty(1, data.channels, data.frame.height, data.frame.width))
    except UsageError:
        raise
    except Exception:  # networks of other libraries may compute with values while they are built
        return None
    weights = sum(parameter.numel() for parameter in network.parameters())
    outside = recipe.objective.uses_ood
    largest = max(optim.batch_size, optim.batch_size_out if outside else 0)
    images = optim.batch_size + (optim.batch_size_out if outside else 0)
    copies = 3 + (optim.ema is not None)  # weights, gradients, momentum, average
    pixels = data.channels * data.frame.area
    # Two batches exist at a time, as floats; each was made of bytes.
    return 4 * copies * weights + (2 if bf16 else 4) * activations * largest + 2 * 5 * pixels * images


def check(
    recipe: Recipe,
    classes: int,
    device: torch.device,
    *,
    bf16: bool = False,
    world: int = 1,
    local_world: int = 1,
) -> None:
    """Refuse a recipe that cannot fit into the memory of `device`.

    Args:
        world: processes that share the batches; `local_world` of them share the memory of this machine.

    Raises:
        RecipeError: the estimate exceeds the memory; it names the batch size or the width.
    """
    sizes = {key: -(-getattr(recipe.optim, key) // world) for key in ("batch_size", "batch_size_out")}
    share = recipe.model_copy(update={"optim": recipe.optim.model_copy(update=sizes)})
    needed = estimate(share, classes, bf16=bf16)
    if device.type == "cuda":
        limit: int | None = torch.cuda.get_device_properties(device).total_memory
    else:
        limit = resources.memory_limit()
        needed = None if needed is None else needed * local_world
    if needed is None or limit is None or needed <= limit:
        return
    alone = recipe.model_copy(
        update={"optim": recipe.optim.model_copy(update={"batch_size": 1, "batch_size_out": 1})}
    )
    one = estimate(alone, classes, bf16=bf16) or 0
    batches = f"optim.batch_size = {recipe.optim.batch_size:,}"
    thing, step = (
        ("model", "Choose a smaller model.width or another model.architecture.")
        if one > limit
        else (batches, "Choose a smaller batch_size (and batch_size_out).")
    )
    reason = f"training needs about {needed / 2**30:,.1f} GiB of memory, and there are {limit / 2**30:,.1f}"
    raise RecipeError(thing, reason, step)
