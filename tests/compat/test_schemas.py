"""The documents that commands write, against the JSON Schemas in `schemas/`.

The schemas say what scripts may rely on: a key that goes, or one that is added without standing there, fails.
Every document is also damaged in every place, one at a time, to see that its schema notices.
"""

from __future__ import annotations

import copy
import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from referencing import Registry, Resource

Run = Callable[..., tuple[int, str]]

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    path.name: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "schemas").glob("*.json"))
}
REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items()
)
HEADER = ["path", "label", "confidence", "ood_score", "is_ood", "error"]
CLASSES = [f"p:{k}" for k in range(10)]
WORST = ["worst_case_confidence", "worst_case_is_ood"]
EXPLAIN = ["margin", "runner_up", "percentile", "reason"]
CHECKS = ["width", "height", "blank", "saturated", "duplicate", "notes", "pixels_sha256"]


def validator(name: str) -> Draft202012Validator:
    """Of a file in `schemas/`, or of a part of one: "measurement.json#/$defs/attacks"."""
    return Draft202012Validator({"$ref": name}, registry=REGISTRY)


def check(name: str, document: Any) -> None:
    faults = [f"{fault.json_path}: {fault.message:.300}" for fault in validator(name).iter_errors(document)]
    assert not faults, "\n".join(faults)


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- the documents -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(format_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that may be written."""
    return Path(shutil.copytree(format_1, tmp_path_factory.mktemp("package") / "copy"))


@pytest.fixture(scope="module")
def damaged(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one digit and one file that is not an image."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(digits / "00.png", folder)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def counterfactuals(
    ratioctl: Run, package: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Of one image and two targets: one flips in the ball, the other does not."""
    out = tmp_path_factory.mktemp("counterfactuals")
    line = ("counterfactual", digits / "00.png", "--target", "2,3", "--eps", "0.05,2.5", "--steps", 5)
    more = ("--device", "cpu", "--precision", "fp32", "--json")
    code, shown = ratioctl(*line, "--model", package, "--out", out, *more)
    assert code == 0
    document = load(out / "counterfactuals.json")
    assert json.loads(shown) == document
    return document


@pytest.fixture(scope="module")
def report(ratioctl: Run, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the suite quick; the measurements are also in the package."""
    out = tmp_path_factory.mktemp("quick")
    line = ("evaluate", package, "--data", "digits:test", "--ood", "uni=noise:uniform", "--limit", 2)
    code, _ = ratioctl(*line, "--suite", "quick", "--write", "--out", out, "--device", "cpu")
    assert code == 0
    return load(out / "report.json")


@pytest.fixture(scope="module")
def explanations(ratioctl: Run, package: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("explanations")
    line = ("evaluate", package, "--data", "digits:test", "--ood", "uni=noise:uniform", "--limit", 1)
    code, _ = ratioctl(*line, "--suite", "explanations", "--judge", package, "--out", out, "--device", "cpu")
    assert code == 0
    return load(out / "report.json")


@pytest.fixture(scope="module")
def rows(ratioctl: Run, package: Path, damaged: Path) -> list[Any]:
    """With every column: one image, one file that cannot be read."""
    line = ("ood-score", damaged, "--model", package, "--format", "jsonl", "--device", "cpu")
    code, shown = ratioctl(*line, "--probabilities", "--worst-case", 0.2, "--explain", "--checks")
    assert code == 3
    return [json.loads(text) for text in shown.splitlines()]


@pytest.fixture(scope="module")
def summary(ratioctl: Run, format_1: Path, damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    code, shown = ratioctl("ood-score", damaged, "--model", format_1, "--output", output, "--json")
    assert code == 3
    assert len(output.read_text(encoding="utf-8").splitlines()) == 2
    return json.loads(shown)


@pytest.fixture(scope="module")
def thresholds(ratioctl: Run, format_1: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By rules with and without a guarantee, per class, with a risk, and under attack."""
    out = tmp_path_factory.mktemp("calibrated") / "package"
    line = ["calibrate", format_1, "--data", "digits:test", "--ood", "uni=noise:uniform", "--out", out]
    for rule in (
        "kept=keep:0.9",
        "sure=conformal:0.1",
        "right=risk:0.2",
        "w=worst-pass:0.9@uni:eps=0.1:n=2:steps=1",
    ):
        line += ["--threshold", rule]
    assert ratioctl(*line, "--per-class", "--device", "cpu")[0] == 0
    code, shown = ratioctl("thresholds", out, "--json")
    assert code == 0
    return json.loads(shown)


@pytest.fixture(scope="module")
def config(report: Any, package: Path) -> Any:
    """Of a package that was trained, calibrated, exported and evaluated."""
    return load(package / "config.json")


# --- documents fit their schemas ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_valid(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["$id"] == name
    assert SCHEMAS[name]["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


def test_an_invalid_schema_is_found() -> None:
    with pytest.raises(SchemaError):
        Draft202012Validator.check_schema({**SCHEMAS["config.json"], "required": "ratio"})


def test_counterfactuals(counterfactuals: Any) -> None:
    check("counterfactuals.json", counterfactuals)
    (image,) = counterfactuals["images"]
    assert [target["target"] for target in image["targets"]] == ["2", "3"]
    assert [target["flip_eps"] is None for target in image["targets"]] == [False, True]
    assert [budget["eps"] for budget in image["targets"][0]["budgets"]] == [0.05, 2.5]


def test_counterfactuals_with_everything_that_is_optional(
    ratioctl: Run, package: Path, damaged: Path, tmp_path: Path
) -> None:
    line = ("counterfactual", damaged, "--target", "second", "--norm", "2", "--norm", "inf", "--steps", 1)
    more = ("--until", 0.9, "--region", "1,1,6,6", "--restarts", 2, "--device", "cpu")
    code, _ = ratioctl(*line, *more, "--model", package, "--out", tmp_path)
    assert code == 3
    document = load(tmp_path / "counterfactuals.json")
    check("counterfactuals.json", document)
    assert [image["norm"] for image in document["images"]] == ["2", "inf"]
    assert document["until"] == 0.9
    assert document["models"][0]["region"] == {"box": [1, 1, 6, 6], "pixels": 36}
    assert [error["path"] for error in document["errors"]] == [f"{damaged}/broken.png"]


def test_the_report_of_the_suite_quick(report: Any) -> None:
    check("report.json", report)
    assert [entry["role"] for entry in report["data"]] == ["inside", "outside"]
    assert {(row["name"], row["dataset"]) for row in report["models"][0]["measurements"]} == {
        *((name, "digits:test") for name in ("accuracy", "accuracy_before_attack", "robust_accuracy")),
        *((f"accuracy_after_{attack}", "digits:test") for attack in ("apgd_ce", "apgd_t")),
        *(
            (name + suffix, "digits:test")
            for name in ("ece", "adaptive_ece", "nll", "brier", "mmc")
            for suffix in ("", "_uncalibrated")
        ),
        *((f"ece_mixture{suffix}", "digits:test + uni") for suffix in ("", "_uncalibrated")),
        *((f"kept_at_{name}", "digits:test") for name in ("tpr95", "tpr99")),
        *((name, "digits:test") for name in ("aurc", "coverage_at_risk_0.01", "coverage_at_risk_0.05")),
        *(
            (name, dataset)
            for name in (
                *("auroc", "conservative_auroc", "fpr_at_95_tpr", "aupr_out", "aupr_in", "mmc"),
                *("auroc_inside_attacked", "conservative_auroc_inside_attacked"),
                *("auroc_both_attacked", "conservative_auroc_both_attacked"),
                *("let_through_at_tpr95", "let_through_at_tpr99"),
            )
            for dataset in ("uni", "mean")
        ),
    }


def test_the_report_of_a_protocol(ratioctl: Run, format_1: Path, tmp_path: Path) -> None:
    line = ("evaluate", format_1, "--data", "digits:test", "--ood", "near-uni=noise:uniform", "--limit", 2)
    assert ratioctl(*line, "--protocol", "openood", "--out", tmp_path / "out", "--device", "cpu")[0] == 0
    found = load(tmp_path / "out" / "report.json")
    check("report.json", found)
    ours, *published = found["comparison"]["rows"]
    assert (ours["published"], ours["figures"]["far"]) == (False, None)
    assert published[0]["source"]


def test_the_report_with_a_guarantee(
    ratioctl: Run, certified_package: Path, digits: Path, tmp_path: Path
) -> None:
    """The card's and the config's part is that of tests/training/test_certified.py."""
    (tmp_path / "data" / "cat").mkdir(parents=True)
    shutil.copy(digits / "00.png", tmp_path / "data" / "cat")
    line = ("evaluate", certified_package, "--data", tmp_path / "data", "--ood", "uni=noise:uniform")
    more = ("--limit", 2, "--suite", "clean", "--certified", "--device", "cpu")
    assert ratioctl(*line, *more, "--out", tmp_path / "out")[0] == 0
    found = load(tmp_path / "out" / "report.json")
    check("report.json", found)
    names = {row["name"] for row in found["models"][0]["measurements"] if row["ball"] is not None}
    assert names == {
        *("auroc_guaranteed", "conservative_auroc_guaranteed", "mmc_guaranteed"),
        *("let_through_at_tpr95_guaranteed", "let_through_at_tpr99_guaranteed"),
    }


def test_the_report_of_the_suite_explanations(explanations: Any) -> None:
    check("report.json", explanations)
    found = {(row["name"], row["dataset"]) for row in explanations["models"][0]["measurements"]}
    always = {
        *(
            (name, "digits:test")
            for name in (
                *("validity", "target_confidence", "changed_pixels", "flipped"),
                *("distance_l1", "distance_l2", "distance_linf"),
                *("judge_confidence", "judge_agreement", "judge_validity"),
            )
        ),
        *((name, "uni") for name in ("confidence", "let_through_at_tpr95")),
    }
    where_something_flips = {
        (name, "digits:test")
        for name in (
            "flip_changed_pixels",
            *(f"{kind}_radius_q{q}" for kind in ("flip", "in_distribution") for q in (25, 50, 75)),
        )
    }
    assert always <= found <= always | where_something_flips


def test_rows_of_ood_score(rows: list[Any]) -> None:
    for row in rows:
        check("ood-score-row.json", row)
        assert list(row) == [*HEADER, *CLASSES, *WORST, *EXPLAIN, *CHECKS]
    assert [row["error"] is None for row in rows] == [True, False]


def test_rows_with_a_guarantee(ratioctl: Run, certified_package: Path, damaged: Path) -> None:
    line = ("ood-score", damaged, "--model", certified_package, "--format", "jsonl", "--device", "cpu")
    code, shown = ratioctl(*line, "--certified")
    assert code == 3
    found = [json.loads(text) for text in shown.splitlines()]
    for row in found:
        check("ood-score-row.json", row)
        assert list(row) == [*HEADER, "guaranteed_confidence"]
    assert [row["guaranteed_confidence"] is None for row in found] == [False, True]


@pytest.mark.parametrize(
    ("options", "header"),
    [
        ((), "path,label,confidence,ood_score,is_ood,error\n"),
        (
            ("--probabilities",),
            "path,label,confidence,ood_score,is_ood,error,p:0,p:1,p:2,p:3,p:4,p:5,p:6,p:7,p:8,p:9\n",
        ),
        (
            ("--worst-case", "0.1"),
            "path,label,confidence,ood_score,is_ood,error,worst_case_confidence,worst_case_is_ood\n",
        ),
    ],
    ids=["plain", "probabilities", "worst-case"],
)
def test_the_header_of_csv(
    ratioctl: Run, format_1: Path, damaged: Path, tmp_path: Path, options: tuple[str, ...], header: str
) -> None:
    """To the byte, and the row of what cannot be read: all empty but path and error."""
    output, broken = tmp_path / "rows.csv", damaged / "broken.png"
    line = ("ood-score", broken, "--model", format_1, "--device", "cpu", "--output", output)
    assert ratioctl(*line, *options)[0] == 3
    first, second = output.read_bytes().decode().splitlines(keepends=True)
    assert first == header
    row = dict(zip(header.rstrip("\n").split(","), next(csv.reader([second])), strict=True))
    assert {name for name, value in row.items() if value} == {"path", "error"}
    assert row["path"] == str(broken)


def test_the_summary_of_ood_score(summary: Any, ratioctl: Run, format_1: Path, digits: Path) -> None:
    check("ood-score-summary.json", summary)
    assert (summary["images"], summary["errors"], summary["threshold"]["name"]) == (2, 1, "tpr95")
    code, shown = ratioctl("ood-score", digits, "--model", format_1, "--threshold", "0.9", "--json", "-q")
    assert code == 0
    other = json.loads(shown)
    check("ood-score-summary.json", other)
    assert other["threshold"] == {"name": None, "confidence": 0.9}
    assert other["output"] is None


def test_thresholds(thresholds: Any) -> None:
    check("thresholds.json", thresholds)
    rows = {row["name"]: row for row in thresholds["thresholds"]}
    assert rows.keys() == {"tpr95", "tpr99", "kept", "sure", "right", "w"}
    assert rows["kept"]["classes"].keys() == set(map(str, range(10)))
    assert rows["sure"]["statement"] is not None
    assert "risk" in rows["right"]
    assert [part["ball"] for part in rows["w"]["ood"]] == [None, {"p": "2", "eps": 0.1}]
    assert len(thresholds["curves"]) == 2


def test_thresholds_of_the_package_that_is_kept(ratioctl: Run, format_1: Path, tmp_path: Path) -> None:
    code, shown = ratioctl("thresholds", format_1, "--out", tmp_path / "page.html", "--json")
    assert code == 0
    document = json.loads(shown)
    check("thresholds.json", document)
    assert [sorted(row) for row in document["thresholds"]] == [["classes", "name", "threshold"]] * 2
    assert document["page"] == str(tmp_path / "page.html")


def test_a_certificate_of_parity(ratioctl: Run, format_1: Path, digits: Path) -> None:
    line = ("parity", format_1, format_1 / "model.onnx", "--data", digits, "--no-timing", "--json")
    code, shown = ratioctl(*line)
    assert code == 0
    document = json.loads(shown)
    check("parity.json", document)
    assert {row["set"] for row in document["results"]} == {part["name"] for part in document["sets"]}
    assert document["model"]["digest"] == load(format_1 / "config.json")["ratio"]["digest"]


def test_the_config_of_the_package_that_is_kept(format_1: Path) -> None:
    check("config.json", load(format_1 / "config.json"))


def test_the_config_of_an_evaluated_package(config: Any) -> None:
    check("config.json", config)
    assert config["ratio"]["metrics"]["suite"] == "quick"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "assets" / "models").glob("*/config.json")), ids=lambda path: path.parent.name
)
def test_configs_of_the_bundled_models(path: Path) -> None:
    check("config.json", load(path))


