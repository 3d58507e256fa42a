"""Files around the code: workflows call make targets that exist, and the tree stays small."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
yaml = pytest.importorskip("yaml")


def test_workflows_call_make_targets_that_exist() -> None:
    called = set()
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in workflow["jobs"].values():
            for step in job["steps"]:
                for line in re.findall(r"^make (.*)$", step.get("run", ""), re.MULTILINE):
                    called |= {word for word in line.split() if "=" not in word}
    assert {"lint", "test", "test-slow", "test-lowest", "docs", "check", "sbom"} <= called <= TARGETS


def test_the_citation_names_the_paper_and_the_version() -> None:
    from ratioctl import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Augustin", "Meinke", "Hein"]
    assert paper["year"] == 2020


def test_the_tracked_tree_without_models_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [
        name for name in listed.stdout.decode().split("\0") if name and not name.startswith("assets/models/")
    ]
    assert len(names) > 100
    assert sum((ROOT / name).stat().st_size for name in names if (ROOT / name).is_file()) < 10 * 2**20


@pytest.mark.parametrize("name", ["SECURITY.md", "CONTRIBUTING.md", "docs/development.md"])
def test_files_and_targets_named_in_the_documents_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|tools|benchmarks|experiments|docs|\.ci)/[\w./-]*)`", text)
    named += re.findall(r"\]\(([^)#:]+)\)", text)
    for target in named:
        assert (ROOT / target).exists() or (ROOT / name).parent.joinpath(target).exists(), target
    assert set(re.findall(r"`make ([a-z-]+)`", text)) <= TARGETS
