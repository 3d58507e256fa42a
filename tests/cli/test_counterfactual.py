"""`ratioctl counterfactual` as people and scripts use it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ratioctl.cli import main

QUICK = ("--eps", "0.5,1.5", "--steps", "6")


def run(*line: str | Path) -> int:
    return main(["counterfactual", *map(str, line)])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)) / 255.0


def test_the_contract(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ratioctl import load_model, package

    out = tmp_path / "out"
    (photographs / "broken.png").write_bytes(b"")
    line = [photographs, "--model", small_package, "--target", "DOG,red panda", "--out", out, *QUICK]
    assert run(*line, "--json") == 3
    captured = capsys.readouterr()
    document = json.loads((out / "counterfactuals.json").read_text())
    assert json.loads(captured.out) == document
    spec = package.read(small_package)
    assert {key: value for key, value in document.items() if key not in ("images", "errors")} == {
        "schema": "ratioctl/counterfactuals/1",
        "norm": "2",
        "steps": 6,
        "restarts": 1,
        "seed": 0,
        "models": [
            {
                "name": "small",
                "digest": spec.digest,
                "temperature": spec.temperature,
                "threshold": 0.5,
                "labels": list(spec.label_names),
            }
        ],
    }
    assert document["errors"] == [{"path": f"{photographs}/broken.png", "error": "is empty (0 bytes)"}]
    assert "wide.png: cut to the center square" in captured.err
    assert "one.png:" not in captured.err
    names = [image["path"] for image in document["images"]]
    assert names == [f"{photographs}/{name}.png" for name in ("one", "two", "wide")]
    assert (out / "one" / "red_panda" / "grid.png").is_file()
    predict = load_model(small_package)

    def score(path: Path) -> np.ndarray:
        import torch

        x = torch.from_numpy(pixels(path)).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            return (predict(x)[0].double() / spec.temperature).softmax(0).numpy()

    for image in document["images"]:
        before = pixels(out / image["input_png"])
        original = score(out / image["input_png"])
        assert image["original"]["probabilities"] == pytest.approx(list(original), abs=1e-4)
        assert image["original"]["confidence"] == max(image["original"]["probabilities"])
        assert image["original"]["is_ood"] == (image["original"]["confidence"] < 0.5)
        for target, k in zip(image["targets"], (1, 2), strict=True):
            assert target["target"] == spec.label_names[k]
            last = image["original"]["probabilities"][k]
            for budget, eps in zip(target["budgets"], (0.5, 1.5), strict=True):
                assert budget["eps"] == eps
                assert budget["png"].endswith(f"/eps-{eps:g}.png")
                saved = pixels(out / budget["png"])
                assert np.linalg.norm(saved - before) <= eps
                assert budget["distance"]["l2"] == pytest.approx(np.linalg.norm(saved - before), abs=1e-9)
                assert budget["probabilities"] == pytest.approx(list(score(out / budget["png"])), abs=1e-4)
                assert budget["confidence"] == budget["probabilities"][k] >= last
                last = budget["confidence"]
            flips = [b for b in target["budgets"] if b["predicted"] == target["target"]]
            if image["original"]["label"] == target["target"]:
                assert target["flip_eps"] == 0
            elif not flips:
                assert target["flip_eps"] is target["flip_png"] is None
            else:
                flip = pixels(out / target["flip_png"])
                assert target["flip_eps"] == pytest.approx(np.linalg.norm(flip - before), abs=1e-9)
                assert target["flip_eps"] <= flips[0]["eps"]
                assert score(out / target["flip_png"]).argmax() == k


def test_twice_the_same(small_package: Path, photographs: Path, tmp_path: Path) -> None:
    image = photographs / "one.png"
    for out in ("a", "b"):
        assert (
            run(image, "--model", small_package, "--target", "second", "--out", tmp_path / out, *QUICK) == 0
        )
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_people_get_a_table_and_are_shown_where_to_look(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        photographs / "one.png",
        "--model",
        small_package,
        "--target",
        "dog",
        "--out",
        tmp_path / "o",
        *QUICK,
    ]
    assert run(*line, "--format", "gif") == 0
    captured = capsys.readouterr()
    assert "flip radius" in captured.out
    assert str(photographs / "one.png") in captured.out
    assert captured.err == f"Pictures, page and numbers: {tmp_path}/o/index.html\n"
    assert (tmp_path / "o" / "one" / "dog" / "animation.gif").is_file()
    assert run(*line, "-q") == 0
    captured = capsys.readouterr()
    assert "flip radius" in captured.out, "the result stays on stdout"
    assert captured.err == ""
    assert not (tmp_path / "o" / "one" / "dog" / "animation.gif").exists()  # a file of the earlier answer


def in_a_terminal(line: list[str], answer: bytes = b"", columns: int = 80, **environment: str) -> str:
    """What a process prints on a pseudo-terminal that answers the question for its attributes so."""
    import fcntl
    import os
    import pty
    import struct
    import termios

    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    quiet = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    environment = {**quiet, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
    process = subprocess.Popen(
        line, stdin=terminal, stdout=terminal, stderr=subprocess.STDOUT, env=environment, close_fds=True,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
        if answer and b"\x1b[c" in part:
            os.write(main_end, answer)
    os.close(main_end)
    assert process.wait() == 0, seen
    return seen.decode()


PREVIEW = """
import sys
import numpy as np
from rich.console import Console
from ratioctl.report import terminal
from ratioctl.types import Counterfactual, Explanation, Original, Target
grey, red = np.full((8, 8, 3), 128, np.uint8), np.full((8, 8, 3), (200, 10, 20), np.uint8)
budgets = tuple(
    Counterfactual(eps=eps, image=red, confidence=0.7, confidence_float=0.7, predicted="dog",
           probabilities=(0.3, 0.7), distance={"l2": eps})
    for eps in (1, 2, 3, 4, 5, 6)
)
target = Target(target="dog", budgets=budgets, flip_eps=1.0, flip_image=red)
original = Original(label="cat", confidence=0.9, probabilities=(0.9, 0.1), is_ood=True)
explanation = Explanation(path="a.png", sha256="", model=0, input=grey, original=original, targets=(target,))
terminal.preview(Console(highlight=False), explanation, target, labels=["cat", "dog"], norm="2")
"""


def test_a_preview_in_half_blocks_sixels_or_not_at_all() -> None:
    line = [sys.executable, "-c", PREVIEW]
    shown = in_a_terminal(line)
    assert "Traceback" not in shown
    assert "a.png, predicted cat (out of distribution); towards dog" in shown
    assert "▀" in shown
    assert "38;2;128;128;128" in shown
    assert "38;2;200;10;20" in shown
    assert shown.index("original") < shown.index("≤ 1") < shown.index("≤ 6")
    assert "0.10" in shown
    assert shown.count("0.70 *") == 3  # as many budgets as fit
    assert in_a_terminal(line, columns=200).count("0.70 *") == 6
    sixels = in_a_terminal(line, answer=b"\x1b[?62;4c")
    assert "\x1bPq" in sixels or "\x1bP0" in sixels
    assert "▀" not in sixels
    assert "▀" not in in_a_terminal(line, TERM="dumb")
    assert subprocess.run(line, capture_output=True, text=True, check=True).stdout == ""


def test_a_terminal_shows_the_preview_before_the_table_and_open_the_page_in_the_browser(
    small_package: Path, photographs: Path, tmp_path: Path
) -> None:
    """A browser of our own, as a user would name one: in BROWSER."""
    browser, opened, out = tmp_path / "browser", tmp_path / "opened", tmp_path / "an swer"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}\n')
    browser.chmod(0o755)
    line = [sys.executable, "-m", "ratioctl", "counterfactual", str(photographs / "one.png"), "--open"]
    line += ["--model", str(small_package), "--target", "dog", "--out", str(out)]
    line += ["--eps", "0.5", "--steps", "1", "--device", "cpu"]
    shown = in_a_terminal(line, columns=120, BROWSER=f"{browser} %s")
    assert 0 < shown.index("▀") < shown.index("radius")
    assert "Traceback" not in shown
    assert opened.read_text() == (out / "index.html").resolve().as_uri()


@pytest.mark.parametrize("norm", ["1", "1.5", "2", "inf"])
def test_saved_pictures_change_inside_the_region_alone(
    small_package: Path, photographs: Path, tmp_path: Path, norm: str
) -> None:
    out = tmp_path / "out"
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 1:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    image = photographs / "one.png"
    line = [image, "--model", small_package, "--target", "dog", "--norm", norm, "--steps", "4"]
    assert run(*line, "--region", tmp_path / "mask.png", "--out", out, "-q") == 0
    assert run(*line, "--region", "1,2,3,4", "--out", tmp_path / "box", "-q") == 0
    saved = sorted(path for path in out.rglob("*.png") if path.name.startswith(("eps-", "flip")))
    assert len(saved) >= 3
    for path in saved:
        changed = (pixels(path) != pixels(path.parent.parent / "input.png")).any(2)
        assert not changed[mask == 0].any()
        assert path.read_bytes() == (tmp_path / "box" / path.relative_to(out)).read_bytes()
    assert any((pixels(path) != pixels(path.parent.parent / "input.png")).any() for path in saved)


def test_several_norms_stand_side_by_side(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [photographs / "one.png", "--model", small_package, "--target", "dog", "--steps", "2"]
    assert run(*line, "--norm", "2", "--norm", "1.5", "--out", tmp_path / "o") == 0
    shown = capsys.readouterr().out
    assert "(l₂; *" in shown
    assert "(l₁.₅; *" in shown
    document = json.loads((tmp_path / "o" / "counterfactuals.json").read_text())
    assert [(image["model"], image["norm"]) for image in document["images"]] == [(0, "2"), (0, "1.5")]
    assert [image["input_png"] for image in document["images"]] == ["one/input.png", "one-2/input.png"]
    assert run(*line, "--norm", "2", "--norm", "1", "--eps", "1") == 2
    assert "each norm has its own ladder" in capsys.readouterr().err


def test_an_animation_is_a_loop_from_the_original_to_the_largest_budget_and_back(
    small_package: Path, photographs: Path, tmp_path: Path
) -> None:
    line = [photographs / "one.png", "--model", small_package, "--target", "dog", "--steps", "2", "-q"]
    for kind in ("gif", "webp"):
        out = tmp_path / kind
        assert run(*line, "--format", kind, "--out", out) == 0
        with Image.open(out / "one" / "dog" / f"animation.{kind}") as film:
            assert film.n_frames == 6  # original, three budgets, and back  # type: ignore[attr-defined]
            assert film.info["loop"] == 0
            times = []
            for frame in range(6):
                film.seek(frame)
                film.load()
                times.append(film.info["duration"])
                if frame == 0:
                    first = np.asarray(film.convert("RGB"), dtype=int)
            assert times[0] > times[1]
            assert times[3] > times[2]
        original = np.asarray(Image.open(out / "one" / "input.png"), dtype=int)
        assert np.abs(first[:256].reshape(8, 32, 8, 32, 3)[:, 16, :, 16] - original).mean() < 6


def test_several_models_side_by_side(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_package, other)
    line = [photographs / "one.png", "--model", small_package, "--model", other, "--target", "dog"]
    assert run(*line, "--out", tmp_path / "o", *QUICK, "--json", "-q") == 0
    document = json.loads(capsys.readouterr().out)
    assert [image["model"] for image in document["images"]] == [0, 1]
    assert [image["input_png"] for image in document["images"]] == ["one/input.png", "one-2/input.png"]
    assert len(document["models"]) == 2
    assert document["images"][0]["targets"][0]["budgets"][1]["probabilities"] == pytest.approx(
        document["images"][1]["targets"][0]["budgets"][1]["probabilities"]
    )


def test_only_unreadable(small_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "text.png"
    image.write_text("not a picture")
    assert run(image, "--model", small_package, "--target", "dog", "--out", tmp_path / "o", "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert document["images"] == []
    assert [error["path"] for error in document["errors"]] == [str(image)]
    assert json.loads((tmp_path / "o" / "counterfactuals.json").read_text()) == document


def test_only_unreadable_over_earlier_answers(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stay, and it says so."""
    image, out = tmp_path / "text.png", tmp_path / "o"
    image.write_text("not a picture")
    line = ("--model", small_package, "--target", "dog", "--out", out, *QUICK)
    assert run(photographs, *line) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(image, *line) == 3
    assert f"the earlier results in {out} are unchanged" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"--target": "dgo"}, 2, ['Did you mean "dog"?', "cat, dog, red panda, air/plane"]),
        ({"--eps": "0"}, 2, ["--eps 0", "positive"]),
        ({"--eps": "-1"}, 2, ["--eps -1", "positive"]),
        ({"--eps": "3..0.5"}, 2, ["--eps 3..0.5", "does not increase"]),
        ({"--eps": "nan"}, 2, ["nan"]),
        ({"--norm": "3"}, 2, ["--norm"]),
        ({"--steps": "0"}, 2, ["--steps"]),
        ({"--until": "2"}, 2, ["--until 2"]),
        ({"--region": "0,0,99,1"}, 2, ["--region", "8x8"]),
        ({"--model": "cifar10-ration"}, 5, ["cifar10-ration", "no such package"]),
        ({"image": "nowhere.png"}, 2, ["nowhere.png", "does not exist"]),
        ({"image": "."}, 2, ["holds no images"]),
        ({"--device": "abacus"}, 2, ["abacus"]),
    ],
)
def test_wrong_usage_is_answered_before_any_work(
    small_package: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    code: int,
    words: list[str],
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    options: dict[str, Any] = {"image": photographs / "one.png", "--model": small_package, "--target": "dog"}
    options |= change
    image = options.pop("image")
    assert run(image, *(str(part) for pair in options.items() for part in pair)) == code
    captured = capsys.readouterr()
    for word in words:
        assert word in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(empty.iterdir()) == []


def test_an_unknown_class_needs_no_torch(small_package: Path, photographs: Path) -> None:
    line = ["counterfactual", str(photographs), "--model", str(small_package), "--target", "dgo"]
    code = f"import sys; sys.modules['torch'] = None\nfrom ratioctl.cli import main\nsys.exit(main({line!r}))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert 'Did you mean "dog"?' in ended.stderr


def test_an_output_that_cannot_be_written(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    line = [photographs / "one.png", "--model", small_package, "--target", "dog"]
    assert run(*line, "--out", tmp_path / "file" / "out") == 2
    assert run(*line, "--out", tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_damaged_package(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_package, broken)
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run(photographs, "--model", broken, "--target", "dog", "--out", tmp_path / "o") == 5
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_an_interrupt_says_what_is_done(
    small_package: Path,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ratioctl import counterfactuals

    whole = counterfactuals.explain

    def stops(asked: Any, **options: Any) -> Any:
        answers = whole(asked, **options)
        yield next(answers)
        raise KeyboardInterrupt

    monkeypatch.setattr(counterfactuals, "explain", stops)
    out = tmp_path / "o"
    line = [photographs, "--model", small_package, "--target", "dog", "--out", out, *QUICK]
    assert run(*line) == 130
    assert "stopped with 1 of 3 images done" in capsys.readouterr().err
    assert len(json.loads((out / "counterfactuals.json").read_text())["images"]) == 1


def test_a_budget_beyond_all_use_is_warned_of(
    small_package: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [photographs / "one.png", "--model", small_package, "--target", "dog", "--steps", "1", "-q"]
    assert run(*line, "--eps", "50", "--out", tmp_path / "far") == 0
    assert "Warning: --eps 50 is far beyond the useful range of small in l2" in capsys.readouterr().err
    assert run(*line, "--eps", "0.5", "--out", tmp_path / "near") == 0
    assert "useful range" not in capsys.readouterr().err


def test_awkward_names_do_not_stop_the_others(
    small_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name of 80 bytes that are not UTF-8, and members of an archive with names of over 255 bytes."""
    import io
    import os
    import zipfile

    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(stream, "PNG")
    given, out = tmp_path / "in", tmp_path / "out"
    given.mkdir()
    for name in (b"a", "фотография_серой_кошки_на_подоконнике".encode("cp1251") * 2, b"z"):
        Path(os.fsdecode(os.fsencode(given) + b"/" + name + b".png")).write_bytes(stream.getvalue())
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("b", "猫的照片" * 25 + "一", "猫的照片" * 25 + "二"):
            archive.writestr(f"{name}.png", stream.getvalue())
    line = [given, tmp_path / "in.zip", "--model", small_package, "--target", "dog", *QUICK]
    assert run(*line, "--out", out) == 0
    document = json.loads((out / "counterfactuals.json").read_text())
    folders = [Path(image["input_png"]).parts[0] for image in document["images"]]
    assert len({*folders}) == 6
    assert [folders[k] for k in (0, 1, 3)] == ["a", "z", "b"]
    assert all(len(os.fsencode(name)) <= 100 and (out / name / "dog").is_dir() for name in folders)
    assert document["errors"] == []
