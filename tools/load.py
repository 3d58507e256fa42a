"""What a million images and twenty thousand calls leave behind: memory, open files, threads, rows.

    python -m tools.load [--images 1000000] [--layout folders|flat|tar] [--calls 20000] [--json FILE]

Images: a process of `ratioctl ood-score` on hard links to 64 small files (one of them damaged) in folders of
a thousand, in one folder, or in a tar, with a tiny ONNX model. Its resident memory, open files and threads
are sampled while it runs; afterwards the path, order and error of every row are checked.

Calls: the verbs of `import ratioctl` in one process, mostly `ood_score` (a third of them abandoned after the
first row, or failing), and the slow verbs a few times. Memory, open files and threads are sampled between
calls. The two parts can be run one after the other into one `--json` (`--calls 0`, then `--images 0`).
"""

from __future__ import annotations

import csv
import gc
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ratioctl.utils.atomic_files import partial
from tools import harness

LABELS = ["left", "middle", "right"]
KINDS = 64  # different files; hard links to one file are limited to 65,000 on ext4
DAMAGED = 17  # the one that is cut short
PER_FOLDER = 1000
WARM = 0.1  # share of a run after which nothing may grow


def tiny_onnx(path: Path) -> Path:
    """An ONNX file of the exported form whose logits are the means of the three channels, 8x8 pixels."""
    from onnx import TensorProto, helper, numpy_helper

    config = {
        "architecture": "channel-means",
        "label_names": LABELS,
        "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0.0] * 3, "std": [1.0] * 3},
        "ratio": {"format": 1, "temperature": 0.1, "thresholds": {"tpr95": 0.5}},
    }
    kinds = {"label": TensorProto.INT64, "is_ood": TensorProto.BOOL}
    wide = ("logits", "probabilities")
    outputs = [
        helper.make_tensor_value_info(
            name, kinds.get(name, TensorProto.FLOAT), ["N", 3][: 1 + (name in wide)]
        )
        for name in (*wide, "label", "confidence", "ood_score", "is_ood")
    ]
    nodes = [
        helper.make_node("ReduceMean", ["image", "space"], ["logits"], keepdims=0),
        helper.make_node("Div", ["logits", "temperature"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["probabilities"], axis=1),
        helper.make_node("ReduceMax", ["probabilities", "first"], ["confidence"], keepdims=0),
        helper.make_node("ArgMax", ["probabilities"], ["label"], axis=1, keepdims=0),
        helper.make_node("Sub", ["one", "confidence"], ["ood_score"]),
        helper.make_node("Less", ["confidence", "threshold"], ["is_ood"]),
    ]
    values = {"space": np.array([2, 3]), "first": np.array([1]), "one": np.float32(1)}
    values |= {"temperature": np.float32(0.1), "threshold": np.float32(0.5)}
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 8, 8])
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", [image], outputs, constants),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    entry = model.metadata_props.add()
    entry.key, entry.value = "ratioctl", json.dumps(config)
    path.write_bytes(model.SerializeToString())
    return path


def package_of(folder: Path) -> Path:
    """A package of a small random ResNet; its ONNX file is the tiny one, which loads faster."""
    import torch

    from ratioctl import package
    from ratioctl.models import build

    torch.manual_seed(0)
    network = build("resnet18", num_classes=3, width=4, mean=[0.5] * 3, std=[0.25] * 3).network
    state = {k: v.numpy() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    config = {
        "architecture": "resnet18",
        "architecture_options": {"width": 4},
        "label_names": LABELS,
        "pretrained_cfg": {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.25] * 3},
        "ratio": {"temperature": 0.5, "thresholds": {"tpr95": 0.5}, "ladders": {"2": [0.25, 0.5]}},
    }
    package.write(folder, config=config, weights=state, onnx=tiny_onnx(folder.parent / "tiny.onnx"))
    return folder


# --- a million images ---------------------------------------------------------------------------------------


