"""How many images reach a random other class, by budget, with checks of what is promised of counterfactuals.

    python -m experiments.validity SOURCE [--model cifar10-ratio-small] [--images 40] [--json FILE]
    python -m experiments.validity --short

Asks for the model's l2 ladder and checks the saved 8-bit images: each lies in its ball, scores again to the
recorded confidence, and the confidence never falls as the budget grows. "faults" lists what does not hold.
The target is neither the image's label nor the class that the model predicts.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ratioctl
from experiments import study
from experiments.study import Study
from ratioctl import images, metrics


def targets_of(found: Study, rng: np.random.Generator) -> list[int]:
    """A random class for each image, neither its label nor its prediction."""
    predicted = found.predict(found.images.pixels).argmax(1)
    classes = range(len(found.package.label_names))
    pairs = zip(found.labels, predicted, strict=True)
    return [int(rng.choice([k for k in classes if k not in pair])) for pair in pairs]


def check(
    found: Study, pixels: np.ndarray, target: int, answer: Any, folder: Path
) -> tuple[list[float], list[str]]:
    """Confidences of the saved images of one answer, scored again, and the promises that they break."""
    channels, size, _ = found.package.input_size
    scores, faults, last = [], [], answer.original.probabilities[target]
    for budget in answer.targets[0].budgets:
        saved = images.decode(folder / budget.png, size, channels).pixels
        moved = (saved.astype(float) - pixels.astype(float)) / 255
        again = found.confidence(saved, target)
        if np.sqrt((moved**2).sum()) > budget.eps:
            faults.append(f"eps {budget.eps}: outside the ball")
        if abs(again - budget.confidence) > 1e-4:
            faults.append(f"eps {budget.eps}: scores {again} again, was {budget.confidence}")
        if budget.confidence < last:
            faults.append(f"eps {budget.eps}: confidence falls")
        last = budget.confidence
        scores.append(again)
    return scores, [f"{folder.parent.name} {fault}" for fault in faults]


def main() -> None:
    parser = study.parser(__doc__, images=40, steps=500, short={"steps": 10})
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--grids", type=Path, help="keep the images in this folder")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    found = study.load(options, options.model, rng)
    labels, budgets = found.package.label_names, found.package.ladders["2"]
    targets = targets_of(found, rng)
    reached: list[list[float]] = []
    flips, faults = [], []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.grids or Path(scratch)
        for row, (pixels, label, target) in enumerate(
            zip(found.images.pixels, found.labels, targets, strict=True)
        ):
            folder = root / f"{row:03d}-{labels[label]}"
            folder.mkdir(parents=True, exist_ok=True)
            source = folder / f"{folder.name}.png"
            Image.fromarray(pixels).save(source)
            (answer,) = ratioctl.counterfactual(
                [source],
                target=labels[target],
                model=options.model,
                steps=options.steps,
                out=folder / "answers",
            )
            scores, broken = check(found, pixels, target, answer, folder / "answers")
            reached.append(scores)
            faults += broken
            flips.append(answer.targets[0].flip_eps)
    count = (np.array(reached) > 0.5).sum(0)
    known = [flip for flip in flips if flip is not None]
    study.harness.finish(
        {
            "benchmark": "counterfactual validity",
            **found.about(options),
            "budgets": list(budgets),
            "above_one_half": [int(k) for k in count],
            "intervals": [metrics.wilson_interval(int(k), len(flips)) for k in count],
            "mean_confidence": [float(v) for v in np.mean(reached, 0)],
            "median_flip_radius": float(np.median(known)) if known else None,
            "flipped": len(known),
            "faults": faults,
            "seconds": time.perf_counter() - began,
        },
        options,
    )


if __name__ == "__main__":
    main()
