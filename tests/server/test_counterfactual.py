"""POST /v1/counterfactual: a job with progress, the result of `ratioctl counterfactual`, and its end."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl import counterfactuals
from ratioctl.cli import main
from ratioctl.errors import UsageError
from ratioctl.report import live
from ratioctl.server import jobs

StartServer = Callable[..., Any]
QUICK = {"target": "dog", "steps": 4}


def begin(server: Any, image: Path, **parameters: Any) -> str:
    answer = server.ask(
        "POST",
        "/v1/counterfactual",
        params={**QUICK, **parameters},
        files={"image": (image.name, image.read_bytes())},
    )
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/counterfactual/{answer.json()['id']}"
    return str(answer.json()["id"])


def events(server: Any, name: str) -> list[tuple[str, Any]]:
    answer = server.ask("GET", f"/v1/counterfactual/{name}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = re.findall(r"event: (\w+)\ndata: (.*)\n\n", answer.text)
    return [(kind, json.loads(data)) for kind, data in found]


def test_a_job_gives_what_the_command_writes(
    start: StartServer, small_package: Path, photographs: Path, tmp_path: Path
) -> None:
    image = photographs / "wide.png"
    line = ["counterfactual", str(image), "--model", str(small_package), "--target", "dog,red panda"]
    assert main([*line, "--steps", "4", "--quiet", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    expected = json.loads((tmp_path / "out" / "counterfactuals.json").read_text())
    expected["images"][0]["path"] = "wide.png"

    server = start(small_package)
    name = begin(server, image, target="dog,red panda")
    seen = events(server, name)
    assert seen[-1] == ("done", {})
    shares = [event["progress"] for kind, event in seen if kind == "progress"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    previews = [event for kind, event in seen if kind == "preview"]
    assert {event["target"] for event in previews} == {"dog", "red panda"}
    for event in previews:
        assert (event["model"], event["eps"] in (0.25, 0.5, 1.0)) == ("small", True)
        picture = Image.open(io.BytesIO(base64.b64decode(event["png"])))
        assert picture.size == (8, 8)
        assert 0 <= event["confidence"] <= 1

    found = server.ask("GET", f"/v1/counterfactual/{name}").json()
    assert (found["state"], found["progress"], found["error"]) == ("done", 1.0, None)
    assert found["result"] == expected
    names = [expected["images"][0]["input_png"], "wide/red panda/grid.png".replace(" ", "_")]
    for target in expected["images"][0]["targets"]:
        names += [budget["png"] for budget in target["budgets"]]
    for png in names:
        answer = server.ask("GET", f"/v1/counterfactual/{name}/pictures/{png}")
        assert answer.headers["content-type"] == "image/png"
        assert answer.content == (tmp_path / "out" / png).read_bytes()
    page = server.ask("GET", f"/v1/counterfactual/{name}/page").text
    assert '<meta name="generator" content="ratioctl">' in page
    assert str(tmp_path) not in page
    assert server.ask("GET", f"/v1/counterfactual/{name}/pictures/../../config.json").status_code == 404
    assert server.ask("DELETE", f"/v1/counterfactual/{name}").status_code == 204
    assert server.ask("GET", f"/v1/counterfactual/{name}").status_code == 404


def test_several_models_and_a_region_of_the_photograph(
    start: StartServer, small_package: Path, photographs: Path
) -> None:
    server = start(small_package, small_package)
    name = begin(
        server, photographs / "wide.png", model=["small", "small-2"], region="1,0,5,5", region_space="image"
    )
    assert events(server, name)[-1][0] == "done"
    result = server.ask("GET", f"/v1/counterfactual/{name}").json()["result"]
    assert len(result["images"]) == 2
    for entry in result["images"]:
        assert entry["targets"][0]["budgets"][-1]["distance"]["l2"] > 0
        pngs = [entry["input_png"], entry["targets"][0]["budgets"][-1]["png"]]
        before, after = (
            np.asarray(
                Image.open(io.BytesIO(server.ask("GET", f"/v1/counterfactual/{name}/pictures/{png}").content))
            )
            for png in pngs
        )
        assert (before[5:] == after[5:]).all()
        assert (before[:, 5:] == after[:, 5:]).all()


@pytest.fixture
def scoring(small_graph: bytes, tmp_path: Path) -> Path:
    """The exported file of the small package."""
    (tmp_path / "model.onnx").write_bytes(small_graph)
    return tmp_path / "model.onnx"


def test_a_file_that_searches_beside_the_one_that_scores(
    start: StartServer, scoring: Path, small_explain: Path, photographs: Path
) -> None:
    server = start(small_explain, scoring)
    (model,) = server.ask("GET", "/v1/model").json()["models"]
    assert (model["name"], model["backend"], model["explains"]) == ("small", "onnx", True)
    assert list(model["ladders"]) == ["2"]
    name = begin(server, photographs / "one.png")
    assert events(server, name)[-1] == ("done", {})
    found = server.ask("GET", f"/v1/counterfactual/{name}").json()["result"]
    (expected,) = ratioctl.counterfactual(photographs / "one.png", target="dog", model=small_explain, steps=4)
    budgets = found["images"][0]["targets"][0]["budgets"]
    assert [budget["confidence"] for budget in budgets] == pytest.approx(
        [budget.confidence for budget in expected.targets[0].budgets], abs=1e-6
    )
    page = server.ask("GET", f"/v1/counterfactual/{name}/page").text
    assert "live-model" not in page
    image = {"image": ("one.png", (photographs / "one.png").read_bytes())}
    for wrong, words in (({"norm": "inf"}, "was exported for the norm 2"), ({"region": "0,0,4,4"}, "region")):
        answer = server.ask("POST", "/v1/counterfactual", params={**QUICK, **wrong}, files=image)
        assert (answer.status_code, words in answer.text) == (400, True), answer.text
        assert str(small_explain.parent) not in answer.text


def test_a_search_in_a_file_is_cancelled(
    start: StartServer, scoring: Path, small_explain: Path, photographs: Path
) -> None:
    server = start(scoring, small_explain)
    name = begin(server, photographs / "one.png", steps=2000, eps="0.001..0.02:0.001")
    while server.ask("GET", f"/v1/counterfactual/{name}").json()["state"] == "queued":
        time.sleep(0.01)
    assert server.ask("DELETE", f"/v1/counterfactual/{name}").status_code == 204
    assert events(server, name)[-1] == ("cancelled", {})


def test_pages_of_results_search_with_live(
    start: StartServer, scoring: Path, small_explain: Path, photographs: Path, tmp_path: Path
) -> None:
    for file in live.FILES.values():
        (tmp_path / file).write_bytes(file.encode())
    server = start(scoring, small_explain, live=tmp_path)
    assert "worker-src blob:" in server.ask("GET", "/").headers["content-security-policy"]
    name = begin(server, photographs / "one.png", eps="0.25,0.75")
    assert events(server, name)[-1] == ("done", {})
    page = server.ask("GET", f"/v1/counterfactual/{name}/page").text
    (packed,) = re.findall(r'<script type="text/plain" id="live-model">([\w+/=]+)</script>', page)
    assert gzip.decompress(base64.b64decode(packed)) == small_explain.read_bytes()
    assert 'data-radii="[0.25, 0.75]"' in page


def test_files_that_search_need_their_model(
    start: StartServer, small_package: Path, scoring: Path, small_explain: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="searches counterfactuals of small, and that model is not served"):
        start(small_explain)
    with pytest.raises(UsageError, match="--live: needs a file of `export --explain`"):
        start(small_package, live=tmp_path)
    with pytest.raises(UsageError, match="has no ort"):
        start(scoring, small_explain, live=tmp_path)
    answer = start(scoring).ask("GET", "/v1/model").json()["models"][0]
    assert "a file of `export --explain` beside it" in answer["why_not"]


REFUSED = [
    ({"target": "dgo"}, 400, 'Did you mean "dog"?'),
    ({"eps": "-1"}, 400, "eps -1: -1 is not a positive"),
    ({"steps": 5000}, 400, "steps 5000: is more than 2000"),
    ({"restarts": 11}, 400, "restarts 11"),
    ({"eps": "0.01..1:0.01"}, 400, "eps 100: is more than 20"),
    ({"target": "all", "eps": "0.1..1:0.1", "restarts": 10}, 400, "searches"),
    ({"region": "/etc/passwd"}, 400, "region /etc/passwd: is not X,Y,W,H"),
    ({"region": "0,0,9,9"}, 400, "not a box within the model's 8x8 input"),
    ({"region": "0,0,99,9", "region_space": "image"}, 422, "not a box within its 8x8 pixels"),
    ({"norm": "7"}, 400, "norm 7: is unknown"),
    ({"until": "2"}, 422, "until 2: must be below 1"),
    ({"model": "other"}, 404, "Use one of: small"),
]


def test_requests_that_are_refused_at_once(
    start: StartServer, small_package: Path, photographs: Path
) -> None:
    server, image = start(small_package), (photographs / "one.png").read_bytes()
    for parameters, status, message in REFUSED:
        answer = server.ask("POST", "/v1/counterfactual", params={**QUICK, **parameters}, content=image)
        assert answer.status_code == status, answer.text
        assert message in answer.json()["error"]["message"]


def test_an_image_that_cannot_be_read_is_no_job(start: StartServer, small_package: Path) -> None:
    server = start(small_package)
    answer = server.ask("POST", "/v1/counterfactual", params=QUICK, content=b"no image")
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith("image-0: is text, not an image.")
    assert server.service.jobs.known == {}


class Slow:
    """Replaces the search: it goes on in small steps until it is cancelled or let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.free = threading.Event(), threading.Event()
        search = counterfactuals.explain

        def slow(prepared: Any, **options: Any) -> Any:
            self.begun.set()
            while not self.free.wait(0.01):
                options["callback"](0.5)
            return search(prepared, **options)

        monkeypatch.setattr(counterfactuals, "explain", slow)


