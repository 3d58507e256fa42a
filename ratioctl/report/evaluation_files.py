"""The files of an evaluation: JSON, Markdown, HTML, Parquet."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from ratioctl.errors import OutputError
from ratioctl.report.html import page
from ratioctl.report.markdown import markdown
from ratioctl.types import Evaluation
from ratioctl.utils.atomic_files import make_folder, write_files

NAMES = ("report.json", "report.md", "report.html", "examples.parquet")


def refuse_foreign(out: Path) -> None:
    """Raise OutputError where a report in `out` would replace a file that no evaluation wrote."""
    existing = [out / name for name in NAMES if (out / name).exists()]
    if not existing:
        return
    try:
        document = json.loads((out / "report.json").read_bytes())
        ours = str(document["schema"]).startswith("ratioctl/evaluation/")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise OutputError(existing[0], "exists and was not written by ratioctl", "Choose another --out.")


def write(evaluation: Evaluation, out: Path) -> list[Path]:
    """Write all files into the folder `out`; without space for all of them the old ones remain.

    Raises:
        OutputError, DiskError: it cannot be written.
    """
    refuse_foreign(out)
    make_folder(out)
    document = json.dumps(finite(evaluation.to_json()), indent=1, allow_nan=False)
    contents = {
        "report.json": document.encode(),
        "report.md": markdown(evaluation).encode(),
        "report.html": page(evaluation).encode(),
        "examples.parquet": parquet(evaluation),
    }
    write_files({out / name: content for name, content in contents.items()})
    return [out / name for name in contents]


def parquet(evaluation: Evaluation) -> bytes:
    """`examples.parquet`: one row per example and attack."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = [model.examples for model in evaluation.models]
    columns = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    arrays = {
        key: pa.array(column, pa.string()).dictionary_encode() if column.dtype == object else pa.array(column)
        for key, column in columns.items()
        if key not in ("label", "verdict")
    }
    arrays["label"] = pa.array(columns["label"], mask=columns["label"] < 0)
    arrays["verdict"] = pa.array(columns["verdict"] > 0, mask=columns["verdict"] < 0)
    stream = io.BytesIO()
    pq.write_table(pa.table({key: arrays[key] for key in columns}), stream)
    return stream.getvalue()


def finite(value: Any) -> Any:
    """A JSON document with null for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
