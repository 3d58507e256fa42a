"""Cost of counterfactuals: six budgets, two targets, 500 steps, beside other libraries and the bare passes.

    python -m benchmarks.counterfactual [--images IMAGE ...] [--steps 500] [--rounds 3] [--json FILE]
    python -m benchmarks.counterfactual --short        # few steps; its ratios beside the stored ones

Sides, in one process and in turns, on the same images and one model:

    ours          `ratioctl.counterfactual`: search, rounding to 8 bits inside the ball, scores of the saved
                  images, smallest flip radius
    fewer steps   the same with --fewer steps, where its confidences are still those of pyautoattack or higher
    search        one Auto-PGD search of as many steps: all targets and budgets in one batch
    pyautoattack  its targeted APGD (cross-entropy) on the module of `ratioctl.load_model`, one run for each
                  budget, all images and targets in one batch
    torchattacks  its targeted PGDL2 in the same way, where it is installed
    search floor  steps x budgets x targets passes with the gradient of the input, and a forward pass
    floor         the passes of our shorter searches, and those of the two radii

Confidences are those of the targets after the model's temperature; ours are of the saved 8-bit images, the
others of unrounded points. "behind" counts the images, budgets and targets where ours is lower by more than
0.005. The floors and "search" compute in the precision of ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import ratioctl
from ratioctl import images
from ratioctl import package as packages
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.counterfactuals.search import FLIP, FLIP_RADII, REFINE, START, WIDE
from ratioctl.models import fold_batchnorm, from_package
from ratioctl.models.device import in_precision, select_device
from ratioctl.recipe import Attack, Ball
from tools import harness

PAIRS = {
    "pyautoattack over ours": ("pyautoattack", "ours"),
    "pyautoattack over fewer steps": ("pyautoattack", "fewer steps"),
    "torchattacks over ours": ("torchattacks", "ours"),
    "torchattacks over fewer steps": ("torchattacks", "fewer steps"),
    "ours over floor": ("ours", "floor"),
    "search over its floor": ("search", "search floor"),
}
OWN = ("ours", "fewer steps")


class Sides:
    """The compared searches; `reached` holds confidences (images x targets, budgets) of the last calls."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.steps, self.fewer = options, options.steps, options.fewer
        package = packages.read(packages.find(options.model))
        self.package, self.ladder = package, package.ladders["2"]
        channels, size, _ = package.input_size
        decoded = [images.decode(Path(image), size, channels).pixels for image in options.images]
        chosen = torch.tensor([package.label_names.index(n) for n in options.targets.split(",")])
        self.targets = chosen.repeat(len(decoded))
        self.x = torch.from_numpy(images.to_pixels(np.stack(decoded))).repeat_interleave(len(chosen), 0)
        self.model = ratioctl.load_model(options.model)
        folded = fold_batchnorm(from_package(package)).to(memory_format=torch.channels_last)
        self.network = in_precision(folded, select_device())
        rows = self.x.repeat_interleave(len(self.ladder), 0)
        self.rows = rows.contiguous(memory_format=torch.channels_last)
        self.reached: dict[str, torch.Tensor] = {}

    def keep(self, side: str, found: list[torch.Tensor]) -> None:
        """`found` holds the points (images x targets, C, H, W) of each budget."""
        with torch.no_grad():
            p = [torch.softmax(self.model(z) / self.package.temperature, 1) for z in found]
        self.reached[side] = torch.stack([q.gather(1, self.targets[:, None])[:, 0] for q in p], 1)

    def counterfactuals(self, side: str, steps: int) -> None:
        options = self.options
        answers = ratioctl.counterfactual(
            options.images, target=options.targets, model=options.model, steps=steps
        )
        reached = [[b.confidence for b in target.budgets] for answer in answers for target in answer.targets]
        self.reached[side] = torch.tensor(reached)

    def ours(self) -> None:
        self.counterfactuals("ours", self.steps)

    def fewer_steps(self) -> None:
        self.counterfactuals("fewer steps", self.fewer)

    def search(self) -> None:
        attack = Attack(ball=Ball(p=2, eps=1), method="apgd", steps=self.steps)
        goal = goals.log_probability(
            self.targets.repeat_interleave(len(self.ladder)), self.package.temperature
        )
        perturb(
            self.network, self.rows, goal, attack, eps=torch.tensor(self.ladder).repeat(len(self.targets))
        )

    def pyautoattack(self) -> None:
        from pyautoattack.autopgd_base import APGDAttack

        found = []
        for eps in self.ladder:
            attack = APGDAttack(self.model, n_iter=self.steps, norm="L2", eps=eps, loss="ce-targeted-cfts")
            attack.init_hyperparam(self.x)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found.append(attack.attack_single_run(self.x, self.targets)[0].detach())
        self.keep("pyautoattack", found)

    def torchattacks(self) -> None:
        from torchattacks import PGDL2

        found = []
        for eps in self.ladder:
            attack = PGDL2(self.model, eps, 2.5 * eps / self.steps, self.steps, random_start=False)
            attack.set_mode_targeted_by_label(quiet=True)
            found.append(attack(self.x, self.targets).detach())
        self.keep("torchattacks", found)

    def search_floor(self) -> None:
        harness.bare_passes(self.network, self.rows, self.steps, forwards=1)

    def floor(self) -> None:
        share = 2 * WIDE + 4 * START + REFINE
        harness.bare_passes(self.network, self.rows, round(share * self.steps), forwards=4)
        flips = self.x.repeat_interleave(2 * FLIP_RADII, 0).contiguous(memory_format=torch.channels_last)
        harness.bare_passes(self.network, flips, max(round(FLIP * self.steps), 1), forwards=1)


