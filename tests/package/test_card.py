"""Model cards: only what the config states, safe to display, and appended text is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ratioctl import package
from ratioctl.package import card as rerendered


def test_update_leaves_a_card_that_somebody_wrote(pkg: package.ModelPackage) -> None:
    mine = package.update(pkg, card="# Mine\n")
    assert package.update(mine, config_changes={"ratio": {"temperature": 0.6}}).card == "# Mine\n"


def test_update_keeps_what_was_added_to_a_rendered_card(pkg: package.ModelPackage) -> None:
    assert pkg.card is not None
    mine = package.update(pkg, card=pkg.card + "\n## Looked at\n\nForty images.\n")
    new = package.update(mine, config_changes={"ratio": {"temperature": 0.6}})
    assert new.card == package.render_card(new.config) + "\n## Looked at\n\nForty images.\n"
    assert "temperature 0.6 " in new.card


def test_card_is_honest_and_inert(
    tmp_path: Path, package_config: dict[str, Any], tensors: dict[str, np.ndarray]
) -> None:
    hostile = ["<script>alert(1)</script>", "a|b\x1b[2J\n# c"]
    made = package.write(
        tmp_path / "p", config={**package_config, "label_names": hostile, "ratio": {}}, weights=tensors
    )
    assert made.label_names == tuple(hostile)
    assert made.card is not None
    assert made.card.startswith('---\nlibrary_name: "ratioctl"\n')
    assert "<script>" not in made.card
    assert "\x1b" not in made.card
    assert "a\\|b\\\\x1b\\[2J\\\\n\\# c" in made.card
    assert "**Not calibrated**" in made.card
    assert "nothing is claimed" in made.card
    assert made.card == package.render_card(made.config)
    assert made.card == package.render_card(package.update(made, onnx=b"x").config)


@pytest.mark.parametrize(
    ("objective", "thresholds", "tags"),
    [
        (None, {}, []),
        ({"inside": {"robust": 0.0}}, {"tpr95": 0.4}, ["out-of-distribution-detection"]),
        ({"inside": {"robust": 1.0}}, {}, ["adversarial-robustness"]),
        (
            {"inside": {"robust": 1.0}, "outside": {"robust": 1.0}},
            {"tpr95": 0.4},
            ["adversarial-robustness", "out-of-distribution-detection", "ratio"],
        ),
    ],
)
def test_tags_follow_the_objective_and_the_calibration(
    package_config: dict[str, Any], objective: object, thresholds: dict[str, float], tags: list[str]
) -> None:
    ratio = {"format": 1, "thresholds": thresholds, "objective": objective}
    card = package.render_card({**package_config, "ratio": ratio})
    assert f"tags: {json.dumps(['image-classification', *tags])}" in card.splitlines()


def test_a_card_of_an_earlier_version_is_brought_up_to_date(pkg: package.ModelPackage) -> None:
    assert pkg.card is not None
    earlier = re.sub(r"tags: .*", rerendered._TAGS, pkg.card, count=1)
    for before, after in (
        *(rerendered._KEEPS, rerendered._NORMALIZES, rerendered._KNOWS, rerendered._REACTS),
    ):
        assert after in earlier
        earlier = earlier.replace(after, before)
    old = package.update(pkg, card=earlier + "\n## Intended use\n\nNone.\n")
    new = package.update(old, config_changes={"ratio": {"metrics": [{"name": "accuracy", "value": 0.9}]}})
    assert new.card is not None
    assert new.card == package.render_card(new.config) + "\n## Intended use\n\nNone.\n"


def test_measurements_and_objective_are_in_words(pkg: package.ModelPackage) -> None:
    attack = {"ball": {"p": 2, "eps": 0.3}, "method": "pgd", "steps": 2}
    objective = {
        "inside": {"clean": 1.0, "robust": 6.0, "against": "clean", "attack": attack},
        "outside": {"clean": 0.0, "robust": 1.0, "against": "target", "attack": attack},
    }
    metrics = [
        {"name": name, "value": 0.5} for name in ("kept_at_tpr95", "let_through_at_mine", "mmc", "new")
    ]
    config = {**pkg.config, "ratio": {**pkg.config["ratio"], "objective": objective, "metrics": metrics}}
    card = package.render_card(config)
    rows = [
        line.split(" | ")[0] for line in card.partition("## Measurements")[2].splitlines() if " 0.5 " in line
    ]
    names = ["ID acceptance rate at tpr95", "OOD acceptance rate at mine", "mean confidence", "new"]
    assert rows == [f"| {name}" for name in names]
    assert (
        "Training objective: in-distribution images: cross-entropy, weight 1 and KL divergence under attack "
        "within l2 0.3 (pgd, 2 steps), weight 6; out-of-distribution images: cross-entropy under attack "
        "within l2 0.3 (pgd, 2 steps), weight 1."
    ) in card
    odd = {**config, "ratio": {**config["ratio"], "objective": {"inside": {"robust": 1.0}}}}
    assert "Training objective: inside robust 1." in package.render_card(odd)


def test_measurements_of_cards_until_0_2_are_renamed(pkg: package.ModelPackage) -> None:
    metrics = [{"name": "kept_at_tpr95", "value": 0.5}]
    given = {**pkg.config, "ratio": {**pkg.config["ratio"], "metrics": metrics}}
    earlier = rerendered._render(given, earlier=True)
    assert "| kept\\_at\\_tpr95 |" in earlier
    card = rerendered.rerender(earlier + "\nMine.\n", given, given)
    assert card == package.render_card(given) + "\nMine.\n"
