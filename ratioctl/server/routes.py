"""The API for programs and the files of the page."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from ratioctl import images
from ratioctl._version import __version__
from ratioctl.errors import ImageError, RatioctlError, UsageError
from ratioctl.report.html import TEMPLATES
from ratioctl.server import schemas
from ratioctl.server.jobs import MAX_WATCHERS
from ratioctl.server.problems import HttpError, answer, document, too_many
from ratioctl.server.service import DEFAULT_THRESHOLD, Service
from ratioctl.server.uploads import uploads
from ratioctl.utils.suggest import did_you_mean
from ratioctl.utils.text import reason_of

STATIC = Path(__file__).parent / "static"
FILES = {
    "": (STATIC / "index.html", "text/html"),
    "app.css": (STATIC / "app.css", "text/css"),
    "app.js": (STATIC / "app.js", "text/javascript"),
    "explorer.css": (TEMPLATES / "explorer.css", "text/css"),
}
BOX = r"^\d{1,6}(,\d{1,6}){3}$"
BINARY = {"type": "string", "format": "binary"}
ModelName = Annotated[str | None, Query(alias="model", description="Default: the first model.")]
REASONS = {
    400: "Impossible values, or a damaged body.",
    401: "The token is missing or wrong.",
    403: "Another site, or another host name than the server's.",
    404: "Not found.",
    408: "The request took too long to arrive.",
    409: "The search has no result (yet).",
    413: "The body is too large, or holds too many images.",
    422: "The image cannot be read, or a parameter cannot.",
    429: "The server is busy.",
    500: "The server failed.",
    501: "This server cannot search counterfactuals of the model.",
    503: "The server is stopping, or took too long.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route."""
    common = (400, 401, 403, 408, 413, 422, 429, 500, 503)
    return {
        status: {"model": schemas.ProblemAnswer, "description": REASONS[status]}
        for status in sorted({*common, *statuses})
    }


