"""Counterfactuals: 8-bit pictures in the ball, the ladder, the flip radius; then the same with a network."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ratioctl
from ratioctl import counterfactuals, package
from ratioctl.counterfactuals.rounding import into_ball
from ratioctl.counterfactuals.search import SearchRequest
from ratioctl.errors import ImageError, OutputError, SourceError, UsageError
from ratioctl.types import Target

NORMS = [1.0, 1.5, 2.0, math.inf]


def norm(picture: np.ndarray, pixels: np.ndarray, p: float) -> float:
    """As a user would measure it."""
    return float(np.linalg.norm((picture / 255.0 - pixels / 255.0).ravel(), ord=p))


# --- rounding ---------------------------------------------------------------------------------------------


def some_point(seed: int, p: float, eps: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """A random image (H, W, C) and a point (C, H, W) of its ball, at `reach` of the radius before the box."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    direction = generator.normal(size=pixels.shape) ** 3
    direction *= reach * eps / np.linalg.norm(direction.ravel(), ord=p)
    x = np.clip(pixels / 255 + direction, 0, 1).astype(np.float32).transpose(2, 0, 1)
    return pixels, x


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    p=st.sampled_from(NORMS),
    eps=st.floats(1e-3, 4),
    reach=st.sampled_from([0.3, 1 - 1e-6]),
)
def test_rounded_pictures_lie_in_the_ball_beside_the_point(
    seed: int, p: float, eps: float, reach: float
) -> None:
    pixels, x = some_point(seed, p, eps, reach)
    picture = counterfactuals.round_into_ball(x, pixels, p, eps)
    assert picture.dtype == np.uint8
    assert norm(picture, pixels, p) <= eps * (1 + 1e-15 if p == np.inf else 1)  # 85 / 255 as a difference
    wanted = x.astype(np.float64).transpose(1, 2, 0) * 255
    assert np.abs(picture - wanted).max() < 1 + 1e-4
    nearest = np.rint(wanted)
    if norm(nearest, pixels, p) <= eps * (1 - 1e-6):
        assert np.array_equal(picture, nearest)
    back = np.abs(nearest - pixels) - np.abs(picture.astype(float) - pixels)
    assert set(np.unique(back)) <= {0.0, 1.0}  # only towards the input, by one


def test_no_more_pixels_go_back_than_needed() -> None:
    """Every pixel wants 3.6 values of change and the ball has room for just that: 4 where it fits, else 3."""
    pixels = np.full((4, 5, 3), 128, np.uint8)
    signs = np.where(np.random.default_rng(1).random((3, 4, 5)) < 0.5, -1, 1)
    x = (128 / 255 + signs * 3.6 / 255).astype(np.float32)
    eps = 3.6 * math.sqrt(60) / 255
    picture = counterfactuals.round_into_ball(x, pixels, 2, eps)
    moved = np.abs(picture.astype(int) - 128)
    assert set(np.unique(moved)) == {3, 4}
    one_less_back = (moved**2).sum() + 16 - 9
    assert (moved**2).sum() <= (255 * eps) ** 2 < one_less_back


def test_a_point_outside_by_rounding_still_ends_inside() -> None:
    pixels = np.full((3, 3, 1), 100, np.uint8)
    x = np.full((1, 3, 3), 110 / 255, np.float32)
    eps = 3 * 9.9 / 255
    picture = counterfactuals.round_into_ball(x, pixels, 2, eps)
    assert 0.9 * eps < norm(picture, pixels, 2) <= eps


def test_a_whole_number_of_values_is_kept_in_linf() -> None:
    pixels = np.full((2, 2, 3), 100, np.uint8)
    x = np.full((3, 2, 2), 108 / 255, np.float32)
    assert counterfactuals.round_into_ball(x, pixels, math.inf, 8 / 255).max() == 108
    assert counterfactuals.round_into_ball(x, pixels, math.inf, 0.0313).max() == 107


def test_distances_are_those_of_the_pictures() -> None:
    pixels, x = some_point(7, 2, 1.5, 1)
    picture = counterfactuals.round_into_ball(x, pixels, 2, 1.5)
    found = counterfactuals.distances(picture, pixels)
    assert list(found) == ["l1", "l1.5", "l2", "linf"]
    for (name, value), p in zip(found.items(), NORMS, strict=True):
        assert value == pytest.approx(norm(picture, pixels, p), rel=1e-12), name


# --- one target, with a linear classifier whose optimum is known --------------------------------------------

LABELS = ("left", "right", "other")
PIXELS = np.full((6, 6, 3), 120, np.uint8)
DIRECTION = np.random.default_rng(2).normal(size=(3, 6, 6))
DIRECTION /= np.linalg.norm(DIRECTION)
AT = 0.8  # distance of the boundary between "left" and "right"
SLOPE = 4.0


