"""Several processes train as one would: shares of the same batches, and the same weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ratioctl import package as packages
from ratioctl import recipe as recipes
from ratioctl.attacks import balls
from ratioctl.data import loader
from ratioctl.data.augment import augment
from ratioctl.errors import RecipeError, UsageError
from ratioctl.recipe import Augment, Recipe
from ratioctl.training import agreement, memory
from ratioctl.training.distributed import Processes, launched, silent
from ratioctl.training.loop import fit
from ratioctl.utils.shares import PartOfBatch, Share
from tests import processes

TINY = [
    "model.width=4",
    "optim.epochs=0.1",
    "optim.batch_size=25",  # does not divide by 2
    "optim.batch_size_out=16",
    "optim.validate_every=0.05",
    "optim.validate_images=24",
    "optim.ema=0.9",
    'data.outside="noise:uniform"',
    'data.outside_test="noise:smooth"',
    "objective.inside.attack.steps=2",
    "objective.outside.attack.steps=2",
]
# Sums over a batch are added up in another order. Measured after 6 updates: 4e-6 of weights up to 1.1. The
# difference grows from update to update, and jumps where an attack prefers another of two points as good.
TOLERANCE = 1e-4
RANDOM_START = ["optim.epochs=0.05", 'objective.inside.attack.start="random"']
WORKER = """
import json, sys, torch
from pathlib import Path
from ratioctl import recipe
from ratioctl.models import build
from ratioctl.training.distributed import joined
from ratioctl.training.loop import fit
from ratioctl.training.sync_batchnorm import training_copy
out, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
with joined("cpu") as processes:
    seen = []
    fit(recipe.load("digits-ratio", settings), out, precision="fp32", processes=processes,
        callback=seen.append)
    for name, more in json.loads(sys.argv[3]).items():
        fit(recipe.load("digits-ratio", [*settings, *more]), out.with_name(name), precision="fp32",
            processes=processes)
    torch.manual_seed(0)
    model = build("resnet18", num_classes=3, channels=1, width=4, mean=(0.5,), std=(0.25,))
    model.network.bn1.momentum = None
    twin = training_copy(model, synchronize=True).train()
    x = torch.rand(7, 1, 8, 8, requires_grad=True)
    rows = processes.share.rows(7)
    twin(x[rows]).square().sum().backward()
    everyone = processes.gathered(x.grad)
    statistics = {k: v.tolist() for k, v in model.network.state_dict().items() if "running" in k}
    rough = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logits = twin(rough[rows])
    logits.float().square().sum().backward()
    in_bf16 = processes.gathered(rough.grad)
    if processes.first:
        found = {"gradient": sum(everyone).tolist(), "statistics": statistics,
                 "bf16": sum(in_bf16).tolist()}
        out.with_name("norm.json").write_text(json.dumps(found))
    print(processes.rank, [event["event"] for event in seen if event["event"] != "progress"])
