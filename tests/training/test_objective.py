"""Each published method equals its formula written out by hand (eq. 4-6, TRADES)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ratioctl.attacks import goals
from ratioctl.attacks.engine import perturb
from ratioctl.data.loader import Batch
from ratioctl.models import build, fold_batchnorm
from ratioctl.models.network import Classifier
from ratioctl.recipe import Attack, Ball, Objective, Term
from ratioctl.training.objective import attacked, losses

IN = Attack(ball=Ball(p=2, eps=0.3), steps=3)
OUT = Attack(ball=Ball(p=2, eps=1.0), steps=4)
LAMBDA = 0.7


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return build("resnet18", num_classes=4, width=4, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        x_in=torch.rand(6, 3, 16, 16, generator=generator),
        y_in=torch.tensor([0, 1, 2, 3, 0, 1]),
        x_out=torch.rand(5, 3, 16, 16, generator=generator),
    )


def worst_in(model: Classifier, batch: Batch) -> Tensor:
    return perturb(fold_batchnorm(model), batch.x_in, goals.margin(batch.y_in), IN).x


def worst_out(model: Classifier, batch: Batch) -> Tensor:
    assert batch.x_out is not None
    return perturb(fold_batchnorm(model), batch.x_out, goals.uniform_cross_entropy(), OUT).x


def uniform_ce(logits: Tensor) -> Tensor:
    p = torch.full_like(logits, 1 / logits.shape[1])
    return -(p * F.log_softmax(logits, 1)).sum(1).mean()


def total(model: Classifier, batch: Batch, objective: Objective) -> Tensor:
    import copy

    return losses(copy.deepcopy(model).train(), fold_batchnorm(model), batch, objective)["total"]


def test_plain(model: Classifier, batch: Batch) -> None:
    value = total(model, batch, Objective(inside=Term(clean=1)))
    assert torch.allclose(value, F.cross_entropy(model.train()(batch.x_in), batch.y_in))


def test_outlier_exposure(model: Classifier, batch: Batch) -> None:
    assert batch.x_out is not None
    value = total(model, batch, Objective(inside=Term(clean=1), outside=Term(clean=LAMBDA)))
    logits = model.train()(torch.cat([batch.x_in, batch.x_out]))
    expected = F.cross_entropy(logits[:6], batch.y_in) + LAMBDA * uniform_ce(logits[6:])
    assert torch.allclose(value, expected)


def test_acet(model: Classifier, batch: Batch) -> None:
    z = worst_out(model, batch)
    value = total(model, batch, Objective(inside=Term(clean=1), outside=Term(robust=LAMBDA, attack=OUT)))
    logits = model.train()(torch.cat([batch.x_in, z]))
    assert torch.allclose(value, F.cross_entropy(logits[:6], batch.y_in) + LAMBDA * uniform_ce(logits[6:]))


def test_adversarial_training(model: Classifier, batch: Batch) -> None:
    z = worst_in(model, batch)
    value = total(model, batch, Objective(inside=Term(robust=1, attack=IN, goal="margin")))
    assert torch.allclose(value, F.cross_entropy(model.train()(z), batch.y_in))


def test_half_clean_half_attacked(model: Classifier, batch: Batch) -> None:
    z = worst_in(model, batch)
    value = total(model, batch, Objective(inside=Term(clean=0.5, robust=0.5, attack=IN, goal="margin")))
    logits = model.train()(torch.cat([batch.x_in, z]))
    expected = 0.5 * F.cross_entropy(logits[:6], batch.y_in) + 0.5 * F.cross_entropy(logits[6:], batch.y_in)
    assert torch.allclose(value, expected)


def test_ratio_with_clean_term_goes_through_one_forward_pass(model: Classifier, batch: Batch) -> None:
    objective = Objective(
        inside=Term(clean=1, robust=1, attack=IN, goal="margin"), outside=Term(robust=LAMBDA, attack=OUT)
    )
    z_in, z_out = worst_in(model, batch), worst_out(model, batch)
    value = total(model, batch, objective)
    logits = model.train()(torch.cat([batch.x_in, z_in, z_out]))
    expected = (
        F.cross_entropy(logits[:6], batch.y_in)
        + F.cross_entropy(logits[6:12], batch.y_in)
        + LAMBDA * uniform_ce(logits[12:])
    )
    assert torch.allclose(value, expected)


def test_trades(model: Classifier, batch: Batch) -> None:
    attack = Attack(ball=Ball(p=2, eps=0.3), steps=3, start="random")
    objective = Objective(inside=Term(clean=1, robust=6, against="clean", attack=attack))
    seed = 7
    eval_net = fold_batchnorm(model)
    with torch.no_grad():
        p = eval_net(batch.x_in).softmax(1)
    z = perturb(eval_net, batch.x_in, goals.kl(p), attack, generator=torch.Generator().manual_seed(seed)).x
    import copy

    named = losses(
        copy.deepcopy(model).train(),
        eval_net,
        batch,
        objective,
        generator=torch.Generator().manual_seed(seed),
    )
    logits = model.train()(torch.cat([batch.x_in, z]))
    log_p, log_q = F.log_softmax(logits[:6], 1), F.log_softmax(logits[6:], 1)
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert torch.allclose(named["total"], F.cross_entropy(logits[:6], batch.y_in) + 6 * divergence)
    assert float(divergence.detach()) > 0


def test_a_side_without_weight_is_not_run(model: Classifier, batch: Batch) -> None:
    seen = []

    def counting(x: Tensor) -> Tensor:
        seen.append(len(x))
        return model(x)

    losses(counting, fold_batchnorm(model), batch, Objective(inside=Term(robust=1, attack=IN)))
    assert seen == [6], "only the attacked ID images"


def test_the_attack_raises_the_loss(model: Classifier, batch: Batch) -> None:
    term = Term(robust=1, attack=OUT)
    assert batch.x_out is not None
    eval_net = fold_batchnorm(model)
    z = attacked(eval_net, batch.x_out, None, term)
    assert float(uniform_ce(eval_net(z))) > float(uniform_ce(eval_net(batch.x_out)))
    moved = (z - batch.x_out).flatten(1).norm(dim=1)
    assert float(moved.max()) <= 1.0 + 1e-5
    short = attacked(eval_net, batch.x_out, None, term, shrink=0.1)
    assert float((short - batch.x_out).flatten(1).norm(dim=1).max()) <= 0.1 + 1e-6


def test_an_outside_term_needs_out_images(model: Classifier, batch: Batch) -> None:
    alone = Batch(x_in=batch.x_in, y_in=batch.y_in, x_out=None)
    with pytest.raises(ValueError, match="no OOD images"):
        losses(model, fold_batchnorm(model), alone, Objective(inside=Term(clean=1), outside=Term(clean=1)))
