"""Python blocks of the documentation run and print what the pages say (the site: browser/test_site.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ratioctl import cli
from tests.docs.test_site import NAMES, ROOT, blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample photographs and an exported model."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "assets").symlink_to(ROOT / "assets", target_is_directory=True)
    line = ["export", "cifar10-ratio", "--input", "uint8", "--output", str(folder / "model.onnx"), "--quiet"]
    assert cli.main(line) == 0
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(name, "python")])
def test_python_blocks_run(name: str, workplace: Path) -> None:
    for block in blocks(name, "python"):
        if "serve_forever" in block or "explain.onnx" in block:  # test_serving and test_explain_onnx run them
            continue
        done = subprocess.run(
            [sys.executable, "-c", block],
            cwd=workplace,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "rocket.jpg ship" in done.stdout or "ship 0.15" in done.stdout
