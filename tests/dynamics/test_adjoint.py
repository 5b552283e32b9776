"""The costate of one outer step against finite differences of the step itself, and against a closed form."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import CLASSES, same, trace
from systems import CASES, LONG, PLAIN, VARIANTS, Case, batch, driver, each_optimizer, smooth, those
from torch import Tensor, nn

from controlat._util import rng
from controlat.attacks.balls import Ball
from controlat.control.space import Control, ControlSpace
from controlat.dynamics.adjoint import pullback
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.finite_differences import Verified, _central, _direction, _random, verify
from controlat.dynamics.state import State
from controlat.methods import Batch, Context, Update, Updates

RATE, H, COUNT = 0.1, 1e-5, 4
SETTINGS = {
    "plain": SGDSettings(momentum=0.0),
    "momentum": SGDSettings(momentum=0.9, weight_decay=1e-2),
    "Nesterov": SGDSettings(momentum=0.9, nesterov=True, weight_decay=1e-2),
}
every = pytest.mark.parametrize("case", LONG)
optimizers = each_optimizer(SETTINGS)


def bn_net() -> nn.Module:
    """A smooth network with BatchNorm and dropout."""
    with rng.scoped(1, "bn"):
        first = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(), nn.Dropout(0.2)
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(48, CLASSES)).double()


def random_like(z: State, seed: int) -> State:
    return _random(z, seed, "test")


def prepared(
    case: Case, o: SGDSettings, norm: str = "linf", model: nn.Module | None = None, eps: float = 0.1
) -> Driver:
    """A driver that has momentum, memory and rows, from one step."""
    d = driver(case, model, Ball(eps, norm), o, channels_last=False)
    d.step(batch(margin=0.2), case.control(), RATE)
    return d


def steps(count: int, epoch: int = 1) -> list[Batch]:
    return [batch(margin=0.2, epoch=epoch, number=i) for i in range(1, count + 1)]


def check(found: Verified) -> None:
    assert found.pairs, "signs changed in every direction"
    assert found.skipped <= COUNT / 2
    if found.dropped:  # what is named makes a difference, but a small one
        share = [abs(fd - got) / abs(fd) for fd, got in found.pairs]
        assert max(share) > 1e-5
        assert min(share) < 0.6
    else:
        assert found.share < 1e-8
        for fd, got in found.pairs:
            assert got == pytest.approx(fd, rel=1e-7, abs=1e-9)


def compare(d: Driver, case: Case, b: Batch) -> Verified:
    found = verify(d, b, case.control(), RATE, directions=COUNT)
    check(found)
    return found


@every
@optimizers
def test_the_costate_of_one_step_is_its_derivative(case: Case, o: SGDSettings) -> None:
    found = compare(prepared(case, o), case, steps(1)[0])
    assert bool(found.dropped) == case.own.cut


@every
def test_the_costate_of_two_steps_is_their_derivative(case: Case) -> None:
    """Step sizes must differ where perturbations are carried: see `verify`."""
    d, batches = prepared(case, SETTINGS["momentum"]), steps(2)
    controls = [case.control(alpha=0.023), case.control(alpha=0.017)]
    saved, visited = d.snapshot(), []

    def after() -> State:
        for b, u in zip(batches, controls, strict=True):
            visited.append(d.snapshot())
            d.step(b, u, RATE)
        return d.point(batches[-1].indices).copy()

    p, dropped = random_like(after(), 0), set()
    weight = p
    for b, u, z in reversed(list(zip(batches, controls, visited, strict=True))):
        d.restore(z)
        p, names = pullback(d, b, u, RATE, p)
        dropped.update(names)
    assert same(d.snapshot(), saved)
    pairs = []
    for i in range(COUNT):
        e = _direction(d.point(batches[0].indices), 0, i)
        fd = _central(d, after, weight, e, H)
        pairs += [] if fd is None else [(fd, p.dot(e))]
    check(Verified(tuple(pairs), COUNT - len(pairs), tuple(sorted(dropped))))


@every
def test_the_costate_of_the_first_step_is_its_derivative(case: Case) -> None:
    compare(driver(case, optimizer=SETTINGS["Nesterov"], channels_last=False), case, steps(1, epoch=0)[0])


@every
def test_smooth_steps_are_followed_or_named(case: Case) -> None:
    found = compare(prepared(case, SETTINGS["momentum"], "l2"), case, steps(1)[0])
    assert ("the adversary's (l_2 steps)" in found.dropped) == case.own.drops_l2


@every
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_batchnorm_and_dropout_in_training_mode_are_followed(case: Case, norm: str) -> None:
    compare(prepared(case, SETTINGS["momentum"], norm, bn_net()), case, steps(1)[0])


@those(lambda case: not case.own.cut and case.own.reach(case.control(), 0.0) == 0)
def test_where_the_adversary_does_not_depend_on_theta_nothing_is_lost_but_what_is_named(case: Case) -> None:
    """eps = 0: what l_2 steps drop is then nothing, though it is named."""
    d, b, u = prepared(case, SETTINGS["momentum"], "l2", eps=0.0), steps(1)[0], case.control()
    if "delta" in d.memory:
        d.memory["delta"] = torch.zeros_like(d.memory["delta"])

    def after() -> State:
        d.step(b, u, RATE)
        return d.point(b.indices).copy()

    z, saved = d.point(b.indices).copy(), d.snapshot()  # theta and momentum alone are moved, and looked at
    weight = replace(random_like(after(), 0), memory={}, rows={})
    d.restore(saved)
    e = random_like(z, 1)
    for t in (*e.memory.values(), *(rows.values for rows in e.rows.values())):
        t.zero_()
    fd = _central(d, after, weight, e, H)
    assert fd is not None
    assert pullback(d, b, u, RATE, weight).costate.dot(e) == pytest.approx(fd, rel=1e-7)


def test_perturbations_that_are_carried_have_a_costate() -> None:
    for name, where in (("free", "memory"), ("atta", "rows"), ("fast previous", "memory")):
        case = CASES[name]
        d = prepared(case, SETTINGS["plain"])
        b = steps(1)[0]
        weight = replace(random_like(d.point(b.indices), 0), memory={}, rows={})  # of parameters alone
        found = pullback(d, b, case.control(), RATE, weight).costate
        (q,) = found.parts()[-2 if where == "memory" else -1].values()
        assert q.norm() > 1e-3 * torch.cat([t.flatten() for t in weight.parameters]).norm() * RATE


def test_a_pixel_that_clips_passes_no_costate_on() -> None:
    """alpha = 2 eps: every pixel ends at the edge of the ball, wherever it was."""
    case = PLAIN["atta"]
    d, b = prepared(case, SETTINGS["plain"]), steps(1)[0]
    weight = random_like(d.point(b.indices), 0)
    for alpha, clips in ((0.2, True), (0.01, False)):
        u = case.control(alpha=alpha)
        found = pullback(d, b, u, RATE, weight).costate.rows["delta"].values
        assert same(found, torch.zeros_like(found)) == clips


# --------------------------------------------------------------------------------------------- what it leaves


@every
def test_the_driver_stays_as_it_is(case: Case) -> None:
    d, b, u = prepared(case, SETTINGS["momentum"], model=bn_net()), steps(1)[0], case.control()
    d.model.eval()
    snapshot, before, meter = d.snapshot(), trace(d.model), d.meter.copy()
    weight = random_like(d.point(b.indices), 0)
    copies = weight.like([t.clone() for t in weight.tensors()])
    spent = type(meter)()
    first = pullback(d, b, u, RATE, weight, spent)
    assert same(d.snapshot(), snapshot)
    assert same(trace(d.model), before)
    assert d.meter == meter
    assert same(weight, copies)
    assert same(pullback(d, b, u, RATE, weight), first)
    assert not any(t.requires_grad for t in first.costate.tensors())
    losses: list[int] = []
    d.model.register_forward_hook(
        lambda m, x, out: losses.append(len(out) * all(p.requires_grad for p in m.parameters()))
    )
    again = d.step(b, u, RATE).spent.gradients  # the step once more, and two for every pass of the loss
    assert spent.gradients == again + 2 * sum(losses)


@every
def test_the_state_is_a_copy(case: Case) -> None:
    d, b = prepared(case, SETTINGS["momentum"]), steps(1)[0]
    z = d.point(b.indices).copy()
    copies = z.like([t.clone() for t in z.tensors()])
    d.step(b, case.control(), RATE)
    assert same(z, copies)
    assert not same(d.point(b.indices), copies)


@pytest.mark.parametrize("name", ["free", "atta"])
def test_names_that_a_costate_lacks_count_as_zero(name: str) -> None:
    case = CASES[name]
    d, b = prepared(case, SETTINGS["momentum"]), steps(1)[0]
    weight = random_like(d.point(b.indices), 0)
    zero = weight.zeros_like()
    found = [
        pullback(d, b, case.control(), RATE, replace(weight, memory=m, rows=r))
        for m, r in (({}, {}), (zero.memory, zero.rows))
    ]
    assert same(*found)


def test_every_option_that_changes_the_step_is_among_the_cases() -> None:
    assert {"yopo direct", "fast previous", "trades separate", "dynamic weighted", "awp warm-up"} <= set(
        VARIANTS
    )


# ------------------------------------------------------------------------------------------------ closed form


@dataclass(frozen=True)
class Quadratic:
    """Least squares on a linear network: 1/2 mean |W x - e_y|^2, whose Hessian is constant."""

    @property
    def controls(self) -> ControlSpace:
        return ControlSpace({}, cost=lambda u: 1)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        target = torch.nn.functional.one_hot(batch.y, CLASSES).to(batch.x)
        yield Update(lambda: 0.5 * (ctx.logits(batch.x) - target).square().sum(1).mean())


@optimizers
def test_least_squares_has_the_closed_form(o: SGDSettings) -> None:
    """w = nu - eta lambda; lambda' = lambda + (H + wd) w; nu' = mu w (and Nesterov's form)."""
    with rng.scoped(0, "linear"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES, bias=False)).double()
    d = driver(Quadratic(), model, optimizer=o)
    batches = [batch(seed=i, number=i) for i in range(4)]
    u, visited = Control(), []
    for b in batches:
        visited.append(d.snapshot())
        d.step(b, u, RATE)
    p = random_like(d.point(batches[0].indices), 0)
    adjoint, nu = (
        p.parameters[0].clone(),
        p.momentum[0].clone() if p.momentum else torch.zeros(3, 16).double(),
    )
    for b, z in zip(reversed(batches), reversed(visited), strict=True):
        d.restore(z)
        p = pullback(d, b, u, RATE, p).costate
        x = b.x.flatten(1)
        hessian = x.T @ x / len(x) + o.weight_decay * torch.eye(16).double()
        if o.nesterov:
            w = nu - RATE * o.momentum * adjoint
            adjoint = adjoint + (w - RATE * adjoint) @ hessian
        else:
            w = nu - RATE * adjoint
            adjoint = adjoint + w @ hessian
        nu = o.momentum * w
        torch.testing.assert_close(p.parameters[0], adjoint, rtol=1e-12, atol=1e-14)
        if p.momentum:
            torch.testing.assert_close(p.momentum[0], nu, rtol=1e-12, atol=1e-14)