def linear_scores(images: np.ndarray) -> np.ndarray:
    x = images.transpose(0, 3, 1, 2) / 255 if images.dtype == np.uint8 else images.astype(np.float64)
    z = SLOPE * (((x - 120 / 255) * DIRECTION).sum((1, 2, 3)) - AT)
    logits = np.stack([np.zeros_like(z), z, np.full_like(z, -9.0)], axis=1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def best_points(pixels: np.ndarray, radii: Sequence[float], sign: float = 1.0) -> np.ndarray:
    centre = pixels.transpose(2, 0, 1) / 255
    return np.stack([centre + sign * eps * DIRECTION for eps in radii]).astype(np.float32)


def ask(
    target: str = "right",
    eps: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5),
    until: float | None = None,
    search: Callable[..., np.ndarray] | None = None,
    pixels: np.ndarray = PIXELS,
    beyond: tuple[float, ...] = (),
    threshold: float | None = None,
) -> Target:
    question = counterfactuals.CounterfactualRequest(
        targets=(target,),
        p=2.0,
        eps=eps,
        steps=100,
        restarts=1,
        seed=0,
        until=until,
        threshold=threshold,
        extra_radii=beyond,
    )
    answer = counterfactuals.search_target(
        pixels,
        LABELS.index(target),
        original=linear_scores(pixels[None])[0],
        labels=LABELS,
        request=question,
    )
    look = search or (lambda pixels, target, radii, *rest: best_points(pixels, radii))

    def find(requests: Sequence[tuple[int, SearchRequest]]) -> list[np.ndarray]:
        return [look(pixels, target, request.radii, request) for _, request in requests]

    (found,) = counterfactuals.run_searches([answer], find, linear_scores)
    return found


def test_every_number_is_that_of_the_picture() -> None:
    answer = ask()
    assert [budget.eps for budget in answer.budgets] == [0.25, 0.5, 1.0, 1.5]
    for budget in answer.budgets:
        again = linear_scores(budget.image[None])[0]
        assert budget.confidence == again[1]
        assert budget.probabilities == tuple(again)
        assert budget.predicted == LABELS[again.argmax()]
        assert budget.distance["l2"] <= budget.eps
        float_confidence = 1 / (
            1 + math.exp(-SLOPE * (budget.eps - AT)) + math.exp(-9 - SLOPE * (budget.eps - AT))
        )
        assert budget.confidence_float == pytest.approx(float_confidence, abs=1e-4)
        assert budget.confidence == pytest.approx(float_confidence, abs=0.02)  # rounding costs little
    assert [budget.predicted for budget in answer.budgets] == ["left", "left", "right", "right"]


def test_the_flip_radius_is_found_and_certified() -> None:
    answer = ask()
    assert answer.flip_eps is not None
    assert answer.flip_image is not None
    assert answer.flip_eps == counterfactuals.distances(answer.flip_image, PIXELS)["l2"]
    assert linear_scores(answer.flip_image[None])[0].argmax() == 1
    assert answer.flip_eps >= AT * (1 - 1e-9)  # no nearer point flips
    assert answer.flip_eps == pytest.approx(AT, rel=0.02)


def test_until_asks_for_a_confidence() -> None:
    answer = ask(until=0.9)
    radius = AT + math.log(9) / SLOPE
    assert answer.flip_eps == pytest.approx(radius, rel=0.02)
    assert answer.flip_image is not None
    assert linear_scores(answer.flip_image[None])[0][1] >= 0.9
    assert ask(until=0.9, eps=(0.5, 1.2)).flip_eps is None


def test_no_budget_flips() -> None:
    answer = ask(eps=(0.25, 0.5))
    assert answer.flip_eps is None
    assert answer.flip_image is None


def test_already_there() -> None:
    answer = ask("left")
    assert answer.flip_eps == 0
    assert np.array_equal(answer.flip_image, PIXELS)  # type: ignore[arg-type]


def test_a_weak_search_never_loses_confidence() -> None:
    """Good at the second budget alone: its point moves into the smaller ball and stays in the larger ones."""

    def search(pixels: np.ndarray, target: int, radii: Sequence[float], *rest: Any) -> np.ndarray:
        return np.concatenate([best_points(pixels, [eps], 1.0 if eps == 0.5 else -1.0) for eps in radii])

    answer = ask(search=search)
    confidences = [budget.confidence for budget in answer.budgets]
    assert confidences == sorted(confidences)
    assert answer.budgets[0].distance["l2"] == pytest.approx(0.25, rel=0.03)
    assert np.array_equal(answer.budgets[2].image, answer.budgets[1].image)
    assert answer.budgets[3].confidence_float == answer.budgets[1].confidence_float


