"""Our parsers as functions of bytes for a fuzzer: each returns, or raises an exception that is a fault.

Errors of `ratioctl.errors` are allowed. Everything else is a fault, and so is a failed assertion: accepted
input must survive being written and read again, or agree with another reader of the format.
"""

from __future__ import annotations

import atexit
import csv
import io
import json
import math
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ratioctl import images, package, recipe
from ratioctl.cli import _rows
from ratioctl.counterfactuals import epsilons
from ratioctl.errors import RatioctlError
from ratioctl.onnx import runtime
from ratioctl.types import ScoreRow
from ratioctl.utils import resources
from ratioctl.utils.text import safe_text

Target = Callable[[bytes], None]

_SHM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_scratch = tempfile.TemporaryDirectory(prefix="fuzz-", dir=_SHM)
SCRATCH = Path(_scratch.name)
atexit.register(_scratch.cleanup)
CONFIG = {
    "architecture": "resnet18",
    "architecture_options": {"width": 4},
    "label_names": ["cat", "dog"],
    "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.2] * 3},
    "ratio": {
        "format": 1,
        "temperature": 0.5,
        "thresholds": {"tpr95": 0.4},
        "ladders": {"2": [0.5, 1]},
        "metrics": [{"name": "accuracy", "value": 0.9, "n": 9, "interval": [0.8, 1.0], "dataset": "x"}],
    },
}


def text_of(data: bytes) -> str:
    """Text as a command line delivers it: bytes that are not UTF-8 become lone surrogates."""
    return data.decode("utf-8", "surrogateescape")


def recipe_file(data: bytes) -> None:
    """A recipe's TOML file; an accepted one is written and read again."""
    path = SCRATCH / "recipe.toml"
    path.write_bytes(data)
    found = recipe.load(path)
    again = recipe.loads(recipe.dumps(found))
    assert again == found
    assert again.digest == found.digest


def recipe_settings(data: bytes) -> None:
    """Values of `--set`, one per line."""
    settings = text_of(data).split("\n")
    found = recipe.load("digits-ratio", settings)
    assert recipe.loads(recipe.dumps(found)) == found


def names(data: bytes) -> None:
    """Name of a recipe and of a model."""
    for look in (recipe.find, package.find):
        try:
            look(text_of(data))
        except RatioctlError as error:
            str(error)


def eps_range(data: bytes) -> None:
    """The RANGE of `--eps`."""
    budgets = epsilons.parse_range(text_of(data))
    assert 0 < len(budgets) <= epsilons.MOST
    assert all(math.isfinite(b) and b > 0 for b in budgets)
    assert list(budgets) == sorted(set(budgets))
    assert epsilons.parse_range(",".join(map(repr, budgets))) == budgets


def package_config(data: bytes) -> None:
    """`config.json` of a package on disk: checked, read, rendered as a card and written again."""
    folder = SCRATCH / "package"
    if not folder.exists():
        package.write(folder, config=CONFIG, weights={"w": np.ones(2, np.float32)})
    (folder / "config.json").write_bytes(data)
    findings = package.check(folder)
    assert findings[0][0] == "config.json"
    found = package.read(folder, verify=False)
    assert package.render_card(found.config)
    assert found.temperature > 0
    assert package.parse_config(package.portable_config(found), "x", name="").label_names == found.label_names
    json.dumps(found.config).encode("ascii")


def safetensors_file(data: bytes) -> None:
    """Weights; for accepted ones the safetensors library reads the same values."""
    found = package.parse_weights(data, "model.safetensors")
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        theirs = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError):
        return  # supports fewer types and is stricter about the header's first byte
    assert set(theirs) == set(found)
    for name, array in found.items():
        if theirs[name].dtype == array.dtype:
            assert np.array_equal(theirs[name], array)


def onnx_metadata(data: bytes) -> None:
    """Metadata block of an exported file."""
    spec = runtime._spec({"ratioctl": data.decode("utf-8", "replace")}, Path("x.onnx"))
    assert len(spec.label_names) >= 2


def _listed(path: Path) -> None:
    for item in images.walk([path]):
        assert item.path.encode("utf-8")
        try:
            item.read()
        except RatioctlError as error:
            str(error)
    images.list_source(str(path))


def tar_archive(data: bytes) -> None:
    """A tar, plain or compressed: walk it, read every member, list it as a labelled SOURCE."""
    path = SCRATCH / "images.tar"
    path.write_bytes(data)
    _listed(path)