"""


def tiny(*more: str) -> Recipe:
    return recipes.load("digits-ratio", [*TINY, *more])


def difference(one: packages.ModelPackage, other: Path) -> float:
    """Largest difference between the weights of two packages."""
    left, right = (packages.read_weights(package) for package in (one, packages.read(other)))
    assert left.keys() == right.keys()
    return max(float(abs(left[key] - right[key]).max()) for key in left)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, str, str]]]:
    """The run folder of two processes, and how they ended."""
    out = tmp_path_factory.mktemp("pair") / "run"
    own = ["optim.epochs=0.05", "optim.sync_batchnorm=false", "optim.allreduce_dtype=bf16"]
    more = json.dumps({"own": own, "random": RANDOM_START})
    started = processes.start([["-c", WORKER, str(out), json.dumps(TINY), more]] * 2)
    ended = processes.finish(started)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return out, ended


def test_two_processes_end_with_the_weights_of_one(pair: Any, tmp_path: Path) -> None:
    out, _ = pair
    one = fit(tiny(), tmp_path / "one", device="cpu", precision="fp32")
    assert 0 < difference(one, out / "package") < TOLERANCE
    random = fit(tiny(*RANDOM_START), tmp_path / "random", device="cpu", precision="fp32")
    assert 0 < difference(random, out.with_name("random") / "package") < TOLERANCE
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "one", out)
    ]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert a[key] == pytest.approx(b[key], abs=1e-3), key
    assert json.loads((out / "checkpoint/state.json").read_text())["processes"] == 2


def test_process_0_alone_reports(pair: Any) -> None:
    _, ended = pair
    first, second = (out for _, out, _ in ended)
    assert first.startswith("0 ['leaks', 'validation'")
    assert second == "1 []\n"


def test_own_batch_statistics_train_another_network_that_agrees(pair: Any) -> None:
    """`check_replicas` has compared the two processes at every validation."""
    out, _ = pair
    assert TOLERANCE < difference(packages.read(out / "package"), out.with_name("own") / "package") < 2


def test_statistics_are_those_of_the_whole_batch(pair: Any) -> None:
    from ratioctl.models import build

    found = json.loads(pair[0].with_name("norm.json").read_text())
    torch.manual_seed(0)
    model = build("resnet18", num_classes=3, channels=1, width=4, mean=(0.5,), std=(0.25,)).train()
    assert isinstance(model.network.bn1, nn.BatchNorm2d)
    model.network.bn1.momentum = None
    x = torch.rand(7, 1, 8, 8, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(torch.tensor(found["gradient"]), x.grad, atol=1e-4 * float(x.grad.abs().max()))
    near = torch.nn.functional.cosine_similarity(
        torch.tensor(found["bf16"]).flatten(), x.grad.flatten(), dim=0
    )
    assert near > 0.8
    for key, value in found["statistics"].items():
        assert torch.allclose(torch.tensor(value), model.network.state_dict()[key], atol=1e-5), key


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("balance", ["none", "sampling"])
def test_shares_joined_are_the_batch(world: int, balance: str) -> None:
    recipe = tiny(f"data.balance={balance}", "data.augment={crop=2, flip=true, cutout=3}")
    splits = loader.load(recipe)
    fill = torch.tensor([60], dtype=torch.uint8)
    whole = loader.batch_at(3, recipe, splits.train, splits.outside, fill)
    parts = [
        loader.batch_at(3, recipe, splits.train, splits.outside, fill, share=Share(rank=rank, world=world))
        for rank in range(world)
    ]
    assert [len(p.x_in) for p in parts] in ([12, 13], [8, 8, 9])
    for name in ("x_in", "y_in", "x_out"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))


def test_views_do_not_depend_on_the_number_of_processes() -> None:
    spec = Augment(
        crop=2, flip=True, autoaugment="cifar10", cutout=4, resized_crop=0.5, color_jitter=0.4, lighting=0.1
    )
    x = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    fill = torch.tensor([100, 110, 120], dtype=torch.uint8)
    whole = augment(x, spec, torch.Generator().manual_seed(5), fill)
    for rows in (slice(0, 7), slice(7, 20)):
        numbers = PartOfBatch(generator=torch.Generator().manual_seed(5), count=20, rows=rows)
        assert torch.equal(augment(x[rows], spec, numbers, fill), whole[rows])


def test_random_starts_do_not_depend_on_the_number_of_processes() -> None:
    x = torch.rand(5, 1, 4, 4)
    for p in (1.0, 1.5, 2.0, float("inf")):
        whole = balls.random_start(x, p, 0.5, torch.Generator().manual_seed(5))
        numbers = PartOfBatch(generator=torch.Generator().manual_seed(5), count=5, rows=slice(2, 5))
        assert torch.equal(balls.random_start(x[2:], p, 0.5, numbers), whole[2:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretended(Processes):
    """Two processes of which the other one has `theirs`."""

    world: int = 2
    members: tuple[tuple[str, int], ...] = (("here", 11), ("there", 12))
    theirs: Any = None

    def gathered(self, value: Any) -> list[Any]:
        return [value, self.theirs(value)]


def test_a_process_with_another_recipe_or_other_options_is_named() -> None:
    recipe = tiny()
    other = recipes.dumps(tiny("optim.lr=0.3", "seed=4"))

    class Compute:
        device, bf16 = torch.device("cpu"), False

    compute: Any = Compute()
    with pytest.raises(RecipeError) as caught:
        agreement.check_arguments(recipe, Pretended(theirs=lambda value: other), compute, {})
    assert str(caught.value).startswith("rank 1 (process 12 on there): has another recipe than rank 0")
    assert "optim.lr, seed" in str(caught.value)

    def changed(value: Any) -> Any:
        return value if isinstance(value, str) else value | {"precision": "bf16"}

    with pytest.raises(
        UsageError, match=r"rank 1 .* has another precision than rank 0: bf16 instead of fp32"
    ):
        agreement.check_arguments(recipe, Pretended(theirs=changed), compute, {"--resume": False})
    many = Pretended(world=17, theirs=lambda value: value)
    with pytest.raises(RecipeError, match="batch_size_out = 16: there are 17 processes"):
        agreement.check_arguments(recipe, many, compute, {})
    same, energy = Pretended(theirs=lambda value: value), recipes.load("digits-jem")
    with pytest.raises(RecipeError, match=r"objective\.energy: is trained by one process only"):
        agreement.check_arguments(energy, same, compute, {})


def test_a_process_with_other_data_is_named() -> None:
    splits, others = loader.load(tiny()), loader.load(tiny("seed=1", 'data.outside="noise:smooth"'))

    def theirs(value: dict[str, str]) -> dict[str, str]:
        return value | {"set of images for data.outside": others.outside.fingerprint}  # type: ignore[union-attr]

    with pytest.raises(UsageError, match=r"rank 1 .* has another set of images for data.outside than rank 0"):
        agreement.check_data(splits, Pretended(theirs=theirs))
    agreement.check_data(splits, Pretended(theirs=lambda value: value))


def test_errors_of_all_are_reported_once() -> None:
    def check(rank: int) -> bool:
        two = Pretended(rank=rank, theirs=lambda value: value | {"a": 2})
        with pytest.raises(UsageError) as caught:
            two.check_same({"a": 1}, "")
        return silent(caught.value, two)

    assert [check(0), check(1)] == [False, True]


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launched()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    three = Processes(world=3, local_world=3, local_rank=1)
    with pytest.raises(UsageError, match=r"has 2 GPU.* and 3 processes"):
        three.device("auto")
    assert Processes(world=2, local_world=2, local_rank=1).device("auto") == "cuda:1"
    assert three.device("cuda:0") == "cuda:0"


def test_the_memory_of_a_machine_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes.load("digits-ratio")
    needed = memory.estimate(recipe, 10)
    assert needed is not None
    monkeypatch.setattr(memory.resources, "memory_limit", lambda: int(1.1 * needed))
    memory.check(recipe, 10, torch.device("cpu"))
    with pytest.raises(RecipeError, match="GiB of memory"):
        memory.check(recipe, 10, torch.device("cpu"), world=8, local_world=8)
    memory.check(recipe, 10, torch.device("cpu"), world=8, local_world=1)


def test_digests_of_earlier_recipes_stay() -> None:
    plain = recipes.load("digits-ratio")
    same = recipes.load("digits-ratio", ["optim.sync_batchnorm=true", 'optim.allreduce_dtype="fp32"'])
    assert plain.digest == same.digest
    assert recipes.load("digits-ratio", ["optim.sync_batchnorm=false"]).digest != plain.digest
