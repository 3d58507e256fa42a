"""Rules of thresholds: text, choices computed by hand, guarantees by simulation, every rule end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ratioctl
from ratioctl import metrics, package, scores
from ratioctl.calibration import rules
from ratioctl.calibration.rules import Rule, Scored
from ratioctl.calibration.thresholds import by_rule
from ratioctl.cli import main
from ratioctl.errors import UsageError

MSP, ENERGY = scores.by_name("msp"), scores.by_name("energy")


def scored(confidences: Any, *, predicted: Any = None, correct: Any = None) -> Scored:
    """Images whose confidences are given."""
    c = np.asarray(confidences, dtype=np.float64)
    return Scored(
        acceptance=np.log(c) - np.log1p(-c),
        threshold=c,
        predicted=np.zeros(len(c), int) if predicted is None else np.asarray(predicted),
        correct=None if correct is None else np.asarray(correct, bool),
    )


def chosen(text: str, inside: Scored, **outside: Scored) -> float:
    return rules.choose(rules.parse(f"t={text}"), MSP, inside, outside)


TEN = np.arange(1, 11) / 20 + 0.45  # 0.5, 0.55, ..., 0.95


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keep:0.9", 0.55),  # the lowest of ten may go
        ("keep:0.95", 0.5),
        ("keep:1", 0.5),
        ("keep:0.001", 0.95),
        # alpha (n + 1) = 3.3: at most the third of ten
        ("conformal:0.3", 0.6),
        ("conformal:0.0910", 0.5),
        # OOD confidences 0.52, 0.62, 0.72, 0.82: one of four may pass
        ("pass:0.25@out", 0.75),
        ("pass:0.49@out", 0.75),
        ("pass:0.5@out", 0.65),
        ("pass:0@out", 0.85),
        ("worst-pass:0@out:eps=1", 0.85),
        # at 0.85 seven of ten are flagged: 0.5 * 0.7; at 0.5 all four pass: 0.5 * 1; at 0.75 0.25 + 0.125
        ("cost:1/1@0.5", 0.85),
        ("cost:1/10@0.5", 0.85),
        ("cost:10/1@0.5", 0.5),
    ],
)
def test_thresholds_against_values_computed_by_hand(text: str, expected: float) -> None:
    assert chosen(text, scored(TEN), out=scored([0.52, 0.62, 0.72, 0.82])) == pytest.approx(expected)


def test_the_least_cost_is_the_least_over_all_thresholds() -> None:
    rng = np.random.default_rng(0)
    inside, first, second = rng.beta(6, 2, 300), rng.beta(3, 3, 200), rng.beta(2, 4, 50)

    def cost(t: float) -> float:
        passed = np.mean([(first >= t).mean(), (second >= t).mean()])
        return 0.9 * 1 * (inside < t).mean() + 0.1 * 20 * passed

    found = chosen("cost:1/20@0.1", scored(inside), a=scored(first), b=scored(second))
    everywhere = np.unique(np.concatenate([inside, first, second]))
    assert cost(found) == min(map(cost, everywhere.tolist()))


def test_risk_takes_the_most_images_with_that_share_of_errors() -> None:
    correct = np.array([0, 0, 1, 0, 1, 1, 1, 1, 1, 1])
    inside = scored(TEN, correct=correct)
    assert chosen("risk:0", inside) == pytest.approx(0.7)
    assert chosen("risk:0.124", inside) == pytest.approx(0.7)
    assert chosen("risk:0.125", inside) == pytest.approx(0.6)  # 1 of 8, exactly; 1 of 7 is more
    assert chosen("risk:0.23", inside) == pytest.approx(0.55)  # 2 of 9
    assert chosen("risk:0.3", inside) == pytest.approx(0.5)  # 3 of 10
    with pytest.raises(UsageError, match=r"lowest share of errors that one reaches is 33\.33%"):
        chosen("risk:0.1", scored([0.5, 0.6, 0.7], correct=[1, 1, 0]))


def test_rules_that_nothing_satisfies_say_why() -> None:
    inside = scored(TEN)
    with pytest.raises(UsageError, match="3 of 4 images of out are accepted before the first of 10"):
        chosen("pass:0.5@out", inside, out=scored([0.2, 0.96, 0.97, 0.98]))
    with pytest.raises(UsageError, match="needs at least 19 in-distribution images; there are 10"):
        chosen("conformal:0.05", inside)
    with pytest.raises(UsageError, match="flagging every image costs least"):
        chosen("cost:1/1000@0.9", inside, out=scored([0.9, 0.96, 0.97]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keep:0.95", "is not NAME=RULE"),
        ("tpr95=keep:0.9", "keeps its meaning"),
        ("0.5=keep:0.9", "is not a name"),
        ("nan=keep:0.9", "is not a name"),
        ("a b=keep:0.9", "is not a name"),
        ("x=kep:0.9", 'Did you mean "keep"'),
        ("x=keep", "has another form than keep:0.95"),
        ("x=keep:95", "is not a share in"),
        ("x=keep:0", "is not a share in"),
        ("x=keep:1e-9999999", "has another form"),
        ("x=conformal:1", "is not a share in"),
        ("x=pass:0.1", "has another form than pass:0.05@NAME"),
        ("x=worst-pass:0.1@out", "has another form"),
        ("x=worst-pass:0.1@out:eps=0", "must be above 0"),
        ("x=worst-pass:0.1@out:eps=1:n=0", "must be above 0"),
        ("x=cost:1/0@0.1", "must be above 0"),
        ("x=cost:1/10@1", "is not a share in"),
    ],
)
def test_rules_that_cannot_be_read(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        rules.parse_all([text], {"out": "x"})


def test_rules_are_read() -> None:
    found = rules.parse("a=worst-pass:.2@noise:uniform:eps=0.25:n=40:steps=3")
    assert (found.ood, found.eps, found.images, found.steps) == ("noise:uniform", 0.25, 40, 3)
    assert found.attack == ("noise:uniform", 0.25, 40, 3)
    assert rules.parse("b=cost:1/10@5e-2").costs == (1, 10)
    for texts, says in (
        (["a=keep:0.9", "a=keep:0.8"], "given twice"),
        (["a=pass:0.1@other"], "no OOD set named other; given are out"),
    ):
        with pytest.raises(UsageError, match=says):
            rules.parse_all(texts, {"out": "x"})
    with pytest.raises(UsageError, match="--ood NAME=SOURCE"):
        rules.parse_all(["a=cost:1/1@0.1"], {})


def test_scores_whose_threshold_is_an_upper_limit() -> None:
    """Energy: images above the threshold are flagged."""
    values = -np.arange(10.0)
    inside = Scored(acceptance=-values, threshold=values, predicted=np.zeros(10, int))
    out = Scored(
        acceptance=np.array([2.5, 4.5]), threshold=np.array([-2.5, -4.5]), predicted=np.zeros(2, int)
    )
    rule = rules.parse("t=keep:0.8")
    assert rules.choose(rule, ENERGY, inside, {}) == -2
    assert rules.choose(rules.parse("t=pass:0@out"), ENERGY, inside, {"out": out}) == -5


# --- guarantees --------------------------------------------------------------------------------------------

RESAMPLINGS = 2000


@pytest.mark.parametrize(("n", "rate"), [(30, 0.95), (200, 0.05), (1000, 0.5)])
def test_exact_intervals_cover(n: int, rate: float) -> None:
    counts = np.random.default_rng(0).binomial(n, rate, RESAMPLINGS)
    ends = {k: metrics.clopper_pearson_interval(int(k), n) for k in np.unique(counts).tolist()}
    covered = np.mean([ends[k][0] <= rate <= ends[k][1] for k in counts.tolist()])
    assert covered >= 0.95 - 3 * (0.05 * 0.95 / RESAMPLINGS) ** 0.5


def test_exact_intervals_are_the_binomials() -> None:
    from scipy.special import bdtr

    for k, n, level in ((0, 10, 0.95), (3, 10, 0.95), (10, 10, 0.9), (950, 1000, 0.99)):
        low, high = metrics.clopper_pearson_interval(k, n, level)
        tail = (1 - level) / 2
        assert low == 0 if k == 0 else 1 - bdtr(k - 1, n, low) == pytest.approx(tail)
        assert high == 1 if k == n else bdtr(k, n, high) == pytest.approx(tail)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        metrics.clopper_pearson_interval(3, 2)


@pytest.mark.parametrize(("n", "alpha"), [(19, 0.05), (57, 0.1), (500, 0.01)])
def test_the_conformal_rule_flags_new_images_as_rarely_as_it_says(n: int, alpha: float) -> None:
    """Of 2,000 calibrations each with one new image; and not much more rarely (the bound is k / (n + 1))."""
    rng = np.random.default_rng(1)
    rule = rules.parse(f"t=conformal:{alpha}")
    flagged = 0
    for _ in range(RESAMPLINGS):
        acceptance = rng.normal(size=n + 1)
        c = 1 / (1 + np.exp(-acceptance))
        flagged += c[-1] < rules.choose(rule, MSP, scored(c[:-1]), {})
    exact = np.floor(alpha * (n + 1) + 1e-9) / (n + 1)
    assert exact <= alpha
    assert flagged / RESAMPLINGS == pytest.approx(exact, abs=3.5 * (exact * (1 - exact) / RESAMPLINGS) ** 0.5)


def test_the_conformal_rule_holds_in_every_predicted_class() -> None:
    rng = np.random.default_rng(2)
    rule = rules.parse("t=conformal:0.1")
    flagged, seen = np.zeros(2), np.zeros(2)
    for _ in range(400):
        predicted = rng.integers(0, 2, 260)
        c = 1 / (1 + np.exp(-rng.normal(size=260) - 3 * predicted))
        parts = scored(c[:200], predicted=predicted[:200])
        threshold, reasons = by_rule(rule, MSP, parts, {}, ["a", "b"])
        assert threshold.classes is not None
        assert not reasons
        for k in range(2):
            new = c[200:][predicted[200:] == k]
            flagged[k] += (new < threshold.classes[k]).sum()
            seen[k] += len(new)
    assert np.all(flagged / seen < 0.105)
    assert np.all(flagged / seen > 0.08)


def test_classes_with_few_images_use_the_common_threshold() -> None:
    rng = np.random.default_rng(3)
    predicted = np.repeat([0, 1, 2], [100, 60, 10])
    inside = scored(rng.uniform(0.4, 0.99, 170), predicted=predicted)
    out = scored(rng.uniform(0.3, 0.6, 120), predicted=np.repeat([0, 1], [100, 20]))
    common, _ = by_rule(rules.parse("t=pass:0.1@out"), MSP, inside, {"out": out})
    found, reasons = by_rule(rules.parse("t=pass:0.1@out"), MSP, inside, {"out": out}, ["a", "b", "c"])
    assert float(found) == float(common)
    assert found != common
    assert len({found, common, float(common), scores.Threshold(common)}) == 2
    assert found == scores.Threshold(common, found.classes)
    assert found.classes is not None
    assert found.classes[0] != common
    assert found.classes[1:] == (common, common)
    assert reasons == {
        "b": "20 images are predicted as it, 50 are needed",
        "c": "0 images are predicted as it, 50 are needed",
    }


# --- end to end --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled SOURCE of 160 images of noise for the small package, two classes that it predicts."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("data")
    for name in ("cat", "dog", "red panda", "air%plane"):
        folder = root / "in" / name.replace("%", "_")
        if "%" in name:
            continue
        folder.mkdir(parents=True)
        for k in range(60):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.png")
    return root


EVERY = (
    *("kept=keep:0.9", "sure=conformal:0.1", "few=pass:0.3@smooth", "risky=risk:0.7"),
    *("cheap=cost:1/3@0.2", "worst=worst-pass:0.5@smooth:eps=0.1:n=20:steps=2"),
)


@pytest.fixture(scope="module")
def calibrated(small_package: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("calibrated") / "model"
    return ratioctl.calibrate(
        small_package,
        data=str(data / "in"),
        ood={"smooth": "noise:smooth"},
        thresholds=EVERY,
        per_class=True,
        out=out,
        device="cpu",
    )


def test_every_rule_end_to_end(calibrated: Any) -> None:
    again = package.read(calibrated.package.path)
    records = {row["name"]: row for row in again.config["ratio"]["threshold_records"]}
    assert list(records) == ["tpr95", "tpr99", *(text.partition("=")[0] for text in EVERY)]
    assert again.thresholds == {name: row["threshold"] for name, row in records.items()}
    for row in records.values():
        for part in (row["id"], *row["ood"]):
            assert part["rate"] == part["accepted"] / part["n"]
            assert part["interval"] == list(metrics.clopper_pearson_interval(part["accepted"], part["n"]))
    assert [part["ball"] for part in records["few"]["ood"]] == [None, {"p": "2", "eps": 0.1}]
    assert records["worst"]["ood"][1]["n"] == 20
    assert records["tpr95"]["id"]["rate"] >= 0.95
    assert "flagged with probability at most 0.1" in records["sure"]["statement"]
    assert len(records["sure"]["assumptions"]) == 2
    assert records["risky"]["risk"]["rate"] <= 0.7
    assert "per_class" not in records["tpr95"]
    own = again.config["ratio"]["class_thresholds"]["max-softmax"]
    for name in ("kept", "sure"):
        listed = records[name]["per_class"]
        assert set(own[name]) <= set(listed["own"])
        assert set(listed["own"]) | set(listed["common"]) == set(again.label_names)
    assert records["kept"]["per_class"]["own"], "one class at least is predicted often enough"
    quantiles = again.config["ratio"]["acceptance"]
    assert quantiles["unit"] == "log-odds"
    assert np.all(np.diff(quantiles["id"]["quantiles"]) >= 0)


def test_the_records_are_those_of_the_flags(calibrated: Any, data: Path) -> None:
    """`ood-score` with a threshold per class flags as many calibration images as the record says."""
    for name in ("tpr95", "kept", "sure", "few"):
        rows = list(ratioctl.ood_score(str(data / "in"), model=calibrated.package, threshold=name))
        record = next(row for row in calibrated.records if row["name"] == name)
        assert sum(not row.is_ood for row in rows) == record["id"]["accepted"]
    limits = calibrated.package.thresholds_of("msp")["kept"].classes
    for row in ratioctl.ood_score(str(data / "in"), model=calibrated.package, threshold="kept"):
        limit = limits[calibrated.package.label_names.index(row.label)]
        assert row.is_ood == (row.confidence < limit)


def test_earlier_thresholds_stay_while_the_temperature_stays(
    calibrated: Any, data: Path, tmp_path: Path
) -> None:
    line = ["calibrate", str(calibrated.package.path), "--data", str(data / "in"), "--json", "-q"]
    assert (
        main([*line, "--threshold", "new=keep:0.8", "--keep-temperature", "--out", str(tmp_path / "a")]) == 0
    )
    more = package.read(tmp_path / "a")
    assert more.temperature == calibrated.temperature
    assert more.thresholds.keys() == {*calibrated.thresholds, "new"}
    assert more.class_thresholds == calibrated.package.class_thresholds
    moved = package.update(more, config_changes={"ratio": {"temperature": 0.5}})
    found = ratioctl.calibrate(moved, data=str(data / "in"), device="cpu")
    assert found.thresholds.keys() == {"tpr95", "tpr99"}
    assert any("chosen at another temperature and are removed" in text for text in found.warnings)
    assert package.read(tmp_path / "a").class_thresholds == {}


def test_the_command_says_what_is_missing(
    small_package: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "calibrate",
        str(small_package),
        "--data",
        str(data / "in"),
        "--out",
        str(tmp_path / "m"),
        "--json",
    ]
    for options, says in (
        (["--per-class"], "needs a threshold to choose"),
        (["--threshold", "x=pass:0.1@svhn"], "Add --ood svhn=SOURCE"),
        (["--threshold", "x=conformal:0.001"], "needs at least 999 in-distribution images; there are 180"),
    ):
        assert main([*line, *options]) == 2
        assert says in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "m").exists()


def test_damaged_class_thresholds_are_refused(calibrated: Any) -> None:
    config = json.loads(json.dumps(calibrated.package.config))
    for damage in (
        {"max-softmax": {"kept": {"unicorn": 0.5}}},
        {"max-softmax": {"kept": {"cat": 1.5}}},
        {"max-softmax": {"kept": [0.5]}},
        {"nothing": {}},
        [],
    ):
        config["ratio"]["class_thresholds"] = damage
        with pytest.raises(ratioctl.PackageError, match="class_thresholds"):
            package.parse_config(config, "config", name="x")


def test_a_rule_is_a_value() -> None:
    assert rules.parse("a=keep:0.9") == Rule(
        name="a", text="keep:0.9", kind="keep", share=rules.Fraction("0.9")
    )
