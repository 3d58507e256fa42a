"""RATIO beside plain training, with the same network and number of updates, and JEM, on the embedded digits.

    python -m experiments.digits [--out runs/digits-comparison] [--json FILE]
    python -m experiments.digits --short

Trains `digits-ratio`, `digits-plain` and `digits-jem`, calibrates them on their held-out split, and measures
test accuracy and the mean confidence, after the temperature, on OOD images that none was trained on: crops of
a held-out photograph and smoothed noise.
"""

from __future__ import annotations

import time
from pathlib import Path

import ratioctl
from experiments import study
from ratioctl import metrics
from ratioctl import recipe as recipes
from ratioctl.data import in_distribution, out_distribution
from ratioctl.models.predict import predictor
from ratioctl.package import ModelPackage
from tools import harness

OOD = {
    "photograph and noise": ("photos:flower", "noise:smooth"),
    "photograph": ("photos:flower",),
    "noise": ("noise:smooth",),
}


def measured(package: ModelPackage) -> dict[str, object]:
    predict = predictor(package).predict
    channels, size, _ = package.input_size
    test = in_distribution.load_labelled("digits:test", size, channels, package.label_names)
    logits = predict(test.pixels)
    accuracy = study.share(int((logits.argmax(1) == test.labels).sum()), len(test))
    found: dict[str, object] = {
        "test_accuracy": accuracy["share"],
        "test_interval": accuracy["interval"],
        "test_n": len(test),
        "temperature": package.temperature,
    }
    inner = metrics.ood_score(metrics.confidence(logits, package.temperature))
    for name, sources in OOD.items():
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
    parser = harness.parser(__doc__, short={"settings": ["optim.epochs=1"]})
    parser.add_argument("--out", type=Path, default=Path("runs/digits-comparison"))
    parser.set_defaults(settings=[])
    options = parser.parse_args()
    result: dict[str, object] = {"benchmark": "digits: RATIO against plain"}
    for name in ("digits-ratio", "digits-plain", "digits-jem"):
        began = time.perf_counter()
        out = options.out / (f"{name}-short" if options.short else name)
        package = ratioctl.train(name, out=out, settings=options.settings, device="cpu", resume=options.short)
        recipe = recipes.load(name, options.settings)
        result[name] = {
            "seconds": time.perf_counter() - began,
            "recipe_digest": recipe.digest,
            "seed": recipe.seed,
            "package_digest": package.digest,
            **measured(package),
        }
    harness.finish(result, options)


if __name__ == "__main__":
    main()