def body(image: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes images; `image`: schema of that part of a multipart body."""
    parts = {"type": "object", "required": ["image"], "properties": {"image": image}}
    content = {"application/octet-stream": {"schema": BINARY}, "multipart/form-data": {"schema": parts}}
    return {"requestBody": {"required": True, "content": content}}


def refusal(request: Request, error: Exception) -> Response:
    """Any exception as an answer."""
    status, said, headers = answer(error)
    if status == 500:
        logging.getLogger(__name__).error("%s failed", request.url.path, exc_info=error)
    return JSONResponse(said, status, headers)


def build(service: Service) -> FastAPI:
    """The application, without the guard around it."""
    app = FastAPI(
        title="ratioctl serve",
        version=__version__,
        description="Scores of images and counterfactual explanations.",
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        dependencies=[Depends(_known_parameters)],
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in (RatioctlError, Exception):
        app.add_exception_handler(kind, refusal)
    for add in (_scores, _searches, _results, _state, _page):
        add(app, service)
    if service.settings.token is not None:
        _require_token(app)
    return app


async def _known_parameters(request: Request) -> None:  # a plain function would cost a thread per request
    """Refuse parameters that a route of the API does not have: a misspelled one would change nothing."""
    route = request.app.openapi()["paths"].get(request.scope["route"].path)
    if route is None:  # of the page
        return
    stated = route[request.method.lower()].get("parameters", [])
    known = [parameter["name"] for parameter in stated if parameter["in"] == "query"]
    for name in request.query_params:
        if name not in known:
            step = did_you_mean(name, known) or "See /openapi.json."
            raise HttpError(422, name[:80], "is not a parameter of this request", step)


def _invalid(request: Request, error: Exception) -> Response:
    finding = error.errors()[0]  # type: ignore[attr-defined]
    name = str(finding["loc"][-1])
    given = finding.get("input")
    thing = name if given is None or isinstance(given, dict | list) else f"{name} {str(given)[:80]}"
    reason = "is missing" if finding["type"] == "missing" else reason_of(finding)
    return refusal(request, HttpError(422, thing, reason, "See /openapi.json."))


def _http(request: Request, error: Exception) -> Response:
    status = error.status_code  # type: ignore[attr-defined]
    headers = getattr(error, "headers", None)
    reason = {404: "there is nothing here", 405: "does not take this method"}.get(status, "is refused")
    return refusal(request, HttpError(status, request.url.path, reason, "See /openapi.json.", headers))


def _scores(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/score",
        response_model=schemas.ScoreAnswer,
        responses=problems(404),
        openapi_extra=body({"type": "array", "items": BINARY, "minItems": 1}),
    )
    async def score(
        request: Request,
        name: ModelName = None,
        threshold: Annotated[
            str, Query(max_length=64, description="A stored name such as tpr95, or a number.")
        ] = DEFAULT_THRESHOLD,
        probabilities: Annotated[bool, Query(description="Add one key p:<class> per class.")] = False,
    ) -> Response:
        """Score one or many images: the rows of `ratioctl ood-score`.

        The body is an image, or multipart/form-data with one or several. An image that cannot be read is a
        row with `error`; the status is 422 where none can.
        """
        served = service.find(name)
        files = await uploads(request, service.settings.max_images)
        bound, future = service.score(served, files, threshold)
        rows = await asyncio.wrap_future(future)
        service.counted(served, rows)
        labels = served.model.spec.label_names if probabilities else None
        found: dict[str, Any] = {"rows": [row.to_json(labels) for row in rows]}
        if all(row.error is not None for row in rows):
            first = ImageError(rows[0].path, str(rows[0].error), f"Images may be {images.FORMATS}.")
            return JSONResponse({"error": document(first), **found}, 422)
        return _json({"model": served.name, "threshold": bound, **found})


def _json(value: Any) -> Response:
    """Without the checks of JSONResponse, which cost as much as the rest of a small answer."""
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")


def _searches(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/counterfactual",
        status_code=202,
        response_model=schemas.JobAnswer,
        responses=problems(404, 501),
        openapi_extra=body(BINARY),
    )
    async def counterfactual(
        request: Request,
        target: Annotated[
            str, Query(max_length=1000, description="Classes, comma-separated, or predicted, second or all.")
        ],
        models: Annotated[
            list[str], Query(alias="model", max_length=8, description="Repeat it to compare models.")
        ] = [],  # noqa: B006
        eps: Annotated[str | None, Query(max_length=200, description="2, or 0.5,1,2, or 0.5..3")] = None,
        norm: Annotated[str, Query(max_length=8, description="2, 1.5, 1 or inf")] = "2",
        steps: Annotated[int, Query(ge=1)] = 500,
        restarts: Annotated[int, Query(ge=1)] = 1,
        seed: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
        until: Annotated[float | None, Query(gt=0, lt=1)] = None,
        region: Annotated[
            str | None, Query(json_schema_extra={"pattern": BOX}, description="X,Y,W,H")
        ] = None,
        region_space: Annotated[
            Literal["input", "image"],
            Query(description="What the region counts: pixels of the model's input, or of the photograph."),
        ] = "input",
    ) -> Response:
        """Begin a search for counterfactuals of one image. The answer's id names it in the routes below.

        Parameters are those of `ratioctl counterfactual`. A search about which nobody asks for a minute, or
        whose last stream of events was closed, is cancelled.
        """
        files = await uploads(request, service.settings.max_images)
        if len(files) > 1:
            raise HttpError(400, "the request", f"holds {len(files)} images", "Explain one at a time.")
        values: dict[str, Any] = {
            "target": target,
            "eps": eps,
            "norm": norm,
            "steps": steps,
            "restarts": restarts,
        }
        values |= {"seed": seed, "until": until, "region_space": region_space}
        values["region"] = None if region is None else _box(region)
        job = await run_in_threadpool(service.prepare, files[0], models, values)
        service.jobs.submit(job)
        return JSONResponse(job.to_json(), 202, {"Location": f"/v1/counterfactual/{job.id}"})


def _box(region: str) -> list[int]:
    """X,Y,W,H. The command line also takes the name of a mask image, which would be a file of the server."""
    if re.fullmatch(BOX, region) is None:
        raise UsageError(f"region {region[:80]}", "is not X,Y,W,H", "Give four whole numbers: 4,4,16,16.")
    return [int(part) for part in region.split(",")]


def _results(app: FastAPI, service: Service) -> None:
    @app.get("/v1/counterfactual/{id}", response_model=schemas.JobAnswer, responses=problems(404))
    async def search(id: str) -> Response:
        """State, progress, and the result where there is one."""
        job = service.jobs.find(id)
        job.fetched = job.fetched or job.final
        return _json(job.to_json())

    @app.get(
        "/v1/counterfactual/{id}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}, **problems(404)},
    )
    async def events(id: str) -> Response:
        """Server-sent events: "progress", "preview" with a picture, and "done", "failed" or "cancelled"."""
        job = service.jobs.find(id)
        if len(job.watchers) >= MAX_WATCHERS:
            raise too_many("counterfactual", f"is followed by {MAX_WATCHERS} streams already")
        return StreamingResponse(job.events(), media_type="text/event-stream")

    @app.get(
        "/v1/counterfactual/{id}/page",
        response_class=Response,
        responses={200: {"content": {"text/html": {}}}, **problems(404, 409)},
    )
    async def page(id: str) -> Response:
        """The result as one self-contained HTML file: the page of `ratioctl counterfactual`."""
        return HTMLResponse(_rendered(service, id).page)

    @app.get(
        "/v1/counterfactual/{id}/pictures/{name:path}",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}}, **problems(404, 409)},
    )
    async def picture(id: str, name: str) -> Response:
        """A picture of the result by the name that its `png` keys state, or grid.png beside them."""
        found = _rendered(service, id).pictures.get(name)
        if found is None:
            raise HttpError(404, "picture", "there is none of this name", "See the keys png of the result.")
        return Response(found, media_type="image/png")

    @app.delete("/v1/counterfactual/{id}", status_code=204, responses=problems(404))
    async def cancel(id: str) -> Response:
        """Cancel the search, or forget its result."""
        service.jobs.cancel(service.jobs.find(id))
        return Response(status_code=204)


def _rendered(service: Service, id: str) -> Any:
    job = service.jobs.find(id)
    if job.rendered is None:
        raise HttpError(409, "counterfactual", f"has no result: it is {job.state}", "Follow its events.")
    job.fetched = True
    return job.rendered


def _state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/model", response_model=schemas.ModelAnswer, responses=problems())
    async def model() -> Response:
        """The models, their classes, thresholds and budgets, and the limits of requests."""
        return _json(service.to_json())

    @app.get("/health/live", response_model=schemas.Health, responses=problems())
    async def live() -> Response:
        """Whether the process answers."""
        return _json({"status": "stopping" if service.draining else "ok"})

    ready: dict[int | str, dict[str, Any]] = {
        503: {"model": schemas.Health, "description": "The server is stopping."}
    }

    @app.get("/health/ready", response_model=schemas.Health, responses={**problems(), **ready})
    async def health() -> Response:
        """Whether new requests are accepted."""
        if service.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return _json({"status": "ok"})

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}, **problems()},
    )
    async def metrics() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _page(app: FastAPI, service: Service) -> None:
    def add(name: str, path: Path, kind: str) -> None:
        content = path.read_bytes()

        async def file() -> Response:
            return Response(content, media_type=f"{kind}; charset=utf-8")

        app.add_api_route(f"/{name}", file, include_in_schema=False)

    for name, (path, kind) in FILES.items():
        add(name, path, kind)


def _require_token(app: FastAPI) -> None:
    """State in the OpenAPI document that the API needs a token; the guard checks it."""
    make: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        made = make()
        made["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"token": []}]
        return made

    app.openapi = openapi  # type: ignore[method-assign]
