"""The examples of the documentation print what they show."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PRINTED = {
    "counterfactuals_of_a_photograph": r"cat, confidence 0.98, out of distribution: False\n"
    r"(budget \S+: \w+, dog \S+, OOD: (True|False)\n){3}budget 3: dog, dog (0.9\d|1.00), OOD: False\n"
    r"flips at l2 \d.\d+\n",
    "onnx_in_ten_lines": r"ship, confidence 0.159, out of distribution: True\n",
    "ratio_and_plain": r"cifar10-ratio: ship, confidence 0.16, out of distribution: True\n"
    r"cifar10-plain: ship, confidence 0.92, out of distribution: False\n"
    r"cifar10-ratio: dog at budget 0.5: 0.\d\d, .*, 3: (0.9\d|1.00)\n"
    r"cifar10-plain: dog at budget 0.5: (0.9\d|1.00), .*\n",
    "own_folder": r"digit 0, digit 1, digit 2 - threshold [01]\.\d+\n"
    r"accuracy: (?:0\.9\d\d|1\.000) \(.*\)\nauroc: .*\n"
    r"\d+ of 179 sevens are flagged\n",
    "threshold_for_a_budget": r"tpr95: .*\ntpr99: .*\nbudget: .*\nguarantee: .*\nstrict: .*\n"
    r"(\S+  \S+  digits:test: \d+.\d%  photo: \d+.\d%  noise: \d+.\d%\n){5}\d+ of 200 digits are flagged\n",
    "foreign_model": r"accuracy on the images given: 0\.9\d*\ntemperature \S+ - threshold 0\.\d+\n(.+\n)+",
}


def built(name: str) -> str | None:
    """What it wrote to stdout when `make docs` ran it, if it has not changed since."""
    notebook = EXAMPLES / f"{name}.ipynb"
    if not notebook.is_file():
        return None
    cells = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    if not all("".join(cell["source"]) in script for cell in cells):
        return None
    outputs = [output for cell in cells for output in cell["outputs"] if output.get("name") == "stdout"]
    return "".join("".join(output["text"]) for output in outputs) or None


def printed(name: str, folder: Path) -> str:
    """What it writes to stdout."""
    if (found := built(name)) is not None:
        return found
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PRINTED)
def test_example(name: str, tmp_path: Path) -> None:
    assert re.fullmatch(PRINTED[name], found := printed(name, tmp_path)), found
