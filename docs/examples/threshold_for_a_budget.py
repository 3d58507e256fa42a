"""A threshold for a false-alarm budget: flag at most 10 % of the known images, and count what it catches."""

from pathlib import Path

import numpy as np

import ratioctl

photographs = Path("assets/samples")
known = [photographs / f"{name}.jpg" for name in ("cat", "dog", "duck", "horse", "kitten", "moose")]
unknown = [photographs / f"{name}.jpg" for name in ("coffee", "crab", "galaxies", "rocket")]
confidence = {
    name: np.array([row.confidence for row in ratioctl.ood_score(paths)])
    for name, paths in (("known", known), ("unknown", unknown))
}
budget = 0.10
threshold = float(np.sort(confidence["known"])[int(budget * len(known))])
for name, values in confidence.items():
    print(f"{name}: {(values < threshold).mean():.0%} of {len(values)} flagged below {threshold:.3f}")
