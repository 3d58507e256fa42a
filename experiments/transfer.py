"""Which model predicts the target on whose counterfactuals: every model searches, every model judges.

    python -m experiments.transfer SOURCE --models cifar10-ratio-small cifar10-plain FOLDER ... [--json FILE]
    python -m experiments.transfer --short

Each image gets a random other class, the same for every model, at one budget of an l2 ball; all models score
the saved 8-bit images. A judge agrees where it predicts the target.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time

import numpy as np

from experiments import study
from experiments.study import Study
from ratioctl import images
from ratioctl import package as packages
from ratioctl.counterfactuals.pipeline import explain
from ratioctl.counterfactuals.request import CounterfactualRequest, PreparedRequest
from ratioctl.counterfactuals.sources import Source
from ratioctl.models.device import select_device
from ratioctl.models.predict import predictor


def searched(
    found: Study, package: packages.ModelPackage, options: argparse.Namespace
) -> tuple[np.ndarray, float]:
    """Saved images (N, H, W, C) of one model's counterfactuals, and their mean confidence."""
    request = CounterfactualRequest(
        targets=("predicted",),  # each source names its own
        p=2.0,
        eps=(options.eps,),
        steps=options.steps,
        restarts=1,
        seed=options.seed,
    )
    sources = tuple(
        Source(path=str(k), read=functools.partial(images.encoded, pixels), targets=(name,))
        for k, (pixels, name) in enumerate(zip(found.images.pixels, found.target_names, strict=True))
    )
    prepared = PreparedRequest(models=((package, request),), sources=sources)
    answers = explain(prepared, device=options.device, precision=options.precision, together=1)
    budgets = [answer.targets[0].budgets[0] for answer in answers]
    confidence = float(np.mean([budget.confidence for budget in budgets]))
    return np.stack([budget.image for budget in budgets]), confidence


def main() -> None:
    parser = study.parser(__doc__, images=200, short={"steps": 5})
    parser.add_argument("--models", nargs="+", default=["cifar10-ratio-small", "cifar10-plain"])
    parser.add_argument("--eps", type=float, default=3.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    loaded = [packages.read(packages.find(model)) for model in options.models]
    models = dict(zip(packages.names(loaded), loaded, strict=True))
    for name, package in models.items():
        if (package.label_names, package.input_size) != (loaded[0].label_names, loaded[0].input_size):
            sys.exit(f"{name}: its classes or input size differ from the first model's. Choose others.")
    found = study.load(options, options.models[0])
    compute = select_device(options.device, options.precision)
    judges = {name: predictor(package, compute.device).predict for name, package in models.items()}
    began, rows = time.perf_counter(), []
    for name, package in models.items():
        pictures, confidence = searched(found, package, options)
        hits = {
            judge: int((predict(pictures).argmax(1) == found.targets).sum())
            for judge, predict in judges.items()
        }
        sees = {judge: study.share(k, len(pictures)) for judge, k in hits.items()}
        rows.append({"asked": name, "mean_confidence": confidence, "sees": sees})
    study.harness.finish(
        {
            "benchmark": "which model predicts the target on whose counterfactuals",
            **found.about(options),
            "eps": options.eps,
            "device": str(compute.device),
            "search_precision": "bf16" if compute.bf16 else "fp32",
            "models": {name: package.digest for name, package in models.items()},
            "accuracy_on_these": {
                name: float((predict(found.images.pixels).argmax(1) == found.labels).mean())
                for name, predict in judges.items()
            },
            "rows": rows,
            "seconds": time.perf_counter() - began,
        },
        options,
    )


if __name__ == "__main__":
    main()
