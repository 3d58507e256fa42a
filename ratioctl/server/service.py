"""The models of a server and what is done with them."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ratioctl import images, package
from ratioctl._version import __version__
from ratioctl.counterfactuals.request import PreparedRequest, prepare
from ratioctl.counterfactuals.sources import Source, load
from ratioctl.errors import UsageError
from ratioctl.package import ModelPackage
from ratioctl.report.live import Live
from ratioctl.report.live import load as load_live
from ratioctl.scoring import pipeline
from ratioctl.scoring.backends import open_model, searches
from ratioctl.server.jobs import Job, Jobs
from ratioctl.server.metrics import Metrics
from ratioctl.server.problems import HttpError
from ratioctl.server.scoring import ScoreQueue
from ratioctl.server.settings import Settings
from ratioctl.types import ScoreRow
from ratioctl.utils import optional
from ratioctl.utils.suggest import one_of

if TYPE_CHECKING:
    from ratioctl.scoring.backends import Explainer

DEFAULT_THRESHOLD = "tpr95"
# Of one search, whose time is limited as well: the command line has no such limits.
MAX_STEPS, MAX_RESTARTS, MAX_BUDGETS, MAX_SEARCHES = 2000, 10, 20, 200


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """One model.

    Attributes:
        package: None for an ONNX file.
        explainer: the file of `export --explain` that belongs to it, if one is served.
        live: what makes the page of a result search itself; needs `explainer`.
    """

    name: str
    model: pipeline.Model
    queue: ScoreQueue
    package: ModelPackage | None
    explainer: Explainer | None = None
    live: Live | None = None

    @property
    def searched(self) -> ModelPackage | Explainer | None:
        """What searches: the package where torch is installed, else the ONNX file."""
        if self.explainer is not None and importlib.util.find_spec("torch") is None:
            return self.explainer
        return self.package or self.explainer

    def unexplained(self) -> HttpError | None:
        """Why this server cannot search counterfactuals of the model (501)."""
        if self.searched is None:
            reason = "is an ONNX file that gives scores only"
            step = "Serve the package that it was exported from, or a file of `export --explain` beside it."
            return HttpError(501, self.name, reason, step)
        needed = ("torch", "jinja2") if self.searched is self.package else ("jinja2",)
        missing = next((m for m in needed if importlib.util.find_spec(m) is None), None)
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
            "ladders": {
                norm: list(ladder)
                for norm, ladder in spec.ladders.items()
                if self.searched is not self.explainer
                or self.explainer is None
                or norm == self.explainer.norm
            },
            "backend": self.model.backend,
            "explains": why_not is None,
            "why_not": None if why_not is None else str(why_not),
        }


class Service:
    """Everything behind the routes. `close` ends its threads.

    Args:
        models: package folders, bundled names or `.onnx` files; the first one is the default. A file of
            `export --explain` searches counterfactuals of the model that it was exported from.
        live: onnxruntime-web's folder `dist`: pages of results search themselves, with the file's graph.

    Raises:
        PackageError: as `open_model`; UncalibratedError: a model without thresholds.
        UsageError: a file of `export --explain` of a model that is not served, or `live` without one.
    """

    def __init__(
        self,
        models: Sequence[str],
        settings: Settings,
        *,
        device: str = "auto",
        precision: str = "auto",
        live: str | None = None,
    ) -> None:
        explainers = {name: one for name in models if (one := searches(name)) is not None}
        scoring = [model for model in models if model not in explainers]
        opened = [open_model(model, DEFAULT_THRESHOLD, device=device) for model in scoring]
        _check_explainers(explainers.values(), opened, live)
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
            explainer = next((e for e in explainers.values() if e.digest == _digest(model)), None)
            page = None if live is None or explainer is None else _live(live, explainer)
            self.models[name] = Served(
                name=name, model=model, queue=queue, package=found, explainer=explainer, live=page
            )
        self.jobs = Jobs(
            device=device,
            precision=precision,
            max_waiting=settings.max_jobs,
            timeout=settings.job_timeout,
            count=lambda state: self.metrics.searches.labels(state).inc(),
        )

    @property
    def live(self) -> bool:
        """Whether a page of a result can search itself."""
        return any(served.live is not None for served in self.models.values())

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
        found = [one.searched for one in served if one.searched is not None]
        prepared = prepare([data], model=found, **values)  # type: ignore[arg-type]
        source = Source(path=name, read=lambda: data)
        prepared = dataclasses.replace(prepared, sources=(source,))
        for spec, request in prepared.models:
            images.decode(
                data, spec.frame, spec.input_size[0], name=name, max_pixels=self.settings.max_pixels
            )
            load(source, spec, box=request.box)  # the box lies within the photograph
        _check_size(prepared)
        live = served[0].live if len(prepared.models) == 1 else None
        if live is not None:
            live = dataclasses.replace(live, radii=prepared.models[0][1].eps)
        return Job(prepared, tuple(one.name for one in served), name, live)


def _digest(model: pipeline.Model) -> str:
    """Of the package, also of the one that a file was exported from."""
    return str(getattr(model.spec, "digest", model.spec.config["ratio"].get("digest")))


def _check_explainers(
    explainers: Iterable[Explainer], models: Sequence[pipeline.Model], live: str | None
) -> None:
    """Raises UsageError for a file of a model that is not served, and for `live` without a file."""
    digests, none = {_digest(model) for model in models}, True
    for explainer in explainers:
        none = False
        if explainer.digest not in digests:
            reason = f"searches counterfactuals of {explainer.name}, and that model is not served"
            step = "Name the package, or its exported file, as well: this file computes no scores."
            raise UsageError(str(explainer.path), reason, step)
    if live is not None and none:
        step = "Write one with `ratioctl export MODEL --explain`."
        raise UsageError("--live", "needs a file of `export --explain` among the models", step)


def _live(dist: str, explainer: Explainer) -> Live:
    if explainer.frame.height != explainer.frame.width or explainer.frame.pad:
        reason = f"{explainer.name} takes images of {explainer.frame} pixels, and the page cuts a square"
        raise UsageError("--live", reason, "Leave out --live.")
    return load_live(Path(dist), explainer.path, explainer.input_size, ())


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
