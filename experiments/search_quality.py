"""Quality of the counterfactual search: its confidences against many long searches.

    python -m experiments.search_quality cifar10.tar.xz:test --limit 200 --json search_quality.json

For every image and a random other class, at each radius (l2): the default counterfactual search, one Auto-PGD
search of all steps from the image, and the best of several targeted searches of `pyautoattack` from random
points, each of all steps. Confidences are those of the points before rounding to 8 bits. `short` counts the
images that stay more than 0.05 below the best of `pyautoattack`.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack

import ratioctl
from ratioctl import package as packages
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.attacks.registry import strongest
from ratioctl.data import in_distribution
from ratioctl.models import fold_batchnorm, from_package
from ratioctl.recipe import Ball
from tools import harness


class Comparison:
    """Images, random targets, and the three kinds of search."""

    def __init__(self, options: Any) -> None:
        self.options, self.model = options, packages.resolve(options.model)
        channels, size, _ = self.model.input_size
        images = in_distribution.load_labelled(options.data, size, channels, self.model.label_names)
        random = np.random.default_rng(options.seed)
        self.pixels = images.pixels[np.sort(random.permutation(len(images))[: options.limit])]
        self.network = fold_batchnorm(from_package(self.model))
        self.x = torch.from_numpy(self.pixels).permute(0, 3, 1, 2).float().contiguous() / 255
        with torch.no_grad():
            predicted = self.network(self.x).argmax(1)
        shift = torch.from_numpy(random.integers(1, len(self.model.label_names), len(self.x)))
        self.targets = (predicted + shift) % len(self.model.label_names)

    def confidences(self, points: torch.Tensor) -> list[float]:
        with torch.no_grad():
            p = torch.softmax(self.network(points) / self.model.temperature, 1)
        return [float(value) for value in p.gather(1, self.targets[:, None])[:, 0]]

    def ours(self, eps: float) -> list[float]:
        values = []
        for pixels, target in zip(self.pixels, self.targets, strict=True):
            (explanation,) = ratioctl.counterfactual(
                pixels,
                target=[self.model.label_names[int(target)]],
                eps=eps,
                steps=self.options.steps,
                model=self.options.model,
            )
            values.append(explanation.targets[0].budgets[0].confidence_float)
        return values

    def one_search(self, eps: float) -> list[float]:
        attack = strongest(Ball(p=2.0, eps=eps), self.options.steps)
        goal = goals.log_probability(self.targets, self.model.temperature)
        return self.confidences(perturb(self.network, self.x, goal, attack).x)

    def pyautoattack(self, eps: float) -> list[float]:
        best = np.zeros(len(self.x))
        attack = APGDAttack(
            self.network, n_iter=self.options.steps, norm="L2", eps=eps, loss="ce-targeted-cfts"
        )
        attack.init_hyperparam(self.x)
        for start in range(self.options.starts):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.options.seed + start)
                points = attack.attack_single_run(self.x, self.targets)[0].detach()
            best = np.maximum(best, self.confidences(points))
        return [float(value) for value in best]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("data", metavar="SOURCE", help="labelled images, such as cifar10.tar.xz:test")
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--radii", default="2,3")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    comparison = Comparison(options)
    result: dict[str, Any] = {
        "experiment": "counterfactual search against many long searches",
        "n": len(comparison.x),
        "steps": options.steps,
        "starts": options.starts,
        "radii": {},
    }
    for eps in map(float, options.radii.split(",")):
        values, seconds = {}, {}
        for name in ("ours", "one_search", "pyautoattack"):
            started = time.process_time()
            values[name] = getattr(comparison, name)(eps)
            seconds[name] = time.process_time() - started
        reference = np.array(values["pyautoattack"])
        result["radii"][f"{eps:g}"] = {
            "mean": {name: float(np.mean(found)) for name, found in values.items()},
            "short": {
                name: int((reference - np.array(found) > 0.05).sum()) for name, found in values.items()
            },
            "processor_seconds": seconds,
            "confidences": values,
        }
    harness.finish(result, options)


if __name__ == "__main__":
    main()
