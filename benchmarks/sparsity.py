"""How many pixels counterfactuals change in l2 and l1.5 balls, at equal confidence.

    python benchmarks/sparsity.py SOURCE [--model cifar10-ratio] [--images 40] [--until 0.9] [--json FILE]

Every image is asked for a random other class (the same in every norm). Each norm answers with the smallest
change found whose saved picture reaches the confidence `--until`; compared are the pictures of images that
reach it in every norm. A pixel counts as changed where some channel differs by more than 1/255.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from _result import finish

import ratioctl
from ratioctl import metrics
from ratioctl import package as packages
from ratioctl.counterfactuals import distances
from ratioctl.data import in_distribution
from ratioctl.evaluation.datasets import class_balanced
from ratioctl.evaluation.stages.explanations import changed, target_of
from ratioctl.models.predict import predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--model", default="cifar10-ratio")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--until", type=float, default=0.9)
    parser.add_argument("--norms", default="2,1.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    norms = options.norms.split(",")
    package = packages.read(packages.find(options.model))
    channels, size, _ = package.input_size
    data = class_balanced(
        in_distribution.load_labelled(options.source, size, channels, package.label_names),
        options.images,
        options.seed,
    )
    assert data.labels is not None
    predict = predictor(package).predict
    found: dict[str, list[dict[str, float] | None]] = {norm: [] for norm in norms}
    began = time.perf_counter()
    for pixels, label in zip(data.pixels, data.labels, strict=True):
        target = target_of(pixels, int(label), len(package.label_names), options.seed)
        answers = ratioctl.counterfactual(
            pixels,
            target=package.label_names[target],
            model=options.model,
            norm=norms,
            steps=options.steps,
            until=options.until,
            seed=options.seed,
        )
        for norm, answer in zip(norms, answers, strict=True):
            picture = answer.targets[0].flip_image
            if picture is None:
                found[norm].append(None)
                continue
            p = metrics.softmax(predict(picture[None]), package.temperature)[0, target]
            found[norm].append(
                {"changed": changed(picture, pixels), "confidence": float(p), **distances(picture, pixels)}
            )
    both = [k for k in range(len(data)) if all(found[norm][k] for norm in norms)]
    # Where the picture needs no change at all nothing is compared.
    both = [k for k in both if any(found[norm][k]["changed"] for norm in norms)]  # type: ignore[index]
    table: dict[str, dict[str, object]] = {}
    for norm in norms:
        mine = [found[norm][k] for k in both]
        table[norm] = {"reached": sum(one is not None for one in found[norm])}
        for key in ("changed", "confidence", "l1", "l1.5", "l2", "linf"):
            values = np.array([one[key] for one in mine if one is not None])
            bounds = (0.0, 1.0) if key in ("changed", "confidence") else (0.0, np.inf)
            table[norm][key] = {
                "mean": float(values.mean()),
                "interval": metrics.mean_interval(values, bounds=bounds),
            }
    first = np.array([found[norms[0]][k]["changed"] for k in both])  # type: ignore[index]
    fewer = {}
    for norm in norms[1:]:
        other = np.array([found[norm][k]["changed"] for k in both])  # type: ignore[index]
        k = int((other < first).sum())
        fewer[norm] = {
            "images_with_fewer": k,
            "share": k / len(both),
            "interval": metrics.wilson_interval(k, len(both)),
            "mean_difference": float((other - first).mean()),
            "difference_interval": metrics.mean_interval(other - first, bounds=(-1.0, 1.0)),
        }
    result = {
        "benchmark": "pixels changed at equal confidence",
        "until": options.until,
        "asked": len(data),
        "n": len(both),
        "norms": table,
        f"fewer_than_l{norms[0]}": fewer,
        "steps": options.steps,
        "seed": options.seed,
        "source_fingerprint": data.fingerprint,
        "model": package.digest,
        "seconds": time.perf_counter() - began,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