def kinds() -> list[bytes]:
    """The different files: PNGs and JPEGs of noise, 8x8 to 23x23, one of them cut short."""
    rng = np.random.default_rng(0)
    files = []
    for k in range(KINDS):
        pixels = rng.integers(0, 256, (8 + k % 16, 8 + k % 7, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG" if k % 2 else "PNG")
        files.append(stream.getvalue())
    files[DAMAGED] = files[DAMAGED][: len(files[DAMAGED]) // 2]
    return files


def name_of(k: int, layout: str) -> str:
    """The path of image `k` inside the folder or archive; ascending, as they are listed."""
    suffix = "jpg" if k % KINDS % 2 else "png"
    return f"{k:07d}.{suffix}" if layout == "flat" else f"{k // PER_FOLDER:04d}/{k % PER_FOLDER:03d}.{suffix}"


def lay_out(where: Path, count: int, layout: str) -> Path:
    """`count` images as hard links in folders, or in a tar; the path to score."""
    files = kinds()
    if layout == "tar":
        with tarfile.open(where / "images.tar", "w") as archive:
            for k in range(count):
                entry = tarfile.TarInfo(name_of(k, layout))
                entry.size = len(files[k % KINDS])
                archive.addfile(entry, io.BytesIO(files[k % KINDS]))
                archive.members.clear()  # type: ignore[attr-defined] # or it would keep a million
        return where / "images.tar"
    (where / "kinds").mkdir()
    for k, data in enumerate(files):
        (where / "kinds" / str(k)).write_bytes(data)
    root = where / "images"
    root.mkdir()
    sources = [str(where / "kinds" / str(k)) for k in range(KINDS)]
    for k in range(count):
        path = f"{root}/{name_of(k, layout)}"
        if layout == "folders" and k % PER_FOLDER == 0:
            os.mkdir(os.path.dirname(path))
        os.link(sources[k % KINDS], path)
    return root


def sample(pid: int | str) -> dict[str, int]:
    """Resident memory in bytes, open files and threads of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def watched(line: Sequence[str], rows: Path, every_s: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a command; its JSON summary, and samples with the bytes of rows written by then."""
    samples = []
    growing = partial(rows)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                written = growing.stat().st_size if growing.exists() else 0
                samples.append({"written": written, **sample(process.pid)})
            except OSError:  # it ended between two looks
                break
            time.sleep(every_s)
        assert process.stdout is not None
        summary = json.loads(process.stdout.read())
    return summary, [s for s in samples if s["written"]]


def check_rows(rows: Path, target: Path, count: int, layout: str) -> dict[str, int]:
    """Read every row; raises where one is not what it must be. Counts of rows and of errors."""
    joint = ":" if layout == "tar" else "/"
    seen = errors = 0
    with rows.open(newline="", encoding="utf-8") as stream:
        for seen, row in enumerate(csv.DictReader(stream), 1):
            expected = f"{target}{joint}{name_of(seen - 1, layout)}"
            damaged = (seen - 1) % KINDS == DAMAGED
            if row["path"] != expected or bool(row["error"]) != damaged or (row["label"] == "") != damaged:
                raise SystemExit(f"row {seen} is {row}, expected {expected}, damaged: {damaged}")
            errors += damaged
    if seen != count:
        raise SystemExit(f"{seen} rows for {count} images")
    return {"rows": seen, "errors": errors}


def growth(at: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    """How values change over `at` (images or calls) after the first tenth: slope and greatest rise."""
    first = next(k for k, x in enumerate(at) if x >= WARM * at[-1])
    x, y = np.array(at[first:], float), np.array(values[first:], float)
    slope = float(np.polyfit(x, y, 1)[0]) if len(x) > 2 and np.ptp(x) > 0 else 0.0
    return {"at_a_tenth": float(y[0]), "at_the_end": float(y[-1]), "most": float(y.max()), "slope": slope}


def many_images(count: int, layout: str, base: Path) -> dict[str, Any]:
    """Score `count` images in another process and measure what it used."""
    where = base / layout
    where.mkdir()
    target, rows = lay_out(where, count, layout), where / "rows.csv"
    line = [sys.executable, "-m", "ratioctl", "ood-score", str(target), "--json", "--skip-errors"]
    line += ["--model", str(tiny_onnx(where / "tiny.onnx")), "--format", "csv", "--output", str(rows)]
    summary, samples = watched(line, rows, every_s=min(2.0, max(0.05, count / 200_000)))
    whole = rows.stat().st_size
    done = [s["written"] / whole * count for s in samples]  # rows are of nearly one length
    result = {
        "layout": layout,
        "images": count,
        **check_rows(rows, target, count, layout),
        "summary": {key: summary[key] for key in ("images", "errors", "backend", "images_per_second")},
        "seconds": summary["seconds"],
        "samples": len(samples),
        "rss_bytes_by_images": growth(done, [s["rss"] for s in samples]),
        "open_files": [min(s["open_files"] for s in samples), max(s["open_files"] for s in samples)],
        "threads": [min(s["threads"] for s in samples), max(s["threads"] for s in samples)],
        "rss_mib": [
            {"images": round(done[k]), "mib": round(samples[k]["rss"] / 2**20, 1)}
            for k in sorted({round(t * (len(samples) - 1)) for t in np.linspace(0, 1, 21)})
        ],
    }
    shutil.rmtree(where)
    return result


# --- twenty thousand calls ----------------------------------------------------------------------------------


def verbs(base: Path) -> dict[str, tuple[int, Callable[[], object]]]:
    """Every verb with its number of calls of 20,000."""
    import ratioctl
    from ratioctl.errors import RatioctlError

    photos, model, onnx = base / "photos", base / "model", base / "model" / "model.onnx"
    rng = np.random.default_rng(1)
    for label in LABELS:
        (photos / label).mkdir(parents=True)
        for k in range(4):
            image = Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8))
            image.save(photos / label / f"{k}.png")
    (photos / "left" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    one = photos / "left" / "0.png"
    with tarfile.open(base / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
    fast = {"device": "cpu"}

    def abandoned() -> None:
        next(ratioctl.ood_score([photos, base / "photos.tar"], model=onnx))

    def refused() -> None:
        try:
            list(ratioctl.ood_score([base / "nowhere"], model=onnx))
        except RatioctlError:
            return
        raise SystemExit("a missing folder was scored")

    def trained() -> None:
        settings = ["model.width=4", "optim.epochs=0.05"]
        with tempfile.TemporaryDirectory(dir=base) as run:
            ratioctl.train("digits-plain", settings=settings, out=Path(run) / "run", **fast)

    def explained() -> None:
        ratioctl.counterfactual(
            [one], target="right", eps="0.5", steps=2, model=model, out=base / "cf", **fast
        )

    return {
        "ood_score, one image, ONNX": (9_000, lambda: list(ratioctl.ood_score([one], model=onnx))),
        "ood_score, a folder, package": (2_000, lambda: list(ratioctl.ood_score([photos], model=model))),
        "ood_score, a tar, probabilities": (
            1_500,
            lambda: list(ratioctl.ood_score([base / "photos.tar"], model=onnx, probabilities=True)),
        ),
        "ood_score, abandoned after a row": (4_000, abandoned),
        "ood_score, refused": (2_000, refused),
        "load_model": (1_000, lambda: ratioctl.load_model(model)),
        "counterfactual, files written": (300, explained),
        "calibrate": (
            190,
            lambda: ratioctl.calibrate(model, data=str(photos), out=base / "calibrated", **fast),
        ),
        "train": (5, trained),
        "export": (3, lambda: ratioctl.export(model, output=base / "again.onnx")),
        "evaluate": (2, lambda: ratioctl.evaluate(model, data=str(photos), limit=2, **fast)),
    }


def order_of(counts: dict[str, int]) -> Iterator[str]:
    """Names as often as `counts` says, in a fixed random order after one call of each."""
    rest = [name for name, count in counts.items() for _ in range(count - 1)]
    random.Random(0).shuffle(rest)
    yield from counts
    yield from rest


def many_calls(calls: int, base: Path) -> dict[str, Any]:
    """Call the verbs in this process and measure what stays."""
    table = verbs(base)
    counts = {name: max(1, round(count * calls / 20_000)) for name, (count, _) in table.items()}
    if calls < 5_000:  # the slow ones cost a minute each
        for name in ("export", "evaluate", "train"):
            del counts[name]
    every = max(1, calls // 200)
    samples, started = [], time.perf_counter()
    total = 0
    for total, name in enumerate(order_of(counts), 1):
        table[name][1]()
        if total % every == 0:
            gc.collect()
            samples.append({"calls": total, **sample("self")})
    settled = [s for s in samples if s["calls"] >= WARM * total]
    return {
        "calls": total,
        "by_verb": counts,
        "seconds": time.perf_counter() - started,
        "samples": len(samples),
        "rss_bytes_by_calls": growth([s["calls"] for s in samples], [s["rss"] for s in samples]),
        "open_files": [min(s["open_files"] for s in settled), max(s["open_files"] for s in settled)],
        "threads": [min(s["threads"] for s in settled), max(s["threads"] for s in settled)],
        "threads_of_ours_at_the_end": sum(t.name.startswith("score-") for t in threading.enumerate()),
        "rss_mib": [
            {"calls": samples[k]["calls"], "mib": round(samples[k]["rss"] / 2**20, 1)}
            for k in sorted({round(t * (len(samples) - 1)) for t in np.linspace(0, 1, 21)})
        ],
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--images", type=int, default=1_000_000, help="0 leaves this part out")
    parser.add_argument("--layout", action="append", choices=["folders", "flat", "tar"])
    parser.add_argument("--calls", type=int, default=20_000, help="0 leaves this part out")
    parser.add_argument("--scratch", type=Path, help="a folder with room for a million hard links")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "load", "processors": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        base = Path(scratch)
        if options.images:
            layouts = options.layout or ["folders"]
            result["images"] = [many_images(options.images, layout, base) for layout in layouts]
        if options.calls:
            package_of(base / "model")
            result["calls"] = many_calls(options.calls, base)
    if options.json is not None and options.json.exists():
        result = {**json.loads(options.json.read_bytes()), **result}
    harness.finish(result, options)


if __name__ == "__main__":
    main()