def zip_archive(data: bytes) -> None:
    """The same for a zip."""
    path = SCRATCH / "images.zip"
    path.write_bytes(data)
    _listed(path)


def _inside(use: Callable[[], object], data: bytes) -> None:
    """Call `use` in a folder with a few sources; inputs that lead out of it are skipped."""
    if data[:1] == b"/" or any(part in data for part in (b"..", b"\n/", b"\0/")):
        return
    root = SCRATCH / "sources"
    if not root.exists():
        for name in ("a/train/cat/1.png", "a/train/dog/1.png", "a/test/cat/2.png", "b/1.png", "c:d/x/1.png"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        with tarfile.open(root / "t.tar", "w") as archive:
            archive.add(root / "a", "a")
    here = os.getcwd()
    os.chdir(root)
    try:
        use()
    finally:
        os.chdir(here)


def source(data: bytes) -> None:
    """A SOURCE as typed, and the same text as a path to walk."""
    text = text_of(data)

    def use() -> None:
        for look in (images.list_source, lambda text: [i.path.encode() for i in images.walk([text])]):
            try:
                look(text)
            except RatioctlError as error:
                str(error)

    if text != "-":
        _inside(use, data)


def path_list(data: bytes) -> None:
    """List of paths on stdin."""

    def use() -> None:
        for item in images.walk(["-"], stdin=io.BytesIO(data)):
            item.path.encode("utf-8")
            try:
                item.read()
            except RatioctlError as error:
                str(error)

    _inside(use, data)


def image(data: bytes) -> None:
    """An encoded image, and the EXIF block that we parse."""
    assert 1 <= images.orientation(data) <= 8
    done = images.decode(data, 8)
    assert done.pixels.shape == (8, 8, 3)
    assert done.pixels.dtype == np.uint8


def rows(data: bytes) -> None:
    """Row writers: CSV, JSON lines and Parquet read back as written; the table is printable."""
    parts = data.decode("utf-8", "backslashreplace").split("|")
    labels = list(dict.fromkeys(p for p in parts if p))[:3] or ["cat"]
    written = []
    for k, part in enumerate(parts[:20]):
        if k % 4 == 3:
            written.append(ScoreRow(path=part, error=parts[k - 1] or "is empty"))
            continue
        p = 1 / (2 + len(part))
        each = (p,) * len(labels)
        label = labels[k % len(labels)]
        written.append(
            ScoreRow(
                path=part, label=label, confidence=p, ood_score=1 - p, is_ood=p < 0.1, probabilities=each
            )
        )
    columns = _rows.columns(labels, worst_case=False)
    expected = [_rows.values(row, columns) for row in written]
    out = {kind: _written(kind, columns, labels, written) for kind in ("csv", "jsonl", "parquet", "table")}
    stream = io.StringIO(out["csv"].decode("utf-8"), newline="")
    header, *lines = csv.reader(stream)
    assert header == columns
    assert lines == [[_rows._text(value) for value in values] for values in expected]
    parsed = [json.loads(line) for line in out["jsonl"].decode("utf-8").split("\n")[:-1]]
    assert [[row[name] for name in columns] for row in parsed] == expected
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(out["parquet"]))
    assert table.schema.names == columns
    read = [list(row) for row in zip(*(c.to_pylist() for c in table.columns), strict=True)]
    assert read == expected
    shown = out["table"].decode("utf-8").split("\n")
    assert len(shown) == len(written) + 2
    assert all(safe_text(line) == line for line in shown)


def _written(kind: _rows.Format, columns: list[str], labels: list[str], written: list[ScoreRow]) -> bytes:
    path = SCRATCH / f"rows.{kind}"
    with _rows.opened(path, kind, columns, labels) as write:
        write(written)
    return path.read_bytes()


