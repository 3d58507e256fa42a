"""Cost of a search with a file of `export --explain`, beside torch on the same processors.

    python -m benchmarks.explain [--widths 16,32,64] [--steps 500] [--rounds 3] [--json FILE]
    python -m benchmarks.explain --short        # width 4, few steps; its ratios beside the stored ones

For each width one image, one target, six radii and a ResNet-18 with random weights for 32x32 pixels, in one
process and in turns:

    onnxruntime  the graph: both runs of Auto-PGD, the exchange among radii, pictures, their scores
    torch fp32   one Auto-PGD search of as many steps for the six radii in one batch
    torch bf16   the same, where the processor has the instructions
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ratioctl import images
from ratioctl import package as packages
from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.models import fold_batchnorm
from ratioctl.models.device import select_device
from ratioctl.onnx import explainer, graph
from ratioctl.recipe import Attack, Ball
from tools import harness

RADII = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
TARGET = 5


def sides(width: int, folder: Path) -> dict[str, Callable[[int], object]]:
    """The searches, which take the number of steps."""
    network = harness.random_network(width=width).eval()
    weights = {
        name: value.contiguous().numpy()
        for name, value in network.network.state_dict().items()
        if value.is_floating_point()
    }
    config = {
        "architecture": "resnet18",
        "architecture_options": {"width": width},
        "label_names": [str(k) for k in range(10)],
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3},
        "ratio": {"name": f"width {width}", "temperature": 1.0, "thresholds": {"tpr95": 0.5}},
    }
    package = packages.write(folder / str(width), config=config, weights=weights)
    file = folder / f"{width}.onnx"
    base = graph.graph(package, threshold=0.5)
    file.write_bytes(graph.explain(base, package, threshold=0.5, p=2.0))
    loaded = explainer.load(file)
    pixels = images.decode(harness.SAMPLES / "cat.jpg", 32).pixels[None]
    folded = fold_batchnorm(network).to(memory_format=torch.channels_last)
    rows = torch.from_numpy(images.to_pixels(np.repeat(pixels, len(RADII), axis=0)))
    rows = rows.contiguous(memory_format=torch.channels_last)

    def search(precision: str, steps: int) -> None:
        compute = select_device("cpu", precision)

        def logits_of(x: torch.Tensor) -> torch.Tensor:
            with compute.autocast():
                return folded(x)

        attack = Attack(ball=Ball(p=2.0, eps=1.0), method="apgd", steps=steps)
        goal = goals.log_probability(torch.full((len(rows),), TARGET))
        perturb(logits_of, rows, goal, attack, eps=torch.tensor(RADII, dtype=torch.float64))

    made: dict[str, Callable[[int], object]] = {
        "onnxruntime": lambda steps: loaded.search(pixels, [TARGET], RADII, steps),
        "torch fp32": functools.partial(search, "fp32"),
    }
    if select_device("cpu").bf16:
        made["torch bf16"] = functools.partial(search, "bf16")
    return made


def main() -> None:
    parser = harness.parser(__doc__, short={"widths": "4", "steps": 5, "rounds": 1})
    parser.add_argument("--widths", default="16,32,64", help="of the networks, separated by commas")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options: argparse.Namespace = parser.parse_args()
    result: dict[str, object] = {"steps": options.steps, "radii": RADII, "rounds": options.rounds}
    ratios, processor_ratios, seconds, processor = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for width in map(int, options.widths.split(",")):
            made = sides(width, Path(folder))
            for side in made.values():  # warm-up
                side(2)
            compared = {name: functools.partial(side, options.steps) for name, side in made.items()}
            times, worked = harness.interleaved(compared, options.rounds, warm_up=False)
            seconds[str(width)], processor[str(width)] = harness.medians(times), harness.medians(worked)
            for name in compared:
                key = f"onnxruntime over {name}, width {width}"
                if name != "onnxruntime":
                    ratios[key] = harness.ratio(times, "onnxruntime", name)
                    processor_ratios[key] = harness.ratio(worked, "onnxruntime", name)
    result |= {"seconds": seconds, "processor_seconds": processor}
    result |= {"ratios": ratios, "processor_ratios": processor_ratios}
    harness.finish(result, options, "explain")


if __name__ == "__main__":
    main()
