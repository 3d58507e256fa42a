"""How many pixels counterfactuals change in l2 and l1.5 balls, at equal confidence.

    python -m experiments.sparsity SOURCE [--model cifar10-ratio-small] [--images 40] [--json FILE]
    python -m experiments.sparsity --short

Each image gets a random other class, the same in every norm. Each norm answers with the smallest change found
whose saved image reaches the confidence `--until`; compared are the images that reach it in every norm. A
pixel counts as changed where some channel differs by more than 1/255.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import ratioctl
from experiments import study
from experiments.study import Study
from ratioctl import metrics
from ratioctl.counterfactuals import distances
from ratioctl.evaluation.stages.explanations import changed

KEYS = ("changed", "confidence", "l1", "l1.5", "l2", "linf")
Found = dict[str, list[dict[str, float] | None]]


def search(found: Study, options: Any, norms: Sequence[str]) -> Found:
    """Figures of the smallest change in each norm, for each image; None where `--until` is not reached."""
    rows: Found = {norm: [] for norm in norms}
    for pixels, target, name in zip(found.images.pixels, found.targets, found.target_names, strict=True):
        answers = ratioctl.counterfactual(
            pixels,
            target=name,
            model=options.model,
            norm=list(norms),
            steps=options.steps,
            until=options.until,
            seed=options.seed,
        )
        for norm, answer in zip(norms, answers, strict=True):
            image = answer.targets[0].flip_image
            rows[norm].append(
                None
                if image is None
                else {
                    "changed": changed(image, pixels),
                    "confidence": found.confidence(image, int(target)),
                    **distances(image, pixels),
                }
            )
    return rows


def main() -> None:
    parser = study.parser(__doc__, images=40, short={"steps": 20})
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--until", type=float, default=0.9)
    parser.add_argument("--norms", default="2,1.5")
    options = parser.parse_args()
    norms = options.norms.split(",")
    found = study.load(options, options.model)
    began = time.perf_counter()
    rows = search(found, options, norms)
    together = [each for each in zip(*rows.values(), strict=True) if None not in each]
    both = [each for each in together if any(one["changed"] for one in each)]  # an image may need no change
    if not both:
        raise SystemExit("no image reaches --until in every norm; raise --steps or lower --until")
    figures = {
        n: {key: np.array([each[k][key] for each in both]) for key in KEYS} for k, n in enumerate(norms)
    }
    first = figures[norms[0]]["changed"]
    fewer = {}
    for norm in norms[1:]:
        difference = figures[norm]["changed"] - first
        k = int((difference < 0).sum())
        fewer[norm] = {
            "images_with_fewer": k,
            **study.share(k, len(both)),
            "mean_difference": float(difference.mean()),
            "difference_interval": metrics.mean_interval(difference, bounds=(-1.0, 1.0)),
        }
    study.harness.finish(
        {
            "benchmark": "pixels changed at equal confidence",
            **found.about(options),
            "until": options.until,
            "asked": len(found.images),
            "n": len(both),
            "norms": {
                norm: {
                    "reached": sum(one is not None for one in rows[norm]),
                    **{key: summary(key, values) for key, values in figures[norm].items()},
                }
                for norm in norms
            },
            f"fewer_than_l{norms[0]}": fewer,
            "seconds": time.perf_counter() - began,
        },
        options,
    )


def summary(key: str, values: np.ndarray) -> dict[str, Any]:
    bounds = (0.0, 1.0) if key in ("changed", "confidence") else (0.0, np.inf)
    return {"mean": float(values.mean()), "interval": metrics.mean_interval(values, bounds=bounds)}


if __name__ == "__main__":
    main()
