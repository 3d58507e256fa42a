"""Which model sees the target in whose counterfactuals: every model asks, every model judges.

    python benchmarks/transfer.py SOURCE --models cifar10-ratio cifar10-plain FOLDER ... [--json FILE]

Every test image is asked for a random other class, the same of every model, at one budget of an l2 ball; the
saved 8-bit pictures are given to all models. A judge sees the target where that is its own label.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import numpy as np
from _result import finish

from ratioctl import metrics
from ratioctl import package as packages
from ratioctl.counterfactuals.pipeline import explain
from ratioctl.counterfactuals.request import CounterfactualRequest, PreparedRequest
from ratioctl.counterfactuals.sources import Source, encoded
from ratioctl.data import in_distribution
from ratioctl.evaluation.explanations import some, target_of
from ratioctl.models.device import select_device
from ratioctl.models.environment import environment
from ratioctl.models.predict import predictor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--eps", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    loaded = [packages.read(packages.find(model)) for model in options.models]
    names = packages.names(loaded)
    for package, name in zip(loaded, names, strict=True):
        if (package.label_names, package.input_size) != (loaded[0].label_names, loaded[0].input_size):
            sys.exit(
                f"{name}: its classes or size differ from those of {names[0]}; name models that share them."
            )
    labels, (channels, size, _) = loaded[0].label_names, loaded[0].input_size
    data = some(
        in_distribution.load_labelled(options.source, size, channels, labels), options.images, options.seed
    )
    if data.labels is None:
        sys.exit(f"{options.source}: has no labels; name a labelled source.")
    compute = select_device(options.device, options.precision)
    targets = np.array(
        [
            target_of(pixels, int(label), len(labels), options.seed)
            for pixels, label in zip(data.pixels, data.labels, strict=True)
        ]
    )
    sources = tuple(
        Source(path=str(k), read=functools.partial(encoded, pixels), targets=(labels[target],))
        for k, (pixels, target) in enumerate(zip(data.pixels, targets, strict=True))
    )
    question = CounterfactualRequest(
        targets=("predicted",),  # every source names its own
        p=2.0,
        eps=(options.eps,),
        steps=options.steps,
        restarts=1,
        seed=options.seed,
    )
    judges = [predictor(package, compute.device) for package in loaded]
    began = time.perf_counter()
    rows = []
    for package, name in zip(loaded, names, strict=True):
        asked = PreparedRequest(models=((package, question),), sources=sources)
        answers = list(explain(asked, device=options.device, precision=options.precision, together=1))
        budgets = [answer.targets[0].budgets[0] for answer in answers]
        pictures = np.stack([budget.image for budget in budgets])
        sees = {}
        for judge, other in zip(judges, names, strict=True):
            k = int((judge.predict(pictures).argmax(1) == targets).sum())
            sees[other] = {"share": k / len(targets), "interval": metrics.wilson_interval(k, len(targets))}
        confidence = np.array([budget.confidence for budget in budgets])
        rows.append({"asked": name, "mean_confidence": float(confidence.mean()), "sees": sees})
    clean = {
        name: float((judge.predict(data.pixels).argmax(1) == data.labels).mean())
        for judge, name in zip(judges, names, strict=True)
    }
    result = {
        "benchmark": "which model sees the target in whose counterfactuals",
        "n": len(data),
        "eps": options.eps,
        "steps": options.steps,
        "seed": options.seed,
        **environment(compute, "search_precision", "score_precision"),
        "source_fingerprint": data.fingerprint,
        "models": {name: package.digest for name, package in zip(names, loaded, strict=True)},
        "accuracy_on_these": clean,
        "rows": rows,
        "seconds": time.perf_counter() - began,
    }
    finish(result, options.json)


if __name__ == "__main__":
    main()
