"""Result values: short reprs and plain JSON."""

from __future__ import annotations

import json

import numpy as np

from ratioctl.types import Counterfactual, Explanation, Original, Prediction, ScoreRow, Target


def test_reprs_name_arrays_by_type_and_shape() -> None:
    picture = np.zeros((32, 32, 3), np.uint8)
    budget = Counterfactual(
        eps=0.5,
        image=picture,
        confidence=0.123456,
        confidence_float=0.125,
        predicted="cat",
        probabilities=(0.1,) * 10,
        distance={"l2": 0.5},
    )
    said = repr(budget)
    assert "image=<uint8 (32, 32, 3)>" in said
    assert "confidence=0.1235" in said
    assert "probabilities=<tuple of 10>" in said
    assert "distance={'l2': 0.5}" in said
    target = Target(target="dog", budgets=(budget,), flip_eps=None, flip_image=None)
    assert repr(target).startswith(
        "Target(target='dog', budgets=<tuple of 1>, flip_eps=None, flip_image=None"
    )
    explanation = Explanation(
        path="x" * 1000,
        sha256="0" * 64,
        model=0,
        input=picture,
        original=Original(label="cat", confidence=0.5, probabilities=(0.1,) * 10, is_ood=None),
        targets=(target,),
    )
    assert len(repr(explanation)) < 500
    assert repr(ScoreRow(path="a.png", confidence=0.25)).startswith("ScoreRow(path='a.png', label=None, conf")


def test_a_prediction_as_json() -> None:
    prediction = Prediction(
        label="b",
        confidence=0.75,
        ood_score=0.25,
        is_ood=False,
        probabilities=np.array([0.25, 0.75]),
        labels=("a", "b"),
    )
    assert json.loads(json.dumps(prediction.to_dict())) == {
        "label": "b",
        "confidence": 0.75,
        "ood_score": 0.25,
        "is_ood": False,
        "probabilities": {"a": 0.25, "b": 0.75},
    }
    assert "probabilities=<float64 (2,)>" in repr(prediction)
