"""`report.md` of an evaluation."""

from __future__ import annotations

import re
from typing import Any

from ratioctl.report.evaluation_tables import tables
from ratioctl.report.table import ROLES, Table
from ratioctl.types import Evaluation
from ratioctl.utils.text import safe_text


def markdown(evaluation: Evaluation) -> str:
    """The tables, the warnings, the data."""
    lines = [f"# Evaluation of {', '.join(escaped(model.name) for model in evaluation.models)}", ""]
    protocol = f"Suite {escaped(evaluation.suite)}: {escaped(evaluation.protocol)}."
    lines += [f"{protocol} Brackets contain 95 % intervals.", ""]
    for model in evaluation.models:
        prefix = f"{model.name}: " if len(evaluation.models) > 1 else ""
        lines += [f"- **Warning:** {escaped(prefix + warning)}" for warning in model.report.warnings]
    for table in tables(evaluation):
        lines += _table(table)
    lines += ["", "## Data and environment", "", "| set | source | role | n | fingerprint |"]
    lines += ["|---|---|---|---:|---|"]
    for entry in evaluation.data:
        role, fingerprint = ROLES[entry["role"]], entry["fingerprint"][:12]
        cells = [entry["name"], entry["source"], role, f"{entry['n']:,}", fingerprint]
        lines.append("| " + " | ".join(map(escaped, cells)) + " |")
    lines += [""]
    for model in evaluation.models:
        report = model.report
        lines += [f"- {escaped(model.name)}: package digest `{report.package_digest}`, seed {report.seed}"]
    return "\n".join([*lines, f"- {escaped(environment_text(evaluation))}", ""])


def _table(table: Table) -> list[str]:
    lines = ["", f"## {escaped(table.title)}", "", "| " + " | ".join(map(escaped, table.header)) + " |"]
    lines += ["|---" + "|---:" * (len(table.header) - 1) + "|"]
    for r, row in enumerate(table.rows):
        cells = [
            escaped(cell)
            + (f" ({table.intervals[r, c]})" if (r, c) in table.intervals else "")
            + (" \\*" if (r, c) in table.marked else "")
            for c, cell in enumerate(row)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", escaped(table.note)] if table.note else lines


def escaped(text: str) -> str:
    """`text` without Markdown or HTML markup and control characters."""
    return re.sub(r"([\\`*_\[\]|#~<>])", r"\\\1", safe_text(text))


def environment_text(evaluation: Evaluation) -> str:
    """Versions, hardware and precisions in one line."""

    def flat(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(
                f"{key.replace('_', ' ')} {flat(item)}" for key, item in value.items() if item is not None
            )
        return str(value)

    return flat(evaluation.environment)
