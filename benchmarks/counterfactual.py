"""Cost of counterfactuals: six budgets, two targets, 500 steps, beside other libraries and the bare passes.

    python -m benchmarks.counterfactual [--image IMAGE] [--steps 500] [--rounds 3] [--json FILE]
    python -m benchmarks.counterfactual --short        # few steps; its ratios beside the stored ones

Sides, in one process and in turns, on one image and one model:

    ours          `ratioctl.counterfactual`: search, rounding to 8 bits inside the ball, scores of the saved
                  images, smallest flip radius
    search        one Auto-PGD search of as many steps: all targets and budgets in one batch
    pyautoattack  its targeted APGD (cross-entropy) on the module of `ratioctl.load_model`, one run for each
                  budget, both targets in one batch
    torchattacks  its targeted PGDL2 in the same way, where it is installed
    search floor  steps x budgets x targets passes with the gradient of the input, and a forward pass
    floor         the passes of our shorter searches, and those of the two radii

Confidences are those of the targets after the model's temperature; ours are of the saved 8-bit images, the
others of unrounded points. "behind" counts the budgets and targets where ours is lower by more than 0.005.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

import ratioctl
from ratioctl import images
from ratioctl import package as packages
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.counterfactuals.search import FLIP, FLIP_RADII, REFINE, START, WIDE
from ratioctl.models import fold_batchnorm, from_package
from ratioctl.models.device import select_device
from ratioctl.recipe import Attack, Ball
from tools import harness

PAIRS = {
    "pyautoattack over ours": ("pyautoattack", "ours"),
    "torchattacks over ours": ("torchattacks", "ours"),
    "ours over floor": ("ours", "floor"),
    "search over its floor": ("search", "search floor"),
}


class Sides:
    """The compared searches; `reached` holds the confidences (targets, budgets) of their last calls."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.steps = options, options.steps
        package = packages.read(packages.find(options.model))
        self.package, self.ladder = package, package.ladders["2"]
        channels, size, _ = package.input_size
        pixels = images.decode(Path(options.image), size, channels).pixels
        self.targets = torch.tensor([package.label_names.index(n) for n in options.targets.split(",")])
        self.x = torch.from_numpy(images.to_pixels(pixels[None])).repeat(len(self.targets), 1, 1, 1)
        self.model = ratioctl.load_model(options.model)
        self.network = fold_batchnorm(from_package(package)).to(memory_format=torch.channels_last)
        rows = self.x[:1].repeat(len(self.ladder) * len(self.targets), 1, 1, 1)
        self.rows = rows.contiguous(memory_format=torch.channels_last)
        self.reached: dict[str, torch.Tensor] = {}

    def keep(self, side: str, found: list[torch.Tensor]) -> None:
        """`found` holds the points (targets, C, H, W) of each budget."""
        with torch.no_grad():
            p = [torch.softmax(self.model(z) / self.package.temperature, 1) for z in found]
        self.reached[side] = torch.stack([q.gather(1, self.targets[:, None])[:, 0] for q in p], 1)

    def ours(self) -> None:
        options = self.options
        answers = ratioctl.counterfactual(
            [options.image], target=options.targets, model=options.model, steps=self.steps
        )
        reached = [[budget.confidence for budget in target.budgets] for target in answers[0].targets]
        self.reached["ours"] = torch.tensor(reached)

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
        share = WIDE + 3 * START + REFINE
        harness.bare_passes(self.network, self.rows, round(share * self.steps), forwards=4)
        flips = self.rows[:1].repeat(2 * len(self.targets) * FLIP_RADII, 1, 1, 1)
        harness.bare_passes(self.network, flips, max(round(FLIP * self.steps), 1), forwards=1)


def main() -> None:
    parser = harness.parser(__doc__, short={"steps": 12})
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--image", default=str(harness.SAMPLES / "cat.jpg"))
    parser.add_argument("--targets", default="dog,horse")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    compared = Sides(options)
    sides: dict[str, Callable[[], object]] = {
        "ours": compared.ours,
        "search": compared.search,
        "pyautoattack": compared.pyautoattack,
        "search floor": compared.search_floor,
        "floor": compared.floor,
    }
    if find_spec("torchattacks"):
        sides["torchattacks"] = compared.torchattacks
    compared.steps = 4
    for side in sides.values():  # warm-up
        side()
    compared.steps = options.steps
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
            side: int((reached["ours"] < found - 0.005).sum())
            for side, found in reached.items()
            if side != "ours"
        },
        "budgets": list(compared.ladder),
        "targets": options.targets.split(","),
        "steps": options.steps,
        "rounds": options.rounds,
        "model": compared.package.digest,
        "device": select_device().why,
    }
    harness.finish(result, options, "counterfactual")


if __name__ == "__main__":
    main()
