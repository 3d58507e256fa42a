"""`report.html` of an evaluation, and the template environment of all pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from ratioctl.report.evaluation_tables import tables
from ratioctl.report.figures import figures
from ratioctl.report.markdown import environment_text
from ratioctl.report.table import ROLES
from ratioctl.types import Evaluated, Evaluation
from ratioctl.utils.text import safe_text

TEMPLATES = Path(__file__).parent / "templates"

if TYPE_CHECKING:
    import numpy as np
    from jinja2 import Environment


def templates() -> Environment:
    """Jinja with the folder `templates`, automatic escaping and errors for undefined names."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(safe_text=safe_text)
    return environment


def page(evaluation: Evaluation) -> str:
    """One file with figures and pictures inside; no script, no requests."""
    text = (
        templates()
        .get_template("evaluation.html")
        .render(
            evaluation=evaluation,
            tables=tables(evaluation),
            figures=[figures(model) for model in evaluation.models],
            galleries=[_gallery(model) for model in evaluation.models],
            environment=environment_text(evaluation),
            roles=ROLES,
        )
    )
    return safe_lines(text)  # names of models and sets come from outside


def safe_lines(text: str) -> str:
    """`text` with `safe_text` applied to each line."""
    return "\n".join(map(safe_text, text.split("\n")))


def _gallery(model: Evaluated) -> dict[str, list[dict[str, str]]]:
    """Pairs of pictures by set."""
    sets: dict[str, list[dict[str, str]]] = {}
    for picture in model.gallery:
        shown = {
            "image": _data_uri(picture.image),
            "attacked": _data_uri(picture.attacked),
            "before": f"{picture.before:.2f}",
            "after": f"{picture.after:.2f}",
            "label": picture.label,
        }
        sets.setdefault(picture.dataset, []).append(shown)
    return sets


def _data_uri(image: np.ndarray) -> str:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
