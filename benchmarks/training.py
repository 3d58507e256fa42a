"""What the training loop costs over the bare passes it must make, in one process, interleaved.

    python benchmarks/training.py [--width 16] [--batch 64] [--rounds 5] [--json FILE]

Both sides make the same number of passes over images of the same shape: T_in and T_out forward passes with
the gradient of the input on the folded network, one forward pass more for each attack, and one forward and
backward pass in train mode over all of them. The bare side does nothing else; the loop's side is one update
as `ratioctl train` makes it: batch from uint8 with crop and flip, attacks, refresh of the folded copy, SGD
with Nesterov momentum, averaged weights. The data are random pixels: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from _result import finish
from torch.nn import functional

from ratioctl import recipe as recipes
from ratioctl.data import loader
from ratioctl.data.inside import Images
from ratioctl.nets import build, frozen, refresh
from ratioctl.nets.hardware import choose
from ratioctl.objective import losses
from ratioctl.recipe import Recipe
from ratioctl.train import _average, _in_precision


def images(count: int, labelled: bool) -> Images:
    rng = np.random.default_rng(0)
    return Images(
        pixels=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        labels=rng.integers(0, 10, count) if labelled else None,
        label_names=tuple("abcdefghij") if labelled else (),
        fingerprint="random",
        source="random",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--in-steps", type=int, default=7)
    parser.add_argument("--out-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-images", type=int, default=50_000, help="held in memory, for the peak")
    parser.add_argument("--out-images", type=int, default=86_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    recipe = recipes.load(
        "cifar10-ratio-0.25",
        [
            'model.architecture="resnet18"',
            f"model.width={options.width}",
            f"optim.batch_size={options.batch}",
            f"optim.batch_size_out={options.batch}",
            "optim.ema=0.999",
            f"objective.inside.attack.steps={options.in_steps}",
            f"objective.outside.attack.steps={options.out_steps}",
            "data.augment={crop=4, flip=true}",
        ],
    )
    place = choose(options.device, options.precision)
    train, out = images(options.in_images, True), images(options.out_images, False)
    torch.manual_seed(0)
    model = build("resnet18", num_classes=10, width=options.width, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = model.to(place.device).to(memory_format=torch.channels_last)
    loop, bare = Loop(recipe, model, train, out, place), Bare(recipe, model, place)
    for side in (loop, bare):
        side()
    times: dict[str, list[float]] = {"loop": [], "bare": []}
    for _ in range(options.rounds):
        for name, side in (("loop", loop), ("bare", bare)):
            began = time.perf_counter()
            side()
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    ratios = [a / b for a, b in zip(times["loop"], times["bare"], strict=True)]
    result = {
        "benchmark": "training loop over its bare passes",
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "loop_s": statistics.median(times["loop"]),
        "bare_s": statistics.median(times["bare"]),
        "rounds": options.rounds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "setting": {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(options).items()},
        "place": place.why,
    }
    finish(result, options.json)


@dataclasses.dataclass
class Loop:
    """One update as `train.fit` makes it."""

    recipe: Recipe
    model: torch.nn.Module
    train: Images
    out: Images
    place: object

    def __post_init__(self) -> None:
        optim = self.recipe.optim
        self.sgd = torch.optim.SGD(
            self.model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=optim.weight_decay
        )
        self.average = {
            k: v.clone() for k, v in self.model.network.state_dict().items() if v.is_floating_point()
        }
        self.twin = frozen(self.model)
        self.update = 0

    def __call__(self) -> None:
        fill = torch.tensor([120, 120, 120], dtype=torch.uint8)
        batch = loader.batch_at(self.update, self.recipe, self.train, self.out, fill, self.place.device)
        generator = torch.Generator(self.place.device).manual_seed(self.update)
        refresh(self.twin, self.model)
        self.model.train()
        named = losses(
            _in_precision(self.model, self.place),
            _in_precision(self.twin, self.place),
            batch,
            self.recipe.objective,
            generator=generator,
        )
        self.sgd.zero_grad(set_to_none=True)
        named["total"].backward()
        self.sgd.step()
        _average(self.average, self.model.network, 0.999)
        self.update += 1


class Bare:
    """The passes alone: the floor that the mathematics requires."""

    def __init__(self, recipe: Recipe, model: torch.nn.Module, place: object) -> None:
        self.steps = (recipe.objective.inside.attack.steps, recipe.objective.outside.attack.steps)
        self.place = place
        self.model = model
        self.twin = frozen(model)
        shape = (recipe.optim.batch_size, 3, 32, 32)
        x = torch.rand(shape, device=place.device).contiguous(memory_format=torch.channels_last)
        self.x = x
        self.y = torch.zeros(2 * shape[0], dtype=torch.long, device=place.device)
        self.both = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)

    def __call__(self) -> None:
        frozen_logits, logits = _in_precision(self.twin, self.place), _in_precision(self.model, self.place)
        for steps in self.steps:
            for _ in range(steps):
                z = self.x.detach().requires_grad_()
                torch.autograd.grad(frozen_logits(z).sum(), z)
            with torch.no_grad():
                frozen_logits(self.x)
        self.model.train()
        functional.cross_entropy(logits(self.both).float(), self.y).backward()
        self.model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
