"""What a counterfactual ladder costs over its bare passes: 500 APGD steps, six budgets, one image.

    python benchmarks/counterfactual.py [--model cifar10-ratio] [--image IMAGE] [--steps 500] [--json FILE]

The floor is steps x budgets forward and backward passes (gradient of the input) of the same folded network
in the same batch. The search alone and the whole verb (rounding, scoring, flip radius) are both measured, in
one process, interleaved with the floor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from _result import finish

from ratioctl import images
from ratioctl import package as packages
from ratioctl.attack import goals
from ratioctl.attack.engine import perturb
from ratioctl.nets import from_package, frozen
from ratioctl.recipe import Attack, Ball


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--image", default="assets/samples/cat.jpg")
    parser.add_argument("--target", default="dog")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import ratioctl

    package = packages.read(packages.find(options.model))
    channels, size, _ = package.input_size
    pixels = images.decode(Path(options.image), size, channels).pixels
    network = frozen(from_package(package))
    target = package.label_names.index(options.target)
    ladder = package.ladders["2"]
    x = torch.from_numpy(images.to_pixels(pixels[None])).repeat(len(ladder), 1, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    goal = goals.log_probability(torch.full((len(ladder),), target), package.temperature)
    attack = Attack(ball=Ball(p=2, eps=1), method="apgd", steps=options.steps)
    eps = torch.tensor(ladder)

    def floor() -> None:
        for _ in range(options.steps):
            z = x.detach().requires_grad_()
            torch.autograd.grad(network(z).sum(), z)

    def search() -> None:
        perturb(network, x, goal, attack, eps=eps)

    def verb() -> None:
        ratioctl.counterfactual(
            [options.image], target=options.target, model=options.model, steps=options.steps
        )

    sides = {"floor": floor, "search": search, "verb": verb}
    times: dict[str, list[float]] = {name: [] for name in sides}
    floor()
    for _ in range(options.rounds):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    ratio = {
        name: [a / b for a, b in zip(times[name], times["floor"], strict=True)] for name in ("search", "verb")
    }
    result = {
        "benchmark": "counterfactual ladder over its bare passes",
        "search_ratio_median": statistics.median(ratio["search"]),
        "verb_ratio_median": statistics.median(ratio["verb"]),
        "floor_s": statistics.median(times["floor"]),
        "search_s": statistics.median(times["search"]),
        "verb_s": statistics.median(times["verb"]),
        "budgets": list(ladder),
        "steps": options.steps,
        "rounds": options.rounds,
        "model": package.digest,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
