"""Where one method is another, or a loop written by hand; and what each promises of itself."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CLASSES, SHAPE, cnn_bn, flat, mlp, same, split
from systems import HEAVY, Case, batch, constant, driver, smooth, trained_on
from torch import Tensor, nn

from controlat._util import rng
from controlat.app.settings import TrainSettings
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy, divergence
from controlat.attacks.per_sample import fosc
from controlat.attacks.pgd import path
from controlat.control.space import Control
from controlat.data import Augment, Split
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Batch, Update, Updates, build
from controlat.methods.awp import Awp
from controlat.models.frozen.view import FrozenModel

EPS, RATE, SEED = 0.1, 0.1, 3
BALL, SGD = Ball(EPS), SGDSettings(momentum=0.0)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def seen_by(
    case: Case, u: Control, b: Batch, model: nn.Module | None = None, norm: str = "linf"
) -> list[Tensor]:
    """What a method trains on in one step that moves nothing."""
    d = driver(case, model, Ball(EPS, norm), SGD)
    seen = trained_on(d.model)
    d.step(b, u, 0.0)
    return seen


def field(case: Case, u: Control, b: Batch, model: nn.Module | None = None, norm: str = "linf") -> Tensor:
    return flat(driver(case, model, Ball(EPS, norm)).field(b, u, RATE).gradients)


def draws(b: Batch, purpose: str) -> torch.Generator:
    return rng.generator(SEED, b.epoch, b.number, purpose)


def iterates(
    model: nn.Module,
    b: Batch,
    start: Tensor,
    alpha: float,
    steps: int,
    mode: str = "eval",
    norm: str = "linf",
) -> list[Tensor]:
    """x^0, ..., x^K of PGD."""
    with FrozenModel(model, mode) as view:
        found = path(
            view, b.x, start, b.y, ball=Ball(EPS, norm), alpha=alpha, steps=steps, loss=cross_entropy
        )
        return [start, *found]


PGD = Case("pgd_at")
BASIC = Case("cat", {"curriculum": False, "mixing": False})
FRIENDLY = Case("fat", {"omega": 0.0})
CLEAN = Control(alpha=0, steps=0)


# ------------------------------------------------------------------------------------------------- 2, 3. YOPO


@pytest.mark.parametrize("mode", ["both", "direct", "hamiltonian"])
def test_yopo_with_a_linear_first_layer_takes_n_steps_as_one_of_n_times_the_size(mode: str) -> None:
    case, b = Case("yopo", {"first_layer_grad": mode}), batch(margin=0.1)
    many = field(case, case.control(alpha=0.01, steps=3, inner=4), b)
    one = field(case, case.control(alpha=0.04, steps=3, inner=1), b)
    torch.testing.assert_close(many, one, rtol=1e-10, atol=1e-13)
    deep = Case("yopo", {"first_layer_grad": mode, "layer": "4"})  # past tanh
    many = field(deep, deep.control(alpha=0.04, steps=3, inner=4), b)
    one = field(deep, deep.control(alpha=0.16, steps=3, inner=1), b)
    assert not torch.allclose(many, one, rtol=1e-6)


def test_yopo_with_a_linear_first_layer_walks_the_path_of_pgd_with_n_times_the_step() -> None:
    case, b = Case("yopo", {"first_layer_grad": "direct"}), batch(margin=0.1)
    seen = seen_by(case, case.control(alpha=0.01, steps=4, inner=3), b)
    start = b.x + BALL.noise(b.x, draws(b, "start"))
    expected = iterates(smooth(), b, start, 0.03, 3, mode="train")
    assert len(seen) == 4
    for x, y in zip(seen, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_yopo_without_movement_has_the_direct_gradient_as_its_hamiltonian_one() -> None:
    found = {}
    for mode in ("both", "direct", "hamiltonian"):
        case = Case("yopo", {"first_layer_grad": mode})
        d = driver(case)
        found[mode] = d.field(batch(margin=0.1), case.control(alpha=0.0, inner=2)).gradients
    for i in range(len(found["both"])):
        direct = found["direct"][i]
        torch.testing.assert_close(found["hamiltonian"][i], direct, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(found["both"][i], (2 if i < 2 else 1) * direct, rtol=1e-11, atol=1e-14)


def test_yopo_1_0_is_training_on_noise() -> None:
    case, b = Case("yopo", {"first_layer_grad": "direct"}), batch(margin=0.1)
    noisy = b._replace(x=b.x + BALL.noise(b.x, draws(b, "start")))
    found = field(case, case.control(steps=1, inner=0), b)
    torch.testing.assert_close(found, field(PGD, CLEAN, noisy), rtol=1e-12, atol=1e-15)


@norms
@pytest.mark.parametrize("mode", ["both", "direct", "hamiltonian"])
@pytest.mark.parametrize("gradients", ["sum", "mean"])
def test_yopo_equals_the_loop_written_by_hand(norm: str, mode: str, gradients: str) -> None:
    """With the model cut in two, as the released code does it; pixels at the edge of the box included."""
    case, ball, model = (
        Case("yopo", {"first_layer_grad": mode, "gradients": gradients}),
        Ball(EPS, norm),
        smooth(),
    )
    b, m, n, alpha = batch(), 3, 2, 0.02
    b = b._replace(x=(b.x * 1.2 - 0.1).clamp(0, 1))
    first, rest = model[0], model[1:]
    eta = ball.noise(b.x, draws(b, "start"))
    losses = []
    for _ in range(m):
        h = first(b.x + eta)
        inner = h.detach().requires_grad_()
        loss = F.cross_entropy(rest(inner), b.y)
        loss.backward()  # adds to the later layers
        losses.append(loss.item())
        p = inner.grad
        if mode != "hamiltonian":
            h.backward(p)
        for _ in range(n):
            e = eta.clone().requires_grad_()
            (g,) = torch.autograd.grad((first((b.x + e).clamp(0, 1)) * p).sum(), e)
            eta = ball.project(b.x + eta + alpha * ball.direction(6 * g), b.x) - b.x
        if mode != "direct":
            (first((b.x + eta).clamp(0, 1)) * p).sum().backward()
    total = flat(q.grad for q in model.parameters()) / (m if gradients == "mean" else 1)
    u = case.control(alpha=alpha, steps=m, inner=n)
    torch.testing.assert_close(field(case, u, b, norm=norm), total, rtol=1e-10, atol=1e-13)
    step = driver(case, ball=ball).step(b, u, RATE)
    assert step.loss == pytest.approx(sum(losses) / (m if gradients == "mean" else 1), rel=1e-12)
    assert (step.spent.gradients, step.spent.forwards) == (6 * m, 0)
    assert step.spent.layers == 6 * (n * (m - 1) if mode == "direct" else (n + 1) * m)


# ---------------------------------------------------------------------------------------------------- 4. Free


def test_free_with_rate_zero_is_pgd_without_reset() -> None:
    case, d = Case("free"), driver(Case("free"), optimizer=SGD)
    start = torch.zeros(6, 1, 4, 4, dtype=torch.float64)
    for i in range(3):
        b = batch(margin=EPS, number=i, seed=i)
        d.step(b, case.control(alpha=0.03, steps=3), 0.0)
        expected = iterates(smooth(), b, b.x + start, 0.03, 3)[-1] - b.x
        torch.testing.assert_close(d.memory["delta"], expected, rtol=0, atol=1e-12)
        start = d.memory["delta"].clone()


def test_free_does_not_pull_saturated_pixels_back_as_pgd_does() -> None:
    case, d, b = Case("free"), driver(Case("free"), optimizer=SGD), batch()
    b = b._replace(x=(b.x * 2 - 0.5).clamp(0, 1))
    d.step(b, case.control(alpha=0.08, steps=3), 0.0)
    outside = b.x + d.memory["delta"]
    assert outside.min() < 0
    assert outside.max() > 1


@norms
def test_free_equals_the_loop_written_by_hand_and_its_slots_are_places_in_the_batch(norm: str) -> None:
    case, ball, model = Case("free"), Ball(EPS, norm), smooth()
    p = constant(case.control(alpha=0.06, steps=3), epochs=2)  # batches of 4, 4, 2
    d = driver(case, ball=ball)
    steps = list(rollout(d, p))
    optimizer = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=1e-3)
    delta, moved = torch.zeros(4, 1, 4, 4, dtype=torch.float64), []
    for e in range(2):
        for b in p.batches(e):
            before, losses = delta.clone(), []
            for _ in range(3):
                part = delta[: len(b.x)].clone().requires_grad_()
                optimizer.zero_grad()
                loss = F.cross_entropy(model((b.x + part).clamp(0, 1)), b.y)
                loss.backward()
                losses.append(loss.item())
                delta[: len(b.x)] = ball.shrink(part.detach() + 0.06 * ball.direction(len(b.x) * part.grad))
                optimizer.step()
            moved.append([not same(s, t) for s, t in zip(delta, before, strict=True)])
            assert steps[len(moved) - 1].loss == pytest.approx(sum(losses) / 3, rel=1e-12)
    torch.testing.assert_close(d.memory["delta"], delta, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(flat(d.parameters), flat(model.parameters()), rtol=1e-10, atol=1e-13)
    assert moved[2] == moved[5] == [True, True, False, False]


def test_free_1_trains_on_what_the_last_batch_left() -> None:
    case, d = Case("free"), driver(Case("free"))
    seen, u = trained_on(d.model), case.control(steps=1, alpha=EPS)
    first, second = batch(margin=EPS), batch(margin=EPS, number=1, seed=1)
    d.step(first, u, RATE)
    left = d.memory["delta"].clone()
    assert same(left.abs(), torch.full_like(left, EPS))
    d.step(second, u, RATE)
    assert same(seen[0], first.x)
    torch.testing.assert_close(seen[1], second.x + left, rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------- 5, 6. ATTA


def inner_split(n: int = 10) -> Split:
    found = split(n, (1, 4, 4))
    return Split(EPS + (1 - 2 * EPS) * found.x, found.y)


@pytest.mark.parametrize("augment", [None, Augment()], ids=["none", "identity"])
def test_atta_1_with_frozen_weights_over_e_epochs_is_pgd_e(augment: Augment | None) -> None:
    case, data = Case("atta"), inner_split()
    p = constant(case.control(alpha=0.02, steps=1), data=data, augment=augment, epochs=4)
    p = RunSpec(**{**vars(p), "rate": lambda t, T: 0.0})
    d, start = driver(case, optimizer=SGD), torch.empty_like(data.x)
    for b in p.batches(0):
        start[b.indices] = b.x + 0.001 * torch.empty_like(b.x).normal_(generator=draws(b, "start"))
    whole = Batch(data.x, data.y, torch.arange(10), 0, 0)
    expected = iterates(smooth(), whole, start, 0.02, 4)
    for e in range(4):
        list(rollout(d, p, epoch=e, until=e + 1))
        torch.testing.assert_close(data.x + d.rows["delta"].values[:10], expected[e + 1], rtol=0, atol=1e-12)
        assert d.rows["delta"].seen[:10].all()


def test_atta_with_crops_and_flips_moves_each_window_where_it_lies() -> None:
    """Against a loop over samples with slices and flips of the padded frame."""
    case, data, pad = Case("atta"), inner_split(), 1
    p = constant(case.control(alpha=0.03, steps=2), data=data, augment=Augment(pad, True, 0.5), epochs=3)
    p = RunSpec(**{**vars(p), "rate": lambda t, T: 0.0})
    d, model = driver(case, optimizer=SGD), smooth()
    frames: dict[int, Tensor] = {}
    trained, seen = [], trained_on(d.model)
    list(rollout(d, p))
    for e in range(3):
        for b in p.batches(e):
            fresh = 0.001 * torch.empty(len(b.x), 1, 6, 6, dtype=torch.float64).normal_(
                generator=draws(b, "start")
            )
            at = b.placement
            assert at is not None
            for i, index in enumerate(b.indices.tolist()):
                frame = frames.setdefault(index, fresh[i])
                t, left = int(at.top[i]), int(at.left[i])
                window = frame[:, t : t + 4, left : left + 4].clone()
                window = window.flip(2) if at.flip[i] else window
                clean = b._replace(x=b.x[i : i + 1], y=b.y[i : i + 1])
                x = iterates(model, clean, clean.x + window[None], 0.03, 2)[-1]
                trained.append(x[0])
                back = (x - clean.x)[0]
                frame[:, t : t + 4, left : left + 4] = back.flip(2) if at.flip[i] else back
    torch.testing.assert_close(torch.cat(seen), torch.stack(trained), rtol=0, atol=1e-12)
    stored = d.rows["delta"].values[:10]
    torch.testing.assert_close(stored, torch.stack([frames[i] for i in range(10)]), rtol=0, atol=1e-12)
    assert stored.abs().max() <= EPS + 1e-12


@norms
def test_atta_reset_in_every_epoch_with_a_uniform_start_is_random_start_pgd(norm: str) -> None:
    found = []
    for case in (Case("atta", {"init": "uniform"}, {"reset": 1}), PGD):
        d = driver(case, ball=Ball(EPS, norm))
        list(rollout(d, constant(case.control(steps=3), data=inner_split())))
        found.append(d.model.state_dict())
    assert same(*found)


@pytest.mark.parametrize(("reset", "forgets"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (10, [])])
def test_atta_forgets_in_epochs_that_reset_divides(reset: int, forgets: list[int]) -> None:
    case = Case("atta", {}, {"reset": reset})
    d, p = driver(case), constant(case.control(), epochs=4)
    found = []
    for e in range(4):
        carried = bool(d.rows)
        d.start_epoch(p, e)
        found += [e] if not d.rows and (carried or e == 0) else []
        list(rollout(d, p, epoch=e, until=e + 1))
    assert [e for e in found if e > 0] == [e for e in forgets if e > 0]


def test_atta_multiplies_the_loss_by_its_scale() -> None:
    found = field(Case("atta", {"loss_scale": 0.25}), Case("atta").control(), batch())
    torch.testing.assert_close(found, field(Case("atta"), Case("atta").control(), batch()) / 4)


# ----------------------------------------------------------------------------------------------------- 7. FAT


@norms
@pytest.mark.parametrize("network", [smooth, cnn_bn])
def test_fat_that_never_stops_is_pgd_bit_for_bit(norm: str, network: Any) -> None:
    b = batch(shape=SHAPE if network is cnn_bn else (1, 4, 4))
    found = field(FRIENDLY, FRIENDLY.control(steps=4, slack=4), b, network(), norm)
    assert same(found, field(PGD, PGD.control(steps=4), b, network(), norm))


def test_fat_stops_at_the_first_point_of_the_path_that_is_misclassified() -> None:
    b, model = batch(12), smooth()
    with torch.no_grad():
        model[5].bias.sub_(model(b.x).mean(0))  # so that no class leads by much
        predicted = model(b.x).argmax(1)
    b = b._replace(y=torch.where(torch.arange(12) < 3, (predicted + 1) % 3, predicted))
    u = FRIENDLY.control(alpha=0.04, steps=5, slack=0)
    d = driver(FRIENDLY, model, optimizer=SGD)
    seen = trained_on(model)
    step = d.step(b, u, 0.0)
    walk = torch.stack(iterates(model, b, BALL.start(b.x, draws(b, "start")), 0.04, 5))
    wrong = torch.stack([model(x).argmax(1) != b.y for x in walk])
    stops = [int(w.nonzero()[0]) if w.any() else 5 for w in wrong.T]
    expected = torch.stack([walk[k, i] for i, k in enumerate(stops)])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)
    assert len(set(stops)) > 2  # at the start, on the way, at the end
    assert step.spent.gradients == sum(min(k + 1, 5) for k in stops) + 12
    for tau in (1, 2):
        d = driver(FRIENDLY, model, optimizer=SGD)
        seen.clear()
        d.step(b, FRIENDLY.control(alpha=0.04, steps=5, slack=tau), 0.0)
        late = [stop_after(w, tau) for w in wrong.T]
        expected = torch.stack([walk[k, i] for i, k in enumerate(late)])
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)


def stop_after(wrong: Tensor, tau: int) -> int:
    """Where a sample stops that may be misclassified tau times; what is used up is not refilled."""
    for k in range(5):
        if wrong[k]:
            if tau == 0:
                return k
            tau -= 1
    return 5


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_fat_trains_on_the_start_where_that_is_misclassified(start: str) -> None:
    case, b = Case("fat", {"start": start}), batch()
    b = b._replace(y=(smooth()(b.x).argmax(1) + 1) % 3)
    noise = torch.empty_like(b.x).normal_(generator=draws(b, "start"))
    expected = BALL.start(b.x, draws(b, "start")) if start == "uniform" else (b.x + 0.001 * noise).clamp(0, 1)
    wrong = smooth()(expected).argmax(1) != b.y
    assert wrong.any()
    (x,) = seen_by(case, case.control(slack=0), b)
    torch.testing.assert_close(x[wrong], expected[wrong], rtol=0, atol=1e-15)
    (clean,) = seen_by(case, case.control(steps=0, slack=0), b)
    assert same(clean, b.x)


def test_fat_adds_noise_to_every_step_and_stays_in_the_ball() -> None:
    case, b = Case("fat", {"omega": 0.01}), batch()
    u = case.control(steps=3, slack=3)
    (x,) = seen_by(case, u, b)
    (bare,) = seen_by(FRIENDLY, u, b)
    assert (x - bare).abs().max() > 1e-4
    assert (x - b.x).abs().max() <= EPS + 1e-12


# ------------------------------------------------------------------------------------------------- 8. Dynamic


@norms
@pytest.mark.parametrize("network", [smooth, cnn_bn])
def test_dynamic_with_level_zero_is_pgd_bit_for_bit(norm: str, network: Any) -> None:
    case, b = Case("dynamic"), batch(shape=SHAPE if network is cnn_bn else (1, 4, 4))
    found = field(case, case.control(alpha=0.02, steps=4, fosc=0), b, network(), norm)
    assert same(found, field(PGD, PGD.control(alpha=0.02, steps=4), b, network(), norm))


@norms
def test_dynamic_with_a_huge_level_takes_one_step(norm: str) -> None:
    case, b = Case("dynamic"), batch()
    u = case.control(alpha=0.02, steps=6, fosc=1e9)
    assert same(field(case, u, b, norm=norm), field(PGD, PGD.control(alpha=0.02, steps=1), b, norm=norm))
    spent = driver(case).step(b, u, RATE).spent
    assert spent.gradients == 6 * 3  # the first step, the look at its point, and the update


def test_dynamic_stops_each_sample_where_its_condition_is_met() -> None:
    case, b, model = Case("dynamic"), batch(12), smooth()
    spent = []
    walk = iterates(model, b, BALL.start(b.x, draws(b, "start")), 0.03, 5)
    levels = torch.stack([fosc(x, b.x, input_gradient(model, x, b.y), BALL) for x in walk])
    for c in (0.0, *levels[1:].flatten().quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()):
        seen = trained_on(model)
        d = driver(case, model, optimizer=SGD)
        step = d.step(b, case.control(alpha=0.03, steps=5, fosc=c), 0.0)
        stops = [next((k for k in range(1, 5) if levels[k, i] <= c), 5) for i in range(12)]
        expected = torch.stack([walk[k][i] for i, k in enumerate(stops)])
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)
        spent.append(step.spent.gradients)
        assert spent[-1] == sum(min(k + 1, 5) for k in stops) + 12
        model._forward_pre_hooks.clear()
    assert spent == sorted(spent, reverse=True)
    assert spent[0] == 12 * 6 > spent[-1]


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return g


@norms
def test_the_condition_is_the_largest_first_order_gain_in_the_ball(norm: str) -> None:
    b, ball, model = batch(), Ball(EPS, norm), smooth()
    g = input_gradient(model, b.x, b.y)
    dual = g.flatten(1).abs().sum(1) if norm == "linf" else g.flatten(1).norm(dim=1)
    torch.testing.assert_close(fosc(b.x, b.x, g, ball), EPS * dual)
    corner = b.x + EPS * ball.direction(g)
    assert fosc(corner, b.x, g, ball).abs().max() < 1e-9
    inside = b.x + ball.noise(b.x, rng.generator(0))
    level = fosc(inside, b.x, g, ball)
    assert (level > 0).all()
    for i in range(20):
        other = b.x + ball.noise(b.x, rng.generator(1 + i))
        assert (((other - inside) * g).flatten(1).sum(1) <= level + 1e-12).all()


def linear(classes: int) -> nn.Module:
    with rng.scoped(0, "linear"):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()


def test_the_boxed_condition_is_at_most_the_papers_and_vanishes_in_the_corner_of_the_true_set() -> None:
    b, model = batch(), linear(2)
    b = b._replace(x=(b.x * 2 - 0.5).clamp(0, 1), y=b.y % 2)
    g = input_gradient(model, b.x, b.y)
    for seed in range(5):
        x = BALL.start(b.x, rng.generator(seed))
        low, high = fosc(x, b.x, g, BALL, box=True), fosc(x, b.x, g, BALL)
        assert (low >= 0).all()
        assert (low < high).all()
    corner = BALL.project(b.x + 2 * EPS * g.sign(), b.x)
    gradient = input_gradient(model, corner, b.y)
    assert fosc(corner, b.x, gradient, BALL, box=True).abs().max() < 1e-15
    assert (fosc(corner, b.x, gradient, BALL) > 1e-4).all()  # black and white pixels count, but cannot move
    inner = batch(margin=EPS)
    x = BALL.start(inner.x, rng.generator(0))
    g = input_gradient(smooth(), x, inner.y)
    torch.testing.assert_close(fosc(x, inner.x, g, BALL, box=True), fosc(x, inner.x, g, BALL))
    with pytest.raises(ValueError, match="boxed FOSC is for linf, got l2"):
        fosc(x, x, g, Ball(EPS, "l2"), box=True)


def test_dynamic_in_the_box_stops_by_the_largest_gain_over_its_corners() -> None:
    """The maximum of a linear function over the feasible box, by trying all its 16 corners."""
    b, model, alpha, steps = batch(16, (1, 2, 2)), mlp(), 0.02, 6
    b = b._replace(x=(1.6 * b.x - 0.3).clamp(0, 1))  # some pixels are black or white
    walk = iterates(model, b, BALL.start(b.x, draws(b, "start")), alpha, steps)
    low, high = (b.x - EPS).clamp(0, 1), (b.x + EPS).clamp(0, 1)
    masks = [torch.tensor(m).view(1, 1, 2, 2) for m in itertools.product((False, True), repeat=4)]
    corners = [torch.where(mask, high, low) for mask in masks]
    levels = []
    for x in walk:
        g = input_gradient(model, x, b.y)
        levels.append(torch.stack([((c - x) * g).flatten(1).sum(1) for c in corners]).amax(0))
    stopped_at = set()
    for c in torch.stack(levels)[1:].flatten().quantile(torch.tensor([0.1, 0.4, 0.8]).double()).tolist():
        seen = trained_on(model)
        u = Case("dynamic").control(alpha=alpha, steps=steps, fosc=c)
        driver(Case("dynamic", {"gap": "box"}), model, optimizer=SGD).step(b, u, 0.0)
        stops = [next((k for k in range(1, steps) if levels[k][i] <= c), steps) for i in range(16)]
        expected = torch.stack([walk[k][i] for i, k in enumerate(stops)])
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)
        model._forward_pre_hooks.clear()
        stopped_at |= set(stops)
    assert len(stopped_at) > 3


def test_a_gap_over_the_box_is_refused_before_the_first_step_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="lies around the clean input, got displacement 'start'"):
        build("dynamic", {"gap": "box", "displacement": "start"})
    boxed = build("dynamic", {"gap": "box"})
    with pytest.raises(ValueError, match="gap 'box' is for the norm linf, got l2: take gap 'paper'"):
        Driver(mlp(), boxed, Ball(EPS, "l2"))
    given = {"schedule": "pgd:steps=2,alpha=0.1,fosc=0", "method": "dynamic", "eps": EPS, "norm": "l2"}
    with pytest.raises(ValueError, match="gap 'box' is for the norm linf, got l2"):
        TrainSettings(**given, method_options={"gap": "box"})


def test_dynamic_weighted_by_the_loss_descends_half_its_square_after_the_first_epoch() -> None:
    case, u = Case("dynamic", {"outer_weight": "loss"}), Case("dynamic").control()
    for epoch in (0, 1):
        b, model = batch(epoch=epoch), smooth()
        (x,) = seen_by(Case("dynamic"), u, b)
        value = cross_entropy(model(x), b.y)
        loss = value.mean() if epoch == 0 else value.square().mean() / 2
        expected = flat(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(field(case, u, b), expected, rtol=1e-12, atol=1e-15)


# -------------------------------------------------------------------------------------------- 9. Fast, N-FGSM


FGSM = Case("pgd_at", {"random_start": False, "attack_mode": "train"})


@norms
def test_fast_from_zero_is_fgsm_training_whatever_its_step_beyond_eps(norm: str) -> None:
    case, b = Case("fast", {"init": "zero"}), batch(8)
    expected = field(FGSM, Control(alpha=EPS, steps=1), b, norm=norm)
    for alpha in (EPS, 1.25 * EPS, 2 * EPS):
        found = field(case, case.control(alpha=alpha), b, norm=norm)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    fixed = Case("fast", {}, {"random": 0.0})
    assert same(
        field(fixed, fixed.control(alpha=EPS, start=0), b, norm=norm),
        field(case, case.control(alpha=EPS), b, norm=norm),
    )


def test_fast_from_a_random_start_is_one_step_of_pgd() -> None:
    case, pgd, b = Case("fast"), Case("pgd_at", {"attack_mode": "train"}), batch(shape=SHAPE)
    u, v = case.control(alpha=0.125), Control(alpha=0.125, steps=1)
    torch.testing.assert_close(field(case, u, b, nodrop()), field(pgd, v, b, nodrop()), rtol=1e-9, atol=1e-12)


def nodrop() -> nn.Module:
    """The network with BatchNorm, its dropout switched off."""
    model = cnn_bn()
    for m in model.modules():
        m.p = 0.0 if isinstance(m, nn.Dropout) else getattr(m, "p", None)
    return model


def test_fast_without_a_step_trains_on_noise_and_with_two_eps_in_the_corners() -> None:
    case, b = Case("fast"), batch(margin=EPS)
    (x,) = seen_by(case, case.control(alpha=0.0), b)
    torch.testing.assert_close(x, BALL.start(b.x, draws(b, "start")), rtol=0, atol=1e-15)
    (x,) = seen_by(case, case.control(alpha=2 * EPS), b)
    torch.testing.assert_close((x - b.x).abs(), torch.full_like(x, EPS), rtol=0, atol=1e-15)


@norms
def test_fast_from_a_fixed_start_begins_with_the_same_in_every_pixel(norm: str) -> None:
    case, b, ball = Case("fast", {}, {"random": 0.0}), batch(margin=EPS), Ball(EPS, norm)
    (x,) = seen_by(case, case.control(alpha=0.0, start=0.5), b, norm=norm)
    value = 0.5 * EPS / (1 if norm == "linf" else 4)  # 16 pixels
    torch.testing.assert_close(x - b.x, torch.full_like(x, value), rtol=0, atol=1e-15)
    assert ball.distance(x, b.x).tolist() == pytest.approx([0.5 * EPS] * 6)


def test_fast_from_the_previous_perturbation_starts_where_the_last_batch_stopped_in_its_place() -> None:
    case = Case("fast", {"init": "previous"})
    d, u = driver(case, optimizer=SGD), case.control(alpha=0.03)
    seen, carried = trained_on(d.model), torch.empty(0, 1, 4, 4, dtype=torch.float64)
    for i, n in enumerate((6, 4, 6)):
        b = batch(n, margin=EPS, number=i, seed=i)
        start = b.x + torch.cat([carried[:n], torch.zeros_like(b.x[len(carried) :])])
        d.step(b, u, 0.0)
        expected = iterates(smooth(), b, start, 0.03, 1, mode="train")[-1]
        torch.testing.assert_close(seen[i], expected, rtol=0, atol=1e-12)
        carried = torch.cat([expected - b.x, carried[n:]])
        torch.testing.assert_close(d.memory["delta"], carried, rtol=0, atol=1e-12)


@norms
def test_n_fgsm_without_noise_is_fgsm_training(norm: str) -> None:
    case, b = Case("nfgsm", {}, {"noise": 0.0, "alpha": EPS}), batch()
    expected = field(FGSM, Control(alpha=EPS, steps=1), b, norm=norm)
    torch.testing.assert_close(field(case, case.control(), b, norm=norm), expected, rtol=1e-9, atol=1e-12)


@norms
@pytest.mark.parametrize("clip", [0.5, 1.5])
def test_n_fgsm_keeps_within_its_clip_if_it_has_one(norm: str, clip: float) -> None:
    case, b = Case("nfgsm", {}, {"clip": clip, "alpha": 2 * EPS}), batch(margin=0.4)
    (x,) = seen_by(case, case.control(), b, norm=norm)
    assert Ball(EPS, norm).distance(x, b.x).tolist() == pytest.approx([clip * EPS] * 6)


def test_n_fgsm_adds_its_step_to_the_noise() -> None:
    case, b = Case("nfgsm"), batch()
    (x,) = seen_by(case, case.control(alpha=EPS), b)
    start = (b.x + BALL.noise(b.x, draws(b, "start"), 2.0)).clamp(0, 1)
    expected = (start + EPS * input_gradient(smooth(), start, b.y).sign()).clamp(0, 1)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- 10. CAT


@pytest.mark.parametrize("options", [{}, {"curriculum": False}, {"curriculum": False, "mixing": False}])
def test_cat_of_strength_zero_is_standard_training_bit_for_bit(options: dict[str, Any]) -> None:
    found = []
    for case, u in ((Case("cat", options), Control(steps=0)), (PGD, CLEAN)):
        d = driver(case, cnn_bn())
        list(rollout(d, constant(u, 7, SHAPE, epochs=2)))
        found.append(d.model.state_dict())
    assert same(*found)


@norms
@pytest.mark.parametrize("k", [1, 4, 10, 20])
def test_cat_basic_is_pgd_k_with_its_drawn_step(norm: str, k: int) -> None:
    b = batch()
    r = float(torch.rand(1, generator=draws(b, "size")))
    factor = 1 + r * (10 / k - 1)
    assert min(1, 10 / k) <= factor <= max(1, 10 / k)
    expected = field(PGD, Control(alpha=2 * EPS / k * factor, steps=k), b, norm=norm)
    torch.testing.assert_close(field(BASIC, Control(steps=k), b, norm=norm), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("n", "k", "ends"), [(9, 2, [3, 6, 9]), (8, 2, [2, 4, 8]), (6, 4, [1, 2, 3, 4, 6]), (2, 3, [0, 0, 0, 2])]
)
def test_cat_attacks_each_part_of_the_batch_with_its_own_strength(n: int, k: int, ends: list[int]) -> None:
    case, b = Case("cat", {"curriculum": False, "attack_mode": "eval"}), batch(n)
    (x,) = seen_by(case, Control(steps=k), b)
    start, draw, first = BALL.start(b.x, draws(b, "start")), draws(b, "size"), 0
    for j, last in enumerate(ends):
        r = float(torch.rand(1, generator=draw))
        if last == first:
            continue
        part = b._replace(x=b.x[first:last], y=b.y[first:last])
        expected = part.x
        if j:
            expected = iterates(smooth(), part, start[first:last], 2 * EPS / j * (1 + r * (10 / j - 1)), j)[
                -1
            ]
        torch.testing.assert_close(x[first:last], expected, rtol=0, atol=1e-12)
        first = last


def separable(n: int, wrong: int = 0) -> Split:
    """Two classes, dark and bright; the first labels may be wrong."""
    y = torch.arange(n) % 2
    noise = torch.rand((n, 1, 2, 2), generator=rng.generator(1, "separable"), dtype=torch.float64)
    x = 0.2 + 0.5 * y.view(-1, 1, 1, 1) + 0.1 * noise
    return Split(x, torch.where(torch.arange(n) < wrong, 1 - y, y))


def curriculum(held_out: Split | None, **options: Any) -> tuple[Driver, RunSpec]:
    case = Case("cat", options)
    model = mlp(classes=2)
    d = driver(case, model, optimizer=HEAVY)
    p = constant(Control(steps=3), data=separable(12), held_out=held_out, epochs=14, rate=0.3)
    return d, p


def epochs(d: Driver, p: RunSpec, first: int = 0) -> Iterator[int]:
    """The strength after each epoch."""
    for e in range(first, p.epochs):
        list(rollout(d, p, epoch=e, until=e + 1))
        yield int(d.memory.get("strength", torch.tensor(0)))


def test_cat_grows_stronger_when_validation_stops_improving_and_puts_the_best_state_back() -> None:
    d, p = curriculum(separable(10), patience=2)
    last, found = 0, []
    for k in epochs(d, p):
        found.append(k)
        assert last <= k <= last + 1
        if k > last:
            assert same(d.model.state_dict(), d.kept["best"].model)
            assert same(d.sgd.state_dict()["state"], d.kept["best"].optimizer["state"])
            assert int(d.memory["waited"]) == 0
        last = k
    assert found[0] == 0
    assert found[-1] == 3  # and not beyond
    assert [found.count(k) >= 2 for k in range(4)] == [True] * 4


def test_cat_waits_as_long_as_it_is_told() -> None:
    for patience in (1, 4):
        d, p = curriculum(separable(10), patience=patience, ready=0.0)
        found, best = list(epochs(d, p)), 0.0
        d, p = curriculum(separable(10), patience=patience, ready=0.0)
        improved = []
        for _ in epochs(d, p):
            now = float(d.memory["best"])
            improved.append(now > best)
            best = max(best, now)
            if int(d.memory.get("strength", torch.tensor(0))):
                break
        grown = found.index(1)
        assert grown == max(i for i, yes in enumerate(improved) if yes) + patience


def test_cat_does_not_take_an_equal_accuracy_for_a_better_one() -> None:
    """9 of 10 are right in every epoch; 0.9 is no float32."""
    d, p = curriculum(separable(10, wrong=1), patience=2)
    assert max(epochs(d, p)) > 0
    assert int(d.memory["best"]) in (-1, 9)


def test_cat_does_not_move_on_before_training_is_ready() -> None:
    d, p = curriculum(separable(10), patience=1, ready=1.0)  # accuracy must be above it
    assert max(epochs(d, p)) == 0


def test_cat_without_held_out_samples_goes_by_the_training_accuracy() -> None:
    d, p = curriculum(None)
    found = list(epochs(d, p))
    assert found[-1] == 3
    assert not d.kept
    d, p = curriculum(None, expected=1.0)
    assert max(epochs(d, p)) == 0


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_cat_can_be_resumed_in_its_curriculum(cut: int) -> None:
    whole, p = curriculum(separable(10), patience=2)
    expected = list(epochs(whole, p))
    d, _ = curriculum(separable(10), patience=2)
    for _ in range(cut):
        strengths = epochs(d, p)
    found = [k for _, k in zip(range(cut), epochs(d, p), strict=False)]
    other, _ = curriculum(separable(10), patience=2)
    other.restore(d.snapshot())
    assert found + list(epochs(other, p, cut)) == expected
    assert same(other.snapshot(), whole.snapshot())
    del strengths


def validated(strength: int, **options: Any) -> Tensor:
    """What the network is asked about when one epoch at some strength is over."""
    d, p = curriculum(separable(10), **options)
    d.memory["strength"] = torch.tensor(strength)
    asked: list[Tensor] = []
    d.model.register_forward_pre_hook(
        lambda m, x: None if m.training or torch.is_grad_enabled() else asked.append(x[0].clone())
    )
    next(epochs(d, p))
    return asked[0]


def test_cat_rounds_what_it_validates_on_after_an_attack() -> None:
    """With two levels, 0.3 and 0.7 become black and white."""
    clean = separable(10).x
    assert same(validated(0), clean)
    assert same(validated(2, levels=2), clean.round())
    fine = validated(2, levels=16)
    assert same(fine, (fine * 15).round() / 15)
    for options in ({"levels": 0}, {"mixing": False}):
        found = validated(2, **options)
        assert not same(found, (found * 15).round() / 15)
        assert BALL.distance(found, clean).max() <= EPS + 1e-12


def test_cat_validates_with_steps_of_two_eps_over_k() -> None:
    d, p = curriculum(separable(10))
    d.memory["strength"] = torch.tensor(2)
    held_out, network = separable(10), mlp(classes=2)
    next(epochs(d, p))
    network.load_state_dict(d.model.state_dict())
    start = BALL.start(held_out.x, rng.generator(3, 0, -1, "validation 0"))
    b = Batch(held_out.x, held_out.y, torch.arange(10), 0, 0)
    x = iterates(network, b, start, EPS, 2)[-1]
    right = (network((x * 15).round() / 15).argmax(1) == held_out.y).sum()
    assert int(d.memory["best"]) == int(right)


def test_cat_looks_at_the_best_network_anew_when_it_grows() -> None:
    d, p = curriculum(separable(10), patience=2)
    last = 0
    for k in epochs(d, p):
        if k > last:
            assert d.memory["best"] >= 0
            assert same(d.model.state_dict(), d.kept["best"].model)
        last = k
    assert last == 3


def test_cat_refuses_one_level() -> None:
    with pytest.raises(ValueError, match="levels must be at least 2"):
        Case("cat", {"levels": 1}).method()


# ----------------------------------------------------------------------------------------- 12. TRADES and AWP


@norms
def test_trades_with_beta_zero_is_standard_training(norm: str) -> None:
    case, b = Case("trades", {}, {"beta": 0.0}), batch()
    found = field(case, case.control(), b, norm=norm)
    torch.testing.assert_close(found, field(PGD, CLEAN, b), rtol=1e-12, atol=1e-15)
    assert same(field(Case("trades"), CLEAN, b), field(PGD, CLEAN, b))


def test_trades_the_divergence_is_not_negative_and_has_no_gradient_at_the_clean_input() -> None:
    b, model = batch(50), smooth()
    with FrozenModel(model) as view:
        clean = view(b.x)
        at = view.gradient(b.x, lambda logits: divergence(logits, clean))
        beside = view.gradient(b.x + 0.001, lambda logits: divergence(logits, clean))
        assert at.abs().max() < 1e-12
        assert beside.abs().max() > 1e-7
        moved = divergence(view(BALL.start(b.x, rng.generator(0))), clean)
    assert (moved > 0).all()
    p, q = torch.softmax(clean, 1), torch.softmax(view_logits(model, b.x + 0.05), 1)
    torch.testing.assert_close(
        divergence(q.log(), p.log()), (p * (p.log() - q.log())).sum(1), rtol=1e-9, atol=1e-12
    )


def view_logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@norms
@pytest.mark.parametrize("separate", [False, True])
def test_trades_equals_the_loop_written_by_hand(norm: str, separate: bool) -> None:
    case, b, model, ball = (
        Case("trades", {"separate_clean": separate}, {"beta": 2.5}),
        batch(),
        smooth(),
        Ball(EPS, norm),
    )
    noise = torch.empty_like(b.x).normal_(generator=draws(b, "start"))
    x, target = b.x + 0.001 * noise, F.softmax(model(b.x), 1).detach()
    for _ in range(3):
        x = x.detach().requires_grad_()
        kl = F.kl_div(F.log_softmax(model(x), 1), target, reduction="sum")
        (g,) = torch.autograd.grad(kl, x)
        x = ball.project((x + 0.03 * ball.direction(g)).detach(), b.x)
    kl = F.kl_div(F.log_softmax(model(x), 1), F.softmax(model(b.x), 1), reduction="batchmean")
    loss = F.cross_entropy(model(b.x), b.y) + 2.5 * kl
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    u = case.control(steps=3)
    torch.testing.assert_close(field(case, u, b, norm=norm), expected, rtol=1e-9, atol=1e-12)
    step = driver(case, ball=ball).step(b, u, RATE)
    assert step.loss == pytest.approx(loss.item(), rel=1e-10)
    assert (step.spent.gradients, step.spent.forwards) == (6 * (5 + separate), 6)


AWP_PGD = Case("pgd_at", {"attack_mode": "train"})


@norms
@pytest.mark.parametrize("options", [({}, 0.0), ({"warmup": 1}, 0.05)], ids=["radius 0", "warm-up"])
def test_awp_with_radius_zero_is_pgd_bit_for_bit(norm: str, options: tuple[dict[str, Any], float]) -> None:
    found = []
    for case in (Case("awp", options[0], {"radius": options[1]}), AWP_PGD):
        d = driver(case, cnn_bn(), Ball(EPS, norm))
        list(rollout(d, constant(case.control(), 7, SHAPE, epochs=1)))
        found.append(d.model.state_dict())
    assert same(*found)


def test_awp_moves_every_layer_by_the_radius_times_its_length_and_neither_biases_nor_batchnorm() -> None:
    case, shifts = Case("awp", {}, {"radius": 0.05}), []
    method = case.method()

    class Spy:
        controls = method.controls

        def updates(self, *arguments: Any) -> Updates:
            inner = method.updates(*arguments)
            reply: Any = None
            while True:
                try:
                    update: Update = inner.send(reply)
                except StopIteration:
                    return
                shifts.append(update.shift)
                reply = yield update

    d = driver(Spy(), cnn_bn())
    before = [p.detach().clone() for p in d.parameters]
    d.step(batch(shape=SHAPE), case.control(), 0.1)
    assert shifts[0] is None
    for (name, p), w, shift in zip(d.model.named_parameters(), before, shifts[1], strict=True):
        if p.dim() > 1:
            torch.testing.assert_close(shift.norm(), 0.05 * w.norm(), rtol=1e-12, atol=0)
        else:
            assert shift.abs().max() == 0, name


@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e-30, 1e-44])
def test_awp_moves_a_layer_by_its_radius_however_small_the_gradient(scale: float) -> None:
    w, g = torch.full((2, 3), 2.0), scale * torch.tensor([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
    shift = Awp._perturbation("weight", w, g, 0.05)
    assert float(shift.norm()) == pytest.approx(0.05 * float(w.norm()), rel=1e-5)
    assert torch.allclose(shift.sign(), g.sign())
    assert not bool(Awp._perturbation("weight", w, 0 * g, 0.05).any())


def test_awp_with_rate_zero_leaves_the_weights_and_lets_batchnorm_see_the_batch_once() -> None:
    case, d = Case("awp", {}, {"radius": 0.05}), driver(Case("awp"), cnn_bn())
    before = flat(d.parameters)
    d.step(batch(shape=SHAPE), case.control(), 0.0)
    torch.testing.assert_close(flat(d.parameters), before, rtol=0, atol=1e-12)
    assert {int(m.num_batches_tracked) for m in d.model.modules() if isinstance(m, nn.BatchNorm2d)} == {1}
    single = driver(Case("awp"), cnn_bn().float())
    before = flat(single.parameters)
    b = batch(shape=SHAPE)
    single.step(b._replace(x=b.x.float()), case.control(), 0.0)
    torch.testing.assert_close(flat(single.parameters), before, rtol=0, atol=1e-6)


@norms
def test_awp_equals_the_loop_written_by_hand(norm: str) -> None:
    case, model, ball = Case("awp", {}, {"radius": 0.05}), smooth(), Ball(EPS, norm)
    d = driver(case, ball=ball)
    optimizer = torch.optim.SGD(model.parameters(), RATE, 0.9, weight_decay=1e-3)
    weights = [p for p in model.parameters() if p.dim() > 1]
    for i in range(3):
        b = batch(number=i, seed=i)
        x = iterates(model, b, ball.start(b.x, draws(b, "start")), 0.03, 2, "train", norm)[-1]
        g = torch.autograd.grad(F.cross_entropy(model(x), b.y), weights)
        moves = [0.05 * w.norm() / s.norm() * s for w, s in zip(weights, g, strict=True)]
        with torch.no_grad():
            moves = [m.clone() for m in moves]
            for w, m in zip(weights, moves, strict=True):
                w += m
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), b.y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for w, m in zip(weights, moves, strict=True):
                w -= m
        step = d.step(b, case.control(), RATE)
        assert step.loss == pytest.approx(loss.item(), rel=1e-10)
        torch.testing.assert_close(flat(d.parameters), flat(model.parameters()), rtol=1e-9, atol=1e-12)


def test_networks_have_as_many_classes_as_the_samples() -> None:
    assert batch(50).y.max() + 1 == CLASSES
