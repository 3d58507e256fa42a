"""What the tests of formats share: the package that is kept, images of digits, and the command line.

Nothing in this folder imports more of ratioctl than its verbs and `ratioctl.cli`: what stands here holds for
users, whatever moves inside.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

DIGITS = 12


@pytest.fixture(scope="session")
def format_1() -> Path:
    """Package of format 1, trained on scikit-learn's digits, calibrated and exported. Read-only."""
    return Path(__file__).parent / "package-format-1"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first twelve of scikit-learn's digits, 8x8 grey, as 00.png, 01.png, ..."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    for k, image in enumerate(load_digits().images[:DIGITS]):
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(folder / f"{k:02}.png")
    return folder


@pytest.fixture(scope="session")
def ratioctl() -> Callable[..., tuple[int, str]]:
    """A command line -> (exit code, what it wrote to stdout)."""
    from ratioctl.cli import main

    def run(*line: object) -> tuple[int, str]:
        written = io.BytesIO()
        out = io.TextIOWrapper(written, encoding="utf-8", newline="")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            code = main([str(word) for word in line])
        out.flush()
        return code, written.getvalue().decode()

    return run
