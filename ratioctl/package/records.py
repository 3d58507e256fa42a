"""What a calibration stores beside thresholds: rules, acceptance rates, quantiles of acceptances. Checked."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ratioctl import scores
from ratioctl.errors import PackageError
from ratioctl.package.config import AGAIN, Spec

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
Value = TypeVar("Value", bound=BaseModel)
_Text = Annotated[str, Field(min_length=1, max_length=1000)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CalibrationSet(_Value):
    """A set of calibration images.

    Attributes:
        set: its name; n: number of images; fingerprint: of its pixels and labels.
        ball: {"p": "2", "eps": E} where the images were attacked; attack: in words.
    """

    set: _Text
    n: Annotated[int, Field(ge=1)]
    fingerprint: _Text
    ball: dict[str, Any] | None = None
    attack: _Text | None = None

    @property
    def title(self) -> str:
        """ "svhn", or "svhn, attacked in l2 0.5"."""
        if self.ball is None:
            return self.set
        return f"{self.set}, attacked in l{self.ball.get('p')} {self.ball.get('eps')}"


class AcceptanceRate(CalibrationSet):
    """How many images of a set a threshold accepts. `interval` is exact (Clopper-Pearson), 95 %."""

    accepted: Annotated[int, Field(ge=0)]
    rate: _Share
    interval: tuple[_Share, _Share]


class AcceptanceQuantiles(CalibrationSet):
    """Acceptances of a set at equally spaced levels from 0 to 1, ascending."""

    quantiles: Annotated[tuple[_Finite, ...], Field(min_length=2, max_length=10_001)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.quantiles) != sorted(self.quantiles):
            raise ValueError("quantiles must ascend")
        return self

    def share_below(self, acceptance: float) -> float:
        """About which share of these images has a lower acceptance, in [0,1]."""
        import numpy as np

        return float(np.interp(acceptance, self.quantiles, np.linspace(0, 1, len(self.quantiles))))


class ThresholdRecord(_Value):
    """A threshold with its rule and its acceptance rates on the calibration images.

    Attributes:
        score: config name of the OOD score.
        id: the in-distribution images; ood: the out-of-distribution sets, clean and attacked.
        statement, assumptions: of a rule that guarantees something. Further keys ("risk", "per_class") are
            kept as they are.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: _Text
    rule: _Text
    score: _Text
    threshold: _Finite
    id: AcceptanceRate
    ood: tuple[AcceptanceRate, ...] = ()
    statement: str | None = None
    assumptions: tuple[str, ...] = ()


class Acceptances(_Value):
    """Quantiles of the acceptances of all calibration images. `unit` is "log-odds" for maximum softmax."""

    score: _Text
    unit: _Text
    id: AcceptanceQuantiles
    ood: tuple[AcceptanceQuantiles, ...] = ()


def records(spec: Spec, score: str | None = None) -> tuple[ThresholdRecord, ...]:
    """The stored records of an OOD score, None takes the model's own; none in models of earlier versions.

    Raises:
        PackageError: they are damaged.
    """
    stored = spec.config["ratio"].get("threshold_records", [])
    if not isinstance(stored, list):
        raise PackageError(spec.name, '"ratio.threshold_records" must be a list', AGAIN)
    found = [_checked(ThresholdRecord, row, spec, "threshold_records") for row in stored]
    wanted = scores.by_name(score or spec.score).config_name
    return tuple(row for row in found if row.score == wanted)


def acceptances(spec: Spec, score: str | None = None) -> Acceptances | None:
    """The stored quantiles for an OOD score, None takes the model's own; None where there are none.

    Raises:
        PackageError: they are damaged.
    """
    stored = spec.config["ratio"].get("acceptance")
    if stored is None:
        return None
    found = _checked(Acceptances, stored, spec, "acceptance")
    return found if found.score == scores.by_name(score or spec.score).config_name else None


def _checked(kind: type[Value], value: object, spec: Spec, key: str) -> Value:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("ratio", key, *first["loc"])))
        raise PackageError(spec.name, f'"{where}" is damaged: {first["msg"]}', AGAIN) from None