def test_a_harmful_search_leaves_the_original() -> None:
    answer = ask(search=lambda pixels, target, radii, *rest: best_points(pixels, radii, -1.0))
    for budget in answer.budgets:
        assert np.array_equal(budget.image, PIXELS)
        assert budget.distance == {"l1": 0, "l1.5": 0, "l2": 0, "linf": 0}
        assert budget.confidence == linear_scores(PIXELS[None])[0][1]


def test_a_larger_radius_is_refined_from_the_point_of_a_smaller_one() -> None:
    """Good up to 1, lost beyond: the larger radii are refined from the point of radius 1, and succeed."""
    requests: list[SearchRequest] = []

    def search(pixels: np.ndarray, target: int, radii: Sequence[float], request: SearchRequest) -> np.ndarray:
        requests.append(request)
        good = [1.0 if eps <= 1 or request.stage >= 4 else -1.0 for eps in radii]
        return np.concatenate([best_points(pixels, [e], sign) for e, sign in zip(radii, good, strict=True)])

    answer = ask(search=search, eps=(0.5, 1.0, 1.5, 2.0))
    refined = next(request for request in requests if request.stage == 4)
    assert refined.radii == (0.5, 1.0, 1.5, 2.0)
    assert refined.init is not None
    for init in refined.init[2:]:
        assert np.allclose(init, best_points(PIXELS, [1.0])[0], atol=1e-5)
    assert [budget.distance["l2"] for budget in answer.budgets] == pytest.approx([0.5, 1, 1.5, 2], rel=0.03)
    confidences = [budget.confidence for budget in answer.budgets]
    assert confidences == sorted(set(confidences))


@pytest.mark.parametrize("random", [False, True], ids=["from the image", "from a random point"])
@pytest.mark.parametrize("eps", [(1.0,), (0.25, 0.5, 1.0, 1.5)])
def test_what_only_a_larger_ball_s_search_finds_is_an_answer(eps: tuple[float, ...], random: bool) -> None:
    """Every search but one of twice the radius is lost: its point, moved into the ball, is the optimum."""

    def search(pixels: np.ndarray, target: int, radii: Sequence[float], request: SearchRequest) -> np.ndarray:
        wide = tuple(radii) == tuple(2 * radius for radius in eps)
        return best_points(pixels, radii, 1.0 if wide and request.random == random else -1.0)

    def keeps_init(
        pixels: np.ndarray, target: int, radii: Sequence[float], request: SearchRequest
    ) -> np.ndarray:
        return search(pixels, target, radii, request) if request.init is None else request.init

    answer = ask(search=keeps_init, eps=eps)
    assert [budget.distance["l2"] for budget in answer.budgets] == pytest.approx(eps, rel=0.03)
    assert answer.flip_eps == pytest.approx(AT, rel=0.02)


def test_nothing_is_searched_where_nothing_can_be_gained() -> None:
    """At radius 4 the confidence is within 1e-4 of 1 after the short searches, at 0.5 it is not."""
    requests: list[SearchRequest] = []

    def search(pixels: np.ndarray, target: int, radii: Sequence[float], request: SearchRequest) -> np.ndarray:
        requests.append(request)
        return best_points(pixels, radii)

    ask(search=search, eps=(0.5, 4.0))
    (refined,) = [request for request in requests if request.stage == 4]
    assert refined.radii == (0.5,)


def test_the_passes_stay_within_1_3_times_those_of_one_search_a_radius() -> None:
    """One search of all steps for each radius, and six flip searches of a tenth of them, were 3,300."""
    for eps, before in (((0.5, 0.6, 0.7, 0.8, 0.9, 1.2), 3300), ((1.2,), 800)):
        passes = 0

        def search(
            pixels: np.ndarray, target: int, radii: Sequence[float], request: SearchRequest
        ) -> np.ndarray:
            nonlocal passes
            passes += 5 * request.steps * request.restarts * len(radii)  # of 500 steps instead of 100
            return best_points(pixels, radii)

        ask(search=search, eps=eps, threshold=0.7)
        assert passes <= 1.3 * before


def test_two_radii_predicted_as_the_target_and_in_distribution() -> None:
    """The boundary is at 0.8, confidence 0.7 at 0.8 + log(7/3)/4; each has a certified picture."""
    answer = ask(threshold=0.7)
    radius = AT + math.log(0.7 / 0.3) / SLOPE
    assert answer.flip_eps == pytest.approx(AT, rel=0.02)
    assert answer.in_distribution_eps == pytest.approx(radius, rel=0.02)
    assert answer.in_distribution_eps >= radius * (1 - 1e-4)  # type: ignore[operator]
    assert answer.flip_image is not None
    scores = linear_scores(answer.flip_image[None])[0]
    assert answer.flip_confidence == scores[1]
    assert answer.flip_is_ood is True
    assert [budget.is_ood for budget in answer.budgets] == [
        bool(max(budget.probabilities) < 0.7) for budget in answer.budgets
    ]
    assert answer.to_json()["in_distribution_eps"] == answer.in_distribution_eps
    far = ask(threshold=0.999)
    assert far.flip_eps == pytest.approx(AT, rel=0.02)
    assert far.in_distribution_eps is None
    assert ask("left", threshold=0.7).in_distribution_eps == 0
    none = ask()
    assert none.in_distribution_eps is none.flip_is_ood is none.budgets[0].is_ood is None


