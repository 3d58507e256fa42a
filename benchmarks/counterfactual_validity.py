"""How many test images reach a random other class, by budget, and that what is promised of them holds.

    python benchmarks/counterfactual_validity.py SOURCE [--model cifar10-ratio] [--images 40] [--json FILE]

Draws images and target classes (not the label of the image, not what the model sees) with a seed, asks for
the model's l2 ladder, and checks on the saved 8-bit pictures: inside the ball, scored again to the same
confidence, confidence never falling with the budget.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from _result import finish
from PIL import Image

import ratioctl
from ratioctl import images, metrics
from ratioctl import package as packages
from ratioctl.data import in_distribution
from ratioctl.models.predict import predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grids", type=Path, help="keep the pictures in this folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    package = packages.read(packages.find(options.model))
    channels, size, _ = package.input_size
    data = in_distribution.load_labelled(options.source, size, channels, package.label_names)
    assert data.labels is not None
    rng = np.random.default_rng(options.seed)
    chosen = np.sort(rng.permutation(len(data))[: options.images])
    predict = predictor(package).predict
    seen = predict(data.pixels[chosen]).argmax(1)
    budgets = package.ladders["2"]
    reached = np.zeros((len(chosen), len(budgets)))
    flips: list[float | None] = []
    faults: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.grids or Path(scratch)
        for row, index in enumerate(chosen):
            others = [k for k in range(len(package.label_names)) if k not in (data.labels[index], seen[row])]
            target = int(rng.choice(others))
            name = f"{row:03d}-{package.label_names[data.labels[index]]}"
            out = root / name
            out.mkdir(parents=True, exist_ok=True)
            source = out / f"{name}.png"
            Image.fromarray(data.pixels[index]).save(source)
            (answer,) = ratioctl.counterfactual(
                [source],
                target=package.label_names[target],
                model=options.model,
                steps=options.steps,
                out=out / "answers",
            )
            (found,) = answer.targets
            flips.append(found.flip_eps)
            last = answer.original.probabilities[target]
            for column, budget in enumerate(found.budgets):
                assert budget.png is not None
                saved = images.decode(out / "answers" / budget.png, size, channels).pixels
                moved = (saved.astype(float) - data.pixels[index].astype(float)) / 255
                p = metrics.softmax(predict(saved[None]), package.temperature)[0, target]
                if np.sqrt((moved**2).sum()) > budget.eps:
                    faults.append(f"{name} eps {budget.eps}: outside the ball")
                if abs(p - budget.confidence) > 1e-4:
                    faults.append(f"{name} eps {budget.eps}: scored again {p}, was {budget.confidence}")
                if budget.confidence < last:
                    faults.append(f"{name} eps {budget.eps}: confidence falls")
                last = budget.confidence
                reached[row, column] = p
    count = (reached > 0.5).sum(0)
    result = {
        "benchmark": "counterfactual validity",
        "n": len(chosen),
        "seed": options.seed,
        "source_fingerprint": data.fingerprint,
        "model": package.digest,
        "steps": options.steps,
        "budgets": list(budgets),
        "above_one_half": [int(k) for k in count],
        "intervals": [metrics.wilson_interval(int(k), len(chosen)) for k in count],
        "mean_confidence": [float(v) for v in reached.mean(0)],
        "median_flip_radius": float(np.median([f for f in flips if f is not None] or [float("nan")])),
        "flipped": sum(f is not None for f in flips),
        "faults": faults,
        "seconds": time.perf_counter() - began,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