def test_the_config_of_a_model_trained_now(ratioctl: Run, format_1: Path, tmp_path: Path) -> None:
    settings = ("model.width=2", "optim.epochs=0.02", 'data.outside="noise:uniform"')
    line = ["train", "digits-ratio", "--out", tmp_path, "--init", format_1, "--device", "cpu", "-q"]
    assert ratioctl(*line, *(f"--set={setting}" for setting in settings))[0] == 0
    config = load(tmp_path / "package" / "config.json")
    check("config.json", config)
    assert (
        config["ratio"]["provenance"]["init"]["digest"] == load(format_1 / "config.json")["ratio"]["digest"]
    )
    assert config["ratio"]["calibration"]["n"] == 216


def test_the_config_of_a_model_trained_elsewhere(ratioctl: Run, format_1: Path, tmp_path: Path) -> None:
    out, weights = tmp_path / "packaged", format_1 / "model.safetensors"
    line = ("package", weights, "--arch", "resnet18", "--labels", ",".join(map(str, range(10))))
    code, _ = ratioctl(*line, "--mean", "0.3054", "--std", "0.3759", "--input-size", 8, "--out", out)
    assert code == 0
    config = load(out / "config.json")
    check("config.json", config)
    kept = load(format_1 / "config.json")
    for key in ("architecture", "label_names", "pretrained_cfg"):
        assert config[key] == kept[key]
    assert config["architecture_options"] == {**kept["architecture_options"], "stem_stride": 1}
    assert config["ratio"]["thresholds"] == {}


