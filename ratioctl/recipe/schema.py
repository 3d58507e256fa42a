"""Recipes: TOML <-> frozen values that are both the schema of the file and what the code runs on.

`Ball`, `Attack`, `Term` and `Objective` are the vocabulary of the method (Augustin, Meinke, Hein 2020,
eq. 4-8); `Recipe` is a whole experiment. There is no second "config" class behind them.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ratioctl.utils.registry import Registry

NORMS = (1.0, 1.5, 2.0, math.inf)
LADDER_STEPS = 6
ATTACKS: Registry[Any] = Registry("attack method", "attacks", "register_attack")


def norm_name(p: float) -> str:
    """The name of a norm in files and on the command line: "1", "1.5", "2" or "inf"."""
    return f"{p:g}"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false are no value for this")
        return value


class Ball(_Value):
    """The threat model {z : ||z - x||_p <= eps}, always intersected with the pixel box [0,1] (eq. 3)."""

    p: Annotated[float, Field(allow_inf_nan=True), PlainSerializer(norm_name, return_type=str)] = 2.0
    eps: float = Field(gt=0)

    @field_validator("p")
    @classmethod
    def _known_norm(cls, p: float) -> float:
        if p not in NORMS:
            raise ValueError(f"p = {p:g} is not one of 1, 1.5, 2, inf")
        return p

    def __str__(self) -> str:
        return f"l{norm_name(self.p)} {self.eps:g}"


class Attack(_Value):
    """How the inner maximum over a ball is searched.

    Attributes:
        method: a registered attack method: "pgd" is momentum PGD as in the paper's appendix B.1, "apgd"
            Auto-PGD (Croce and Hein 2020), "afw" Auto-Frank-Wolfe (Boreiko et al. 2022).
        steps: gradient steps per restart.
        step_size: length of a PGD step in the ball's norm; None means 2.5 eps / steps. APGD and AFW
            choose their own.
        momentum: PGD's momentum.
        start: "centre" begins at the image itself, "random" inside the ball.
        restarts: independent runs of which the best is kept; those after the first start at random.
    """

    ball: Ball
    method: str = "pgd"
    steps: int = Field(default=7, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    start: Literal["centre", "random"] = "centre"
    restarts: int = Field(default=1, ge=1)

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        return ATTACKS.check(method)

    @model_validator(mode="after")
    def _legal_pair(self) -> Attack:
        options, norm = ATTACKS.options(self.method), norm_name(self.ball.p)
        if norm not in options["norms"]:
            able = [f'"{name}"' for name in ATTACKS.names() if norm in ATTACKS.options(name)["norms"]]
            raise ValueError(
                f'method = "{self.method}" cannot search the l{norm} ball; its method is {" or ".join(able)}'
            )
        if self.step_size is not None and not options.get("step_size"):
            raise ValueError(f'method = "{self.method}" chooses its own step sizes; remove step_size')
        return self


GoalName = Literal["cross-entropy", "margin", "dlr", "uniform-cross-entropy", "kl", "confidence"]


class Term(_Value):
    """One side of the objective: clean * L(x) + robust * max_{z in ball} L(z), L the cross-entropy.

    The target of L is the label inside and the uniform distribution outside. `against = "clean"` is the
    TRADES term: the divergence from the prediction on the clean image instead of from the target.

    Attributes:
        clean, robust: weights.
        attack: the search for the inner maximum; needed where `robust` is not 0.
        goal: what the attack maximises where it is not the term's own loss, "margin" for eq. 8.
        more_steps_per_drop, max_steps: the attack grows by this many steps at every learning-rate drop
            of a step schedule, up to the limit (appendix B.1: ACET 20, 25, ..., 40).
        ramp_epochs: the radius grows linearly from 0 to its value over these first epochs.
        ramp_steps_from: during the ramp, the steps grow from this number to `attack.steps`.
    """

    clean: float = Field(default=0.0, ge=0)
    robust: float = Field(default=0.0, ge=0)
    against: Literal["target", "clean"] = "target"
    attack: Attack | None = None
    goal: GoalName | None = None
    more_steps_per_drop: int = Field(default=0, ge=0)
    max_steps: int | None = Field(default=None, ge=1)
    ramp_epochs: float = Field(default=0.0, ge=0)
    ramp_steps_from: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _attack_where_needed(self) -> Term:
        if self.robust > 0 and self.attack is None:
            raise ValueError("robust > 0 needs an [attack] table with its ball, method and steps")
        if self.robust == 0 and self.clean == 0:
            raise ValueError("clean and robust are both 0: this term has no effect; leave the table out")
        if self.against == "clean" and self.robust == 0:
            raise ValueError('against = "clean" has no effect while robust is 0')
        if self.goal == "kl" and self.against != "clean":
            raise ValueError('goal = "kl" compares with the clean prediction and needs against = "clean"')
        goal = self.goal or ("kl" if self.against == "clean" else None)
        attack = self.attack
        if goal == "kl" and attack is not None and attack.start == "centre" and attack.restarts == 1:
            raise ValueError(
                "the divergence from the clean prediction has no gradient at the clean image itself, so its "
                'attack needs start = "random"'
            )
        return self


class Objective(_Value):
    """inside + outside, eq. 6: the paper's weighting, in + lambda * out, with lambda = outside weights.

    The authors' public code multiplies both by one half, which halves the effective learning rate.
    """

    inside: Term = Term(clean=1.0)
    outside: Term | None = None

    @model_validator(mode="after")
    def _no_labels_outside(self) -> Objective:
        if self.outside is not None and self.outside.goal in ("cross-entropy", "margin", "dlr"):
            raise ValueError(
                f'outside.goal = "{self.outside.goal}" needs labels, which out-images do not have; legal are '
                '"uniform-cross-entropy", "confidence" and "kl"'
            )
        return self


class Augment(_Value):
    """Training augmentation, the same for in- and out-images.

    Attributes:
        crop: zero padding in pixels before a random crop back to size.
        flip: random horizontal flip.
        autoaugment: the AutoAugment policy of Cubuk et al. 2019; "none" undoes that of a base.
        cutout: side in pixels of a square set to the mean (DeVries and Taylor 2017).
        resized_crop: random area fraction at least this, then resized (ImageNet style); 0 is off.
        color_jitter: strength of brightness, contrast and saturation jitter.
        lighting: standard deviation of the PCA lighting noise.
    """

    crop: int = Field(default=0, ge=0)
    flip: bool = False
    autoaugment: Literal["cifar10", "svhn", "imagenet"] | None = None
    cutout: int = Field(default=0, ge=0)
    resized_crop: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0)
    lighting: float = Field(default=0.0, ge=0)

    @field_validator("autoaugment", mode="before")
    @classmethod
    def _none_is_off(cls, value: object) -> object:
        return None if value == "none" else value


class Data(_Value):
    """Where images come from; every entry is a SOURCE as on the command line.

    Attributes:
        train: labelled in-distribution.
        test: its test split, never used for training, selection or calibration.
        validation: how many training images (or which fraction) are held out, stratified, for selection
            and calibration.
        calibration: a labelled source to calibrate on instead of the held-out images.
        outside: training out-distribution, one or several sources.
        outside_test: held-out images of the out-distribution, for validation.
        exclude: class folders of the outside sources that are left out, of `outside_test` where it has
            them too.
        size, channels: the model's input.
    """

    train: str
    test: str | None = None
    validation: float = Field(default=0.05, gt=0)
    calibration: str | None = None
    outside: tuple[str, ...] = ()
    outside_test: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    size: int = Field(default=32, ge=4, le=1024)
    channels: Literal[1, 3] = 3
    augment: Augment = Augment()

    @field_validator("outside", "outside_test", "exclude", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("validation")
    @classmethod
    def _count_or_fraction(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("give a fraction below 1 or a whole number of images")
        return value


class Model(_Value):
    """The network.

    Attributes:
        width: channels of a ResNet's first stage; None is 64.
        stem_stride: of a ResNet's first convolution; None is 1. With 2 an image of 64x64 costs what one of
            32x32 costs with 1.
        mean, std: per channel of [0,1] pixels; None measures the training images.
    """

    architecture: str = "resnet18"
    width: int | None = Field(default=None, ge=1)
    stem_stride: int | None = Field(default=None, ge=1, le=8)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Model:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: give both or neither")
        if self.std is not None and any(s <= 0 for s in self.std):
            raise ValueError("every std must be above 0")
        return self


class Optim(_Value):
    """SGD with Nesterov momentum and its schedule.

    Attributes:
        batch_size: in-distribution images per update; `batch_size_out` of the out-distribution.
        weight_decay: on every parameter, as in the paper.
        schedule: "step" divides by `drop_factor` at each epoch of `drops`; "cosine" falls to 0;
            "onecycle" rises over the first 30 % and falls to 0.
        warmup_epochs: linear warm-up from 0.
        ema: decay of the averaged weights, min(ema, (1+n)/(10+n)) at update n, batch statistics
            averaged too; None trains without.
        select: "best" keeps the weights with the highest attacked validation accuracy (clean where
            nothing inside is attacked), "last" the final ones.
        validate_every: epochs between validations.
        grad_clip: largest gradient norm; None leaves gradients alone.
    """

    epochs: float = Field(default=220, gt=0)
    batch_size: int = Field(default=128, ge=1)
    batch_size_out: int = Field(default=128, ge=1)
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["step", "cosine", "onecycle"] = "step"
    drops: tuple[float, ...] = ()
    drop_factor: float = Field(default=0.1, gt=0, lt=1)
    warmup_epochs: float = Field(default=0.0, ge=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    select: Literal["best", "last"] = "best"
    validate_every: float = Field(default=1.0, gt=0)
    validate_images: int = Field(default=1024, ge=1)
    grad_clip: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Optim:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum > 0")
        if self.drops and self.schedule != "step":
            raise ValueError(f'drops belong to schedule = "step", not "{self.schedule}"')
        if any(a >= b for a, b in zip((0.0, *self.drops), self.drops, strict=False)):
            raise ValueError("drops must be epochs above 0 in ascending order")
        return self


class Calibration(_Value):
    """Temperature search (appendix C): `temperatures` geometric values between `low` and `high`."""

    objective: Literal["ece", "nll"] = "ece"
    bins: int = Field(default=10, ge=2)
    report_bins: int = Field(default=15, ge=2)
    low: float = Field(default=0.05, gt=0)
    high: float = Field(default=2.71, gt=0)
    temperatures: int = Field(default=500, ge=2)

    @model_validator(mode="after")
    def _ordered(self) -> Calibration:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class Evaluation(_Value):
    """What `evaluate` measures by default, and the counterfactual ladders.

    Attributes:
        robust: balls of the robust accuracies; empty means the paper's, scaled to the input size.
        outside_eps: l2 radius of the worst case on out-images; None means 1.0 scaled to the size.
        ladders: budgets per norm ("1", "1.5", "2", "inf"); norms left out get `default_ladder`.
    """

    robust: tuple[Ball, ...] = ()
    outside_eps: float | None = Field(default=None, gt=0)
    ladders: dict[Literal["1", "1.5", "2", "inf"], tuple[float, ...]] = {}

    @field_validator("ladders")
    @classmethod
    def _ascending(cls, ladders: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for norm, budgets in ladders.items():
            if not budgets or any(a >= b for a, b in zip((0.0, *budgets), budgets, strict=False)):
                raise ValueError(f"the budgets for norm {norm} must be above 0 and in ascending order")
        return ladders


class Recipe(_Value):
    """A whole experiment: everything that decides the weights, and nothing about the machine."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**63)
    data: Data
    model: Model = Model()
    objective: Objective = Objective()
    optim: Optim = Optim()
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Recipe:
        if self.objective.outside is not None and not self.data.outside:
            raise ValueError(
                "objective.outside needs images: name at least one SOURCE in data.outside, "
                'for example --set data.outside="tinyimagenet.tar.xz:train"'
            )
        if self.model.mean is not None and len(self.model.mean) != self.data.channels:
            raise ValueError(
                f"model.mean has {len(self.model.mean)} values for {self.data.channels} channel(s)"
            )
        if self.model.std is not None and len(self.model.std) != self.data.channels:
            raise ValueError(
                f"model.std has {len(self.model.std)} values for {self.data.channels} channel(s)"
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: JSON of every value, sorted keys, no spaces.

        Keys that recipes have had since later versions count where they are set, so that the digests of
        older recipes stay.
        """
        values = self.model_dump(mode="json")
        if self.model.stem_stride is None:
            del values["model"]["stem_stride"]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def default_ladder(p: float, size: int, channels: int) -> tuple[float, ...]:
    """Six budgets for a norm, scaled to the input.

    l2 is the paper's 0.5, 1, ..., 3 at 32x32x3, growing with sqrt(d), which makes 3.5, ..., 21 at 224
    (Figures 2 and 36). The other norms' ladders are those at which an l2-robust CIFAR model shows
    changes of a comparable strength: linf does not grow with d, l1 grows with d, l1.5 with d^(2/3).
    """
    d = channels * size * size / 3072.0  # in units of a CIFAR image
    top = {2.0: 3.0 * d**0.5, math.inf: 24 / 255, 1.0: 60.0 * d, 1.5: 9.0 * d ** (2 / 3)}[p]
    if math.isinf(p):
        # Rounded up: a hair below 4/255, the nearest 8-bit picture in the ball would be 3/255 away.
        return tuple(math.ceil(top * (k + 1) / LADDER_STEPS * 1e6) / 1e6 for k in range(LADDER_STEPS))
    return tuple(round(top * (k + 1) / LADDER_STEPS, 6) for k in range(LADDER_STEPS))
