"""The models of a server and what is done with them."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from ratioctl import images, package
from ratioctl._version import __version__
from ratioctl.counterfactuals.request import PreparedRequest, prepare
from ratioctl.counterfactuals.sources import Source, load
from ratioctl.package import ModelPackage
from ratioctl.scoring import pipeline
from ratioctl.scoring.backends import open_model
from ratioctl.server.jobs import Job, Jobs
from ratioctl.server.metrics import Metrics
from ratioctl.server.problems import HttpError
from ratioctl.server.scoring import ScoreQueue
from ratioctl.server.settings import Settings
from ratioctl.types import ScoreRow
from ratioctl.utils import optional
from ratioctl.utils.suggest import one_of

DEFAULT_THRESHOLD = "tpr95"
# Of one search, whose time is limited as well: the command line has no such limits.
MAX_STEPS, MAX_RESTARTS, MAX_BUDGETS, MAX_SEARCHES = 2000, 10, 20, 200


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """One model. `package` is None for an ONNX file."""

    name: str
    model: pipeline.Model
    queue: ScoreQueue
    package: ModelPackage | None

    def unexplained(self) -> HttpError | None:
        """Why this server cannot search counterfactuals of the model (501)."""
        if self.package is None:
            reason = "is an ONNX file, and this server searches counterfactuals of packages only"
            return HttpError(501, self.name, reason, "Serve the package that it was exported from.")
        missing = next((m for m in ("torch", "jinja2") if importlib.util.find_spec(m) is None), None)
        if missing is None:
            return None
        step = f"Run on the server: {optional.install_command(missing)}"
        return HttpError(501, "counterfactual", f"needs {missing}, which is not installed", step)

    def to_json(self) -> dict[str, Any]:
        spec, why_not = self.model.spec, self.unexplained()
        return {
            "name": self.name,
            "architecture": spec.architecture,
            "digest": None if self.package is None else self.package.digest,
            "labels": list(spec.label_names),
            "input_size": list(spec.input_size),
            "temperature": spec.temperature,
            "score": self.model.score,
            "thresholds": spec.thresholds_of(self.model.score),
            "ladders": {norm: list(ladder) for norm, ladder in spec.ladders.items()},
            "backend": self.model.backend,
            "explains": why_not is None,
            "why_not": None if why_not is None else str(why_not),
        }


class Service:
    """Everything behind the routes. `close` ends its threads.

    Args:
        models: package folders, bundled names or `.onnx` files; the first one is the default.

    Raises:
        PackageError: as `open_model`; UncalibratedError: a model without thresholds.
    """

    def __init__(
        self,
        models: Sequence[str],
        settings: Settings,
        *,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        opened = [open_model(model, DEFAULT_THRESHOLD, device=device) for model in models]
        for model in opened:
            _warm_up(model)
        self.settings, self.draining = settings, False
        self.models: dict[str, Served] = {}
        self.metrics = Metrics(self.waiting_images, self.waiting_jobs)
        for model in opened:
            name = _unused(model.spec.name, self.models)
            queue = ScoreQueue(
                model,
                max_waiting=settings.max_queue,
                max_pixels=settings.max_pixels,
                observe=self.metrics.batches.observe,
            )
            found = model.spec if isinstance(model.spec, ModelPackage) else None
            self.models[name] = Served(name=name, model=model, queue=queue, package=found)
        self.jobs = Jobs(
            device=device,
            precision=precision,
            max_waiting=settings.max_jobs,
            timeout=settings.job_timeout,
            count=lambda state: self.metrics.searches.labels(state).inc(),
        )

    def waiting_images(self) -> int:
        return sum(len(served.queue) for served in self.models.values())

    def waiting_jobs(self) -> int:
        return len(self.jobs.waiting) + (self.jobs.running is not None)

    def close(self) -> None:
        self.jobs.close()
        for served in self.models.values():
            served.queue.close()

    def find(self, name: str | None) -> Served:
        """The model of this name, the first one by default. Raises HttpError 404."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            raise HttpError(404, f"model {name}", "is not served here", one_of(name, self.models))
        return self.models[name]

    def to_json(self) -> dict[str, Any]:
        limits = ("max_body", "max_pixels", "max_images", "timeout", "job_timeout")
        return {
            "version": __version__,
            "models": [served.to_json() for served in self.models.values()],
            "limits": {name: getattr(self.settings, name) for name in limits},
        }

    def score(
        self, served: Served, uploads: Sequence[tuple[str, bytes]], threshold: str
    ) -> tuple[float, Future[list[ScoreRow]]]:
        """The threshold's value, and the rows to come.

        Raises:
            UsageError, UncalibratedError: an unknown threshold. HttpError: 413 or 429, too many images.
        """
        bound = package.threshold(served.model.spec, threshold, served.model.score)
        if len(uploads) > self.settings.max_images:
            reason = f"holds {len(uploads)} images, more than {self.settings.max_images}"
            raise HttpError(413, "the request", reason, "Send several requests.")
        items = [
            images.Item(path=images.shown(name), member=images.Member(name=name, data=data))
            for name, data in uploads
        ]
        return bound, served.queue.submit(items, bound)

    def counted(self, served: Served, rows: Sequence[ScoreRow]) -> None:
        for row in rows:
            kind = "unreadable" if row.error else "ood" if row.is_ood else "in_distribution"
            self.metrics.images.labels(served.name, kind).inc()

    def prepare(self, upload: tuple[str, bytes], models: Sequence[str], values: dict[str, Any]) -> Job:
        """A checked search; reads the image, so call it in a thread.

        Args:
            values: arguments of `ratioctl.counterfactuals.prepare`; `region` is X, Y, W, H.

        Raises:
            ImageError: the image cannot be read. UsageError: impossible values.
            HttpError: 501 without torch; 400 for a larger search than a server carries out.
        """
        served = [self.find(name) for name in models] or [self.find(None)]
        for one in served:
            if (why_not := one.unexplained()) is not None:
                raise why_not
        name, data = images.shown(upload[0]), upload[1]
        found = [one.package for one in served if one.package is not None]
        prepared = prepare([data], model=found, **values)  # type: ignore[arg-type]
        source = Source(path=name, read=lambda: data)
        prepared = dataclasses.replace(prepared, sources=(source,))
        for spec, request in prepared.models:
            images.decode(
                data, spec.frame, spec.input_size[0], name=name, max_pixels=self.settings.max_pixels
            )
            load(source, spec, box=request.box)  # the box lies within the photograph
        _check_size(prepared)
        return Job(prepared, tuple(one.name for one in served), name)


def _check_size(prepared: PreparedRequest) -> None:
    """Raises HttpError 400 for more than one request may ask for."""
    searches = 0
    for spec, request in prepared.models:
        classes = len(spec.label_names) if "all" in request.targets else len(request.targets)
        searches += classes * len(request.eps) * request.restarts
        for what, given, most in (
            ("steps", request.steps, MAX_STEPS),
            ("restarts", request.restarts, MAX_RESTARTS),
            ("eps", len(request.eps), MAX_BUDGETS),
        ):
            if given > most:
                raise HttpError(400, f"{what} {given}", f"is more than {most}", "Use the command line.")
    if searches > MAX_SEARCHES:
        reason = f"asks for {searches} searches (targets x budgets x models), more than {MAX_SEARCHES}"
        raise HttpError(400, "the request", reason, "Ask for fewer targets or budgets.")


def _warm_up(model: pipeline.Model) -> None:
    channels, height, width = model.spec.input_size
    model.predict(np.zeros((1, height, width, channels), np.uint8))


def _unused(name: str, taken: dict[str, Served]) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found
