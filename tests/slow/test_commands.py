"""The commands of the README, of "Get started" and of the guides, run in their order on small stand-ins.

Trainings, searches and evaluations are made short by further options, and the default model is replaced by
the small one; nothing else of a command is changed.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ratioctl import cli

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *(f"docs/guides/{path.name}" for path in sorted((ROOT / "docs" / "guides").glob("*.md"))),
]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ANIMALS = ["cat", "dog", "horse"]
SHORTER = {
    "counterfactual": ["--steps", "4"],
    "evaluate": ["--limit", "10"],
    "parity": ["--limit", "8", "--no-timing"],
    "report": ["--limit", "6"],
    "train": [
        "--set=optim.epochs=1",
        "--set=optim.batch_size=8",
        "--set=optim.batch_size_out=8",
        "--set=optim.head_epochs=0",
    ],
}
NOT_RUN = {  # commands that contain these words
    "serve": "does not end; tests/server and tests/slow/test_serve.py",
    "--device cuda": "needs a GPU",
    "--download": "needs a network",
    "robustbench:": "needs RobustBench; tests/models/test_robustbench.py",
    "timm-weights.safetensors": "100 MB; tests/cli/test_package.py has another network of timm",
    "madry.pt": "100 MB; tests/models/test_import_checkpoint.py",
    "node_modules": "needs npm; tests/browser/test_live.py",
    "s3://": "needs a server; tests/slow/test_s3.py",
    "torchrun": "several processes; tests/slow has its own test",
    "--engine ray": "needs Ray",
}


def commands(page: str) -> Iterator[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("ratioctl ") or "| ratioctl " in line:
                yield line


def picture(seed: int, size: int) -> bytes:
    """A smooth image, so that it is no duplicate of another one."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(data, "png")
    return data.getvalue()


def folder_of(path: Path, splits: list[str], classes: list[str], count: int, size: int = 32) -> None:
    first = 1000 * sum(map(ord, path.name + splits[0]))
    for s, split in enumerate(splits):
        for c, label in enumerate(classes):
            (path / split / label).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                data = picture(first + 10_000 * s + 100 * c + k, size)
                (path / split / label / f"{k}.png").write_bytes(data)


def packed(path: Path, splits: list[str], classes: list[str], count: int) -> None:
    source = path.with_name(path.name + "-folder")
    folder_of(source, splits, classes, count)
    with tarfile.open(path, "w:xz" if path.suffix == ".xz" else "w") as archive:
        archive.add(source, arcname=".")
    shutil.rmtree(source)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RATIOCTL_KEY_PASSWORD", "")
    monkeypatch.setenv("RATIOCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "assets").symlink_to(ROOT / "assets", target_is_directory=True)
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for name in ("cat", "rocket"):
        shutil.copy(ROOT / "assets" / "samples" / f"{name}.jpg", inbox)
    shutil.copy(inbox / "cat.jpg", tmp_path / "photo.jpg")
    packed(tmp_path / "cifar10.tar.xz", ["test"], CIFAR10, 4)
    folder_of(tmp_path, ["cifar10-test-other-9000"], CIFAR10, 4)
    folder_of(tmp_path, ["other"], ["street", "wall"], 8)
    for name in ("svhn-test.tar.xz", "cifar100-test.tar.xz", "textures.tar.xz", "street.tar", "archive.tar"):
        packed(tmp_path / name, ["test"], ["one", "two"], 12)
    packed(tmp_path / "photos.tar", ["val"], ["cat", "dog", "frog"], 12)
    return tmp_path


def prepare(page: str) -> None:
    """What the commands of one page need besides."""
    if page.endswith("own-photographs.md"):
        folder_of(Path(), ["photos"], ANIMALS, 24, 64)
        text = (ROOT / page).read_text(encoding="utf-8")
        (recipe,) = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        recipe = recipe.replace('"./photos:', '"split:').replace('split:train"', 'split:train:photos"')
        Path("animals.toml").write_text(recipe.replace('split:test"', 'split:test:photos"'), encoding="utf-8")
        weights("weights.safetensors", 1000)
    if page.endswith(("signing.md", "thresholds.md")):
        folder_of(Path("animals"), ["train", "validation"], ANIMALS, 60)
        weights("weights.pt", 3)
        options = ["--labels", ",".join(ANIMALS), "--input-size", "32", "--mean", "0", "--std", "1"]
        run(["package", "weights.pt", "--arch", "timm:resnet18", *options, "--out", "runs/animals/package"])
    if page.endswith("import.md"):
        weights("weights.pt", 3)


def weights(name: str, classes: int) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = timm.create_model("resnet18", num_classes=classes).state_dict()
    save_file(state, name) if name.endswith(".safetensors") else torch.save(state, name)


def run(words: list[str]) -> None:
    extra = [word for word in SHORTER.get(words[0], []) if word not in words]
    if words[0] == "evaluate" and "--limit" in words:
        words[words.index("--limit") + 1], extra = "4", []
    wanted = 4 if "--fail-on-ood" in words else 0
    assert cli.main([*words, *extra, "--quiet"]) == wanted, words


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))])
def test_commands_of(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(page)
    for line in commands(page):
        if any(word in line for word in NOT_RUN):
            continue
        words = shlex.split(line, comments=True)
        before, words = words[: words.index("ratioctl")], words[words.index("ratioctl") + 1 :]
        words = ["cifar10-ratio-small" if word == "cifar10-ratio" else word for word in words]
        words = ["split:test:photos" if word == "./photos:test" else word for word in words]
        if (
            words[0] == "train" and "--resume" not in words
        ):  # pages show several ways to train the same photos
            for run_folder in ("photos", Path(words[1]).stem):
                shutil.rmtree(Path("runs") / run_folder, ignore_errors=True)
        if before:  # commands whose output the last one reads
            shell = line[: line.index("| ratioctl")]
            given = subprocess.run(["bash", "-c", shell], capture_output=True, check=True).stdout
            assert given
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        run(words)


def masked(text: str) -> list[str]:
    """Lines without numbers and drawn borders, words of a line separated by single spaces."""
    kept = (re.sub(r"[^\w\s./:;,()*<>=-]", " ", line) for line in text.splitlines())
    return [
        line
        for line in (" ".join(re.sub(r"[<>]?\d[\d.e+-]*\*?", "N", line).split()) for line in kept)
        if line
    ]


def test_outputs_shown_in_get_started(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command of the page as it stands, with the default model; shown outputs up to their numbers."""
    page = (ROOT / "docs" / "get-started.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"^```sh\n(ratioctl [^\n]*)\n```\n(?:\n```text\n(.*?)^```)?", page, re.DOTALL | re.MULTILINE
    )
    assert len(shown) >= 6
    for line, expected in shown:
        assert cli.main(shlex.split(line)[1:]) == 0, line
        printed = capsys.readouterr().out
        if expected:
            assert masked(printed) == masked(expected)