# --- schemas notice damage ---------------------------------------------------------------------------------

MAPS = (  # keys are the user's
    *("ratio.thresholds", "models[].figures.histograms", "models[].figures.roc"),
    *("thresholds[].classes", "thresholds[].per_class.common"),
)


def places(value: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every (path, container, key) of a document; paths without positions and without the user's keys."""
    if isinstance(value, dict):
        for key in value:
            shown = "*" if at in MAPS else "p:*" if key.startswith("p:") else key
            path = f"{at}.{shown}".lstrip(".")
            yield path, value, key
            yield from places(value[key], path)
    elif isinstance(value, list) and value:
        yield f"{at}[]", value, 0
        for item in value if isinstance(value[0], dict) else ():
            yield from places(item, f"{at}[]")


def thinned(value: Any) -> Any:
    """A copy of the document with at most three entries in its lists."""
    if isinstance(value, dict):
        return {key: thinned(item) for key, item in value.items()}
    return [thinned(item) for item in value[:3]] if isinstance(value, list) else value


def kinds(measurements: list[Any]) -> list[Any]:
    """Of measurements, one with every set of keys, with and without a ball."""
    return list({(tuple(row), row["ball"] is None): row for row in measurements}.values())


def damages(container: Any, key: Any) -> dict[str, Any]:
    """What stands in the place of a list or table whose entry `key` is damaged."""
    other = {"unknown": []} if isinstance(container[key], list) else [[]]
    if isinstance(container, list):
        return {"other type": [other, *container[1:]]}
    return {
        "missing": {name: value for name, value in container.items() if name != key},
        "null": {**container, key: None},
        "other type": {**container, key: other},
        "unknown key": {**container, "unknown": [[]]},
    }


def fill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def accepted(name: str, document: Any) -> dict[str, set[str]]:
    """Kind of damage -> the places where a schema accepts it."""
    whole, passing = thinned(document), dict[str, set[str]]()
    fits = validator(name).is_valid
    assert fits(whole)
    for path, container, key in list(places(whole)):
        before = copy.copy(container)
        for kind, content in damages(before, key).items():
            fill(container, content)
            if fits(whole):
                passing.setdefault(kind, set()).add(path)
        fill(container, before)
    return passing


def test_damaged_counterfactuals_are_found(counterfactuals: Any) -> None:
    assert accepted("counterfactuals.json", counterfactuals) == {
        "null": {
            "models[].threshold",  # not calibrated
            "images[].original.is_ood",
            *(
                "images[].targets[].flip_eps",
                "images[].targets[].flip_png",
            ),  # of the target that does not flip
            *(
                "images[].targets[].flip_confidence",
                "images[].targets[].flip_is_ood",
                "images[].targets[].in_distribution_eps",
                "images[].targets[].budgets[].is_ood",
            ),  # not calibrated
        }
    }


def test_damaged_reports_are_found(report: Any, explanations: Any) -> None:
    row = "models[].measurements[]"
    nullable = {"environment.hardware.gpu", f"{row}.interval", f"{row}.ball"}
    assert accepted("report.json", report) == {
        "null": nullable | {f"{row}.attack"},
        "missing": {"models[].figures.risk_coverage"},  # absent from older reports
    }
    assert accepted("report.json", explanations) == {"null": nullable}


def test_damaged_measurements_are_found(report: Any, explanations: Any) -> None:
    for row in kinds(report["models"][0]["measurements"]):
        found = accepted("measurement.json#/$defs/attacks", row)
        nullable = {"interval", "attack"} & row.keys()
        assert nullable <= found.pop("null") <= nullable | {"ball"}
        assert found.pop("missing", set()) <= {"attack"}  # see its description
        assert found == {}
    for row in kinds(explanations["models"][0]["measurements"]):
        assert accepted("measurement.json#/$defs/explanations", row) == {"null": {"interval", "ball"}}


def test_damaged_rows_are_found(rows: list[Any]) -> None:
    image, broken = rows
    found = accepted("ood-score-row.json", image)
    assert found == {"missing": {"p:*"}, "null": {"error", "margin", "percentile", "reason"}}
    found = accepted("ood-score-row.json", broken)
    assert found == {"missing": {"p:*"}, "null": {*HEADER[1:-1], "p:*", *WORST, *EXPLAIN, *CHECKS}}


def test_damaged_summaries_are_found(summary: Any) -> None:
    assert accepted("ood-score-summary.json", summary) == {"null": {"threshold.name", "output"}}


def test_damaged_thresholds_are_found(thresholds: Any) -> None:
    row, last = "thresholds[]", thresholds["thresholds"][3:]
    assert accepted("thresholds.json", {**thresholds, "thresholds": last}) == {
        "missing": {f"{row}.risk", f"{row}.per_class", f"{row}.classes.*", f"{row}.per_class.common.*"},
        "null": {
            *(f"{row}.classes", f"{row}.statement", "curves[].ball", "page"),
            *(f"{row}.{part}.{key}" for part in ("id", "ood[]") for key in ("ball", "attack")),
        },
    }


def test_damaged_configs_are_found(config: Any) -> None:
    found = accepted("config.json", config)
    assert found == {
        "missing": {
            "architecture_options.width",
            "ratio.thresholds.*",
            *("ratio.objective.outside", "ratio.objective.inside.goal"),
            *("ratio.provenance.data.outside", "ratio.provenance.data.outside_test"),
            "ratio.files.model.onnx",
            # Absent from older measurements of a bundled model.
            *("ratio.metrics.data[].unreadable", "ratio.metrics.measurements[].attack"),
        },
        "null": {
            "ratio.provenance.init",
            "ratio.metrics.hardware.gpu",
            *(f"ratio.metrics.measurements[].{key}" for key in ("interval", "ball", "attack")),
        },
    }
