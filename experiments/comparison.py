"""Table 1 of the paper with our own recipes: one network, one budget, eight methods; and two more questions.

    python -m experiments.comparison small --train cifar10.tar.xz:train --test cifar10.tar.xz:test \\
        --outside a.tar.xz:train b.tar.xz:train --ood svhn=svhn.tar.xz:test cifar100=... textures=...
    python -m experiments.comparison fine-tune (the same data)
    python -m experiments.comparison svhn --train svhn-small:train --test svhn-small:test (the same --outside)
    python -m experiments.comparison digits

"small" trains the eight `cifar10-*-small` recipes, "svhn" the five of `svhn-*-small`, "digits" the six of
`digits-*` with several seeds, "fine-tune" compares RATIO from scratch with plain or adversarially trained
models fine-tuned to RATIO (`--init`) at the same total cost in passes. Each trains what is not trained yet,
calibrates on the shared held-out split, and evaluates all models on the same images ("fine-tune" on half as
many worst cases). The same command continues after an interruption. `--steps-only` prints the runs and their
cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ratioctl
from ratioctl import package as packages
from ratioctl import recipe
from ratioctl.attacks.autoattack import AttackBudget
from ratioctl.evaluation import run as evaluate
from ratioctl.evaluation.suites import Suite
from ratioctl.recipe import Recipe, Term
from ratioctl.report import evaluation_files, markdown
from ratioctl.training.schedule import schedule_attacks
from tools import harness

METHODS = ("plain", "oe", "acet", "at-0.5", "at-0.25", "trades-0.5", "ratio-0.5", "ratio-0.25")
SUITE = Suite(
    name="comparison",
    inside=500,
    balls=1,
    attacks=("apgd-ce", "apgd-t"),
    budget=AttackBudget(steps=50, targets=3),
    outside=200,
    outside_steps=50,
    curve=64,
    curve_steps=20,
    probe=16,
)
# For six models: half the worst cases and no Figure 5.
FINE_TUNE_SUITE = dataclasses.replace(SUITE, outside=100, curve=0)
FORWARD, TRAINING = 0.4, 1.5  # cost of a forward and of a training pass, in forward-and-input-gradient passes
TRAIN_IMAGES = {"cifar10": 48_000, "svhn": 7_400, "digits": 1_223}
FINE_TUNE_EPOCHS = 3  # of RATIO from scratch: the total cost of every row of "fine-tune"

Start = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One model: a recipe with settings, optionally from the weights of another run (`init`, its name).

    `measured` is false for a run that is only another run's start.
    """

    name: str
    recipe: str
    seed: int = 0
    settings: tuple[str, ...] = ()
    init: str | None = None
    measured: bool = True

    def loaded(self, shared: Sequence[str] = ()) -> Recipe:
        own = (*shared, *self.settings, f"seed={self.seed}")
        return recipe.load(
            self.recipe, [s for s in own if not (self.plain_data and s.startswith("data.outside"))]
        )

    @property
    def plain_data(self) -> bool:
        return not recipe.load(self.recipe).data.outside


def passes(spec: Recipe, images: int) -> float:
    """Cost of a training in forward-and-input-gradient passes of one image, ramps included."""
    per_epoch = images / spec.optim.batch_size
    updates = round(spec.optim.epochs * per_epoch)
    sizes = (spec.optim.batch_size, spec.optim.batch_size_out)

    def term(side: Term | None, batch: int) -> float:
        if side is None:
            return 0.0
        views = (side.clean > 0 or side.against == "clean") + (side.robust > 0)
        search = 0.0
        if side.attack is not None and side.robust > 0:
            extra = (side.attack.start == "random") + (side.against == "clean")
            search = side.attack.restarts * (side.attack.steps + FORWARD) + FORWARD * extra
        return batch * (views * TRAINING + search)

    total = 0.0
    for update in range(updates):
        objective, _ = schedule_attacks(spec, update / per_epoch)
        total += term(objective.inside, sizes[0]) + term(objective.outside, sizes[1])
        if objective.energy is not None:
            total += objective.energy.batch_size * (TRAINING + objective.energy.steps)
    return total


def small(seeds: Sequence[int]) -> list[Run]:
    return [
        Run(name=_seeded(method, seed), recipe=f"cifar10-{method}-small", seed=seed)
        for seed in seeds
        for method in METHODS
    ]


def svhn(seeds: Sequence[int]) -> list[Run]:
    methods = ("plain", "oe", "acet", "at-0.25", "ratio-0.25")
    return [
        Run(name=_seeded(m, seed), recipe=f"svhn-{m}-small", seed=seed) for seed in seeds for m in methods
    ]


def digits(seeds: Sequence[int]) -> list[Run]:
    methods = ("plain", "oe", "acet", "at", "ratio", "jem")
    return [Run(name=_seeded(m, seed), recipe=f"digits-{m}", seed=seed) for m in methods for seed in seeds]


