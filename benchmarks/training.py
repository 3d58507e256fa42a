"""Cost of a RATIO training step: beside a plain loop, torchattacks, and the bare passes.

    python -m benchmarks.training [--width 64] [--batch 32] [--rounds 3] [--json FILE]
    python -m benchmarks.training --short        # a small step; its ratios beside the stored ones

Sides, in one process and in turns:

    ours          one update of `ratioctl train`: batch from uint8 with crop and flip, attacks, SGD with
                  Nesterov momentum, averaged weights
    plain         the same mathematics written plainly: gradients of the input only, one mixed forward pass,
                  SGD, averaged weights; fp32, eager, PyTorch's default settings, a batch ready in memory
    torchattacks  the plain update with torchattacks' PGDL2 as both attacks (cross-entropy, no momentum, last
                  point), where it is installed
    floor         the passes that the mathematics requires: T_in and T_out passes with the gradient of the
                  input, a forward pass for each attack, a forward and backward pass in train mode
    matrix        products of large square matrices in the precision of the passes, and in fp32:
                  "matrix_peak_gflops" and "fp32_matrix_peak_gflops" are the fastest of all rounds,
                  "share_of_matrix_peak" the operations of our update over the first

"agreement" is the largest difference between the values that our attacks and the plain ones reach from the
same weights and images. "shares_of_update" are the shares of processor seconds of the parts of our update.
The data are random pixels: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from ratioctl import recipe as recipes
from ratioctl.data import loader
from ratioctl.data.in_distribution import Images
from ratioctl.models import fold_batchnorm, sync_folded
from ratioctl.models.device import ComputeConfig, in_precision, select_device
from ratioctl.recipe import Recipe
from ratioctl.training.loop import update_average
from ratioctl.training.objective import attacked
from tools import harness

PAIRS = {
    "plain over ours": ("plain", "ours"),
    "ours over floor": ("ours", "floor"),
    "torchattacks over ours": ("torchattacks", "ours"),
}
FILL = torch.tensor([120, 120, 120], dtype=torch.uint8)
SHORT = {"width": 16, "batch": 16, "images": 256, "in_steps": 3, "out_steps": 5}


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, short=SHORT)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="ID images, and as many OOD images")
    parser.add_argument("--in-steps", type=int, default=7)
    parser.add_argument("--out-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000, help="of each kind held in memory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    return parser.parse_args()


def recipe_of(options: argparse.Namespace) -> Recipe:
    return recipes.load(
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


def main() -> None:
    options = arguments()
    recipe = recipe_of(options)
    compute = select_device(options.device, options.precision)
    train, out = images(options.images, True), images(options.images, False)
    model = harness.random_network(width=options.width).to(compute.device)
    batch = loader.batch_at(0, recipe, train, out, FILL, compute.device)
    ours, matrix = Ours(recipe, model, train, out, compute), Products(compute)
    exact = Products(dataclasses.replace(compute, bf16=False))
    sides: dict[str, Callable[[], object]] = {"ours": ours, "plain": Plain(recipe, model, batch)}
    if find_spec("torchattacks"):
        sides["torchattacks"] = Plain(recipe, model, batch, packaged=True)
    sides |= {"floor": Floor(recipe, model, compute), "matrix": matrix, "fp32 matrix": exact}
    agreement = agree(recipe, model, batch, compute)
    ours()  # a wide network needs no more warm-up than this
    ours.seconds.clear()
    times, worked = harness.interleaved(sides, options.rounds, warm_up=options.width < 64)
    pairs = {name: pair for name, pair in PAIRS.items() if pair[0] in sides}
    per_second = operations(model, options) / harness.medians(times)["ours"]
    result = {
        "benchmark": "a RATIO training step",
        "ratios": {name: harness.ratio(times, *pair) for name, pair in pairs.items()},
        "seconds": harness.medians(times),
        "all_seconds": times,
        "processor_ratios": {name: harness.ratio(worked, *pair) for name, pair in pairs.items()},
        "processor_seconds": harness.medians(worked),
        "agreement": agreement,
        "gflops_of_ours": per_second / 1e9,
        "matrix_peak_gflops": matrix.best / 1e9,
        "fp32_matrix_peak_gflops": exact.best / 1e9,
        "share_of_matrix_peak": per_second / matrix.best,
        "shares_of_update": {name: s / sum(ours.seconds.values()) for name, s in ours.seconds.items()},
        "rounds": options.rounds,
        "peak_memory_gib": harness.peak_memory_gib(),
        "setting": {name: getattr(options, name) for name in (*SHORT, "device", "precision")},
        "device": compute.why,
    }
    harness.finish(result, options, "training-w16")


def images(count: int, labelled: bool) -> Images:
    rng = np.random.default_rng(0)
    return Images(
        pixels=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        labels=rng.integers(0, 10, count) if labelled else None,
        label_names=tuple("abcdefghij") if labelled else (),
        fingerprint="random",
        source="random",
    )


def sgd(model: torch.nn.Module, recipe: Recipe) -> torch.optim.SGD:
    decay = recipe.optim.weight_decay
    return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, nesterov=True, weight_decay=decay)


def _attacks(recipe: Recipe) -> tuple[Any, Any]:
    return recipe.objective.inside.attack, recipe.objective.outside.attack


@dataclasses.dataclass
class Ours:
    """One update of `training.loop.fit`."""

    recipe: Recipe
    source: torch.nn.Module
    train: Images
    out: Images
    compute: ComputeConfig

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.source).to(memory_format=torch.channels_last)
        self.sgd = sgd(self.model, self.recipe)
        self.average = {
            k: v.clone() for k, v in self.model.network.state_dict().items() if v.is_floating_point()
        }
        self.twin = fold_batchnorm(self.model)
        self.update, self.seconds = 0, {}
        self.held = tuple(loader.hold(side.pixels, self.compute.device) for side in (self.train, self.out))

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the processor seconds of a part of the update to `seconds`."""
        began = time.process_time()
        yield
        if self.compute.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began

    def __call__(self) -> None:
        device, objective = self.compute.device, self.recipe.objective
        assert objective.outside is not None
        with self.part("batch and augmentation"):
            batch = loader.batch_at(
                self.update, self.recipe, self.train, self.out, FILL, device, held=self.held
            )
        with self.part("folding"):
            sync_folded(self.twin, self.model)
        twin = in_precision(self.twin, self.compute)
        with self.part("in-attack"):
            z_in = attacked(twin, batch.x_in, batch.y_in, objective.inside)
        with self.part("out-attack"):
            z_out = attacked(twin, batch.x_out, None, objective.outside)
        with self.part("mixed pass of the update"):
            logits = in_precision(self.model.train(), self.compute)(torch.cat([z_in, z_out])).float()
            loss = mixed_loss(logits, batch.y_in)
            self.sgd.zero_grad(set_to_none=True)
            loss.backward()
        with self.part("optimizer"):
            self.sgd.step()
        with self.part("averaged weights"):
            update_average(self.average, self.model.network, 0.999)
        self.update += 1


