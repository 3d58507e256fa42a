"""How costs grow with one, two and four times the images, budgets, targets and steps, and with the classes.

    python -m benchmarks.growth [--rounds 3] [--json FILE]
    python -m benchmarks.growth --short

For each quantity: processor seconds of 1x, 2x and 4x (of 10, 100 and 1,000 classes), in turns, and the
exponent e of the power law seconds ~ quantity^e fitted to them in each round. 1 is linear; below 1 there
are costs that do not grow. Counterfactuals run as `ratioctl.counterfactual` on the given model; training
updates and the dependence on the number of classes on a random ResNet-18 of width 16. "floor" are passes
with the gradient of the input for as many rows of a batch, steps or classes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

import ratioctl
from ratioctl import recipe as recipes
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.data.loader import Batch
from ratioctl.models import fold_batchnorm
from ratioctl.recipe import Attack, Ball
from ratioctl.scoring import backends
from ratioctl.training.objective import losses
from tools import harness

IMAGES = [harness.SAMPLES / f"{name}.jpg" for name in ("cat", "dog", "horse", "kitten")]
LABELS = ("dog", "horse", "ship", "truck")


def random_pixels(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32).contiguous(memory_format=torch.channels_last)


def explain(model: str, steps: int, images: int = 1, budgets: int = 3, targets: int = 1) -> None:
    ladder = [0.25 * (k + 1) for k in range(budgets)]
    target = ",".join(LABELS[:targets])
    ratioctl.counterfactual(IMAGES[:images], target=target, eps=ladder, model=model, steps=steps)


def update(batch: int, classes: int, steps: int) -> None:
    """Losses and gradients of one update: `batch` ID and OOD images each; `steps` ID, twice as many OOD."""
    settings = [f"objective.{s}.attack.steps={n}" for s, n in (("inside", steps), ("outside", 2 * steps))]
    recipe = recipes.load("cifar10-ratio-0.25", settings)
    net, x = harness.random_network(classes), random_pixels(batch)
    data = Batch(x_in=x, y_in=torch.arange(batch) % classes, x_out=x)
    losses(net.train(), fold_batchnorm(net), data, recipe.objective)["total"].backward()


def attack(classes: int) -> None:
    goal = goals.margin(torch.zeros(32, dtype=torch.long))
    apgd = Attack(ball=Ball(p=2, eps=0.5), method="apgd", steps=4)
    perturb(fold_batchnorm(harness.random_network(classes)), random_pixels(32), goal, apgd)


def class_floor(classes: int) -> None:
    harness.bare_passes(fold_batchnorm(harness.random_network(classes)), random_pixels(32), 4)


def exponent(seconds: dict[int, float]) -> float:
    """Slope of log seconds over log quantity, by least squares."""
    return float(np.polyfit([math.log(n) for n in seconds], [math.log(s) for s in seconds.values()], 1)[0])


def main() -> None:
    parser = harness.parser(__doc__, short={"steps": 4, "rounds": 1})
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    scored = backends.open_model(options.model, "tpr95", device="cpu")
    bare = fold_batchnorm(ratioctl.load_model(options.model)).to(memory_format=torch.channels_last)
    asked = partial(explain, options.model, options.steps)
    sides: dict[str, Callable[[], object]] = {}
    for n in (1, 2, 4):
        sides |= {
            f"counterfactual images {n}": partial(asked, images=n),
            f"counterfactual budgets {n}": partial(asked, budgets=3 * n),
            f"counterfactual targets {n}": partial(asked, targets=n),
            f"counterfactual steps {n}": partial(explain, options.model, options.steps * n),
            f"ood-score images {n}": partial(scored.predict, np.zeros((128 * n, 32, 32, 3), np.uint8)),
            f"training images {n}": partial(update, 16 * n, 10, 2),
            f"training steps {n}": partial(update, 16, 10, 2 * n),
            f"floor, rows {n}": partial(harness.bare_passes, bare, random_pixels(12 * n), options.steps),
            f"floor, steps {n}": partial(harness.bare_passes, bare, random_pixels(12), options.steps * n),
        }
    for classes in (10, 100, 1000):
        sides |= {
            f"training classes {classes}": partial(update, 16, classes, 2),
            f"attack classes {classes}": partial(attack, classes),
            f"floor, classes {classes}": partial(class_floor, classes),
        }
    for name in ("counterfactual images 1", "training images 1", "ood-score images 1"):
        sides[name]()  # warm-up
    _, seconds = harness.interleaved(sides, options.rounds, warm_up=False)
    table = {}
    for quantity in dict.fromkeys(name.rpartition(" ")[0] for name in sides):
        counts = (10, 100, 1000) if quantity.endswith("classes") else (1, 2, 4)
        each = {n: seconds[f"{quantity} {n}"] for n in counts}
        table[quantity] = {
            "seconds": {str(n): statistics.median(s) for n, s in each.items()},
            "exponent": harness.spread(
                [exponent({n: each[n][k] for n in each}) for k in range(options.rounds)]
            ),
        }
    result = {
        "benchmark": "growth of costs",
        "ratios": {f"{quantity}, exponent": row["exponent"] for quantity, row in table.items()},
        "table": table,
        "steps": options.steps,
        "rounds": options.rounds,
    }
    harness.finish(result, options, "growth")


if __name__ == "__main__":
    main()