def test_until_below_the_threshold_is_not_yet_in_distribution() -> None:
    answer = ask(until=0.6, threshold=0.8)
    assert answer.flip_eps == pytest.approx(AT + math.log(1.5) / SLOPE, rel=0.02)
    assert answer.in_distribution_eps == pytest.approx(AT + math.log(4) / SLOPE, rel=0.02)


@pytest.mark.parametrize("p", NORMS)
def test_points_are_moved_into_the_ball(p: float) -> None:
    pixels, z = some_point(3, p, 2.0, 1)
    x = pixels.transpose(2, 0, 1) / 255
    for eps in (0.01, 0.3, 0.7):
        moved = into_ball(z, x, p, eps)
        far = np.linalg.norm((moved.astype(np.float64) - x).ravel(), ord=p)
        assert eps * 0.999 < far <= eps
        assert 0 <= moved.min() <= moved.max() <= 1
    assert np.array_equal(into_ball(z, x, p, 5.0), z)


def test_a_smaller_ball_is_searched_where_all_budgets_are_large() -> None:
    """The model's ladder ends at 1 and 3 is asked: what is only found at 1 answers, and flips."""

    def search(pixels: np.ndarray, target: int, radii: Sequence[float], wish: SearchRequest) -> np.ndarray:
        return np.concatenate([best_points(pixels, [eps], 1.0 if eps <= 1 else -1.0) for eps in radii])

    lost = ask(search=search, eps=(3.0,))
    assert lost.flip_eps is None
    answer = ask(search=search, eps=(3.0,), beyond=(1.0,))
    assert [budget.eps for budget in answer.budgets] == [3.0]
    assert answer.budgets[0].distance["l2"] == pytest.approx(1.0, rel=0.02)
    assert answer.flip_eps == pytest.approx(AT, rel=0.02)


def test_until_grows_with_the_confidence_asked_for() -> None:
    radii = [ask(until=p).flip_eps for p in (0.2, 0.5, 0.7, 0.9)]
    assert radii == sorted(radii)  # type: ignore[type-var]
    assert radii[-1] > 1.3 * radii[0]  # type: ignore[operator]


def test_where_the_short_searches_fail_the_first_flipping_budget_answers() -> None:
    flips = []

    def search(pixels: np.ndarray, target: int, radii: Sequence[float], request: SearchRequest) -> np.ndarray:
        if request.stage == 5:
            flips.append(tuple(radii))
        return best_points(pixels, radii, -1.0 if request.stage == 5 else 1.0)

    answer = ask(search=search)
    assert len(flips) == 1
    assert answer.flip_eps is not None
    assert AT <= answer.flip_eps * (1 + 1e-9) <= 1.0
    low, high = min(flips[0]), max(flips[0])
    assert 0.5 < low < high < 1.0


# --- the question -----------------------------------------------------------------------------------------


def test_targets_are_found_whatever_the_case(small_package: Path) -> None:
    spec = package.read(small_package)
    assert counterfactuals.resolve_targets("dog", spec) == ("dog",)
    assert counterfactuals.resolve_targets("Red Panda, DOG,dog", spec) == ("red panda", "dog")
    assert counterfactuals.resolve_targets(["second", "air/plane"], spec) == ("second", "air/plane")
    assert counterfactuals.resolve_targets("predicted", spec) == ("predicted",)


def test_targets_by_number(small_package: Path) -> None:
    spec = package.read(small_package)
    assert counterfactuals.resolve_targets("1,3, cat", spec) == ("dog", "air/plane", "cat")
    with pytest.raises(UsageError, match="numbers go from 0 to 3"):
        counterfactuals.resolve_targets("4", spec)
    digits = dataclasses.replace(spec, label_names=("7", "1", "0", "3"))
    assert counterfactuals.resolve_targets("1,2,0", digits) == ("1", "0")  # names come first