def fine_tune(seeds: Sequence[int]) -> list[Run]:
    """RATIO-0.25 from scratch, and from plain and AT-0.25 models, at the total cost of three epochs.

    A start takes half of the cost (the plain one is the comparison's, of six epochs), RATIO the rest.
    """
    target = recipe.load("cifar10-ratio-0.25-small")
    images = TRAIN_IMAGES["cifar10"]
    whole = passes(recipe.load(target.name, _length(target, FINE_TUNE_EPOCHS)), images)
    starts = {"plain": recipe.load("cifar10-plain-small").optim.epochs}
    starts["at-0.25"] = _epochs_for(recipe.load("cifar10-at-0.25-small"), whole / 2, images)
    runs = []
    for seed in seeds:
        settings = _length(target, FINE_TUNE_EPOCHS)
        name = _seeded("ratio-0.25-short", seed)
        runs.append(Run(name=name, recipe=target.name, seed=seed, settings=settings))
        for start, epochs in starts.items():
            spec = recipe.load(f"cifar10-{start}-small")
            whole_start = epochs == spec.optim.epochs
            first = _seeded(start if whole_start else f"{start}-short", seed)
            settings = () if whole_start else _length(spec, epochs)
            runs.append(Run(name=first, recipe=spec.name, seed=seed, settings=settings, measured=False))
            rest = whole - passes(recipe.load(spec.name, settings), images)
            knows = ("inside",) if spec.objective.inside.robust > 0 else ()
            settings = _length(target, _epochs_for(target, rest, images, knows), knows)
            name = _seeded(f"{start}-then-ratio-0.25", seed)
            runs.append(Run(name=name, recipe=target.name, seed=seed, settings=settings, init=first))
    return runs


def _length(spec: Recipe, epochs: float, knows: Sequence[str] = ()) -> tuple[str, ...]:
    """Settings that train `spec` for `epochs`.

    Ramps take the first quarter as in the recipes; the sides that the start `knows` have none.
    """
    sides = {"inside": spec.objective.inside, "outside": spec.objective.outside}
    ramps = {
        name: 0.0 if name in knows else epochs / 4
        for name, term in sides.items()
        if term is not None and term.ramp_epochs > 0
    }
    settings = (f"objective.{name}.ramp_epochs={ramp:.3f}" for name, ramp in ramps.items())
    return (f"optim.epochs={epochs:.2f}", *settings)


def _epochs_for(spec: Recipe, cost: float, images: int, knows: Sequence[str] = ()) -> float:
    """Epochs of `spec` that cost about `cost` passes; at most the recipe's own."""
    low, high = 0.1, spec.optim.epochs
    for _ in range(12):
        middle = (low + high) / 2
        spent = passes(recipe.load(spec.name, _length(spec, middle, knows)), images)
        low, high = (middle, high) if spent < cost else (low, middle)
    return round(low, 2)


def _seeded(name: str, seed: int) -> str:
    return name if seed == 0 else f"{name}-seed{seed}"


def trained(
    runs: Sequence[Run], shared: Sequence[str], out: Path, device: str
) -> Iterator[packages.ModelPackage]:
    """Packages of the runs; trains and calibrates those that are missing or of another recipe."""
    done: dict[str, packages.ModelPackage] = {}
    for run in runs:
        spec, folder = run.loaded(shared), out / run.name
        found = folder / "package"
        package = packages.read(found) if (found / "config.json").is_file() else None
        filed = found / "recipe.toml"
        start = None if run.init is None else done[run.init]
        if package is not None and start is not None:
            known = package.config["ratio"]["provenance"]["init"]
            if known is None or known["digest"] != start.digest:
                sys.exit(f"{folder}: was trained from another {run.init}. Move it away to train it again.")
        if package is None or not alike(spec, recipe.load(filed)) or not package.thresholds:
            cost = passes(spec, TRAIN_IMAGES[run.recipe.partition("-")[0]])
            print(f"training {run.name}: {cost:,.0f} passes", file=sys.stderr)
            path = out / f"{run.name}.toml"
            path.write_text(recipe.dumps(_without_unused(spec)), encoding="utf-8")
            package = ratioctl.train(
                path, out=folder, resume=True, init=None if start is None else start.path, device=device
            )
        done[run.name] = package
        yield package


def _without_unused(spec: Recipe) -> Recipe:
    """`spec` without inherited OOD images that its objective does not use, which a file may not name."""
    if spec.objective.outside is not None:
        return spec
    return spec.model_copy(update={"data": spec.data.model_copy(update={"outside": ()})})


def alike(wanted: Recipe, filed: Recipe) -> bool:
    """Whether two recipes train the same model: names and the set that only measures do not count."""

    def training(spec: Recipe) -> Recipe:
        spec = _without_unused(spec)
        data = spec.data.model_copy(update={"outside_test": ()})
        return spec.model_copy(update={"name": "", "description": "", "data": data})

    return training(wanted) == training(filed)


def start_of(run: Run, spec: Recipe, package: packages.ModelPackage, images: int) -> Start:
    """What a row records about the run whose weights it started from."""
    return {
        "name": run.name,
        "recipe": run.recipe,
        "settings": list(run.settings),
        **origin(package),
        "passes": passes(spec, images),
    }


