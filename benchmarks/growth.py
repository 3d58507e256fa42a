"""How costs grow: one, two and four times the images, budgets, targets, steps and classes.

    python benchmarks/growth.py [--rounds 3] [--json FILE]
    python benchmarks/growth.py --short

For each quantity the processor seconds of 1x, 2x and 4x, in turns, and the exponent e of the power law
seconds ~ quantity^e fitted to them, in each round: 1 is linear, below 1 there are costs that do not grow.
Counterfactuals run as `ratioctl.counterfactual` on the model given; training updates and the dependence on
the number of classes on a random ResNet-18 of width 16. "floor" are bare passes with the gradient of the
input: of 1x, 2x and 4x images, budgets or targets (all are rows of a batch), with as many times the steps,
and with as many classes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _result import finish
from _rounds import beside_stored, interleaved

import ratioctl
from ratioctl import recipe as recipes
from ratioctl.attacks import goals
from ratioctl.attacks.batch_parallel import in_parts, one_each
from ratioctl.attacks.engine import perturb
from ratioctl.data.loader import Batch
from ratioctl.models import build, fold_batchnorm
from ratioctl.recipe import Attack, Ball
from ratioctl.scoring import backends
from ratioctl.training.objective import losses

SAMPLES = ("cat", "dog", "horse", "kitten")
LABELS = ("dog", "horse", "ship", "truck")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.short:
        options.steps, options.rounds = 4, 1

    def ask(images: int = 1, budgets: int = 3, targets: int = 1, times: int = 1) -> None:
        ratioctl.counterfactual(
            [f"assets/samples/{name}.jpg" for name in SAMPLES[:images]],
            target=",".join(LABELS[:targets]),
            eps=[0.25 * (k + 1) for k in range(budgets)],
            model=options.model,
            steps=options.steps * times,
        )

    def scored(times: int) -> None:
        pixels = np.zeros((128 * times, 32, 32, 3), np.uint8)
        model.predict(pixels)

    model = backends.open_model(options.model, "tpr95", device="cpu")
    bare = fold_batchnorm(ratioctl.load_model(options.model)).to(memory_format=torch.channels_last)
    sides: dict[str, Callable[[], object]] = {}
    for times in (1, 2, 4):
        sides |= {
            f"counterfactual images {times}": lambda n=times: ask(images=n),
            f"counterfactual budgets {times}": lambda n=times: ask(budgets=3 * n),
            f"counterfactual targets {times}": lambda n=times: ask(targets=n),
            f"counterfactual steps {times}": lambda n=times: ask(times=n),
            f"ood-score images {times}": lambda n=times: scored(n),
            f"training images {times}": lambda n=times: update(16 * n, 10, 2),
            f"training steps {times}": lambda n=times: update(16, 10, 2 * n),
            f"training classes {times}": lambda n=times: update(16, 50 * n, 2),
            f"attack classes {times}": lambda n=times: attacked(50 * n),
            f"floor, rows {times}": lambda n=times: passes(bare, 12 * n, options.steps),
            f"floor, steps {times}": lambda n=times: passes(bare, 12, options.steps * n),
            f"floor, classes {times}": lambda n=times: passes(fold_batchnorm(network(50 * n)), 32, 4),
        }
    ask(), update(16, 10, 1), scored(1)
    _, times_of = interleaved(sides, options.rounds)
    table, ratios = {}, {}
    for quantity in dict.fromkeys(name.rpartition(" ")[0] for name in sides):
        each = {n: times_of[f"{quantity} {n}"] for n in (1, 2, 4)}
        fits = [fitted({n: each[n][k] for n in each}) for k in range(options.rounds)]
        exponent = {"median": statistics.median(fits), "least": min(fits), "most": max(fits)}
        seconds = {f"{n}x": statistics.median(s) for n, s in each.items()}
        table[quantity] = {"seconds": seconds, "exponent": exponent}
        ratios[f"{quantity}, exponent"] = exponent
    result = {
        "benchmark": "growth of costs",
        "ratios": ratios,
        "table": table,
        "steps": options.steps,
        "rounds": options.rounds,
    }
    finish(result, options.json)
    if options.short:
        beside_stored(result, "growth")


def fitted(seconds: dict[int, float]) -> float:
    """The slope of log seconds over log quantity, by least squares."""
    x, y = [math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - mean_x) ** 2 for a in x
    )


def network(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    net = build("resnet18", num_classes=classes, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    return net.to(memory_format=torch.channels_last)


def update(batch: int, classes: int, steps: int) -> None:
    """Losses of one update and their gradients: twice `batch` images; `steps` inside, twice that outside."""
    recipe = recipes.load(
        "cifar10-ratio-0.25",
        [f"objective.inside.attack.steps={steps}", f"objective.outside.attack.steps={2 * steps}"],
    )
    net = network(classes)
    x = torch.rand(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    data = Batch(x_in=x, y_in=torch.arange(batch) % classes, x_out=x)
    losses(net.train(), fold_batchnorm(net), data, recipe.objective)["total"].backward()


def passes(net: torch.nn.Module, rows: int, steps: int) -> None:
    """`steps` bare forward passes of `rows` images with the gradient of the input."""
    x = torch.rand(rows, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with one_each(x.device) as count:
        run = in_parts(net, count)
        for _ in range(steps):
            z = x.detach().requires_grad_()
            torch.autograd.grad(run(z).sum(), z)


def attacked(classes: int) -> None:
    net = fold_batchnorm(network(classes))
    x = torch.rand(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    attack = Attack(ball=Ball(p=2, eps=0.5), method="apgd", steps=4)
    perturb(net, x, goals.margin(torch.zeros(32, dtype=torch.long)), attack)


if __name__ == "__main__":
    main()