def test_several_norms(small_package: Path, photographs: Path) -> None:
    asked = ask_small(small_package, photographs / "one.png", norm=["2", "1.5", "2"], steps=2)
    assert [question.p for _, question in asked.models] == [2.0, 1.5]
    assert [model["name"] for model in asked.header["models"]] == ["small"]
    assert asked.header["norm"] == "2"
    assert len(asked.cards) == 1
    assert [len(question.eps) for _, question in asked.models] == [3, 6]
    answers = list(counterfactuals.explain(asked))
    assert [(one.model, one.norm) for one in answers] == [(0, "2"), (0, "1.5")]
    for one, (_, question) in zip(answers, asked.models, strict=True):
        for budget in one.targets[0].budgets:
            assert norm(budget.image, one.input, question.p) <= budget.eps
    (alone,) = counterfactuals.explain(ask_small(small_package, photographs / "one.png", norm="1.5", steps=2))
    assert "norm" not in alone.to_json()
    assert answers[1].to_json() == {**alone.to_json(), "norm": "1.5"}
    with pytest.raises(UsageError, match="each norm has its own ladder"):
        ask_small(small_package, photographs, norm=["2", "1"], eps=1)


def test_large_budgets_have_a_smaller_one_beside_them(small_package: Path, photographs: Path) -> None:
    for eps, beyond in (("2,4", (1.0,)), ("1,4", ()), (None, ())):
        (_, question) = ask_small(small_package, photographs, eps=eps).models[0]
        assert question.extra_radii == beyond


def test_labels_with_commas_are_targets(small_package: Path) -> None:
    spec = dataclasses.replace(
        package.read(small_package), label_names=("tench, fish", "fish", "Fish", "all")
    )
    assert counterfactuals.resolve_targets("fish,tench, fish", spec) == ("fish", "tench, fish")
    assert counterfactuals.resolve_targets("all", spec) == ("all",)
    with pytest.raises(UsageError, match="no such class"):
        counterfactuals.resolve_targets("FISH", spec)  # two answer to it


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("dgo", ['"dgo"', 'Did you mean "dog"?', "cat, dog, red panda, air/plane"]),
        ("dog,", ["a class name is missing"]),
        ("", ["a class name is missing"]),
        ("secnd", ['Did you mean "second"?']),
    ],
)
def test_unknown_classes(small_package: Path, target: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        counterfactuals.resolve_targets(target, package.read(small_package))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"eps": "3..1"},
        {"eps": [1, float("nan")]},
        {"eps": 0.0},
        {"norm": "3"},
        {"steps": 0},
        {"until": 1.0},
        {"until": float("nan")},
        {"seed": -1},
        {"model": []},
        {"region": "0,0,9,1"},
        {"region": "0,0,0,1"},
        {"region": "nowhere.png"},
        {"region": np.zeros((8, 8), bool)},
        {"images": []},
    ],
)
def test_impossible_questions(small_package: Path, photographs: Path, change: dict[str, Any]) -> None:
    request: dict[str, Any] = {"images": photographs, "target": "dog", "model": small_package}
    counterfactuals.prepare(**request)
    with pytest.raises(UsageError):
        counterfactuals.prepare(**{**request, **change})


