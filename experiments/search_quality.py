"""Quality of the counterfactual search: its confidences against many long searches.

    python -m experiments.search_quality cifar10.tar.xz:test --limit 40 \\
        --json experiments/results/search-quality.json

For every image and a random other class, at each radius (l2): the default counterfactual search for that one
radius, and the best of several targeted searches of `pyautoattack` in fp32, each of all steps: one from the
image, the others from random points. Confidences are those of the points before rounding to 8 bits, in fp32.
`short` counts the images more than 0.05 below the best of `pyautoattack`. Where the default reaches 0.999,
`pyautoattack` is not run and counts as 1: the shortfall is overestimated by at most 0.001, and the mean of
`from_the_image_alone`, the search of `pyautoattack` from the image, is an upper bound. With
`--reference FILE` the confidences of `pyautoattack` are kept in that file and not computed again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyautoattack.autopgd_base import APGDAttack

import ratioctl
from ratioctl import package as packages
from ratioctl.attacks.batch_parallel import in_parts, one_each
from ratioctl.data import in_distribution
from ratioctl.metrics.intervals import bootstrap_interval, wilson_interval
from ratioctl.models import fold_batchnorm, from_package
from tools import harness

_CHUNK = 20  # images searched together by pyautoattack
_SATURATED = 0.999  # no search by pyautoattack where the default reaches this
_DEFINE = ("steps", "starts", "seed")  # options that define a reference value, with the image and radius


class Comparison:
    """Images, random targets, and the two kinds of search."""

    def __init__(self, options: Any) -> None:
        self.options, self.model = options, packages.resolve(options.model)
        channels, size, _ = self.model.input_size
        images = in_distribution.load_labelled(options.data, size, channels, self.model.label_names)
        random = np.random.default_rng(options.seed)
        chosen = random.permutation(len(images))[: options.limit]
        shift = random.integers(1, len(self.model.label_names), len(images))[chosen]
        self.pixels = images.pixels[chosen]
        self.network = fold_batchnorm(from_package(self.model)).to(memory_format=torch.channels_last)
        self.x = torch.from_numpy(self.pixels).permute(0, 3, 1, 2).float().contiguous() / 255
        with torch.no_grad():
            predicted = self.logits(self.x).argmax(1)
        self.targets = (predicted + torch.from_numpy(shift)) % len(self.model.label_names)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x.contiguous(memory_format=torch.channels_last))

    def ours(self, eps: float) -> list[float]:
        values = np.zeros(len(self.x))
        for target in self.targets.unique().tolist():
            rows = np.flatnonzero(self.targets.numpy() == target)
            found = ratioctl.counterfactual(
                [self.pixels[row] for row in rows],
                target=[self.model.label_names[target]],
                eps=eps,
                steps=self.options.steps,
                model=self.options.model,
            )
            values[rows] = [one.targets[0].budgets[0].confidence_float for one in found]
        return values.tolist()

    def pyautoattack(self, eps: float, rows: np.ndarray) -> list[list[float]]:
        """Confidences (images, starts) of some images of one chunk."""
        starts, first = self.options.starts, int(rows[0]) // _CHUNK * _CHUNK
        size = min(_CHUNK, len(self.x) - first)
        random = torch.Generator().manual_seed(self.options.seed + first)
        noise = torch.randn((starts, size, *self.x.shape[1:]), generator=random)[:, rows - first]
        noise[0] = 0  # the first starts from the image
        length = noise.flatten(2).norm(dim=2).clamp_min(1e-12)[..., None, None, None]
        x, targets = self.x[rows], self.targets[rows].repeat(starts)
        with one_each(x.device) as threads:
            attack = APGDAttack(
                in_parts(self.logits, threads),
                n_iter=self.options.steps,
                norm="L2",
                eps=eps,
                loss="ce-targeted-cfts",
            )
            attack.init_hyperparam(x)
            begin = (x + eps * noise / length).clamp(0, 1).flatten(0, 1)
            points = attack.attack_single_run(x.repeat(starts, 1, 1, 1), targets, begin)[0]
        with torch.no_grad():
            p = torch.softmax(self.logits(points) / self.model.temperature, 1)
        confidences = p.gather(1, targets[:, None])[:, 0].view(starts, -1).T.tolist()
        return [[float(value) for value in row] for row in confidences]

    def reference(self, eps: float, ours: list[float]) -> list[list[float]]:
        """Confidences (images, starts); those that `--reference` has are not computed again."""
        path: Path | None = self.options.reference
        known = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
        keys = [
            json.dumps([self.model.digest, row, eps, *(getattr(self.options, name) for name in _DEFINE)])
            for row in range(len(self.x))
        ]
        missing = [row for row, key in enumerate(keys) if key not in known and ours[row] < _SATURATED]
        for first in range(0, len(self.x), _CHUNK):
            rows = np.array([row for row in missing if first <= row < first + _CHUNK])
            if rows.size:
                for row, values in zip(rows, self.pyautoattack(eps, rows), strict=True):
                    known[keys[row]] = values
                if path:
                    path.write_text(json.dumps(known), encoding="utf-8")
        saturated = [1.0] * self.options.starts
        return [saturated if ours[row] >= _SATURATED else known[key] for row, key in enumerate(keys)]


def summary(found: list[float], reference: np.ndarray) -> dict[str, Any]:
    """Means, shortfall and counts of one search against the best of `pyautoattack`, with 95 % intervals."""
    gap = reference - np.array(found)
    short = int((gap > 0.05).sum())
    interval = bootstrap_interval(np.mean, [[gap]], generator=np.random.default_rng(0), samples=10_000)
    return {
        "mean": float(np.mean(found)),
        "shortfall": float(gap.mean()),
        "shortfall_interval": interval,
        "short": short,
        "short_interval": wilson_interval(short, len(gap)),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("data", metavar="SOURCE", help="labelled images, such as cifar10.tar.xz:test")
    parser.add_argument("--model", default="cifar10-ratio-small")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--radii", default="2,3")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--starts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reference", type=Path, metavar="FILE", help="confidences of pyautoattack")
    options = parser.parse_args()
    comparison = Comparison(options)
    result: dict[str, Any] = {
        "experiment": "counterfactual search against many long searches",
        "model": options.model,
        "n": len(comparison.x),
        "steps": options.steps,
        "starts": options.starts,
        "radii": {},
    }
    for eps in map(float, options.radii.split(",")):
        ours = comparison.ours(eps)
        starts = np.array(comparison.reference(eps, ours))
        best = starts.max(1)
        result["radii"][f"{eps:g}"] = {
            "pyautoattack": float(best.mean()),
            "saturated": int((np.array(ours) >= _SATURATED).sum()),
            "ours": summary(ours, best),
            "from_the_image_alone": summary(starts[:, 0].tolist(), best),
            "confidences": {"ours": ours, "pyautoattack": starts.tolist()},
        }
    harness.finish(result, options)


if __name__ == "__main__":
    main()
