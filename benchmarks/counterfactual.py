"""What counterfactuals cost: six budgets, two targets, 500 steps, against the peers and over the bare passes.

    python benchmarks/counterfactual.py [--image IMAGE] [--steps 500] [--rounds 3] [--json FILE]
    python benchmarks/counterfactual.py --short        # a few steps; its ratios beside the stored ones

Sides, in one process and in turns, on one image and the weights of one model:

    ours          `ratioctl.counterfactual`, the whole verb: search, rounding to 8 bits inside the ball,
                  scores of the rounded pictures, flip radius
    search        the search alone: both targets and all budgets in one batch, as the verb runs it
    pyautoattack  its targeted APGD (cross-entropy) on the module that `ratioctl.load_model` returns, one run
                  a budget, both targets in one batch
    torchattacks  its PGDL2, targeted, in the same way, where it is installed
    search floor  steps x budgets x targets passes with the gradient of the input, and a forward pass, as fast
                  as we can make them: what the ladder requires of anybody
    floor         the same, and those of the flip radius, which the verb finds too: six radii a target, a
                  tenth of the steps

Confidences are those in the targets, after the model's temperature; ours are of the saved 8-bit pictures,
the others' of unrounded points. "behind" counts, of all budgets and targets, where ours is lower by more
than 0.005.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from _result import finish
from _rounds import beside_stored, interleaved, medians, ratio

import ratioctl
from ratioctl import images
from ratioctl import package as packages
from ratioctl.attacks import goals
from ratioctl.attacks.batch_parallel import in_parts, one_each
from ratioctl.attacks.engine import perturb
from ratioctl.counterfactuals.search import FLIP_RADII, FLIP_SHARE
from ratioctl.models import fold_batchnorm, from_package
from ratioctl.models.device import select_device
from ratioctl.recipe import Attack, Ball


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--image", default="assets/samples/cat.jpg")
    parser.add_argument("--targets", default="dog,horse")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.short:
        options.steps = 12

    package = packages.read(packages.find(options.model))
    channels, size, _ = package.input_size
    pixels = images.decode(Path(options.image), size, channels).pixels
    x = torch.from_numpy(images.to_pixels(pixels[None]))
    names = options.targets.split(",")
    targets = torch.tensor([package.label_names.index(name) for name in names])
    ladder = package.ladders["2"]
    model = ratioctl.load_model(options.model)
    network = fold_batchnorm(from_package(package)).to(memory_format=torch.channels_last)
    rows = x.repeat(len(ladder) * len(targets), 1, 1, 1).contiguous(memory_format=torch.channels_last)
    reached: dict[str, torch.Tensor] = {}  # (targets, budgets) confidences

    def keep(side: str, found: list[torch.Tensor]) -> None:
        """`found`: for each budget the points (targets, C, H, W)."""
        with torch.no_grad():
            p = [torch.softmax(model(z) / package.temperature, 1) for z in found]
        reached[side] = torch.stack([q.gather(1, targets[:, None])[:, 0] for q in p], 1)

    def ours() -> None:
        answers = ratioctl.counterfactual(
            [options.image], target=options.targets, model=options.model, steps=options.steps
        )
        reached["ours"] = torch.tensor(
            [[budget.confidence for budget in target.budgets] for target in answers[0].targets]
        )

    def search() -> None:
        both = targets.repeat_interleave(len(ladder))
        attack = Attack(ball=Ball(p=2, eps=1), method="apgd", steps=options.steps)
        goal = goals.log_probability(both, package.temperature)
        perturb(network, rows, goal, attack, eps=torch.tensor(ladder).repeat(len(targets)))

    def pyautoattack() -> None:
        from pyautoattack.autopgd_base import APGDAttack

        found = []
        for eps in ladder:
            attack = APGDAttack(model, n_iter=options.steps, norm="L2", eps=eps, loss="ce-targeted-cfts")
            both = x.repeat(len(targets), 1, 1, 1)
            attack.init_hyperparam(both)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                found.append(attack.attack_single_run(both, targets)[0].detach())
        keep("pyautoattack", found)

    def torchattacks() -> None:
        from torchattacks import PGDL2

        found = []
        for eps in ladder:
            attack = PGDL2(model, eps, 2.5 * eps / options.steps, options.steps, random_start=False)
            attack.set_mode_targeted_by_label(quiet=True)
            found.append(attack(x.repeat(len(targets), 1, 1, 1), targets).detach())
        keep("torchattacks", found)

    def bare(steps: int, x: torch.Tensor) -> None:
        with one_each(x.device) as count:
            passes = in_parts(network, count)
            for _ in range(steps):
                z = x.detach().requires_grad_()
                torch.autograd.grad(passes(z).sum(), z)
            with torch.no_grad():
                passes(x)

    def search_floor() -> None:
        bare(options.steps, rows)

    def floor() -> None:
        bare(options.steps, rows)
        bare(max(options.steps // FLIP_SHARE, 1), rows[:1].repeat(len(targets) * FLIP_RADII, 1, 1, 1))

    sides: dict[str, Callable[[], object]] = {
        "ours": ours,
        "search": search,
        "pyautoattack": pyautoattack,
        "search floor": search_floor,
        "floor": floor,
    }
    if find_spec("torchattacks"):
        sides["torchattacks"] = torchattacks
    full, options.steps = options.steps, 4
    for side in sides.values():  # the first time is not counted
        side()
    options.steps = full
    times, worked = interleaved(sides, options.rounds)
    pairs = {
        "pyautoattack over ours": ("pyautoattack", "ours"),
        "ours over floor": ("ours", "floor"),
        "search over its floor": ("search", "search floor"),
    }
    if "torchattacks" in sides:
        pairs["torchattacks over ours"] = ("torchattacks", "ours")
    result = {
        "benchmark": "counterfactuals of six budgets and two targets",
        "ratios": {name: ratio(times, *pair) for name, pair in pairs.items()},
        "seconds": medians(times),
        "all_seconds": times,
        "processor_ratios": {name: ratio(worked, *pair) for name, pair in pairs.items()},
        "processor_seconds": medians(worked),
        "confidence": {side: found.mean().item() for side, found in reached.items()},
        "confidences": {side: found.tolist() for side, found in reached.items()},
        "behind": {
            side: int((reached["ours"] < found - 0.005).sum())
            for side, found in reached.items()
            if side != "ours"
        },
        "budgets": list(ladder),
        "targets": names,
        "steps": options.steps,
        "rounds": options.rounds,
        "model": package.digest,
        "place": select_device().why,
    }
    finish(result, options.json)
    if options.short:
        beside_stored(result, "counterfactual")


if __name__ == "__main__":
    main()
