"""`train --max-time`: fits the schedule to the time that is left.

The speed is measured over the first updates. From then on the run goes through the rest of the recipe's
schedule at the pace at which it ends in time, and the pace is corrected whenever a tenth of the remaining
updates is done. The epoch never jumps, so neither does the learning rate, also where a run is resumed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ratioctl.errors import UsageError
from ratioctl.recipe import Recipe
from ratioctl.training.schedule import Pace, full_pace, work
from ratioctl.utils.durations import duration

_WARM_UP = 2  # updates that are not measured: kernels are chosen and memory is allocated
_MEASURED = 3  # updates at least
_MEASURED_S = 3.0  # and seconds, or 2 % of the time left
_IMPATIENT = 0.1  # share of the time left after which fewer are enough
_VALIDATIONS = 0.1  # share of the time left
_BYTES_PER_S = 100e6  # of written files, with their digests
_MARGIN = 1.25  # of what is reserved for the end of the run
_SPARE = 0.01  # share of the time left that is not used


@dataclasses.dataclass(kw_only=True)
class TimeLimit:
    """The time of a run and what it is spent on.

    Attributes:
        seconds: for the whole run, counted from `began` (of `clock`).
        train_images, calibration_images, written_bytes: what training and the end of the run work on.
        validation_work: of one validation, as `schedule.work`.
        reading_s: seconds in which the calibration reads its images.
        slowdown: of a pass in fp32, the precision of the calibration, against one in training.
        synchronize: waits for the device.
    """

    recipe: Recipe
    seconds: float
    began: float
    train_images: int
    calibration_images: int = 0
    validation_work: float = 0.0
    written_bytes: int = 0
    reading_s: float = 0.0
    slowdown: float = 1.0
    synchronize: Callable[[], None] = lambda: None
    clock: Callable[[], float] = lambda: time.monotonic()

    def __post_init__(self) -> None:
        self.decided = False  # whether a decision was recorded
        self._validation_s: float | None = None  # measured
        self._unit_s: float | None = None  # seconds of a forward pass of one image
        self._next = 0

    @property
    def known(self) -> bool:
        """Whether the speed is."""
        return self._unit_s is not None

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.began)

    def start(self, update: int) -> None:
        """The first update of this process comes next. Raises UsageError if no time is left for it."""
        self._first = self._marked = update
        self._loop_began = self._mark = self.clock()
        self._loop_left = self.left
        self._apart = 0.0
        if self._loop_left <= self._ending_s(0.0):
            raise self._too_short("loading")

    def spent(self, seconds: float, *, validation: bool = False) -> None:
        """Seconds since the last update went into saving, or a validation."""
        self._apart += seconds
        if validation:
            self._validation_s = seconds

    def fit(self, update: int, pace: Pace) -> Pace:
        """The pace from here on; called after every update.

        Raises:
            UsageError: the first updates have used up the time.
        """
        ended = update >= pace.total
        if self._unit_s is not None and (ended or update < self._next):
            return pace
        self.synchronize()
        now = self.clock()
        if self._unit_s is None and not ended and not self._measured(update, now):
            return pace
        middle = (pace.at(self._marked) + pace.at(update)) / 2
        spent = max(now - self._mark - self._apart, 1e-9)
        first = self._unit_s is None
        self._unit_s = spent / ((update - self._marked) * work(self.recipe, middle))
        self._mark, self._marked, self._apart = now, update, 0.0
        fitted = pace if ended else self._fitted(update, pace)
        if first and fitted.total - update < min(update - self._first, pace.total - update):
            raise self._too_short(f"the first {update - self._first} updates")
        self._next = update + max(1, (fitted.total - update) // 10)
        return fitted

    def _measured(self, update: int, now: float) -> bool:
        """Whether the speed is known; the measurement begins anew with every update of the warm-up."""
        done, spent = update - self._first, (now - self._loop_began) / self._loop_left
        if done <= _WARM_UP:
            if spent > (_IMPATIENT if done > 1 else 4 * _IMPATIENT):
                return True
            self._mark, self._marked, self._apart = now, update, 0.0
            return False
        enough = update - self._marked >= _MEASURED and now - self._mark >= min(_MEASURED_S, 0.02 * self.left)
        return enough or spent > _IMPATIENT

    def _fitted(self, update: int, pace: Pace) -> Pace:
        assert self._unit_s is not None
        full, epoch, end = (
            full_pace(self.recipe, self.train_images),
            pace.at(update),
            self.recipe.optim.epochs,
        )
        of_one = self._validation_s
        if of_one is None:
            of_one = self._unit_s * self.validation_work
        allowed = max(1, math.floor(_VALIDATIONS * self.left / max(of_one, 1e-9)))
        every = max(pace.validate_every, (end - epoch) / allowed)
        done, in_all = (math.floor(e / every + 1e-9) for e in (epoch, end))
        count = in_all - done + 1  # the last update is validated in any case
        available = (1 - _SPARE) * self.left - self._ending_s(self._unit_s) - _MARGIN * count * of_one
        mean = float(np.mean([work(self.recipe, e) for e in np.linspace(epoch, end, 33)]))
        updates = max(0, math.floor(available / (self._unit_s * mean)))
        if updates >= math.ceil((end - epoch) * full.per_epoch):  # time for all of the recipe that is left
            updates = math.ceil((end - epoch) * full.per_epoch)
            if pace.per_epoch == full.per_epoch:
                return dataclasses.replace(pace, validate_every=every)
        if updates == 0:
            return dataclasses.replace(pace, total=update)
        return Pace(
            update=update,
            epoch=epoch,
            per_epoch=min(updates / max(end - epoch, 1e-9), full.per_epoch),
            total=update + updates,
            validate_every=every,
        )

    def _ending_s(self, unit_s: float) -> float:
        """Seconds for saving, packaging and calibrating, without the last validation."""
        passes = unit_s * self.slowdown * self.calibration_images
        return 1.0 + _MARGIN * (1.0 + self.reading_s + passes + self.written_bytes / _BYTES_PER_S)

    def _too_short(self, what: str) -> UsageError:
        spent, ending = self.seconds - self.left, self._ending_s(self._unit_s or 0.0)
        reason = (
            f"is too short; {what} took until {duration(spent)} after the start, and saving and calibrating "
            f"take {duration(ending)}"
        )
        return UsageError(f"--max-time {duration(self.seconds)}", reason, "Give it more time.")

    def decision(self, update: int, pace: Pace) -> dict[str, Any]:
        """What was decided, as plain JSON values.

        Returns:
            "update" at which it was decided, "updates" of the whole run, "epochs" in them,
            "recipe_epochs", "seconds" of the run, "left_s", "update_s" (mean of those to come),
            "reserved_s" for validations and the end.
        """
        assert self._unit_s is not None
        ahead = np.linspace(pace.at(update), self.recipe.optim.epochs, 33)
        update_s = self._unit_s * float(np.mean([work(self.recipe, e) for e in ahead]))
        full = full_pace(self.recipe, self.train_images)
        return {
            "update": update,
            "updates": pace.total,
            "epochs": round(pace.total / full.per_epoch, 3),
            "recipe_epochs": self.recipe.optim.epochs,
            "seconds": self.seconds,
            "left_s": round(self.left, 1),
            "update_s": round(update_s, 5),
            "reserved_s": round(max(0.0, self.left - (pace.total - update) * update_s), 1),
        }
