"""Answers of the API, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Problem(BaseModel):
    """What is wrong, why, and what to do about it; as the command line's --json reports errors."""

    type: str
    thing: str
    reason: str
    next_step: str
    message: str


class ProblemAnswer(BaseModel):
    """An error. Answers of /v1/score hold the rows, too, where no image could be read."""

    model_config = ConfigDict(extra="allow")
    error: Problem


class Row(BaseModel):
    """One image, as `ratioctl ood-score` writes it; with probabilities, one key p:<class> each."""

    model_config = ConfigDict(extra="allow")
    path: str
    label: str | None
    confidence: float | None
    ood_score: float | None
    is_ood: bool | None
    error: str | None


class ScoreAnswer(BaseModel):
    """Rows in the order of the images."""

    model: str
    threshold: float
    rows: list[Row]


class ServedModel(BaseModel):
    """One model of the server."""

    name: str
    architecture: str
    digest: str | None
    labels: list[str]
    input_size: list[int] = Field(description="channels, height, width")
    temperature: float
    score: str
    thresholds: dict[str, float]
    ladders: dict[str, list[float]] = Field(description="default budgets of counterfactuals by norm")
    backend: Literal["onnx", "torch"]
    explains: bool
    why_not: str | None


class ModelAnswer(BaseModel):
    """The models, the default one first, and the limits of requests."""

    version: str
    models: list[ServedModel]
    limits: dict[str, float]


class JobAnswer(BaseModel):
    """A search. `result` is what `ratioctl counterfactual` writes to counterfactuals.json."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    progress: float = Field(ge=0, le=1)
    error: Problem | None
    result: dict[str, Any] | None


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok", "stopping"]