def test_cancel_a_running_search_and_a_waiting_one(
    start: StartServer, small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, server = Slow(monkeypatch), start(small_package, max_jobs=1)
    running = begin(server, photographs / "one.png")
    assert slow.begun.wait(30)
    waiting = begin(server, photographs / "two.png")
    full = server.ask(
        "POST", "/v1/counterfactual", params=QUICK, content=(photographs / "one.png").read_bytes()
    )
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert server.ask("GET", f"/v1/counterfactual/{waiting}").json()["state"] == "queued"
    assert server.ask("GET", f"/v1/counterfactual/{running}/page").status_code == 409
    for name in (waiting, running):
        assert server.ask("DELETE", f"/v1/counterfactual/{name}").status_code == 204
        assert events(server, name)[-1] == ("cancelled", {})
    slow.free.set()
    third = begin(server, photographs / "one.png")
    assert events(server, third)[-1] == ("done", {})
    text = server.ask("GET", "/metrics").text
    assert 'ratioctl_searches_total{state="cancelled"} 2.0' in text


def test_a_search_ends_when_nobody_watches_it_any_more(
    start: StartServer, small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, server = Slow(monkeypatch), start(small_package)
    monkeypatch.setattr(jobs, "LEFT", 0.0)
    name = begin(server, photographs / "one.png")
    assert slow.begun.wait(30)
    job = server.service.jobs.find(name)

    async def leave() -> None:
        watching = job.events()
        assert "progress" in await anext(watching)
        assert not job.unwatched()
        await watching.aclose()

    asyncio.run(leave())
    job.deadline = 0.0  # the minute of the request is over
    until(lambda: job.state == "cancelled")


def test_a_search_that_takes_too_long_or_fails_says_so(
    start: StartServer, small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow(monkeypatch)
    server = start(small_package, job_timeout=0.1)
    kind, data = events(server, begin(server, photographs / "one.png"))[-1]
    assert (kind, data["error"]["reason"]) == ("failed", "took longer than 0.1 s and was ended")

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError(f"broken in {photographs}")

    monkeypatch.setattr(counterfactuals, "explain", broken)
    kind, data = events(server, begin(server, photographs / "one.png"))[-1]
    assert (kind, data["error"]["thing"]) == ("failed", "internal error")
    assert str(photographs) not in json.dumps(data)


def test_a_server_that_stops_waits_for_searches_and_for_their_results(
    start: StartServer, small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, server = Slow(monkeypatch), start(small_package)
    queue = server.service.jobs
    assert queue.idle
    name = begin(server, photographs / "one.png")
    assert not queue.idle
    slow.free.set()
    assert events(server, name)[-1] == ("done", {})
    until(lambda: queue.running is None)
    assert not queue.idle, "the result has not been fetched"
    server.ask("GET", f"/v1/counterfactual/{name}")
    assert queue.idle


def test_results_are_kept_for_a_while(
    start: StartServer, small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "KEPT", 2)
    server = start(small_package)
    names = []
    for _ in range(3):
        names.append(begin(server, photographs / "one.png", eps="0.25", steps=1))
        events(server, names[-1])
    statuses = [server.ask("GET", f"/v1/counterfactual/{name}").status_code for name in names]
    assert statuses == [404, 200, 200]


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")
