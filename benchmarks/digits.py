"""The claim in a minute: RATIO against plain training on the embedded digits, same network and updates.

    python benchmarks/digits.py [--out runs/digits-comparison] [--json FILE]

Trains `digits-ratio` and `digits-plain`, calibrates both on their held-out split, and measures test accuracy
and the mean confidence after temperature on out-images that neither has seen: crops of a held-out photograph
and smoothed noise.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from _result import finish

import ratioctl
from ratioctl import metrics
from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, out_distribution
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage


def measured(package: ModelPackage) -> dict[str, object]:
    predict = predictor(package).predict
    channels, size, _ = package.input_size
    test = in_distribution.load_labelled("digits:test", size, channels, package.label_names)
    logits = predict(test.pixels)
    right = int((logits.argmax(1) == test.labels).sum())
    found: dict[str, object] = {
        "test_accuracy": right / len(test),
        "test_interval": metrics.wilson_interval(right, len(test)),
        "test_n": len(test),
        "temperature": package.temperature,
    }
    inner = metrics.ood_score(metrics.confidence(logits, package.temperature))
    for name, sources in {
        "photograph and noise": ("photos:flower", "noise:smooth"),
        "photograph": ("photos:flower",),
        "noise": ("noise:smooth",),
    }.items():
        images = out_distribution.load(sources, size, channels)
        confidence = metrics.confidence(predict(images.pixels), package.temperature)
        found[f"out: {name}"] = {
            "mean_confidence": float(confidence.mean()),
            "interval": metrics.mean_interval(confidence),
            "auroc": metrics.auroc(inner, metrics.ood_score(confidence)),
            "n": len(images),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/digits-comparison"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, object] = {"benchmark": "digits: RATIO against plain"}
    for name in ("digits-ratio", "digits-plain"):
        began = time.perf_counter()
        package = ratioctl.train(name, out=options.out / name, device="cpu")
        seconds = time.perf_counter() - began
        recipe = recipes.load(name)
        result[name] = {
            "seconds": seconds,
            "recipe_digest": recipe.digest,
            "seed": recipe.seed,
            "package_digest": package.digest,
            **measured(package),
        }
    finish(result, options.json)


if __name__ == "__main__":
    main()