class Plain:
    """The update as written in the paper; `packaged` takes the attacks from torchattacks."""

    def __init__(self, recipe: Recipe, source: torch.nn.Module, batch: Any, packaged: bool = False) -> None:
        plain = copy.deepcopy(source).to(memory_format=torch.contiguous_format)  # PyTorch's default
        self.model, self.average = plain, copy.deepcopy(plain)
        self.sgd = sgd(self.model, recipe)
        self.x_in, self.y = batch.x_in.contiguous(), batch.y_in
        self.x_out = batch.x_out.contiguous()
        self.inside, self.outside = _attacks(recipe)
        self.packaged = packaged

    def attack(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.model.eval()
        if self.packaged:
            import torchattacks

            made = [
                torchattacks.PGDL2(self.model, eps=a.ball.eps, alpha=0.1, steps=a.steps, random_start=False)
                for a in (self.inside, self.outside)
            ]
            return made[0](self.x_in, self.y), made[1](self.x_out, self.y)
        z_in = plain_pgd(self.model, self.x_in, lambda f: plain_margin(f, self.y), self.inside)
        return z_in, plain_pgd(self.model, self.x_out, to_uniform, self.outside)

    def __call__(self) -> None:
        z_in, z_out = self.attack()
        self.model.train()
        self.sgd.zero_grad()
        mixed_loss(self.model(torch.cat([z_in, z_out])), self.y).backward()
        self.sgd.step()
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.mul_(0.999).add_(value, alpha=0.001)


def plain_margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    own = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.masked_fill(functional.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return others.max(1).values - own


def to_uniform(logits: torch.Tensor) -> torch.Tensor:
    return -functional.log_softmax(logits, dim=1).mean(1)


def mixed_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Equation 6 with lambda 1; the rows after those of `y` are OOD images."""
    return functional.cross_entropy(logits[: len(y)], y) + to_uniform(logits[len(y) :]).mean()


def length_of(d: torch.Tensor) -> torch.Tensor:
    return d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def plain_pgd(
    model: torch.nn.Module, x: torch.Tensor, goal: Callable[[torch.Tensor], torch.Tensor], attack: Any
) -> torch.Tensor:
    """Projected gradient ascent in an l2 ball with momentum; returns the best of all points."""
    eps = attack.ball.eps
    length = 2.5 * eps / attack.steps if attack.step_size is None else attack.step_size
    z, velocity, best, best_value = x.clone(), torch.zeros_like(x), x.clone(), None
    for step in range(attack.steps + 1):
        z.requires_grad_(step < attack.steps)
        with torch.set_grad_enabled(step < attack.steps):
            value = goal(model(z))
        reached = value.detach()
        if best_value is None:
            best_value = reached
        else:
            better = reached > best_value
            best = torch.where(better.view(-1, 1, 1, 1), z.detach(), best)
            best_value = torch.where(better, reached, best_value)
        if step == attack.steps:
            return best
        (gradient,) = torch.autograd.grad(value.sum(), z)
        gradient = gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True).clamp_min(1e-30)
        velocity = attack.momentum * velocity + gradient
        direction = velocity / length_of(velocity).clamp_min(1e-30)
        d = z.detach() + length * direction - x
        d = d * (eps / length_of(d).clamp_min(1e-30)).clamp_max(1)
        z = (x + d).clamp(0, 1)
    raise AssertionError("unreachable")


class Floor:
    """The passes that the mathematics requires."""

    def __init__(self, recipe: Recipe, source: torch.nn.Module, compute: ComputeConfig) -> None:
        self.steps = [attack.steps for attack in _attacks(recipe)]
        self.model = copy.deepcopy(source).to(memory_format=torch.channels_last)
        self.logits = in_precision(self.model, compute)
        self.folded_logits = in_precision(fold_batchnorm(self.model), compute)
        x = torch.rand((recipe.optim.batch_size, 3, 32, 32), device=compute.device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.zeros(2 * len(x), dtype=torch.long, device=compute.device)
        self.both = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)

    def __call__(self) -> None:
        for steps in self.steps:
            harness.bare_passes(self.folded_logits, self.x, steps, forwards=1)
        self.model.train()
        functional.cross_entropy(self.logits(self.both).float(), self.y).backward()
        self.model.zero_grad(set_to_none=True)


def agree(recipe: Recipe, source: torch.nn.Module, batch: Any, compute: ComputeConfig) -> dict[str, float]:
    """Largest difference between the goal values of our attacks and of the plain ones."""
    model = copy.deepcopy(source).eval()
    twin = fold_batchnorm(copy.deepcopy(source).to(memory_format=torch.channels_last))
    x_in, x_out, y = batch.x_in[:8], batch.x_out[:8], batch.y_in[:8]
    inside, outside = _attacks(recipe)
    ours = [
        attacked(in_precision(twin, compute), x, label, term)
        for x, label, term in ((x_in, y, recipe.objective.inside), (x_out, None, recipe.objective.outside))
    ]
    plain = [
        plain_pgd(model, x_in.contiguous(), lambda f: plain_margin(f, y), inside),
        plain_pgd(model, x_out.contiguous(), to_uniform, outside),
    ]
    with torch.no_grad():
        goals = (lambda f: plain_margin(f, y), to_uniform)
        apart = [
            (goal(model(a)) - goal(model(b))).abs().max().item()
            for goal, a, b in zip(goals, ours, plain, strict=True)
        ]
    return {"inside": apart[0], "outside": apart[1]}


def operations(model: torch.nn.Module, options: argparse.Namespace) -> float:
    """Floating-point operations of an update; a backward pass costs a forward pass per gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.rand(1, 3, 32, 32, device=next(model.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(x)
    forwards = 2 * (options.in_steps + options.out_steps) + 2 + 3 * 2
    return counter.get_total_flops() * options.batch * forwards


class Products:
    """Products of large square matrices in the passes' precision; `best` is in operations a second."""

    def __init__(self, compute: ComputeConfig) -> None:
        self.size, self.best = (8192 if compute.device.type == "cuda" else 2048), 0.0
        kind = torch.bfloat16 if compute.bf16 else torch.float32
        self.a, self.out = (
            torch.randn(self.size, self.size, device=compute.device, dtype=kind) for _ in range(2)
        )

    def __call__(self) -> None:
        for _ in range(8):
            began = time.perf_counter()
            torch.mm(self.a, self.a, out=self.out)
            self.out[0, 0].item()
            self.best = max(self.best, 2 * self.size**3 / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