def origin(package: packages.ModelPackage) -> dict[str, Any]:
    """Digest of the recipe that the package was trained with (`alike` accepts other names), and versions."""
    provenance = package.config["ratio"]["provenance"]
    return {
        "recipe_digest": provenance["recipe_digest"],
        "package_digest": package.digest,
        "trained_with": provenance["versions"],
    }


def row(
    run: Run, spec: Recipe, package: packages.ModelPackage, evaluated: Any, images: int, start: Start | None
) -> dict[str, Any]:
    """Figures of one model, and how its start was trained."""
    inside, outside = spec.objective.inside.attack, spec.objective.outside and spec.objective.outside.attack
    return {
        "name": run.name,
        "recipe": run.recipe,
        "settings": list(run.settings),
        "start": start,
        "seed": run.seed,
        **origin(package),
        "attack_steps": [inside.steps if inside else 0, outside.steps if outside else 0],
        "updates": package.config["ratio"]["provenance"]["updates"],
        "passes": passes(spec, images),
        "total_passes": passes(spec, images) + (start["passes"] if start else 0.0),
        "temperature": package.temperature,
        "measurements": [m.to_json() for m in evaluated.report.measurements],
        "warnings": list(evaluated.report.warnings),
        "radius": evaluated.figures["radius"],
    }


DEFAULT_SEEDS = {"small": [0], "fine-tune": [0, 1], "svhn": [0], "digits": [0, 1, 2]}
PLANS = {"small": small, "fine-tune": fine_tune, "svhn": svhn, "digits": digits}
FAMILIES = {"small": "cifar10", "fine-tune": "cifar10", "svhn": "svhn", "digits": "digits"}


def planned(options: argparse.Namespace) -> list[Run]:
    """The runs of one comparison, with `--only` those named and their starts."""
    runs = PLANS[options.what](options.seeds or DEFAULT_SEEDS[options.what])
    if not options.only:
        return runs
    chosen = [run for run in runs if run.name in options.only]
    starts = {run.init for run in chosen}
    return [
        dataclasses.replace(run, measured=run in chosen)
        for run in runs
        if run in chosen or run.name in starts
    ]


def sources(options: argparse.Namespace) -> tuple[str, list[str], list[str]]:
    """Test data, out-distributions, and the settings that all recipes share."""
    ood = ["uniform=noise:uniform", "smooth=noise:smooth"]
    if options.what == "digits":
        return "digits:test", ["photo=photos:flower", *ood], []
    shared = [f"data.train={options.train}", f"data.test={options.test}"]
    return options.test, [*options.ood, *ood], [*shared, f"data.outside={json.dumps(options.outside)}"]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("what", choices=tuple(PLANS))
    parser.add_argument("--train", default="cifar10:train")
    parser.add_argument("--test", default="cifar10:test")
    parser.add_argument("--outside", nargs="*", default=["data/tinyimagenet-out:train"])
    parser.add_argument("--ood", nargs="*", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--steps-only", action="store_true")
    options = parser.parse_args()
    runs, (data, ood, shared) = planned(options), sources(options)
    family = FAMILIES[options.what]
    images = TRAIN_IMAGES[family]
    if options.steps_only:
        for run in runs:
            cost = passes(run.loaded(shared), images)
            print(f"{run.name:32} {cost:14,.0f} passes {' '.join(run.settings)}")
        return
    out = options.out or Path("runs/comparison" + ("" if family == "cifar10" else f"-{family}"))
    out.mkdir(parents=True, exist_ok=True)
    done = dict(zip((run.name for run in runs), trained(runs, shared, out, options.device), strict=True))
    if options.train_only:
        return
    starts = {
        run.name: start_of(run, run.loaded(shared), done[run.name], images)
        for run in runs
        if run.name in {other.init for other in runs}
    }
    runs = [run for run in runs if run.measured]
    folder = out / f"report-{options.what}"
    suite = FINE_TUNE_SUITE if options.what == "fine-tune" else SUITE
    result = evaluate(
        [out / run.name / "package" for run in runs],
        data=data,
        ood=ood,
        suite=suite,
        out=folder,
        device=options.device,
        resume=True,
        finish=lambda evaluation: evaluation_files.write(evaluation, folder),
    )
    print(markdown.markdown(result).split("\n## ")[0], file=sys.stderr)
    harness.finish(
        {
            "benchmark": f"comparison: {options.what}",
            "protocol": result.protocol,
            "figure": {"images": suite.curve, "steps": suite.curve_steps},
            "data": [{k: v for k, v in entry.items() if k != "source"} for entry in result.data],
            "environment": result.environment,
            "rows": [
                row(run, run.loaded(shared), done[run.name], evaluated, images, starts.get(run.init or ""))
                for run, evaluated in zip(runs, result.models, strict=True)
            ],
        },
        options,
    )


if __name__ == "__main__":
    main()
