"""Files that mean harm: packages, models, archives, images. Refused with a message and an exit code, and
nothing of theirs is run, followed or shown as anything but text.

Each parser's own tests hold more of the same; these go the whole way, from the file to the exit code.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from ratioctl import package
from ratioctl.cli import main
from ratioctl.errors import OutputError, PackageError
from ratioctl.onnx import runtime

SOURCES = Path(package.__file__).parent
ESCAPES = "\x1b]0;owned\x07\x1b[2Jcat\u202egnp"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
LABELS = [ESCAPES, MARKUP, "=cmd|' /C calc'!A0"]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that has to end with `code` and one message; returns that."""

    def run(*line: object, code: int = 5) -> str:
        got = main([str(part) for part in line])
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert got == code, said
        assert "Traceback" not in said
        assert "internal error" not in said
        return said

    return run


# --- no code from files -------------------------------------------------------------------------------------


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCES.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_in_the_source_unpickles_or_evaluates() -> None:
    """`pickle` may be imported for the name of its error alone; every loader that could unpickle says no."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml", "xml"}
    found = []
    for path, tree in trees():
        for node in ast.walk(tree):
            where = f"{path.relative_to(SOURCES)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                taken = modules & {name.split(".")[0] for name in names}
                if taken and (taken, path.name) != ({"pickle"}, "foreign.py"):
                    found.append(f"{where} imports {taken}")
            of_pickle = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
            if isinstance(node, ast.Attribute) and of_pickle and node.attr != "UnpicklingError":
                found.append(f"{where} uses pickle.{node.attr}")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""
            given = {k.arg: ast.unparse(k.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
            if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
                found.append(f"{where} calls {called}")
            if given.get("shell") == "True" or "trust_remote_code" in given:
                found.append(f"{where} gives {given}")
            if called.endswith("torch.load") and given.get("weights_only") != "True":
                found.append(f"{where} loads without weights_only=True")
            if called in ("np.load", "numpy.load", "np.savez", "np.save") and (
                given.get("allow_pickle") != "False"
            ):
                found.append(f"{where} calls {called} without allow_pickle=False")
            if called in ("torch.save", "torch.jit.load", "torch.hub.load", "np.fromregex"):
                found.append(f"{where} calls {called}")
    assert found == []


class Harm:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("form", ["plain", "zip", "jit", "nested"])
def test_a_checkpoint_with_code_is_refused_and_not_run(
    form: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    import torch

    mark, path = tmp_path / "ran", tmp_path / "weights.pt"
    if form == "plain":
        path.write_bytes(pickle.dumps({"state_dict": Harm(mark)}, protocol=2))
    elif form == "jit":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("weights/constants.pkl", pickle.dumps(Harm(mark), protocol=2))
            archive.writestr("weights/data.pkl", pickle.dumps(Harm(mark), protocol=2))
            archive.writestr("weights/version", "3\n")
    else:
        state = {"a": torch.zeros(1), "b": torch.zeros(1)}
        torch.save({**state, "x": Harm(mark)} if form == "zip" else {"model": [Harm(mark), state]}, path)
    said = refused(
        *("package", path, "--arch", "resnet18", "--labels", "a,b", "--mean", "0", "--std", "1"),
        *("--out", tmp_path / "out"),
    )
    assert "weights.pt" in said
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_pickled_arrays_where_numbers_belong_are_damage(tmp_path: Path) -> None:
    """In the cache of finished batches, and in that of decoded data."""
    from ratioctl.utils.result_cache import ResultCache

    mark = tmp_path / "ran"
    harm = np.array([Harm(mark)], dtype=object)
    buffer = io.BytesIO()
    np.savez(buffer, x=harm)
    results = ResultCache(tmp_path / "results")
    (tmp_path / "results" / "key.npz").write_bytes(buffer.getvalue())
    assert results.get_or_compute("key", lambda: {"x": np.ones(1)})["x"] == 1
    assert not mark.exists()
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive:
        head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000000,), }"
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
    (tmp_path / "results" / "lie.npz").write_bytes(lying.getvalue())
    assert results.get_or_compute("lie", lambda: {"x": np.ones(1)})["x"] == 1


# --- archives -----------------------------------------------------------------------------------------------


def png(side: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (255, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


HOSTILE_NAMES = ["../../up.png", "/absolute.png", "a/../../../b.png", "..\\..\\back.png", "C:\\drive.png"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_in_archives_lead_nowhere(
    kind: str, tmp_path: Path, tiny_onnx: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    archive = inner / f"images.{kind}"
    if kind == "tar":
        with tarfile.open(archive, "w") as tar:
            for name in HOSTILE_NAMES:
                info = tarfile.TarInfo(name)
                info.size = len(png())
                tar.addfile(info, io.BytesIO(png()))
            for number, (link, target) in enumerate(
                [(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../../secret.png")]
            ):
                info = tarfile.TarInfo(f"link{number}.png")
                info.type, info.linkname = link, target
                tar.addfile(info)
            device = tarfile.TarInfo("device.png")
            device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 5
            tar.addfile(device)
    else:
        with zipfile.ZipFile(archive, "w") as zipped:
            for name in HOSTILE_NAMES:
                zipped.writestr(name, png())
            link = zipfile.ZipInfo("link0.png")
            link.external_attr = 0o120777 << 16
            zipped.writestr(link, "/etc/passwd")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["ood-score", str(archive), "--model", str(tiny_onnx), "--format", "jsonl", "-q"]) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    links = [row for row in rows if row["path"].rsplit(":", 1)[1].startswith(("link", "device"))]
    assert len(links) == (3 if kind == "tar" else 1)
    assert all(row["label"] is None and "not" in row["error"] for row in links)
    hidden = kind == "tar"  # there "..\\..\\back.png" is one name, which begins with a dot
    assert [row["label"] for row in rows if row not in links] == ["red"] * (len(HOSTILE_NAMES) - hidden)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_names_in_archives_stay_below_the_answers_folder(tmp_path: Path) -> None:
    from ratioctl.report import counterfactual_files as report

    place = report._places()
    for name in (*HOSTILE_NAMES, "..", ".", "...", "x/..png", "\x1b[2J.png", "con.png", "index.html.png"):
        folder = place(f"some.tar:{name}")
        assert (tmp_path / folder).resolve().parent == tmp_path.resolve(), name
        assert folder.isprintable()
        assert folder not in (report.PAGE, report.DOCUMENT)


def test_bombs_in_archives_are_rows_with_errors(
    tmp_path: Path, tiny_onnx: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A member of too many zeros, an archive in an archive, a picture of ten thousand million pixels."""
    import resource

    nested = io.BytesIO()
    with zipfile.ZipFile(nested, "w") as zipped:
        zipped.writestr("x.png", png())
    with zipfile.ZipFile(tmp_path / "bombs.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        with zipped.open("zeros.png", "w", force_zip64=True) as stream:
            for _ in range(300):
                stream.write(bytes(2**20))
        zipped.writestr("nested.zip", nested.getvalue())
        zipped.writestr("nested.png", nested.getvalue())
        zipped.writestr("pixels.png", png_of(100_000, 100_000))
        zipped.writestr("good.png", png())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = ("--model", str(tiny_onnx), "--format", "jsonl", "-q")
    assert main(["ood-score", str(tmp_path / "bombs.zip"), *options]) == 3
    rows = {json.loads(line)["path"].rsplit(":", 1)[1]: json.loads(line) for line in _out(capsys)}
    assert set(rows) == {"zeros.png", "nested.png", "pixels.png", "good.png"}
    assert "larger than 256 MiB" in rows["zeros.png"]["error"]
    assert "is a zip archive, not an image" in rows["nested.png"]["error"]
    assert "100,000 x 100,000 pixels" in rows["pixels.png"]["error"]
    assert rows["good.png"]["label"] == "red"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150 * 1024, f"{grown} KiB for a few refusals"


def _out(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def png_of(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_a_compressed_note_in_a_png_does_not_unfold(tmp_path: Path) -> None:
    data = b"Comment\0\0" + zlib.compress(bytes(16 * 2**20), 1)
    note = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    (tmp_path / "note.png").write_bytes(png_of(4, 4, note))
    from ratioctl import images
    from ratioctl.errors import ImageError

    with pytest.raises(ImageError, match=r"damaged PNG|cut short"):
        images.decode(tmp_path / "note.png", 4)


def test_a_tar_that_unfolds_is_streamed(
    tmp_path: Path,
    tiny_onnx: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """80 MiB of zeros before the image, over a limit of 1 MiB: skipped in small pieces."""
    import resource

    from ratioctl.images import files

    monkeypatch.setattr(files, "MAX_BYTES", 2**20)
    path = tmp_path / "bomb.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        info = tarfile.TarInfo("zeros.png")
        info.size = 80 * 2**20
        tar.addfile(info, _Zeros())  # type: ignore[arg-type]
        info = tarfile.TarInfo("good.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["ood-score", str(path), "--model", str(tiny_onnx), "--format", "jsonl", "-q"]) == 3
    zeros, good = (json.loads(line) for line in _out(capsys))
    assert "larger than 1 MiB" in zeros["error"]
    assert good["label"] == "red"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 * 1024


class _Zeros:
    def read(self, size: int) -> bytes:
        return bytes(size)


# --- packages -----------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object], weights: bytes = b"") -> Path:
    """A package whose config.json, and weights, were changed by someone who can compute hashes."""
    config = json.loads((folder / "config.json").read_bytes())
    if weights:
        (folder / "model.safetensors").write_bytes(weights)
        config["ratio"]["files"]["model.safetensors"] = hashlib.sha256(weights).hexdigest()
    config["ratio"].pop("digest", None)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nothing(config: dict[str, Any]) -> None:
    pass


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/hostname", "sub/../../outside.bin", "..", "\\x"])
def test_names_in_a_config_lead_nowhere(name: str, tiny_package: Path, refused: Callable[..., str]) -> None:
    outside = tiny_package.parent / "outside.bin"
    outside.write_bytes(b"mine")
    recorded = hashlib.sha256(b"mine").hexdigest()
    rewritten(tiny_package, lambda c: c["ratio"]["files"].update({name: recorded}))
    for command in ("verify", "inspect", "export"):
        assert "not a file name" in refused(command, tiny_package)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "model.onnx", "config.json"])
@pytest.mark.parametrize("target", ["absolute", "relative"])
def test_links_out_of_a_package_are_refused(
    name: str, target: str, tiny_package: Path, refused: Callable[..., str]
) -> None:
    outside = tiny_package.parent / "outside"
    (tiny_package / name).rename(outside)
    (tiny_package / name).symlink_to(outside if target == "absolute" else "../outside")
    said = refused("verify" if name != "config.json" else "inspect", tiny_package)
    assert "is a link that leads out of the package" in said
    assert "cp -rL" in said or name != "config.json"


def test_links_inside_a_package_are_fine(tiny_package: Path) -> None:
    (tiny_package / "README.md").rename(tiny_package / "card")
    (tiny_package / "README.md").symlink_to("card")
    assert package.read(tiny_package).card


@pytest.mark.parametrize("planted", [".lock", ".config.json.tmp~", ".README.md.tmp~"])
def test_writing_into_a_package_follows_no_planted_link(
    planted: str, tiny_package: Path, tmp_path: Path
) -> None:
    """`calibrate` and `export` write into a package that came from elsewhere."""
    precious = tmp_path / "precious"
    precious.write_text("all I have")
    (tiny_package / planted).symlink_to(precious)
    there = package.read(tiny_package)
    if planted == ".lock":
        with pytest.raises(OutputError, match=r"\.lock: cannot be written"):
            package.update(there, card="# New\n")
    else:
        assert package.update(there, card="# New\n").card == "# New\n"
    assert precious.read_text() == "all I have"
    package.read(tiny_package)


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


ONE = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
LIES = {
    "header of 2^63 bytes": (safetensors({}, length=2**63), "header too large"),
    "header longer than the file": (safetensors({"w": ONE}, bytes(12), length=4096), "invalid header length"),
    "header nested 100,000 deep": (safetensors(b'{"a":' * 100_000), "recursion limit exceeded"),
    "tensor beyond the end": (
        safetensors({"w": {**ONE, "data_offsets": [0, 2**40]}}, bytes(12)),
        "invalid shape",
    ),
    "shape that overflows": (safetensors({"w": {**ONE, "shape": [2**32, 2**32]}}, bytes(12)), "overflow"),
    "overlap": (safetensors({"w": ONE, "v": ONE}, bytes(12)), "invalid offset for tensor"),
    "hidden bytes": (safetensors({"w": ONE}, bytes(12) + b"#!/bin/sh"), "file not fully covered"),
    "NaN": (safetensors({"w": ONE}, np.array([0, np.nan, 1], "<f4").tobytes()), "not finite"),
    "infinity": (safetensors({"w": ONE}, np.array([0, -np.inf, 1], "<f4").tobytes()), "not finite"),
    "half NaN": (
        safetensors({"w": {**ONE, "dtype": "BF16", "data_offsets": [0, 6]}}, b"\xc0\x7f" * 3),
        "not finite",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_weights_that_lie_under_a_right_hash(
    lie: str, tiny_package: Path, refused: Callable[..., str]
) -> None:
    data, said = LIES[lie]
    rewritten(tiny_package, nothing, data)
    assert said in refused("verify", tiny_package)
    with pytest.raises(PackageError, match=said):
        package.read_weights(package.read(tiny_package))


BAD = {
    "temperature NaN": lambda c: c["ratio"].update(temperature=float("nan")),
    "temperature infinite": lambda c: c["ratio"].update(temperature=float("inf")),
    "temperature 1e999": lambda c: c["ratio"].update(temperature=10**999),
    "temperature that float32 rounds to 0": lambda c: c["ratio"].update(temperature=1e-300),
    "temperature too large for float32": lambda c: c["ratio"].update(temperature=1e300),
    "deviation that float32 rounds to 0": lambda c: c["pretrained_cfg"].update(std=[1e-300] * 3),
    "mean too large for float32": lambda c: c["pretrained_cfg"].update(mean=[1e300] * 3),
    "threshold NaN": lambda c: c["ratio"].update(thresholds={"tpr95": float("nan")}),
    "threshold of 2": lambda c: c["ratio"].update(thresholds={"tpr95": 2}),
    "label with half a character": lambda c: c.update(label_names=["\ud800", "b", "c"]),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("carrier", ["package", "onnx"])
def test_values_that_cannot_be(
    what: str,
    carrier: str,
    tiny_package: Path,
    tiny_graph: Callable[..., bytes],
    colors: Path,
    refused: Callable[..., str],
) -> None:
    model = rewritten(tiny_package, BAD[what])
    if carrier == "onnx":
        config = json.loads((tiny_package / "config.json").read_bytes())
        config["ratio"].pop("files")
        model = tiny_package.parent / "bad.onnx"
        model.write_bytes(tiny_graph(config))
    refused("ood-score", colors, "--model", model)
    refused("inspect", model)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b'{"ratio":' * 100_000, b'{"ratio": {"a": ' + b"[" * 100_000]
)
def test_json_nested_a_hundred_thousand_deep(
    text: bytes, tiny_package: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tiny_package / "config.json").write_bytes(text)
    for command in ("inspect", "verify", "export", "calibrate"):
        assert "config.json" in refused(command, tiny_package)


def test_an_answers_folder_with_a_nested_document(tmp_path: Path) -> None:
    from ratioctl.report import counterfactual_files as report

    (tmp_path / report.DOCUMENT).write_bytes(
        b'{"schema": "ratioctl/counterfactuals/1", "images":' + b"[" * 100_000
    )
    assert report._earlier_files(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 10**6}, "has shape|cannot be built"),
        ({"width": 2**62}, "cannot be built"),
        ({"width": -4}, "cannot be built"),
        ({"width": "4"}, "cannot be built"),
        ({"weights": "DEFAULT"}, "cannot be built"),
        ({"pretrained": True}, "cannot be built"),
        ({"num_classes": 3}, "cannot be built"),
        ({"width": 4, "stem_stride": 0}, "cannot be built: stem_stride 0: is out of range"),
    ],
)
def test_an_architecture_of_more_memory_than_there_is(
    options: dict[str, Any], said: str, small_package: Path, tmp_path: Path
) -> None:
    import shutil

    from ratioctl.models import from_package

    folder = rewritten(
        Path(shutil.copytree(small_package, tmp_path / "p")),
        lambda config: config.update(architecture_options=options),
    )
    with pytest.raises(PackageError, match=said):
        from_package(package.read(folder))


def test_a_librarys_network_takes_no_memory_before_it_fits(
    small_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600,000 classes and one bias of that length: 3 MB of weights, and a network of 10 GiB."""
    import shutil

    from safetensors.numpy import save

    from ratioctl.models import from_package, network

    n, built = 600_000, []
    build = network.build

    def watched(*args: Any, **options: Any) -> Any:
        model = build(*args, **options)
        built.append({parameter.device.type for parameter in model.parameters()})
        return model

    monkeypatch.setattr(network, "build", watched)

    def change(config: dict[str, Any]) -> None:
        config.update(architecture="torchvision:vgg16", architecture_options={}, num_classes=n)
        config.update(num_features=4096, label_names=[str(k) for k in range(n)])
        config["pretrained_cfg"]["input_size"] = [3, 32, 32]

    weights = save({"classifier.6.bias": np.zeros(n, np.float32)})
    folder = rewritten(Path(shutil.copytree(small_package, tmp_path / "p")), change, weights)
    with pytest.raises(PackageError, match=r"missing classifier\.0\.bias"):
        from_package(package.read(folder))
    assert built == [{"meta"}]


@pytest.mark.parametrize(
    "architecture",
    [
        "wideresnet-600000004-1",
        "torchvision:../../x",
        "timm:hf-hub:someone/else",
        "os:system",
        "resnet18\x1b[2J",
    ],
)
def test_an_architecture_that_is_none(architecture: str, small_package: Path, tmp_path: Path) -> None:
    import shutil

    from ratioctl.models import from_package

    folder = rewritten(
        Path(shutil.copytree(small_package, tmp_path / "p")),
        lambda config: config.update(architecture=architecture, architecture_options={}),
    )
    with pytest.raises(PackageError, match="cannot be built"):
        from_package(package.read(folder))


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, 'base = "/etc/passwd"', "\x00", "[data]\ntrain = 3", "x" * 10**6]
)
def test_a_recipe_in_a_package_that_is_none(
    text: str, tiny_package: Path, refused: Callable[..., str]
) -> None:
    with_recipe = package.read(tiny_package)
    package.write(
        tiny_package,
        config=package.portable_config(with_recipe),
        weights=(tiny_package / "model.safetensors").read_bytes(),
        recipe_text=text,
    )
    said = refused("calibrate", tiny_package, code=2)
    assert str(tiny_package) in said


def test_a_models_name_does_not_choose_where_reports_go() -> None:
    from ratioctl.cli.evaluate import default_folder
    from ratioctl.onnx.layouts import safe_name

    for name in ("../../home", "/etc/cron.d/x", "..", ".", "a\0b", "\x1b[2J", "a/b", "  "):
        folder = default_folder([(name, "0123456789")], "quick")
        assert folder.parent == Path("reports")
        assert folder.name.endswith("-01234567-quick")
        assert folder.name.isprintable()
        assert "/" not in safe_name(name)
        assert safe_name(name).strip(".")


# --- names are only names -----------------------------------------------------------------------------------


def inert(text: str) -> bool:
    """No character that a terminal obeys, line ends apart."""
    return all(ch.isprintable() or ch == "\n" for ch in text)


@pytest.fixture
def named(tiny_package: Path, tiny_graph: Callable[..., bytes]) -> Path:
    """A package, export included, whose labels, name and provenance are hostile."""
    config = json.loads((tiny_package / "config.json").read_bytes())
    config["ratio"].pop("digest")
    files = config["ratio"].pop("files")
    config["label_names"] = LABELS
    config["ratio"] |= {"name": ESCAPES + MARKUP, "provenance": {ESCAPES: MARKUP}}
    config["ratio"]["metrics"] = [{"name": ESCAPES, "value": 1.0, "dataset": MARKUP}]
    assert files
    package.write(tiny_package, config=config, weights={"w": np.ones(3, np.float32)}, onnx=tiny_graph(config))
    return tiny_package


def test_terminals_show_hostile_names_as_text(
    named: Path, colors: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = colors / f"{ESCAPES[:20]}.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(strange)
    for line in (
        ["inspect", str(named)],
        ["inspect", str(named / "model.onnx")],
        ["verify", str(named)],
        ["ood-score", str(colors), "--model", str(named), "--probabilities"],
        ["ood-score", str(colors), "--model", str(named), "--format", "jsonl", "--probabilities"],
        ["counterfactual", str(strange), "--target", "no such class", "--model", str(named), "--eps", "1"],
        ["evaluate", str(named), "--data", str(colors)],
    ):
        main(line)
        captured = capsys.readouterr()
        assert inert(captured.out), line
        assert inert(captured.err), line
        assert "owned" in captured.out + captured.err or line[0] in ("verify", "evaluate"), line


def test_csv_is_faithful_in_a_file_and_inert_on_a_terminal(
    named: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import csv
    import pty
    import subprocess
    import sys

    line = ["ood-score", str(colors), "--model", str(named), "--format", "csv", "--probabilities", "-q"]
    assert main([*line, "--output", str(tmp_path / "rows.csv")]) == 0
    with (tmp_path / "rows.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header[6:] == [f"p:{label}" for label in LABELS]
    assert ESCAPES in {row[1] for row in rows}
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "ratioctl", *line], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"\\x1b]0;owned" in shown
    assert b"\x1b" not in shown
    assert b"\x07" not in shown


def test_cards_and_reports_show_hostile_names_as_text(named: Path) -> None:
    card = (named / "README.md").read_text()
    assert inert(card)
    assert "<script" not in card
    assert "<img" not in card
    from ratioctl import metrics
    from ratioctl.evaluation import measurements
    from ratioctl.report import html, markdown, terminal
    from ratioctl.types import Evaluated, Evaluation, Measurement, Report

    row = Measurement(name="accuracy", value=0.5, n=4, interval=(0.2, 0.8), dataset=ESCAPES + MARKUP)
    report = Report(package_digest="0" * 64, seed=0, measurements=(row,), warnings=(ESCAPES + MARKUP,))
    logits = np.random.default_rng(0).normal(size=(20, 3))
    histogram = measurements.histogram(metrics.confidence(logits), 1 / 3)
    figures: dict[str, Any] = {
        "histograms": {MARKUP: {"clean": histogram}, ESCAPES: {"clean": histogram}},
        "reliability": measurements.reliability(logits, np.arange(20) % 3, 1.0, 5),
        "roc": {},
        "radius": {},
    }
    model = Evaluated(name=ESCAPES + MARKUP, report=report, figures=figures, gallery=(), examples={})
    data = ({"name": MARKUP, "source": ESCAPES, "n": 4, "role": "inside", "fingerprint": "0" * 64},)
    machine = {"machine": ESCAPES + MARKUP}
    evaluation = Evaluation(suite="quick", protocol=MARKUP, data=data, environment=machine, models=(model,))
    markdown, page = markdown.markdown(evaluation), html.page(evaluation)
    assert inert(markdown)
    assert not re.search(r"(?<!\\)<(script|img)", markdown)
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert "\x1b" not in json.dumps(evaluation.to_json())
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    for table in terminal.evaluation_tables(evaluation):
        console.print(table)
    assert inert(console.file.getvalue())  # type: ignore[attr-defined]


# --- graphs -------------------------------------------------------------------------------------------------


def outside_tensor(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "secret.bin", "", "/dev/zero"])
@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph"])
def test_a_graph_that_reads_other_files(
    location: str,
    where: str,
    tmp_path: Path,
    tiny_graph: Callable[..., bytes],
    colors: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "secret.bin").write_bytes(np.float32(0.5).tobytes())
    model = onnx.load_model_from_string(tiny_graph())
    index = next(k for k, t in enumerate(model.graph.initializer) if t.name == "temperature")
    if where == "initializer":
        model.graph.initializer[index].CopyFrom(outside_tensor("temperature", location))
    else:
        del model.graph.initializer[index]
        constant = helper.make_node("Constant", [], ["temperature"], value=outside_tensor("t", location))
        if where == "subgraph":
            inner = helper.make_graph(
                [helper.make_node("Constant", [], ["inner"], value=outside_tensor("t", location))],
                "inner",
                [],
                [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [])],
            )
            model.graph.node.insert(
                0, helper.make_node("If", ["yes"], ["temperature"], then_branch=inner, else_branch=inner)
            )
            constant = helper.make_node(
                "Constant", [], ["yes"], value=helper.make_tensor("y", TensorProto.BOOL, [], [True])
            )
        model.graph.node.insert(0, constant)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path)
    said = refused("ood-score", colors, "--model", folder / "m.onnx")
    assert "keeps its weights in another file" in said
    assert "ratioctl export" in said


def test_a_model_with_the_word_in_it_loads(tmp_path: Path, tiny_graph: Callable[..., bytes]) -> None:
    model = onnx.load_model_from_string(tiny_graph())
    model.doc_string = "location, location, location"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    runtime.load(tmp_path / "m.onnx", threads=1)


def test_a_graph_whose_outputs_are_not_what_it_says(tmp_path: Path, tiny_graph: Callable[..., bytes]) -> None:
    """Declared [N, 3], computed [N, 2] or [1, 3], as the pixels decide; or not computed at all."""
    images = np.full((2, 3, 4, 4), 0.5, np.float32)

    def lying(nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Path:
        model = onnx.load_model_from_string(tiny_graph())
        first = model.graph.node[0]
        first.output[0] = "true_logits"
        for node in reversed(nodes):
            model.graph.node.insert(1, node)
        for name, value in constants.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        path = tmp_path / "m.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    count = [
        helper.make_node("ReduceMax", ["image"], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest", "four"], ["times"]),
        helper.make_node("Cast", ["times"], ["end"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["end", "one_long"], ["ends"]),
        helper.make_node("Slice", ["true_logits", "begin", "ends", "axis"], ["logits"]),
    ]
    for axis, factor in ((1, 4.0), (0, 2.0)):
        path = lying(
            count,
            four=np.float32(factor),
            one_long=np.array([1]),
            begin=np.array([0]),
            axis=np.array([axis]),
        )
        with pytest.raises(PackageError, match=r"computes logits of shape \(\d, \d\) for 2 images") as caught:
            runtime.load(path, threads=1).predict(images)
        assert caught.value.exit_code == 5
    huge = [
        helper.make_node("ConstantOfShape", ["enormous"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["true_logits", "nothing"], ["logits"]),
    ]
    path = lying(huge, enormous=np.array([2**30, 2**30]))
    with pytest.raises(PackageError, match=r"cannot compute|is damaged"):
        runtime.load(path, threads=1).predict(images)


def test_a_graph_that_computes_nothing_usable(
    tmp_path: Path, tiny_graph: Callable[..., bytes], colors: Path, refused: Callable[..., str]
) -> None:
    model = onnx.load_model_from_string(tiny_graph())
    model.graph.node[0].output[0] = "true"
    model.graph.node.insert(1, helper.make_node("Div", ["true", "zero"], ["logits"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "zero"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "computed no usable numbers" in refused("ood-score", colors, "--model", tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(label_names=["a", "b"], num_classes=2), "another number of classes"),
        (lambda c: c["pretrained_cfg"].update(input_size=[3, 8, 8]), "another input"),
        (lambda c: c["pretrained_cfg"].update(input_size=[1, 4, 4], mean=[0], std=[1]), "another input"),
        (lambda c: c["ratio"].update(format=99), "format 99"),
        (lambda c: c.pop("ratio"), 'no "ratio" part'),
    ],
)
def test_metadata_that_lies(
    change: Callable[[dict[str, Any]], object],
    said: str,
    tmp_path: Path,
    tiny_package: Path,
    tiny_graph: Callable[..., bytes],
    colors: Path,
    refused: Callable[..., str],
) -> None:
    config = package.portable_config(package.read(tiny_package))
    change(config)
    (tmp_path / "m.onnx").write_bytes(tiny_graph(config))
    assert said in refused("ood-score", colors, "--model", tmp_path / "m.onnx")
