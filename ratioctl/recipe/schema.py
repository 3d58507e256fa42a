"""The schema of recipes: frozen values that are validated when read and used at run time.

`Ball`, `Attack`, `Term` and `Objective` describe the method (Augustin, Meinke, Hein 2020, eq. 4-8); `Recipe`
is a whole experiment. Upper bounds refuse slips of the keyboard; none of them limits a sensible experiment.
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

from ratioctl.utils.defaults import CERTIFIED
from ratioctl.utils.frame import Frame, Size, frame_of
from ratioctl.utils.registry import Registry

NORMS = (1.0, 1.5, 2.0, math.inf)
LADDER_STEPS = 6
ATTACKS: Registry[Any] = Registry("attack method", "attacks", "register_attack")
MAX_EPOCHS = 1e6
MAX_BATCH = 2**20
MAX_BUDGETS = 1000
RENAMED = {"optim.milestones": "optim.drops", "optim.gamma": "optim.drop_factor"}  # key: its earlier name


def norm_name(p: float) -> str:
    """The name of a norm in files and on the command line: "1", "1.5", "2" or "inf"."""
    return f"{p:g}"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true and false are not allowed here")
        return value


class Ball(_Value):
    """The threat model {z : ||z - x||_p <= eps}, always intersected with the pixel box [0, 1] (eq. 3)."""

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
    """Maximization over a ball.

    Attributes:
        method: a registered attack method: "pgd" is momentum PGD as in the paper's appendix B.1, "apgd"
            Auto-PGD (Croce and Hein 2020), "afw" Auto-Frank-Wolfe (Boreiko et al. 2022).
        steps: gradient steps per restart.
        step_size: length of a PGD step in the ball's norm; None means 2.5 eps / steps. APGD and AFW
            adapt theirs.
        momentum: of PGD.
        start: "centre" starts at the image, "random" at a random point of the ball.
        restarts: independent runs, of which the best is kept; all but the first start at random.
    """

    ball: Ball
    method: str = "pgd"
    steps: int = Field(default=7, ge=1, le=100_000)
    step_size: float | None = Field(default=None, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    start: Literal["centre", "random"] = "centre"
    restarts: int = Field(default=1, ge=1, le=10_000)

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
                f'method = "{self.method}" cannot search the l{norm} ball; use method = {" or ".join(able)}'
            )
        if self.step_size is not None and not options.get("step_size"):
            raise ValueError(f'method = "{self.method}" adapts its step size; remove step_size')
        return self


GoalName = Literal["cross-entropy", "margin", "dlr", "uniform-cross-entropy", "kl", "confidence"]


class Term(_Value):
    """One summand of the objective: clean * L(x) + robust * max_{z in ball} L(z), L the cross-entropy.

    The target of L is the label for ID images and the uniform distribution for OOD images.
    `against = "clean"` is the TRADES term: the divergence from the prediction on the clean image.

    Attributes:
        clean, robust: weights.
        attack: the inner maximization; required if `robust` is not 0.
        goal: what the attack maximizes if it is not the term's own loss, "margin" for eq. 8.
        more_steps_per_drop, max_steps: the attack gets this many more steps at every milestone of a step
            schedule, up to the limit (appendix B.1: ACET 20, 25, ..., 40).
        ramp_epochs: the radius grows linearly from 0 to its value over these first epochs.
        ramp_steps_from: during the ramp, the steps grow from this number to `attack.steps`.
    """

    clean: float = Field(default=0.0, ge=0, le=1e6)
    robust: float = Field(default=0.0, ge=0, le=1e6)
    against: Literal["target", "clean"] = "target"
    attack: Attack | None = None
    goal: GoalName | None = None
    more_steps_per_drop: int = Field(default=0, ge=0, le=100_000)
    max_steps: int | None = Field(default=None, ge=1, le=100_000)
    ramp_epochs: float = Field(default=0.0, ge=0, le=MAX_EPOCHS)
    ramp_steps_from: int | None = Field(default=None, ge=1, le=100_000)

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
                "the divergence from the clean prediction has zero gradient at the clean image; "
                'its attack needs start = "random"'
            )
        return self


class Energy(_Value):
    """JEM's term, weight * (E(x) - E(x~)) with E(x) = -log sum_k exp f_k(x): the likelihood of ID images.

    x~ are samples of the model's own density by stochastic gradient Langevin dynamics (SGLD), which continues
    chains from a replay buffer: x <- x - step_size * grad E(x) + noise * N(0, 1). `step_size`, `noise` and
    `data_noise` are for pixels scaled to [-1, 1], as published (Grathwohl et al. 2020, arXiv 1912.03263,
    section 4 and appendix A). As published, samples are not clipped.

    Attributes:
        batch_size: samples per update.
        steps: of SGLD per update.
        buffer: images in the replay buffer.
        restart: probability that a chain starts anew at uniform noise.
        data_noise: standard deviation of Gaussian noise on the ID images of an update.
        limit: training stops as diverged where |E(x) - E(x~)| exceeds it.
    """

    weight: float = Field(default=1.0, gt=0, le=1e6)
    batch_size: int = Field(default=64, ge=1, le=MAX_BATCH)
    steps: int = Field(default=20, ge=1, le=100_000)
    step_size: float = Field(default=1.0, gt=0, le=1e6)
    noise: float = Field(default=0.01, ge=0, le=10)
    buffer: int = Field(default=10_000, ge=1, le=10_000_000)
    restart: float = Field(default=0.05, ge=0, le=1)
    data_noise: float = Field(default=0.03, ge=0, le=10)
    limit: float = Field(default=1000.0, gt=0)


class Certified(_Value):
    """Training of a certified head on a finished network, which stays as it is (ProoD, arXiv 2106.04260).

    The head is a binary discriminator g between ID and OOD images; the loss is the binary cross-entropy
    log(1 + exp(-g(x))) of ID images plus `weight` times log(1 + exp(max g)) of OOD images, max g being the
    upper bound of interval arithmetic over the linf ball.

    Attributes:
        eps: radius of the ball, for pixels in [0,1].
        weight: of the OOD images.
        ramp_epochs: the radius grows linearly from 0 to its value over these first epochs.
        shift: added to g after training, as published: a larger one costs guarantee, and leaves ID images
            more of the confidence of the network without a head.
    """

    eps: float = Field(default=0.01, gt=0, le=1)
    weight: float = Field(default=1.0, gt=0, le=1e6)
    ramp_epochs: float = Field(default=0.0, ge=0, le=MAX_EPOCHS)
    shift: float = Field(default=0.0, ge=-100, le=100)


class Objective(_Value):
    """ID term + OOD term, eq. 6: in + lambda * out, lambda being the weights of `outside`.

    The authors' public code multiplies both by one half, which halves the effective learning rate.
    `energy` adds the term of JEM. `certified` trains a head on a finished network instead, without the other
    terms.
    """

    inside: Term = Term(clean=1.0)
    outside: Term | None = None
    energy: Energy | None = None
    certified: Certified | None = None

    @property
    def uses_ood(self) -> bool:
        """Whether it needs OOD images."""
        return self.outside is not None or self.certified is not None

    @model_validator(mode="after")
    def _head_alone(self) -> Objective:
        others = self.outside is not None or self.energy is not None or self.inside != Term(clean=1.0)
        if self.certified is not None and others:
            raise ValueError("objective.certified trains a head alone; leave the other terms out")
        return self

    @model_validator(mode="after")
    def _energy_of_clean_images(self) -> Objective:
        if self.energy is not None and self.inside.clean == 0:
            raise ValueError("the energy term is one of clean ID images; it needs inside.clean > 0")
        return self

    @model_validator(mode="after")
    def _no_labels_outside(self) -> Objective:
        if self.outside is not None and self.outside.goal in ("cross-entropy", "margin", "dlr"):
            raise ValueError(
                f'outside.goal = "{self.outside.goal}" needs labels, which OOD images do not have; use '
                '"uniform-cross-entropy", "confidence" or "kl"'
            )
        return self


class Augment(_Value):
    """Training augmentation, the same for ID and OOD images.

    Attributes:
        crop: padding in pixels before a random crop back to size.
        crop_fill: color of that padding: "black", or "mean", that of the training images.
        flip: random horizontal flip.
        autoaugment: the AutoAugment policy of Cubuk et al. 2019; "none" removes that of a base.
        cutout: side in pixels of a square set to the mean (DeVries and Taylor 2017).
        resized_crop: random area fraction of at least this, then resized (ImageNet style); 0 is off.
        color_jitter: strength of brightness, contrast and saturation jitter.
        lighting: standard deviation of the PCA lighting noise.
    """

    crop: int = Field(default=0, ge=0, le=1024)
    crop_fill: Literal["black", "mean"] = "black"
    flip: bool = False
    autoaugment: Literal["cifar10", "svhn", "imagenet"] | None = None
    cutout: int = Field(default=0, ge=0, le=2048)
    resized_crop: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0, le=10)
    lighting: float = Field(default=0.0, ge=0, le=10)

    @field_validator("autoaugment", mode="before")
    @classmethod
    def _none_is_off(cls, value: object) -> object:
        return None if value == "none" else value


Side = Annotated[int, Field(ge=4, le=1024)]


class Data(_Value):
    """The data; every entry is a SOURCE as on the command line.

    Attributes:
        train: labelled in-distribution (ID) training images.
        test: its test split, never used for training, selection or calibration.
        validation: number (or fraction) of training images held out, stratified, for selection and
            calibration.
        calibration: a labelled source to calibrate on instead of the held-out images.
        outside: out-of-distribution (OOD) training images, one or several sources.
        outside_test: held-out OOD images, for validation.
        exclude: class folders that are removed from the OOD sources.
        size, channels: the model's input; `size` is the side of a square or [height, width].
        resize: how images of another shape get there: "crop" cuts what does not fit, around the center; "pad"
            keeps the whole image and fills the rest with black.
        bit_depth: bits in use, 9 to 16, of images with 16 bits per pixel, in training and wherever the model
            is used; None takes the file's range.
        balance: for classes of unequal size. "sampling" draws every class equally often, "weights" weighs the
            losses of labelled images by the inverse of the size of their class (mean 1); "none" does neither.
    """

    train: str
    test: str | None = None
    validation: float = Field(default=0.05, gt=0, le=1e9)
    calibration: str | None = None
    outside: tuple[str, ...] = ()
    outside_test: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    size: Side | tuple[Side, Side] = 32
    resize: Literal["crop", "pad"] = "crop"
    bit_depth: int | None = Field(default=None, ge=9, le=16)
    channels: Literal[1, 3] = 3
    balance: Literal["none", "sampling", "weights"] = "none"
    augment: Augment = Augment()

    @property
    def frame(self) -> Frame:
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return Frame(height, width, self.resize == "pad", self.bit_depth)

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
        width: channels of a ResNet's first stage; None means 64.
        stem_stride: of a ResNet's first convolution; None means 1. An image of 64x64 with 2 costs as much
            as one of 32x32 with 1.
        options: further options of the architecture, such as `activation` of preactresnet18. Their names and
            values are checked when the network is built.
        mean, std: per channel, of pixels in [0, 1]; None measures the training images.
    """

    architecture: str = "resnet18"
    width: int | None = Field(default=None, ge=1, le=4096)
    stem_stride: int | None = Field(default=None, ge=1, le=8)
    options: dict[str, bool | int | float | str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Model:
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std belong together: set both or neither")
        if self.std is not None and any(s <= 0 for s in self.std):
            raise ValueError("every std must be above 0")
        return self


class Optim(_Value):
    """SGD with Nesterov momentum, or Adam, and its schedule.

    Attributes:
        optimizer: "sgd", or "adam" (JEM's), for which `momentum` is beta_1, beta_2 is 0.999 and `nesterov`
            has no meaning.
        batch_size, batch_size_out: ID and OOD images per update, of all processes together.
        weight_decay: on every parameter, as in the paper.
        schedule: "step" multiplies the learning rate by `gamma` at each epoch of `milestones`; "cosine"
            falls to 0; "onecycle" rises over the first 30 % and falls to 0; "slowstart", for fine-tuning,
            rises quadratically over the first 60 % and falls so to 0 (after Jeddi et al. 2020).
        warmup_epochs: linear warm-up from 0.
        head_epochs: fine-tuning trains the head alone over these first epochs, on attacked images and at the
            full learning rate (an attacked linear probe, after RoLI, arXiv 2312.05716); the schedule covers
            the rest. Needs `--init`.
        ema: decay of the averaged weights, min(ema, (1+n)/(10+n)) at update n, batch statistics
            included; None disables averaging.
        select: "best" keeps the weights with the highest robust validation accuracy (clean accuracy if
            the ID term has no attack), "last" the final ones.
        validate_every: epochs between validations.
        grad_clip: largest gradient norm; None disables clipping.
        sync_batchnorm: with several processes, batch statistics are those of the whole batch, as with one;
            false normalizes with the statistics of a process's own images, and averages the running ones.
        allreduce_dtype: precision in which several processes exchange gradients.
    """

    optimizer: Literal["sgd", "adam"] = "sgd"
    epochs: float = Field(default=220, gt=0, le=MAX_EPOCHS)
    batch_size: int = Field(default=128, ge=1, le=MAX_BATCH)
    batch_size_out: int = Field(default=128, ge=1, le=MAX_BATCH)
    lr: float = Field(default=0.1, gt=0, le=1e6)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(default=5e-4, ge=0, le=1e6)
    schedule: Literal["step", "cosine", "onecycle", "slowstart"] = "step"
    milestones: tuple[float, ...] = Field(default=(), max_length=10_000)
    gamma: float = Field(default=0.1, gt=0, lt=1)
    warmup_epochs: float = Field(default=0.0, ge=0, le=MAX_EPOCHS)
    head_epochs: float = Field(default=0.0, ge=0, le=MAX_EPOCHS)
    ema: float | None = Field(default=None, gt=0, lt=1)
    select: Literal["best", "last"] = "best"
    validate_every: float = Field(default=1.0, gt=0)
    validate_images: int = Field(default=1024, ge=1, le=2**40)
    grad_clip: float | None = Field(default=None, gt=0)
    sync_batchnorm: bool = True
    allreduce_dtype: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> Optim:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov = true needs momentum > 0")
        if self.milestones and self.schedule != "step":
            raise ValueError(f'milestones belong to schedule = "step", not "{self.schedule}"')
        if self.head_epochs > 0 and self.optimizer != "sgd":
            raise ValueError('head_epochs needs optimizer = "sgd"')
        if self.head_epochs >= self.epochs:
            raise ValueError("head_epochs must be below epochs: afterwards all layers are trained")
        if any(a >= b for a, b in zip((0.0, *self.milestones), self.milestones, strict=False)):
            raise ValueError("milestones must be epochs above 0 in ascending order")
        return self


class Calibration(_Value):
    """Temperature search (appendix C) over `temperatures` geometric steps from `low` to `high`.

    Attributes:
        bins: of the ECE that is minimized; `report_bins` of the one that is reported.
    """

    objective: Literal["ece", "nll"] = "ece"
    bins: int = Field(default=10, ge=2, le=10_000)
    report_bins: int = Field(default=15, ge=2, le=10_000)
    low: float = Field(default=0.05, gt=0)
    high: float = Field(default=2.71, gt=0)
    temperatures: int = Field(default=500, ge=2, le=100_000)

    @model_validator(mode="after")
    def _ordered(self) -> Calibration:
        if self.low >= self.high:
            raise ValueError("low must be below high")
        return self


class Evaluation(_Value):
    """What `evaluate` measures by default, and the budgets of counterfactuals.

    Attributes:
        robust: balls of the robust accuracies; empty means the paper's, scaled to the input size.
        outside_eps: l2 radius of the worst case on OOD images; None means 1.0 scaled to the size.
        ladders: budgets per norm ("1", "1.5", "2", "inf"); other norms get `default_ladder`.
    """

    robust: tuple[Ball, ...] = Field(default=(), max_length=100)
    outside_eps: float | None = Field(default=None, gt=0)
    ladders: dict[Literal["1", "1.5", "2", "inf"], tuple[float, ...]] = {}

    @field_validator("ladders")
    @classmethod
    def _ascending(cls, ladders: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for norm, budgets in ladders.items():
            if len(budgets) > MAX_BUDGETS:
                raise ValueError(f"norm {norm} has {len(budgets):,} budgets, more than {MAX_BUDGETS}")
            if not budgets or any(a >= b for a, b in zip((0.0, *budgets), budgets, strict=False)):
                raise ValueError(f"the budgets for norm {norm} must be above 0 and in ascending order")
        return ladders


class Recipe(_Value):
    """A whole experiment: everything that determines the weights, and nothing about the machine."""

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
        if self.objective.uses_ood and not self.data.outside:
            term = "outside" if self.objective.certified is None else "certified"
            raise ValueError(
                f"objective.{term} needs OOD images: name at least one SOURCE in data.outside, "
                'for example --set data.outside="tinyimagenet.tar.xz:train"'
            )
        self._check_head()
        if self.model.mean is not None and len(self.model.mean) != self.data.channels:
            raise ValueError(
                f"model.mean has {len(self.model.mean)} values for {self.data.channels} channel(s)"
            )
        if self.model.std is not None and len(self.model.std) != self.data.channels:
            raise ValueError(
                f"model.std has {len(self.model.std)} values for {self.data.channels} channel(s)"
            )
        return self

    def _check_head(self) -> None:
        """A certified head needs the objective that trains it, and the reverse."""
        name, trained = self.model.architecture, self.objective.certified is not None
        if trained and not name.startswith(CERTIFIED):
            raise ValueError(f'model.architecture = "{name}" has no certified head; use "{CERTIFIED}{name}"')
        if name.startswith(CERTIFIED) and not trained:
            raise ValueError(f'model.architecture = "{name}" has a head that [objective.certified] trains')
        if trained and (self.optim.select != "last" or self.optim.head_epochs > 0):
            raise ValueError(
                'objective.certified needs optim.select = "last" and no head_epochs: the accuracy is that '
                "of the network without a head"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: JSON of every value, sorted keys, no spaces.

        Keys that later versions added count only if they are set, and renamed keys count under their first
        name, so the digests of older recipes stay.
        """
        values = self.model_dump(mode="json")
        for key, earlier in RENAMED.items():
            table, name = key.split(".")
            values[table][earlier.split(".")[1]] = values[table].pop(name)
        for table, key, default in (
            (values["objective"], "energy", None),
            (values["objective"], "certified", None),
            (values["optim"], "optimizer", "sgd"),
            (values["model"], "stem_stride", None),
            (values["model"], "options", None),
            (values["data"]["augment"], "crop_fill", "black"),
            (values["optim"], "head_epochs", 0.0),
            (values["optim"], "sync_batchnorm", True),
            (values["optim"], "allreduce_dtype", "fp32"),
            (values["data"], "balance", "none"),
            (values["data"], "resize", "crop"),
            (values["data"], "bit_depth", None),
        ):
            if table[key] == default:
                del table[key]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def default_ladder(p: float, size: Size, channels: int) -> tuple[float, ...]:
    """Six budgets for a norm, scaled to the input.

    l2 is the paper's 0.5, 1, ..., 3 at 32x32x3, growing with sqrt(d), which gives 3.5, ..., 21 at 224
    (Figures 2 and 36). The budgets of the other norms are those at which an l2-robust CIFAR model shows
    changes of comparable strength: linf does not grow with d, l1 grows with d, l1.5 with d^(2/3).
    """
    d = channels * frame_of(size).area / 3072.0  # in units of a CIFAR image
    top = {2.0: 3.0 * d**0.5, math.inf: 24 / 255, 1.0: 60.0 * d, 1.5: 9.0 * d ** (2 / 3)}[p]
    if math.isinf(p):
        # Rounded up: just below 4/255, the nearest 8-bit image in the ball would be 3/255 away.
        return tuple(math.ceil(top * (k + 1) / LADDER_STEPS * 1e6) / 1e6 for k in range(LADDER_STEPS))
    return tuple(round(top * (k + 1) / LADDER_STEPS, 6) for k in range(LADDER_STEPS))