@every
def test_without_a_learning_rate_parameters_keep_their_costate(case: Case) -> None:
    d, b = prepared(case, SETTINGS["plain"]), steps(1)[0]
    weight = replace(random_like(d.point(b.indices), 0), memory={}, rows={})
    found = pullback(d, b, case.control(), 0.0, weight).costate
    assert same(found.parameters, weight.parameters)


def test_the_sample_network_is_smooth() -> None:
    assert not any(isinstance(m, (nn.ReLU, nn.MaxPool2d)) for m in [*smooth().modules(), *bn_net().modules()])


# --------------------------------------------------------------------------------------- what YOPO leaves out


def second_derivative(mode: str, into: int, of: int) -> tuple[float, float, tuple[str, ...]]:
    """(finite difference, costate, names): how parameter `of` moves the step of parameter `into`, n = 0."""
    case = Case("yopo", {"first_layer_grad": mode}, {"inner": 0, "steps": 1})
    d, b, u = driver(case, optimizer=SETTINGS["plain"], channels_last=False), steps(1)[0], case.control()
    z = d.point(b.indices).copy()
    weight, e = random_like(z, 0), random_like(z, 1)
    for i in range(len(z.parameters)):
        weight.parameters[i].mul_(i == into)
        e.parameters[i].mul_(i == of)

    def after() -> State:
        d.step(b, u, RATE)
        return d.point(b.indices).copy()

    fd, found = _central(d, after, weight, e, H), pullback(d, b, u, RATE, weight)
    assert fd is not None
    return fd, found.costate.dot(e), found.dropped


