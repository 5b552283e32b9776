"""What methods meet in earnest: activations in place, single samples, vectors, dropout in hooks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, SHAPE, cnn_bn, flat, same, samples, split
from systems import LONG, PLAIN, Case, batch, constant, driver, trained_on
from torch import Tensor, nn

from controlat._util import rng
from controlat.attacks.balls import Ball
from controlat.attacks.per_sample import stopped
from controlat.control.space import Control
from controlat.dynamics.driver import SGDSettings
from controlat.dynamics.rollout import rollout
from controlat.methods import Batch
from controlat.models.frozen.hook import first_layer
from controlat.models.frozen.view import FrozenModel

SGD = SGDSettings(momentum=0.0)
every = pytest.mark.parametrize("case", LONG)


def convolutional(in_place: bool) -> nn.Module:
    with rng.scoped(0, "convolutional"):
        first = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace=in_place)
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(64, CLASSES)).double()


@every
def test_an_activation_in_place_changes_nothing(case: Case) -> None:
    found = []
    for in_place in (True, False):
        d = driver(case, convolutional(in_place), optimizer=SGD)
        d.step(batch(), case.control(), 0.1)
        found.append(flat(d.parameters))
    assert same(*found)


class Token(nn.Module):
    """A network with a parameter of its own beside its layers, as vision transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4, 1, 1).double())
        self.body = convolutional(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body[1:](self.body[0](x) + self.token)
        return found


def test_the_first_layer_is_not_the_network_that_owns_a_parameter() -> None:
    model = Token()
    assert first_layer(model) is model.body[0]
    d = driver(Case("yopo"), model)
    step = d.step(batch(), Control(alpha=0.03, steps=2, inner=3), 0.1)
    assert step.spent.gradients == 12
    assert step.spent.layers == 6 * 2 * (3 + 1)


@every
@pytest.mark.parametrize("shape", [(1, 4, 4), (16,)], ids=["images", "vectors"])
def test_single_samples_and_vectors_are_batches_too(case: Case, shape: tuple[int, ...]) -> None:
    with rng.scoped(0, "vectors"):
        layers = nn.Flatten(), nn.Linear(16, 8), nn.Softplus(), nn.Linear(8, CLASSES)
        d = driver(case, nn.Sequential(*layers).double())
    for number, n in enumerate((1, 3, 2)):
        x, y = samples(n, (1, 4, 4), seed=number)
        b = Batch(x.reshape(n, *shape), y, torch.arange(n), 0, number)
        assert 0 < d.step(b, case.control(), 0.1).loss < 20


def test_cat_attacks_a_part_of_one_sample_though_batchnorm_needs_more() -> None:
    with rng.scoped(0, "one"):
        layers = nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)
        d = driver(PLAIN["cat"], nn.Sequential(*layers).double())
    assert d.step(batch(4), Control(steps=3), 0.1).loss > 0


@pytest.mark.parametrize("name", ["fat", "dynamic"])
def test_a_single_survivor_is_attacked_within_its_batch(name: str) -> None:
    """In training mode BatchNorm sees the whole batch: one sample that goes on is not alone."""
    with rng.scoped(0, "survivor"):
        layers = nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)
        model = nn.Sequential(*layers).double()
    b, ball, noticed = batch(margin=0.2), Ball(0.1), []

    def goes_on(k: int, rows: Tensor, points: Tensor, logits: Tensor, gradient: Tensor) -> Tensor:
        noticed.append((rows.tolist(), len(points), len(logits), len(gradient)))
        return torch.full_like(rows, k == 0, dtype=torch.bool) | (rows == 4)

    with FrozenModel(model, "train") as view:
        found = stopped(view, b.x, b.x, b.y, ball=ball, alpha=0.03, steps=3, goes_on=goes_on)
        x = b.x
        for k in range(3):
            gradient = view.gradient(x, lambda z: F.cross_entropy(z, b.y, reduction="none"))
            moved = ball.step(x, gradient, 0.03, b.x)
            x = moved if k == 0 else torch.where(torch.arange(6).view(-1, 1, 1, 1) == 4, moved, x)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)
    assert noticed == [(list(range(6)), 6, 6, 6), (list(range(6)), 6, 6, 6), ([4], 1, 1, 1)]
    step = driver(Case(name, {"attack_mode": "train"}), model, ball).step(b, PLAIN[name].control(), 0.1)
    assert step.loss > 0


@pytest.mark.parametrize(("options", "knobs"), [({"early_stop": True}, {}), ({}, {})])
def test_hooks_draw_numbers_of_their_own(options: dict[str, Any], knobs: dict[str, float]) -> None:
    """Dropout in the attack after an epoch depends on the seed, and leaves torch's generator alone."""
    case, found = Case("fast", options, knobs), []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        d = driver(case, cnn_bn())
        p = constant(case.control(), shape=SHAPE, epochs=2, data=split(40, SHAPE), batch_size=20)
        steps = list(rollout(d, p))
        assert same(torch.random.get_rng_state(), before)
        found.append((steps, d.snapshot()))
    assert same(*found)
    assert ("robust" in found[0][1].memory) == bool(options)


@pytest.mark.parametrize(("fall", "ends"), [(8, True), (4, True), (3, False)])
def test_fast_stops_where_accuracy_fell_by_more_than_a_fifth(fall: int, ends: bool) -> None:
    """15 samples: a fall by 3 is a fifth, one by 4 is more; the network of the epoch before comes back."""
    case = Case("fast", {"early_stop": True})
    d = driver(case)
    p = constant(case.control(), 15, batch_size=15, epochs=1, rate=0.0)
    list(rollout(d, p))
    right = round(15 * float(d.memory["robust"]))
    kept = {name: t.clone() for name, t in d.model.state_dict().items()}
    spent = d.meter.gradients
    assert spent == 15 * 2 + 15 * 5
    d.memory["robust"] = torch.tensor((right + fall) / 15, dtype=torch.float64)
    with torch.no_grad():
        for q in d.parameters:
            q.mul_(1 + 1e-9)
    d.end_epoch(p, 0)
    assert bool(d.stopped) == ends
    assert same(d.model.state_dict(), kept) == ends
    if ends:
        assert d.stopped.startswith("catastrophic overfitting: PGD-5 accuracy fell from")
        assert list(rollout(d, p)) == []


def test_the_store_of_atta_has_a_row_for_every_sample_and_no_more() -> None:
    case = PLAIN["atta"]
    d, p = driver(case), constant(case.control(), 10)
    list(rollout(d, p))
    assert len(d.rows["delta"].values) == 10
    assert bool(d.rows["delta"].seen.all())


def test_trades_lets_batchnorm_see_clean_and_adversarial_in_the_released_order() -> None:
    for separate, order in ((False, ["clean", "adversarial"]), (True, ["clean", "adversarial", "clean"])):
        d, b = driver(Case("trades", {"separate_clean": separate})), batch()
        seen = trained_on(d.model)
        d.step(b, Case("trades").control(), 0.1)
        assert ["clean" if same(x, b.x) else "adversarial" for x in seen] == order
