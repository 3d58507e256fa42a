"""Counters for `/metrics`, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """The metrics of one server; labels hold routes and names of models, nothing that a client chooses."""

    def __init__(self, waiting: Callable[[], int], jobs: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        disable_created_metrics()
        ProcessCollector(registry=self.registry)
        shared: Any = {"registry": self.registry, "namespace": "ratioctl"}
        self.requests = Counter("requests", "Answered requests.", ("route", "status"), **shared)
        self.seconds = Histogram(
            "request_seconds", "Time to the end of an answer.", ("route",), buckets=_SECONDS, **shared
        )
        self.images = Counter("images", "Scored images.", ("model", "result"), **shared)
        self.batches = Histogram("batch_images", "Images of a batch.", buckets=(1, 2, 4, 8, 16, 32), **shared)
        self.searches = Counter("searches", "Ended counterfactual searches.", ("state",), **shared)
        Gauge("waiting_images", "Images that wait to be scored.", **shared).set_function(waiting)
        Gauge("waiting_searches", "Searches that wait or run.", **shared).set_function(jobs)

    def text(self) -> bytes:
        return generate_latest(self.registry)