@pytest.mark.parametrize("mode", ["both", "direct", "hamiltonian"])
def test_what_yopo_drops_is_what_it_names(mode: str) -> None:
    """Cut off, the later layers do not see the first layer's parameters move; p keeps what it came from."""
    first, later = 0, 2
    for into in (first, later):
        for of in (first, later):
            fd, got, names = second_derivative(mode, into, of)
            assert abs(fd) > 1e-6
            exact = got == pytest.approx(fd, rel=1e-7)
            assert exact == (mode != "hamiltonian" or of == later), (into, of)
            assert names == (("the input of the later layers",) if mode == "hamiltonian" else ())


def test_theta_that_a_method_has_used_is_held_fixed_but_not_forgotten() -> None:
    """A gradient p of one pass as a weight in the next: its derivative counts, but not in the gradient."""

    class Weighted:
        controls = ControlSpace({}, cost=lambda u: 2)

        def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
            def loss() -> Tensor:
                return ctx.logits(batch.x).square().mean()

            weights = ctx.weights()
            found = yield Update(loss, also=lambda: [w for _, w in weights], move=False)
            p = found[-1]
            yield Update(lambda: (ctx.logits(batch.x) * p).sin().sum())

    d = driver(Weighted(), optimizer=SETTINGS["plain"], channels_last=False)
    found = verify(d, steps(1)[0], Control(), RATE, directions=COUNT)
    assert len(found.pairs) == COUNT
    check(found)


