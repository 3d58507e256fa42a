"""The examples of the documentation that train a model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PRINTED = {
    "own_folder": r"digit 0, digit 1, digit 2 - threshold [01]\.\d+\naccuracy: (?:0\.9\d\d|1\.000) \(.*\)\nauroc: .*\n"
    r"\d+ of 179 sevens are flagged\n",
    "threshold_for_a_budget": r"tpr95: .*\ntpr99: .*\nbudget: .*\nguarantee: .*\nstrict: .*\n"
    r"(\S+  \S+  digits:test: \d+.\d%  photo: \d+.\d%  noise: \d+.\d%\n){5}\d+ of 200 digits are flagged\n",
    "foreign_model": r"accuracy on the images given: 0\.9\d*\ntemperature \S+ - threshold 0\.\d+\n(.+\n)+",
}


@pytest.mark.parametrize("name", PRINTED)
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTED[name], done.stdout), done.stdout
