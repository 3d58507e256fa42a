"""The model card: README.md with the YAML front matter that model hubs read."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from ratioctl.package.config import Spec, parse_config
from ratioctl.utils.text import safe_text

# Sentences of earlier versions, so that their cards are recognised as rendered and brought up to date.
_TAGS = 'tags: ["image-classification", "adversarial-robustness", "out-of-distribution-detection", "ratio"]'
_KEEPS = (
    "`tpr95` keeps 95 % of the in-distribution images it was chosen on.",
    "`tpr95` accepts 95 % of the in-distribution images on which it was chosen.",
)
_KNOWS = (
    "- It knows only the classes above. The flag is a statistical statement: some images of other things "
    "pass, and about as many known ones are flagged as the threshold's name says.",
    "- It knows only the classes above. The flag is statistical: it misses some out-of-distribution images, "
    "and flags about as many in-distribution ones as the threshold's name says.",
)
_NORMALIZES = (
    "Normalisation is part of the model: give it pixels in [0,1] and nothing else.",
    "Normalization is part of the model: give it pixels in [0,1] and nothing else.",
)
_REACTS = (
    "- Counterfactuals show what this model reacts to, which need not be what is true of the world.",
    "- Counterfactuals show what this model responds to, which need not hold in the real world.",
)

_MEASURES = {  # names of measurements in config.json, and what they are called in the card
    "accuracy": "accuracy",
    "adaptive_ece": "ECE, bins of equal size",
    "auroc": "AUROC",
    "brier": "Brier score",
    "ece": "ECE",
    "ece_mixture": "ECE of ID and OOD images together",
    "fpr_at_95_tpr": "FPR at 95 % TPR (OOD images count as positive)",
    "mmc": "mean confidence",
    "nll": "negative log-likelihood",
    "robust_accuracy": "robust accuracy",
}
_RATES = {"kept_at_": "ID acceptance rate at ", "let_through_at_": "OOD acceptance rate at "}


def render_card(config: Mapping[str, Any]) -> str:
    """README.md for a config.

    States only what the config holds. `ratio.metrics` is a list of measurements (`{"name", "value", "n",
    "interval", "dataset", "ball"}`), or a table with such `measurements` and a list of `warnings`.
    `ratio.files` and `ratio.digest` are not used, so writing files does not change the card.
    """
    return _render(config, earlier=False)


def _render(config: Mapping[str, Any], *, earlier: bool) -> str:
    """The card, or the one that versions until 0.2 rendered, up to the sentences above."""
    spec = parse_config({**config, "ratio": {**config["ratio"]}}, "config", name="model")
    ratio = config["ratio"]
    shown, rest = spec.label_names[:100], len(spec.label_names) - 100
    more = f" and {rest} more, listed in config.json" if rest > 0 else ""
    parts = [
        _front(spec, ratio.get("objective"), earlier),
        ["## Use", "", "```python", "import ratioctl", ""],
        ['model = ratioctl.load_model("path/to/this/folder")  # pixels in [0,1], NCHW, to logits', "```", ""],
        [_NORMALIZES[1], ""],
        ["## Classes", "", ", ".join(_md(label) for label in shown) + more, ""],
        _calibration(spec, ratio.get("calibration"), ratio.get("threshold_records")),
        _certified(ratio.get("certified")),
        ["## Measurements", "", *_measurements(ratio.get("metrics"), earlier), ""],
        ["## Limits", "", _KNOWS[1]],
        [
            "- Robustness holds for small changes in the norms and radii it was measured at, not for other "
            "ones."
        ],
        [_REACTS[1], ""],
        _provenance(ratio.get("provenance")),
    ]
    return "\n".join(line for part in parts for line in part)


def rerender(card: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The card for the config `new`, with what was appended to the one for `old`; None for another card."""
    for rendered in (render_card(old), _render(old, earlier=True)):
        tags = next(line for line in rendered.splitlines() if line.startswith("tags: "))
        for before, after in ((_TAGS, tags), _KEEPS, _NORMALIZES, _KNOWS, _REACTS):
            card = card.replace(before, after, 1)
        if card.startswith(rendered):
            return render_card(new) + card.removeprefix(rendered)
    return None


def _front(spec: Spec, objective: Any, earlier: bool) -> list[str]:
    sides = objective if isinstance(objective, Mapping) else {}
    robust = [name for name, side in sides.items() if isinstance(side, Mapping) and side.get("robust")]
    tags = ["image-classification"]
    tags += ["adversarial-robustness"] if robust else []
    tags += ["out-of-distribution-detection"] if spec.calibrated else []
    tags += ["ratio"] if {"inside", "outside"} <= set(robust) else []
    front = {"library_name": "ratioctl", "pipeline_tag": "image-classification", "tags": tags}
    channels, height, width = spec.input_size
    summary = f"A {_md(spec.architecture)}{_options(spec.architecture_options)} image classifier with "
    summary += f"{len(spec.label_names)} classes for {channels}x{height}x{width} input, packaged by ratioctl."
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {_md(spec.name)}", "", summary, ""]
    stated = inline(objective) if earlier else _objective(objective)
    return lines + ([f"Training objective: {_md(stated)}.", ""] if objective else [])


def _certified(stated: Any) -> list[str]:
    """What the certified head guarantees; nothing without one."""
    if not isinstance(stated, Mapping) or not isinstance(stated.get("statement"), str):
        return []
    return ["## Guarantee", "", _md(stated["statement"]), ""]