def test_views_in_between_see_the_statistics_that_batchnorm_has_gathered() -> None:
    seen: list[Tensor] = []

    class Looking:
        controls = ControlSpace({}, cost=lambda u: 2)

        def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
            for _ in range(3):
                with ctx.view("eval") as view:
                    seen.append(view(batch.x))
                yield Update(lambda: ctx.logits(batch.x).square().mean())

    d, b = driver(Looking(), bn_net(), channels_last=False), steps(1)[0]
    pullback(d, b, Control(), RATE, d.point(b.indices))
    d.step(b, Control(), RATE)
    assert len(seen) == 6
    for mine, theirs in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(seen[0], seen[1])


# -------------------------------------------------------------------------------------------------- `verify`


@dataclass(frozen=True)
class Distilled:
    """Descends on the distance to what the network says of other samples, detached or not."""

    detach: bool = True
    dropped: tuple[str, ...] = ()
    controls = ControlSpace({}, cost=lambda u: 2)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
        def loss() -> Tensor:
            target = ctx.logits(batch.x.flip(0))
            return (ctx.logits(batch.x) - (target.detach() if self.detach else target)).pow(4).sum()

        yield Update(loss, self.dropped)


@pytest.mark.parametrize("dropped", [(), ("the target",)])
def test_what_a_method_detaches_shows_as_a_share_whether_it_is_named_or_not(dropped: tuple[str, ...]) -> None:
    d, b = driver(Distilled(dropped=dropped), optimizer=SETTINGS["plain"]), steps(1)[0]
    found = verify(d, b, Control(), RATE)
    assert 1e-3 < found.share < 1
    assert found.dropped == dropped
    pairs = torch.tensor(found.pairs, dtype=torch.float64)
    error = (pairs[:, 0] - pairs[:, 1]).square().sum() / pairs[:, 0].square().sum()
    assert found.share == pytest.approx(float(error.sqrt()))
    check(verify(driver(Distilled(detach=False), channels_last=False), b, Control(), RATE, directions=COUNT))