def test_missing_images(small_package: Path, photographs: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        counterfactuals.prepare([photographs, photographs / "three.png"], target="dog", model=small_package)


def test_own_answers_are_no_questions(small_package: Path, photographs: Path) -> None:
    out = photographs / "counterfactuals"
    (out / "one").mkdir(parents=True)
    (out / "one" / "input.png").write_bytes((photographs / "one.png").read_bytes())
    names = [Path(s.path).name for s in ask_small(small_package, photographs, out=out).sources]
    assert names == ["one.png", "two.png", "wide.png"]
    named = ask_small(small_package, out / "one" / "input.png", out=out).sources
    assert [source.path for source in named] == [str(out / "one" / "input.png")]
    assert len(ask_small(small_package, out, out=out).sources) == 1


def test_norms_by_either_name(small_package: Path, photographs: Path) -> None:
    prepared = ask_small(small_package, photographs, norm=["l2", "L1.5", "l1", "linf", "2", math.inf])
    assert [request.p for _, request in prepared.models] == [2.0, 1.5, 1.0, math.inf]


def test_limit(small_package: Path, photographs: Path) -> None:
    assert [Path(s.path).name for s in ask_small(small_package, photographs, limit=2).sources] == [
        "one.png",
        "two.png",
    ]
    with pytest.raises(UsageError, match="must be positive"):
        ask_small(small_package, photographs, limit=0)


def test_output_in_the_input_folder_is_not_explained_again(small_package: Path, photographs: Path) -> None:
    for _ in range(2):
        answers = ratioctl.counterfactual(
            photographs, target="dog", model=small_package, eps=0.5, steps=2, out=photographs
        )
        assert [Path(answer.path).name for answer in answers] == ["one.png", "two.png", "wide.png"]


def test_a_planted_link_is_not_written_through(
    small_package: Path, photographs: Path, tmp_path: Path
) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (out / "one").symlink_to(elsewhere)
    with pytest.raises(OutputError, match="symbolic link"):
        ratioctl.counterfactual(
            photographs / "one.png", target="dog", model=small_package, eps=0.5, steps=2, out=out
        )
    assert list(elsewhere.iterdir()) == []


def test_a_box_in_pixels_of_the_photograph(small_package: Path, photographs: Path) -> None:
    """wide.png is 12x10: its center square begins at column 1, and 10 pixels become 8."""
    (answer,) = ratioctl.counterfactual(
        photographs / "wide.png",
        target="dog",
        model=small_package,
        eps=2.0,
        steps=10,
        region="6,0,6,10",
        region_space="image",
    )
    changed = (answer.targets[0].budgets[0].image != answer.input).any(2)
    assert changed[:, 4:].any()
    assert not changed[:, :4].any()
    with pytest.raises(ImageError, match="not a box within its 12x10 pixels"):
        ratioctl.counterfactual(
            photographs / "wide.png",
            target="dog",
            model=small_package,
            region="6,0,7,10",
            region_space="image",
        )


@pytest.mark.parametrize(("eps", "warned"), [("0.5..3", False), ("3.1", True), (None, False)])
def test_budgets_far_beyond_the_ladder_are_warned_of(
    small_package: Path, photographs: Path, eps: str | None, warned: bool
) -> None:
    """The ladder ends at 1; three times that is the most."""
    asked = counterfactuals.prepare([photographs], target="dog", model=small_package, eps=eps)
    assert bool(asked.warnings) is warned
    if warned:
        assert "--eps 3.1 is far beyond the useful range of small in l2, about 0.25 to 1" in asked.warnings[0]


def test_ladder_is_the_model_s_own(small_package: Path, photographs: Path) -> None:
    (_, question) = ask_small(small_package, photographs).models[0]
    assert question.eps == (0.25, 0.5, 1.0)
    (_, question) = ask_small(small_package, photographs, norm="inf").models[0]
    assert len(question.eps) == 6  # none stored: the default for the size


def test_seeds_depend_on_what_is_asked_alone() -> None:
    other = PIXELS.copy()
    other[0, 0, 0] += 1
    asked = [(0, PIXELS, "dog", 1.0), (1, PIXELS, "dog", 1.0), (0, other, "dog", 1.0)]
    asked += [(0, PIXELS, "cat", 1.0), (0, PIXELS, "dog", 1.5)]
    seeds = [counterfactuals.seed_of(*one) for one in asked]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == counterfactuals.seed_of(0, PIXELS.copy(), "dog", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- with a network ---------------------------------------------------------------------------------------


def ask_small(model: Path, images: Any, **options: Any) -> counterfactuals.PreparedRequest:
    return counterfactuals.prepare(images, **{"target": "dog", "model": model, "steps": 6, **options})


def same(a: Any, b: Any) -> bool:
    return a.to_json() == b.to_json() and all(
        np.array_equal(x.image, y.image)
        for s, t in zip(a.targets, b.targets, strict=True)
        for x, y in zip(s.budgets, t.budgets, strict=True)
    )


@pytest.mark.parametrize("norm_name", ["1", "1.5", "2", "inf"])
def test_pictures_of_every_norm_lie_in_the_ball(
    small_package: Path, photographs: Path, norm_name: str
) -> None:
    eps = {"1": (4, 12), "1.5": (1, 3), "2": (0.5, 1.5), "inf": (0.03, 0.1)}[norm_name]
    # In a few steps the search at linf 0.1 may find no more than the one at 0.03, and so move too little.
    (answer,) = ratioctl.counterfactual(
        photographs / "wide.png", target="dog", model=small_package, norm=norm_name, eps=eps, steps=100
    )
    (target,) = answer.targets
    before = answer.original.probabilities[1]
    for budget in target.budgets:
        assert norm(budget.image, answer.input, float(norm_name)) <= budget.eps
        assert budget.confidence >= before
        before = budget.confidence
    assert target.budgets[-1].confidence > 1.05 * answer.original.probabilities[1]
    if norm_name in ("2", "inf"):  # the others need more steps than these
        assert target.budgets[-1].distance[f"l{norm_name}"] > 0.8 * eps[-1]


def test_confidences_are_those_of_a_fresh_scoring(small_package: Path, photographs: Path) -> None:
    import torch

    model, temperature = ratioctl.load_model(small_package), package.read(small_package).temperature
    answers = ratioctl.counterfactual(
        [photographs / "one.png"], target="all", model=small_package, steps=6, eps=[0.5, 2]
    )
    (answer,) = answers
    labels = package.read(small_package).label_names
    assert [target.target for target in answer.targets] == [
        label for label in labels if label != answer.original.label
    ]
    for target in answer.targets:
        k = labels.index(target.target)
        for image, confidence in [(b.image, b.confidence) for b in target.budgets]:
            x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
            with torch.no_grad():
                again = (model(x)[0].double() / temperature).softmax(0)
            assert confidence == pytest.approx(float(again[k]), abs=1e-4)
    first, second = np.argsort(answer.original.probabilities)[:-3:-1]
    asked = ask_small(small_package, photographs / "one.png", target="predicted,second", eps=1.0)
    (named,) = counterfactuals.explain(asked)
    labels = package.read(small_package).label_names
    assert [target.target for target in named.targets] == [labels[first], labels[second]]
    assert named.targets[0].flip_eps == 0


def test_companions_change_nothing(small_package: Path, photographs: Path) -> None:
    """With batches of its own an answer is the same to the bit, whoever else is asked about."""
    eps = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    asked = ask_small(small_package, photographs, target="dog,air/plane", restarts=2, eps=eps, steps=4)
    apart = list(counterfactuals.explain(asked, together=1))
    assert [Path(one.path).name for one in apart] == ["one.png", "two.png", "wide.png"]
    (alone,) = counterfactuals.explain(
        ask_small(small_package, photographs / "two.png", target="air/plane", restarts=2, eps=eps, steps=4)
    )
    assert same(dataclasses.replace(apart[1], targets=apart[1].targets[1:]), alone)
    (other,) = counterfactuals.explain(
        ask_small(
            small_package,
            photographs / "two.png",
            target="air/plane",
            restarts=2,
            eps=eps,
            steps=4,
            seed=1,
        )
    )
    assert not same(other, alone)


def counted(monkeypatch: pytest.MonkeyPatch, fits: int = 10**6) -> list[int]:
    """The rows of every batch that the engine is given from now on; more than `fits` of them fit nowhere."""
    import torch

    from ratioctl.attacks import engine

    rows: list[int] = []
    whole = engine.perturb

    def perturb(logits_of: Any, x0: Any, *rest: Any, **options: Any) -> Any:
        rows.append(len(x0))
        if len(x0) > fits:
            raise torch.OutOfMemoryError("too much")
        return whole(logits_of, x0, *rest, **options)

    monkeypatch.setattr(engine, "perturb", perturb)
    return rows


def test_images_and_targets_share_batches(
    small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever shares a batch: the same answers up to rounding, random starts included."""
    from ratioctl.counterfactuals import batches

    rows = counted(monkeypatch)
    found = []
    for most in (1, 4, 100):
        rows.clear()
        monkeypatch.setattr(batches, "_CPU_ROWS", most)
        asked = ask_small(
            small_package, photographs, target="dog,cat,second", restarts=2, eps=(0.5, 1.0), steps=4
        )
        found.append(list(counterfactuals.explain(asked)))
        targets = sum(len(one.targets) for one in found[-1])
        assert max(rows) >= {1: 2, 4: 4, 100: 2 * targets}[most]
        assert rows[0] == min(most if most > 2 else 2, 2 * targets)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert one.path == other.path
            for a, b in zip(one.targets, other.targets, strict=True):
                assert a.target == b.target
                assert [x.confidence for x in a.budgets] == pytest.approx(
                    [x.confidence for x in b.budgets], abs=2e-3
                )


def test_a_batch_that_does_not_fit_is_halved(
    small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask_small(small_package, photographs / "one.png", eps=(0.5, 0.8, 1.0, 1.1, 1.2), steps=3)
    (whole,) = counterfactuals.explain(asked)
    rows = counted(monkeypatch, fits=2)
    (halved,) = counterfactuals.explain(asked)
    assert rows[:4] == [5, 2, 2, 1]
    confidences = [[budget.confidence for budget in one.targets[0].budgets] for one in (whole, halved)]
    assert confidences[0] == pytest.approx(confidences[1], abs=2e-3)
    counted(monkeypatch, fits=0)
    with pytest.raises(RuntimeError, match="too much"):
        list(counterfactuals.explain(asked))


def test_what_is_done_is_handed_out_before_an_interrupt(
    small_package: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images are asked about two targets, two at a time; the interrupt comes in the second batch."""
    from ratioctl.attacks import engine
    from ratioctl.counterfactuals import batches

    whole, first_done = engine.perturb, []

    def perturb(*given: Any, **options: Any) -> Any:
        if first_done:
            raise KeyboardInterrupt
        return whole(*given, **options)

    monkeypatch.setattr(engine, "perturb", perturb)
    monkeypatch.setattr(batches, "_CPU_ROWS", 4)
    images = [photographs / "one.png", photographs / "two.png"]
    asked = ask_small(small_package, images, target="cat,dog", eps=(2.0, 3.0), steps=3)
    answers = counterfactuals.explain(asked)
    assert Path(next(answers).path).name == "one.png"
    first_done.append(True)
    with pytest.raises(KeyboardInterrupt):
        next(answers)


@pytest.mark.parametrize("norm_name", ["1", "1.5", "2", "inf"])
def test_a_region_binds_every_norm_and_random_starts(
    small_package: Path, photographs: Path, norm_name: str
) -> None:
    """Several images and targets, whose batches must not mix: outside the region each is its own original."""
    eps = {"1": 6, "1.5": 2, "2": 1, "inf": 0.1}[norm_name]
    asked = ask_small(
        small_package,
        photographs,
        target="dog,cat",
        region="1,2,3,4",
        eps=eps,
        steps=4,
        restarts=2,
        norm=norm_name,
    )
    for answer in counterfactuals.explain(asked):
        for target in answer.targets:
            changed = (target.budgets[0].image != answer.input).any(2)
            assert changed[2:6, 1:4].any()
            changed[2:6, 1:4] = False
            assert not changed.any()
            if target.flip_image is not None:
                changed = (target.flip_image != answer.input).any(2)
                changed[2:6, 1:4] = False
                assert not changed.any()


def test_nothing_changes_outside_the_region(small_package: Path, photographs: Path) -> None:
    asked = ask_small(small_package, photographs / "one.png", region="1,2,3,4", eps=1.0, steps=12)
    (answer,) = counterfactuals.explain(asked)
    changed = (answer.targets[0].budgets[0].image != answer.input).any(2)
    assert changed[2:6, 1:4].any()
    changed[2:6, 1:4] = False
    assert not changed.any()


def test_the_document_tells_the_region(small_package: Path, photographs: Path) -> None:
    mask = np.zeros((8, 8), dtype=bool)
    mask[1, 2] = mask[4, 6] = True
    for region, told in (
        (None, None),
        ("1,2,3,4", {"box": [1, 2, 3, 4], "pixels": 12}),
        (mask, {"box": [2, 1, 5, 4], "pixels": 2}),
    ):
        asked = ask_small(small_package, photographs, target="dog", region=region)
        assert asked.header["models"][0].get("region") == told


def test_a_mask_image_is_a_region(small_package: Path, photographs: Path, tmp_path: Path) -> None:
    from PIL import Image

    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (_, question) = ask_small(small_package, photographs, region=str(tmp_path / "mask.png")).models[0]
    assert np.array_equal(question.region, mask > 0)  # type: ignore[arg-type]


def test_unreadable_images_are_reported_and_left_out(small_package: Path, photographs: Path) -> None:
    (photographs / "two.png").write_text("this is no picture")
    told: list[str] = []
    read: list[counterfactuals.Picture] = []
    done: list[float] = []
    answers = list(
        counterfactuals.explain(
            ask_small(small_package, photographs, eps=0.5, steps=2),
            on_error=lambda path, error: told.append(path),
            on_picture=read.append,
            callback=done.append,
        )
    )
    assert told == [f"{photographs}/two.png"]
    assert [Path(one.path).stem for one in answers] == ["one", "wide"]
    assert read[0].notes == ()
    assert "12x10" in " ".join(read[1].notes)
    assert done == sorted(done)
    assert done[-1] == 2
    with pytest.raises(ImageError):
        ratioctl.counterfactual(photographs, target="dog", model=small_package)


def test_arrays_are_images(small_package: Path) -> None:
    array = np.random.default_rng(1).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    (answer,) = ratioctl.counterfactual(array, target="dog", model=small_package, eps=0.5, steps=2)
    assert np.array_equal(answer.input, array)
    with pytest.raises(UsageError, match="float64"):
        ratioctl.counterfactual(array / 255, target="dog", model=small_package, eps=0.5, steps=2)


@pytest.mark.parametrize("target", ["caf\u00e9", "cafe\u0301", "CAFE\u0301"])
@pytest.mark.parametrize("label", ["caf\u00e9", "cafe\u0301"])
def test_targets_are_compared_after_normalization(target: str, label: str) -> None:
    spec = types.SimpleNamespace(name="m", label_names=("eau", label))
    assert counterfactuals.resolve_targets(target, spec) == (label,)  # type: ignore[arg-type]


def test_bit_depth_reaches_the_decoder(small_package: Path, tmp_path: Path) -> None:
    image = tmp_path / "scan.png"
    Image.fromarray(np.full((8, 8), 2048, np.uint16)).save(image)
    for bits, level in ((None, 8), (12, 128)):
        (found,) = counterfactuals.explain(ask_small(small_package, image, eps=0.5, bit_depth=bits))
        assert found.input.max() == found.input.min() == level