def _objective(objective: Any) -> str:
    """The terms of `ratio.objective` in words; of another form as it is."""
    sides = []
    try:
        for key, images in (("inside", "in-distribution"), ("outside", "out-of-distribution")):
            side = objective.get(key) or {}
            terms = [f"cross-entropy, weight {side['clean']:g}"] if side.get("clean") else []
            if side.get("robust"):
                attack = side["attack"]
                loss = "KL divergence" if side.get("against") == "clean" else "cross-entropy"
                terms.append(
                    f"{loss} under attack within {inline(attack['ball'])} ({attack['method']}, "
                    f"{attack['steps']} steps), weight {side['robust']:g}"
                )
            if terms:
                sides.append(f"{images} images: {' and '.join(terms)}")
    except (AttributeError, KeyError, TypeError, ValueError):
        return inline(objective)
    head = objective.get("certified")
    if isinstance(head, Mapping) and "eps" in head:
        return f"a certified head on a finished network, linf radius {inline(head['eps'])}"
    return "; ".join(sides) or inline(objective)


def _rules(records: Any) -> list[str]:
    """The rules of thresholds and what they accept, from `ratio.threshold_records`."""
    lines = []
    for record in records if isinstance(records, list) else ():
        try:
            parts = [("ID", record["id"]), *(("OOD", part) for part in record["ood"])]
            rates = [
                f"{part['rate']:.1%} of {part['n']} {kind} images ({_md(inline(part['set']))}"
                + (f", attacked in {inline(part['ball'])}" if part.get("ball") else "")
                + f"; {part['interval'][0]:.1%} to {part['interval'][1]:.1%})"
                for kind, part in parts
            ]
            lines.append(f"- {_md(record['name'])}, rule {_md(record['rule'])}: accepts {', '.join(rates)}.")
            if record.get("statement"):
                lines.append(f"  {_md(record['statement'])} Assumes: {_md(inline(record['assumptions']))}.")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue  # damaged; `ratioctl thresholds` reports it
    head = "Acceptance rates on the calibration images, with exact 95 % intervals:"
    return ["", head, "", *lines] if lines else []


def _calibration(spec: Spec, calibration: Any, records: Any) -> list[str]:
    lines = ["## Calibration", ""]
    if spec.calibrated:
        lines += [
            f"Logits are divided by the temperature {spec.temperature:.6g} before the softmax. An image "
            "counts as out of distribution where its highest probability is below the threshold:"
        ]
        lines += ["", "| threshold | confidence |", "|---|---|"]
        lines += [f"| {_md(key)} | {value:.6g} |" for key, value in sorted(spec.thresholds.items())]
        lines += ["", _KEEPS[1], *_rules(records)]
    else:
        lines += [
            "**Not calibrated**: temperature 1, no thresholds. Its confidences mean little, and it cannot "
            "flag images; run `ratioctl calibrate` first."
        ]
    if isinstance(calibration, Mapping) and calibration:
        lines += ["", "| calibration | |", "|---|---|", *_rows(calibration)]
    return [*lines, ""]


def _provenance(provenance: Any) -> list[str]:
    if not isinstance(provenance, Mapping) or not provenance:
        return []
    closing = "The complete recipe is in `recipe.toml` where the model was trained with ratioctl."
    return ["## Provenance", "", "| | |", "|---|---|", *_rows(provenance), "", closing, ""]


def _rows(table: Mapping[str, Any]) -> list[str]:
    return [f"| {_md(key)} | {_md(inline(value))} |" for key, value in table.items()]


def _measurements(metrics: Any, earlier: bool) -> list[str]:
    warnings: Any = []
    if isinstance(metrics, Mapping) and "measurements" in metrics:
        metrics, warnings = metrics["measurements"], metrics.get("warnings", [])
    if isinstance(metrics, Mapping):
        metrics = [{"name": key, "value": value} for key, value in metrics.items()]
    rows = [row for row in metrics if isinstance(row, Mapping)] if isinstance(metrics, list) else []
    if not rows:
        return ["None yet: nothing is claimed about its accuracy, robustness or detection."]
    lines = ["| measurement | value | 95 % interval | n | data | ball |", "|---|---|---|---|---|---|"]
    for row in rows:
        interval = row.get("interval")
        shown = " to ".join(inline(end) for end in interval) if isinstance(interval, list | tuple) else "-"
        name = inline(row.get("name"))
        cells = [name if earlier else _measure(name), inline(row.get("value")), shown]
        cells += [inline(row[key]) if row.get(key) is not None else "-" for key in ("n", "dataset", "ball")]
        if row.get("ball") is not None and row.get("attack"):  # a rate under attack is worth what attacked it
            cells[-1] += f" ({inline(row['attack'])})"
        lines.append("| " + " | ".join(_md(cell) for cell in cells) + " |")
    if isinstance(warnings, list) and warnings:
        lines += ["", *(f"- Warning: {_md(inline(warning))}" for warning in warnings)]
    return lines


def _measure(name: str) -> str:
    """What a measurement is called in a card."""
    for prefix, shown in _RATES.items():
        if name.startswith(prefix):
            return shown + name.removeprefix(prefix)
    return _MEASURES.get(name, name)


def inline(value: object) -> str:
    """A JSON value in one line of prose."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        if set(value) == {"p", "eps"}:
            return f"l{value['p']} {inline(value['eps'])}"
        return ", ".join(f"{key} {inline(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(inline(item) for item in value)
    return str(value)


def _options(options: Mapping[str, Any]) -> str:
    return f" ({_md(inline(options))})" if options else ""


def _md(text: str) -> str:
    """Text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(safe_text(text), quote=False))