@every
def test_verify_leaves_the_driver_as_it_is(case: Case) -> None:
    class Counting(nn.Module):
        """Has a buffer that no state dict has."""

        def __init__(self) -> None:
            super().__init__()
            self.net = bn_net()
            self.register_buffer("calls", torch.zeros(1).double(), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return self.net(x)

    d, b = prepared(case, SETTINGS["momentum"], model=Counting()), steps(1)[0]
    d.kept["best"], d.stopped = d.snapshot().network(), "why not"
    d.model.eval()
    d.parameters[0].grad = torch.ones_like(d.parameters[0])
    snapshot, before, meter, counts, ball = d.snapshot(), trace(d.model), d.meter, d.meter.copy(), d.ball
    first = verify(d, b, case.control(), RATE, directions=2)
    assert same(d.snapshot(), snapshot)
    assert same(trace(d.model), before)
    assert d.ball is ball
    assert d.meter is meter
    assert meter == counts
    assert verify(d, b, case.control(), RATE, directions=2) == first
    assert verify(d, b, case.control(), RATE, directions=2, seed=1) != first


def test_verify_leaves_the_driver_as_it_is_when_the_method_fails() -> None:
    class Failing:
        controls = ControlSpace({}, cost=lambda u: 1)
        calls = 0

        def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
            self.calls += 1
            ctx.memory["calls"] = torch.tensor(self.calls).double()
            yield Update(lambda: ctx.logits(batch.x).square().mean())
            if self.calls == 4:
                raise RuntimeError("the fourth step")
            yield Update(lambda: ctx.logits(batch.x).square().mean())

    d = driver(Failing(), bn_net())
    snapshot, before, meter, ball = d.snapshot(), trace(d.model), d.meter.copy(), d.ball
    with pytest.raises(RuntimeError, match="the fourth step"):
        verify(d, steps(1)[0], Control(), RATE)
    assert same(d.snapshot(), snapshot)
    assert same(trace(d.model), before)
    assert (d.meter, d.ball) == (meter, ball)


def test_directions_in_which_a_sign_changes_are_skipped() -> None:
    d, b, u = prepared(PLAIN["pgd_at"], SETTINGS["plain"]), steps(1)[0], PLAIN["pgd_at"].control()
    found = verify(d, b, u, RATE, directions=5, h=3.0)
    assert found.pairs == ()
    assert found.skipped == 5
    assert math.isnan(found.share)
    some = verify(d, b, u, RATE, directions=20, h=0.05)
    assert 0 < some.skipped < 20
    assert len(some.pairs) + some.skipped == 20
    assert some.share < 1e-3


def test_every_ball_that_a_method_makes_of_the_drivers_is_watched_and_keeps_its_kind() -> None:
    kinds: set[tuple[bool, float]] = set()

    class Half(Ball):
        def direction(self, gradient: Tensor) -> Tensor:
            return super().direction(gradient) / 2

    class Own:
        controls = ControlSpace({}, cost=lambda u: 2)

        def updates(self, ctx: Context, batch: Batch, u: Control) -> Updates:
            with ctx.view() as view:
                gradient = view.gradient(batch.x, lambda logits: logits[:, 0])
            other = type(ctx.ball)(2 * ctx.ball.eps, ctx.ball.norm)
            moved = other.direction(gradient)
            kinds.add((isinstance(ctx.ball, Half), float(moved.abs().max())))
            yield Update(lambda: ctx.logits(batch.x + 0.01 * moved).square().mean())

    d = driver(Own(), ball=Half(0.1), optimizer=SETTINGS["plain"], channels_last=False)
    check(verify(d, steps(1)[0], Control(), RATE, directions=COUNT))
    assert kinds == {(True, 0.5)}
    assert verify(d, steps(1)[0], Control(), RATE, directions=COUNT, h=10.0).skipped == COUNT


def test_samples_that_carry_nothing_yet_have_no_direction() -> None:
    case = PLAIN["atta"]
    d, b = prepared(case, SETTINGS["momentum"]), steps(1)[0]
    index = torch.tensor([3, 40, 0, 7, 1, 6])  # of 6 samples that carry something, three
    compare(d, case, b._replace(indices=index))
    e = _direction(d.point(index), 0, 0)
    assert [bool(row.any()) for row in e.rows["delta"].values] == [True, False, True, False, True, False]
    assert e.dot(e) == pytest.approx(1)


def test_what_one_of_two_states_lacks_counts_as_zero() -> None:
    d, b = prepared(PLAIN["atta"], SETTINGS["plain"]), steps(1)[0]
    z = d.point(b.indices).copy()
    less, delta = replace(z, rows={}), z.rows["delta"].values
    theta = sum(float(t.square().sum()) for t in z.parameters)
    assert less.dot(z) == z.dot(less) == pytest.approx(theta)
    assert same(z.plus(less, -1).tensors(), [*(torch.zeros_like(t) for t in z.parameters), delta])
    assert same(less.plus(z, -1).tensors(), [*(torch.zeros_like(t) for t in z.parameters), -delta])
    assert same(less.plus(z).index, b.indices)


def test_anything_but_float64_is_refused_with_what_to_do() -> None:
    case, b = PLAIN["free"], steps(1)[0]
    u, single = case.control(), b._replace(x=b.x.float())
    d = driver(case, smooth().float())
    with pytest.raises(ValueError, match=r"the parameters are torch.float32: call model.double\(\)"):
        verify(d, single, u, RATE)
    d.step(single, u, RATE)
    d.model.double()
    with pytest.raises(
        ValueError, match=r"optimiser's buffers are torch.float32: .* before the driver's first"
    ):
        verify(d, b, u, RATE)
    with pytest.raises(ValueError, match=r"the inputs are torch.float32: .*x.double\(\)"):
        verify(driver(case), single, u, RATE)
    d = prepared(case, SETTINGS["plain"])
    d.memory["delta"] = d.memory["delta"].float()
    with pytest.raises(ValueError, match=r"the memory are torch.float32"):
        verify(d, b, u, RATE)
    with pytest.raises(ValueError, match="autocast"):
        verify(driver(case, autocast=torch.bfloat16), b, u, RATE)


@pytest.mark.parametrize("wrong", [{"directions": 0}, {"h": 0.0}, {"h": -1e-6}, {"h": math.nan}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="directions must be >= 1 and h > 0"):
        verify(driver(PLAIN["pgd_at"]), steps(1)[0], PLAIN["pgd_at"].control(), RATE, **wrong)  # type: ignore[arg-type]
