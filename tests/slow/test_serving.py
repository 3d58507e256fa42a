"""The services of the serving guide, run as they are printed there, give the numbers of `ood-score`."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ratioctl
from ratioctl.cli import main
from ratioctl.types import ScoreRow
from ratioctl.utils import resources

pytestmark = pytest.mark.slow

SERVING = (Path(__file__).parents[2] / "docs" / "guides" / "serving.md").read_text(encoding="utf-8")


def block(language: str, having: str) -> str:
    """The one block of the guide that contains `having`."""
    found = [text for text in re.findall(rf"```{language}\n(.*?)```", SERVING, re.DOTALL) if having in text]
    assert len(found) == 1, f"{having} is in {len(found)} {language} blocks of the guide"
    return found[0]


def lines_of(code: str) -> int:
    return sum(1 for line in code.splitlines() if line.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the guide's first command has been run."""
    command = re.search(r"```sh\nratioctl (export cifar10-ratio .*)\n```", SERVING)
    assert command is not None
    place = tmp_path_factory.mktemp("serving")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(command[1].split()) == 0
    assert (place / "model.onnx").is_file()
    return place


@pytest.fixture(scope="module")
def expected() -> list[ScoreRow]:
    samples = resources.folder("assets") / "samples"
    return list(ratioctl.ood_score([samples], model="cifar10-ratio"))


def test_the_python_service(folder: Path, expected: list[ScoreRow]) -> None:
    code = block("python", "serve_forever")
    assert lines_of(code) <= 14
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "8000" in code
    program = f"import sys\nsys.modules['torch'] = None\n{code.replace('8000', str(port))}"
    child = subprocess.Popen([sys.executable, "-c", program], cwd=folder, stderr=subprocess.DEVNULL)

    def ask(body: bytes | None) -> tuple[int, Any]:
        for _ in range(300):
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}", data=body)
                with urllib.request.urlopen(request, timeout=60) as response:
                    return response.status, json.load(response)
            except urllib.error.HTTPError as refused:
                with refused:
                    return refused.code, json.load(refused)
            except urllib.error.URLError:
                assert child.poll() is None, "the service ended"
                time.sleep(0.2)  # it starts
        raise AssertionError("no answer")

    picture = Path(expected[0].path).read_bytes()
    try:
        for body, says in (
            (b"no image", "is text, not an image"),
            (picture[:100], "cut short"),
            (b"", "is empty"),
            (None, "is empty"),  # a GET
        ):
            status, answer = ask(body)
            assert status == 422
            assert says in answer["error"]
        for row in expected:
            status, answer = ask(Path(row.path).read_bytes())
            assert status == 200
            assert answer[0] == row.label
            assert answer[1] == pytest.approx(row.confidence, abs=1e-4)
            assert answer[2] is row.is_ood
    finally:
        child.kill()
        child.wait()


def test_the_node_service(folder: Path, expected: list[ScoreRow], npm_install: Callable[..., None]) -> None:
    code = block("js", "onnxruntime-node")
    assert lines_of(code) <= 10
    wanted = re.search(r"`npm install --ignore-scripts (onnxruntime-node [^`]*)`", SERVING)
    assert wanted is not None
    npm_install(folder, *wanted[1].split())
    (folder / "service.js").write_text(code)
    # Other decoders and resizers than ours: near on photographs, the same on an image of the model's size.
    known = [row for row in expected if not row.is_ood]  # what is not known has no label to speak of
    for row in known[:4]:
        label, confidence, _ = node(folder, row.path)
        assert label == ratioctl.load_model().config["label_names"].index(row.label)  # type: ignore[index]
        assert confidence == pytest.approx(row.confidence, abs=0.1)
    from PIL import Image

    from ratioctl import images

    small = folder / "small.png"
    Image.fromarray(images.decode(expected[0].path, 32).pixels).save(small)
    (exact,) = ratioctl.ood_score([small], model=folder / "model.onnx")
    label, confidence, is_ood = node(folder, str(small))
    assert label == ratioctl.load_model().config["label_names"].index(exact.label)  # type: ignore[index]
    assert confidence == pytest.approx(exact.confidence, abs=1e-4)
    assert is_ood is exact.is_ood
    # Transparency and orientation as `ood-score` takes them: each changes the answer if it is overlooked.
    sure = max(expected, key=lambda row: row.confidence or 0)
    picture = Image.fromarray(images.decode(sure.path, 32).pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(folder / "turned.jpg", quality=100, subsampling=0, exif=turned)
    hole = Image.new("L", picture.size, 255)
    hole.paste(0, (0, 0, 32, 12))
    picture.putalpha(hole)
    picture.save(folder / "hole.png")
    for name in ("hole.png", "turned.jpg"):
        (row,) = ratioctl.ood_score([folder / name], model=folder / "model.onnx")
        assert row.confidence != pytest.approx(sure.confidence, abs=0.05)
        assert node(folder, str(folder / name))[1] == pytest.approx(row.confidence, abs=0.01)


def node(folder: Path, image: str) -> tuple[int, float, bool]:
    line = ["node", "service.js", str(Path(image).resolve())]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    label, confidence, is_ood = done.stdout.split()
    return int(label), float(confidence), {"true": True, "false": False}[is_ood]


def test_tritons_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, serve = block("sh", "tritonserver").splitlines()
    monkeypatch.chdir(folder)
    assert main(export.split()[1:]) == 0
    repository = folder / serve.partition("--model-repository=")[2]
    found = sorted(str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file())
    assert found == [f"cifar10-ratio/{name}" for name in ("1/model.onnx", "config.pbtxt", "labels.txt")]