def main() -> None:
    parser = harness.parser(__doc__, short={"steps": 12, "fewer": 4})
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--images", nargs="+", default=[str(harness.SAMPLES / "cat.jpg")])
    parser.add_argument("--targets", default="dog,horse")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--fewer", type=int, default=125)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    compared = Sides(options)
    sides: dict[str, Callable[[], object]] = {
        "ours": compared.ours,
        "fewer steps": compared.fewer_steps,
        "search": compared.search,
        "pyautoattack": compared.pyautoattack,
        "search floor": compared.search_floor,
        "floor": compared.floor,
    }
    if find_spec("torchattacks"):
        sides["torchattacks"] = compared.torchattacks
    compared.steps = compared.fewer = 4
    for side in sides.values():  # warm-up
        side()
    compared.steps, compared.fewer = options.steps, options.fewer
    times, worked = harness.interleaved(sides, options.rounds, warm_up=False)
    pairs = {name: pair for name, pair in PAIRS.items() if pair[0] in sides}
    reached = compared.reached
    result = {
        "benchmark": "counterfactuals of six budgets and two targets",
        "ratios": {name: harness.ratio(times, *pair) for name, pair in pairs.items()},
        "seconds": harness.medians(times),
        "all_seconds": times,
        "processor_ratios": {name: harness.ratio(worked, *pair) for name, pair in pairs.items()},
        "processor_seconds": harness.medians(worked),
        "confidence": {side: found.mean().item() for side, found in reached.items()},
        "confidences": {side: found.tolist() for side, found in reached.items()},
        "behind": {
            f"{own}, {side}": int((reached[own] < found - 0.005).sum())
            for own in OWN
            for side, found in reached.items()
            if side not in OWN
        },
        "budgets": list(compared.ladder),
        "targets": options.targets.split(","),
        "images": [Path(image).name for image in options.images],
        "steps": options.steps,
        "fewer": options.fewer,
        "rounds": options.rounds,
        "model": compared.package.digest,
        "device": select_device().why,
    }
    harness.finish(result, options, "counterfactual")


if __name__ == "__main__":
    main()