def signature(data: bytes) -> None:
    """Signature file of a package, and a public key."""
    from ratioctl.package import signing

    folder, key = SCRATCH / "signed", SCRATCH / "release"
    if not folder.exists():
        package.write(folder, config=CONFIG, weights={"w": np.ones(2, np.float32)})
        secret, _ = signing.new_key(key)
        signing.sign(folder, secret)
        (SCRATCH / "signature").write_bytes((folder / signing.SIGNATURE).read_bytes())
    for given, ours in ((folder / signing.SIGNATURE, SCRATCH / "signature"), (SCRATCH / "key", None)):
        given.write_bytes(data)
        try:
            signing.verify(folder, [SCRATCH / "release.pub" if ours else given])
        except RatioctlError as error:
            str(error)
        else:
            same = ours or SCRATCH / "release.pub"
            told = [b"".join(text.split()) for text in (data, same.read_bytes())]
            assert told[0][-56:] == told[1][-56:], "a foreign signature or key was accepted"
        if ours:
            given.write_bytes(ours.read_bytes())


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        *(recipe_file, recipe_settings, names, eps_range, package_config, safetensors_file, onnx_metadata),
        *(tar_archive, zip_archive, source, path_list, image, rows, signature),
    )
}


def run(name: str, data: bytes) -> None:
    """Run one input; returns, or raises the fault."""
    try:
        TARGETS[name](data)
    except RatioctlError as error:
        str(error).encode("utf-8", "backslashreplace")


def seeds(name: str) -> Iterable[bytes]:
    """Valid inputs to start from."""
    if name == "recipe_file":
        yield from (p.read_bytes() for p in sorted(resources.folder("recipes").glob("digits*.toml")))
        yield recipe.dumps(recipe.load("cifar10-ratio-0.25", ['data.outside="x"'])).encode()
    elif name == "recipe_settings":
        yield b'optim.epochs=10\ndata.outside=["a", "b"]\nmodel.width = 8'
        yield b'objective.inside.attack.ball.p="inf"\nevaluation.robust=[{p="2", eps=0.5}]'
    elif name == "names":
        yield from (b"digits-ratio", b"cifar10-ratio", b"recipes/digits-plain.toml", b"a/../b\xff")
    elif name == "eps_range":
        yield from (b"2", b"0.5,1,2", b"0.5..3", b"0.5..3:0.25", b"1e-3..1_0", b" 1 , inf")
    elif name == "package_config":
        folder = SCRATCH / "seed"
        if not folder.exists():
            package.write(folder, config=CONFIG, weights={"w": np.ones(2, np.float32)})
        yield (folder / "config.json").read_bytes()
    elif name == "safetensors_file":
        from safetensors.numpy import save

        yield save({"a": np.ones((2, 3), np.float32), "b": np.arange(3)}, metadata={"format": "pt"})
        yield save({"h": np.ones(3, np.float16), "t": np.array([True]), "z": np.zeros((0, 2), np.uint8)})
    elif name == "onnx_metadata":
        yield json.dumps(CONFIG).encode()
    elif name == "tar_archive":
        for mode in ("w", "w:gz", "w:xz", "w:bz2"):
            for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
                stream = io.BytesIO()
                with tarfile.open(fileobj=stream, mode=mode, format=form) as archive:  # type: ignore[call-overload]
                    for member in ("train/cat/1.png", "train/dog/" + "n" * 90 + ".png", "x/" * 60 + "1.jpg"):
                        entry = tarfile.TarInfo(member)
                        entry.size = 5
                        archive.addfile(entry, io.BytesIO(b"bytes"))
                yield stream.getvalue()
    elif name == "zip_archive":
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w", method) as packed:
                packed.writestr("train/cat/1.png", b"bytes" * 9)
                packed.writestr("train/dog\\2.png", b"bytes")
            yield stream.getvalue()
    elif name == "source":
        yield from (b"a:train", b"a", b"b", b"c:d", b"t.tar:a/test", b"t.tar:", b"c:d:x", b"a/test/cat/2.png")
    elif name == "path_list":
        yield from (b"a.png\nb/c.jpg\n", b"a.png\0b\nc.png\0", b"x\r\ny\r\n", b"\xff\xfe.png")
    elif name == "image":
        from PIL import Image

        picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
        exif = Image.Exif()
        exif[0x0112] = 6
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"):
            stream = io.BytesIO()
            options: dict[str, Any] = {"exif": exif.tobytes()} if kind in ("PNG", "JPEG", "WEBP") else {}
            picture.save(stream, kind, **options)
            yield stream.getvalue()
        yield exif.tobytes()
    elif name == "rows":
        yield from (b'a,b.png|"x"|new\nline|tab\t', b"=1+1|\x1b[2J|\xe2\x80\xae|\x00", "ü|p:ü|null".encode())
    elif name == "signature":
        run("signature", b"")
        yield (SCRATCH / "signature").read_bytes()
        yield (SCRATCH / "release.pub").read_bytes()
