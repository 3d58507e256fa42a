"""Counterfactuals of a file of `export --explain` beside those of torch: one random target class per image.

    python -m experiments.graph_search SOURCE [--model cifar10-ratio-small] [--images 40] [--json FILE]
    python -m experiments.graph_search --short

Both search every radius of the model's l2 ladder for as many steps, torch in fp32. Confidences are those of
the saved 8-bit pictures, scored by torch. The interval is that of the mean difference of an image's mean
confidence over the radii.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import ratioctl
from experiments import study
from ratioctl import metrics
from ratioctl.onnx import explainer


def main() -> None:
    parser = study.parser(__doc__, images=40, short={"steps": 3})
    parser.add_argument("--model", default="cifar10-ratio-small", help="a package or a bundled model")
    options = parser.parse_args()
    found = study.load(options, options.model)
    radii = found.package.ladders["2"]
    confidences: dict[str, list[list[float]]] = {"graph": [], "torch": []}
    seconds, most = dict.fromkeys(confidences, 0.0), 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = ratioctl.export(found.package, explain=True, output=Path(folder) / "explain.onnx").path
        loaded = explainer.load(file)
    for pixels, target, name in zip(found.images.pixels, found.targets, found.target_names, strict=True):
        began = time.perf_counter()
        pictures = loaded.search(pixels[None], [int(target)], radii, options.steps)["counterfactual"]
        seconds["graph"] += time.perf_counter() - began
        confidences["graph"].append([found.confidence(picture, target) for picture in pictures])
        lengths = np.linalg.norm((pictures / 255.0 - pixels / 255.0).reshape(len(radii), -1), axis=1)
        most = max(most, float((lengths / radii).max()))
        began = time.perf_counter()
        (answer,) = ratioctl.counterfactual(
            pixels, target=name, eps=radii, model=found.package.path, steps=options.steps, precision="fp32"
        )
        seconds["torch"] += time.perf_counter() - began
        budgets = answer.targets[0].budgets
        confidences["torch"].append([found.confidence(budget.image, target) for budget in budgets])
    of = {name: np.array(rows) for name, rows in confidences.items()}
    difference = of["graph"] - of["torch"]
    result: dict[str, Any] = {
        "benchmark": "counterfactuals of the exported graph beside torch's",
        **found.about(options),
        "radii": radii,
        "mean_confidence": {name: rows.mean(axis=0).tolist() for name, rows in of.items()},
        "difference_by_radius": difference.mean(axis=0).tolist(),
        "mean_difference": float(difference.mean()),
        "interval": metrics.mean_interval(difference.mean(axis=1), bounds=(-1.0, 1.0)),
        "largest_loss": float(-difference.min()),
        "largest_gain": float(difference.max()),
        "behind_by_more_than_0.01": study.share(int((difference < -0.01).sum()), difference.size),
        "ahead_by_more_than_0.01": study.share(int((difference > 0.01).sum()), difference.size),
        "largest_distance_over_radius": most,
        "confidences": {name: rows.tolist() for name, rows in of.items()},
        "seconds": seconds,
    }
    study.harness.finish(result, options)


if __name__ == "__main__":
    main()
