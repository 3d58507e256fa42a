"""The gallery of the documentation: a page and a notebook of each script in `docs/examples/`.

    python -m tools.gallery [--out docs/examples] [--no-run]

Scripts have the percent format of Jupytext: "# %%" begins a cell, "# %% [markdown]" a text. Each is
executed in a new kernel and a folder of its own; a cell that fails ends the build. What is written is not
kept in the repository: NAME.ipynb with the outputs, NAME.md and its pictures, and index.md. `--no-run`
leaves the outputs out.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from tools.harness import ROOT

SCRIPTS = ROOT / "docs" / "examples"
INDEX = """# Examples

Complete scripts as pages, with the output of the run that built this site. Each page ends with links to its
script and its notebook; they need `pip install "ratioctl[torch]"` and no other files.

"""


def notebook_of(script: Path) -> Any:
    """The script as a notebook without outputs."""
    import jupytext

    notebook = jupytext.read(script, fmt="py:percent")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"  # random otherwise
    return notebook


def run(notebook: Any) -> None:
    """Execute it in place, in a new folder. Raises nbclient's CellExecutionError, with the traceback."""
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=1800, startup_timeout=600, resources={"metadata": {"path": folder}}
        ).execute()


def page(notebook: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown with the outputs, and the pictures that it names."""
    from nbconvert import MarkdownExporter

    for cell in notebook.cells:
        if "outputs" in cell:
            cell["outputs"] = [one for one in cell["outputs"] if one.get("name") != "stderr"]
    exporter = MarkdownExporter()
    exporter.register_filter("indent", fenced)  # the template indents text, which has no language then
    files = {"unique_key": name, "output_files_dir": f"{name}_files"}
    body, resources = exporter.from_notebook_node(notebook, files)
    body = re.sub(r"\n\s*\n+", "\n\n", body).strip()
    pictures = {file: content for file, content in resources["outputs"].items() if file in body}
    return f"{body}\n\n[Script]({name}.py) · [Notebook]({name}.ipynb)\n", pictures


def fenced(text: str) -> str:
    """A text output as a code block."""
    return f"```text\n{text.strip()}\n```\n" if text.strip() else ""


def title(script: Path) -> str:
    """The first heading of a script."""
    found = re.search(r"^# # (.+)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else script.stem


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=SCRIPTS)
    parser.add_argument("--no-run", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small are slower with more
    import nbformat

    options.out.mkdir(parents=True, exist_ok=True)
    scripts = sorted(SCRIPTS.glob("*.py"))
    for script in scripts:
        notebook = notebook_of(script)
        if not options.no_run:
            run(notebook)
        text, pictures = page(notebook, script.stem)
        for name, content in pictures.items():
            path = options.out / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        (options.out / f"{script.stem}.md").write_text(text, encoding="utf-8")
        nbformat.write(notebook, options.out / f"{script.stem}.ipynb")
        print(script.stem)
    links = [f"- [{title(script)}]({script.stem}.md)\n" for script in scripts]
    (options.out / "index.md").write_text(INDEX + "".join(links), encoding="utf-8")


if __name__ == "__main__":
    main()
