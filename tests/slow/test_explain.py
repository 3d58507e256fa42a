"""Counterfactuals of the bundled model: what holds on photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import ratioctl
from ratioctl import images, metrics, package
from ratioctl.evaluation.stages.explanations import changed
from ratioctl.models.predict import predictor
from ratioctl.utils.resources import folder

pytestmark = pytest.mark.slow


def sample(name: str) -> Path:
    return folder("assets") / "samples" / name


def test_until_is_certified_on_the_saved_picture_and_grows(tmp_path: Path) -> None:
    spec = package.read(package.find("cifar10-ratio"))
    predict = predictor(spec).predict
    radii = []
    for until in (0.6, 0.9):
        out = tmp_path / str(until)
        (answer,) = ratioctl.counterfactual(
            sample("kitten.jpg"), target="dog", until=until, steps=30, out=out, device="cpu"
        )
        (target,) = answer.targets
        assert target.flip_png is not None
        assert target.flip_eps is not None
        saved = images.decode(out / target.flip_png, 32, 3).pixels
        p = metrics.softmax(predict(saved[None]), spec.temperature)[0, spec.label_names.index("dog")]
        assert until <= p < until + 0.15  # no further than needed
        moved = np.linalg.norm((saved.astype(float) - answer.input) / 255)
        assert target.flip_eps == pytest.approx(moved, abs=1e-9)
        first = next(budget.eps for budget in target.budgets if budget.confidence >= until)
        assert target.flip_eps <= first
        radii.append(target.flip_eps)
    assert radii[0] < radii[1]


def test_a_large_ball_is_no_worse_than_a_small_one() -> None:
    """Without a smaller radius beside it, this search ends at 0.14 for l2 6, and at 0.3 for l2 50."""
    (answer,) = ratioctl.counterfactual(
        sample("horse.jpg"), target="dog", eps=[6, 50], steps=30, device="cpu"
    )
    assert [budget.confidence > 0.95 for budget in answer.targets[0].budgets] == [True, True]


def test_frank_wolfe_changes_fewer_pixels_at_equal_confidence() -> None:
    l2, sparse = ratioctl.counterfactual(
        sample("kitten.jpg"), target="dog", norm=["2", "1.5"], until=0.9, steps=30, device="cpu"
    )
    pictures = [answer.targets[0].flip_image for answer in (l2, sparse)]
    assert all(picture is not None for picture in pictures)
    shares = [changed(picture, l2.input) for picture in pictures if picture is not None]
    assert shares[1] < 0.95 * shares[0]
