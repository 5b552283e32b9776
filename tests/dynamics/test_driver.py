"""The driver of the outer step: bits, snapshots, scoring without a trace, several updates, and the plan."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPE, cnn_bn, flat, mlp, same, samples, spec, split, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat._util.parallel import World
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.attacks.pgd import ALPHA
from controlat.control.cost import Meter
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.control.space import Control, ControlSpace, Knob
from controlat.data import Split
from controlat.dynamics.driver import Driver, SGDSettings, Step
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.methods import Batch, Context, Update
from controlat.methods.pgd_at import PgdAT
from controlat.pmp import criterion

SGD, HEAVY = SGDSettings(momentum=0.0), SGDSettings(momentum=0.9, weight_decay=1e-3)
BALL = Ball(0.1)
ATTACKED = "amata:min=0,max=2,tau=0.2"
V = Control(alpha=0.1, steps=3)
seeded = settings(derandomize=True, deadline=None, max_examples=50)


def noisy_driver(seed: int = 0, method: object | None = None) -> Driver:
    """BatchNorm, dropout in training and in the attack, random starts, momentum and weight decay."""
    return Driver(cnn_bn(), method or PgdAT(attack_mode="train"), BALL, HEAVY, seed)  # type: ignore[arg-type]


def noisy_plan(seed: int = 0, epochs: int = 2) -> RunSpec:
    return spec(split(9, SHAPE), schedule=ATTACKED, epochs=epochs, seed=seed)


def probe(n: int = 5, shape: tuple[int, int, int] = (1, 2, 2), number: int = 0) -> Batch:
    return Batch(*samples(n, shape, seed=7), torch.arange(n), 0, number)


# ---------------------------------------------------------------------------------------- seeds and snapshots


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    runs = []
    for seed in (0, 0, 1):
        driver = noisy_driver(seed)
        steps = list(rollout(driver, noisy_plan(seed)))
        runs.append((driver.snapshot(), steps))
    assert same(runs[0], runs[1])
    assert not same(runs[0][0].model, runs[2][0].model)


def test_the_random_state_of_the_caller_plays_no_part_and_is_left_alone() -> None:
    found = []
    for seed in (1, 2):
        driver = noisy_driver()
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        list(rollout(driver, noisy_plan(epochs=1)))
        assert same(before, torch.random.get_rng_state())
        found.append(driver.snapshot())
    assert same(*found)


def after(driver: Driver, spec: RunSpec, epoch: int, batch: int = 0) -> tuple[State, list[Step]]:
    steps = list(rollout(driver, spec, epoch=epoch, batch=batch))
    return driver.snapshot(), steps


def test_a_restored_snapshot_is_continued_bit_for_bit_as_often_as_one_likes() -> None:
    driver, p = noisy_driver(), noisy_plan()
    list(rollout(driver, p, until=1))
    snapshot = driver.snapshot()
    undisturbed = after(driver, p, 1)
    for _ in range(2):  # the second time shows that the first left the snapshot alone
        driver.restore(snapshot)
        assert same(after(driver, p, 1), undisturbed)


def test_a_snapshot_of_the_beginning_forgets_the_momentum() -> None:
    driver, p = noisy_driver(), noisy_plan(epochs=1)
    beginning = driver.snapshot()
    first = after(driver, p, 0)
    driver.restore(beginning)
    assert not driver.sgd.state
    assert same(after(driver, p, 0), first)


def test_a_snapshot_can_be_restored_into_another_driver() -> None:
    driver, p = noisy_driver(), noisy_plan()
    list(rollout(driver, p, until=1))
    other = noisy_driver()
    other.restore(driver.snapshot())
    assert same(after(other, p, 1), after(driver, p, 1))


def test_a_snapshot_does_not_follow_the_driver() -> None:
    driver, p = noisy_driver(), noisy_plan(epochs=1)
    next(rollout(driver, p))
    snapshot, again = driver.snapshot(), driver.snapshot()
    list(rollout(driver, p, batch=1))
    assert same(snapshot, again)
    assert not same(snapshot, driver.snapshot())


def recorded(driver: Driver, p: RunSpec, stride: int) -> tuple[dict[int, State], list[Step]]:
    rec = Recording.of(driver, p, stride=stride)
    return rec.stored, rec.steps


def test_a_rollout_from_any_recorded_state_repeats_the_undisturbed_one_bit_for_bit() -> None:
    driver, p = noisy_driver(), noisy_plan()
    store, steps = recorded(driver, p, 1)
    end = driver.snapshot()
    assert sorted(store) == list(range(6))
    for number, snapshot in store.items():
        driver.restore(snapshot)
        found, rest = after(driver, p, *divmod(number, p.batches_per_epoch))
        assert same(rest, steps[number:])
        assert same(found, end)


@pytest.mark.parametrize(
    ("stride", "numbers"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (4, [0, 4]), (9, [0])]
)
def test_every_stride_th_state_is_recorded_before_its_step(stride: int, numbers: list[int]) -> None:
    p = noisy_plan()
    every, _ = recorded(noisy_driver(), p, 1)
    driver = noisy_driver()
    initial = driver.snapshot()
    store, _ = recorded(driver, p, stride)
    assert list(store) == numbers
    assert same(store, {n: every[n] for n in numbers})
    assert same(store[0], initial)


def test_a_rollout_stops_before_until_and_moves_only_as_it_is_consumed() -> None:
    driver, p = Driver(mlp(), PgdAT(), BALL), spec(split(9), epochs=3)
    before = driver.snapshot()
    steps = rollout(driver, p, until=2)
    assert same(before, driver.snapshot())
    assert [(s.epoch, s.batch) for s in steps] == [(e, b) for e in (0, 1) for b in (0, 1, 2)]


def test_a_step_tells_where_it_was_what_it_did_and_what_it_cost() -> None:
    driver, p = Driver(mlp(), PgdAT(), BALL), spec(split(9), schedule="table:steps=1:3,alpha=0.1")
    loss = F.cross_entropy(driver.model(next(p.batches(0)).x), next(p.batches(0)).y).item()
    steps = list(rollout(driver, p))
    assert [s.samples for s in steps] == [4, 4, 1] * 2
    assert [s.control["steps"] for s in steps] == [1, 1, 1, 3, 3, 3]
    assert [s.spent for s in steps] == [Meter(s.samples * (s.control["steps"] + 1)) for s in steps]
    assert driver.meter.gradients == 9 * 2 + 9 * 4
    driver = Driver(mlp(), PgdAT(), BALL)
    assert next(rollout(driver, spec(split(9)))).loss == pytest.approx(loss, rel=1e-14)


# ------------------------------------------------------------------------------------ scoring leaves no trace


class Replacing(nn.Module):
    """A layer that puts a new tensor in the place of its buffer, as many running averages do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


def replacing_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Replacing(), *list(mlp())[1:])


def unusual_cnn() -> nn.Module:
    """Every trace that scoring could leave is there to be destroyed."""
    model = cnn_bn()
    model[1].eval()  # one BatchNorm layer frozen by the user
    model[0].weight.data = model[0].weight.data.contiguous(memory_format=torch.channels_last)
    model[-1].bias.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i)) if p.requires_grad else None
    return model


class Broken(PgdAT):
    """Fails within its updates, after the network was used."""

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        yield from super().updates(ctx, batch, u)
        with ctx.view("train") as view:
            view(batch.x)
            raise RuntimeError("in the method")

    def prefixes(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Control, Update]]:
        def loss() -> Tensor:
            ctx.logits(batch.x)
            raise RuntimeError("in the loss")

        yield u, Update(loss)


SCORING: dict[str, Callable[[Driver, Batch], object]] = {
    "field": lambda driver, batch: driver.field(batch, V, 0.3),
    "fields": lambda driver, batch: list(driver.fields([batch], V, 0.3)),
    "fields, left early": lambda driver, batch: next(driver.fields([batch], V)),
}


@pytest.mark.parametrize("score", SCORING.values(), ids=SCORING)
@pytest.mark.parametrize("build", [unusual_cnn, replacing_net, mlp])
def test_scoring_leaves_no_trace(
    score: Callable[[Driver, Batch], object], build: Callable[[], nn.Module]
) -> None:
    batch = probe(shape=SHAPE if build is unusual_cnn else (1, 2, 2))
    driver = Driver(build(), PgdAT(attack_mode="train"), BALL, HEAVY)
    grads = [p.grad for p in driver.model.parameters()]
    driver.step(batch, V, 0.1)  # so that there are momentum buffers
    for p, g in zip(driver.model.parameters(), grads, strict=True):
        p.grad = g
    driver.model.eval()
    before, state, spent = trace(driver.model), driver.snapshot(), driver.meter.copy()
    score(driver, batch)
    assert same(trace(driver.model), before)
    assert same(driver.snapshot(), state)
    assert driver.meter == spent


@pytest.mark.parametrize("score", SCORING.values(), ids=SCORING)
@pytest.mark.parametrize("build", [unusual_cnn, replacing_net, mlp])
def test_scoring_that_fails_leaves_no_trace(
    score: Callable[[Driver, Batch], object], build: Callable[[], nn.Module]
) -> None:
    driver = Driver(build(), Broken(), BALL, HEAVY)
    before, state = trace(driver.model), driver.snapshot()
    with pytest.raises(RuntimeError, match="in the"):
        score(driver, probe(shape=SHAPE if build is unusual_cnn else (1, 2, 2)))
    assert same(trace(driver.model), before)
    assert same(driver.snapshot(), state)


def test_scoring_counts_on_the_meter_it_is_given() -> None:
    driver, meter = Driver(mlp(), PgdAT(), BALL), Meter()
    driver.field(probe(), V, meter=meter)
    assert meter == Meter(5 * 4)
    assert driver.meter == Meter()


@pytest.mark.parametrize("u", [Control(alpha=0, steps=0), V])
@pytest.mark.parametrize("build", [mlp, cnn_bn])
def test_under_plain_sgd_the_field_is_the_step_over_the_rate(
    build: Callable[[], nn.Module], u: Control
) -> None:
    shape, rate = SHAPE if build is cnn_bn else (1, 2, 2), 0.25
    driver = Driver(build(), PgdAT(attack_mode="train"), BALL, SGD)
    before = flat(driver.parameters)
    found = flat(driver.field(probe(shape=shape), u).gradients)
    driver.step(probe(shape=shape), u, rate)
    torch.testing.assert_close(found, (before - flat(driver.parameters)) / rate, rtol=1e-9, atol=1e-13)
    assert found.norm() > 1e-3


def test_parameters_that_the_loss_does_not_use_have_gradient_zero() -> None:
    model = mlp()
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    driver = Driver(model, PgdAT(), BALL, SGD)
    found = dict(
        zip((n for n, _ in model.named_parameters()), driver.field(probe(), V).gradients, strict=True)
    )
    assert same(found["spare"], torch.zeros(2, dtype=torch.float64))
    driver.step(probe(), V, 0.1)
    assert same(model.spare.detach(), torch.ones(2, dtype=torch.float64))


def test_scoring_candidates_in_between_changes_no_bit_of_training() -> None:
    driver, disturbed, p = noisy_driver(), noisy_driver(), noisy_plan()
    steps = list(rollout(driver, p))
    found = []
    for step in rollout(disturbed, p):
        found.append(step)
        batch = probe(shape=SHAPE, number=step.batch)
        disturbed.field(batch, V)
        list(disturbed.fields([batch], V))
    assert same(found, steps)
    assert same(disturbed.snapshot(), driver.snapshot())


def masked_net() -> tuple[nn.Module, list[Tensor]]:
    """A network that starts with dropout, and the masks of its passes in the order of time."""
    with rng.scoped(0, "masked"):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    masks: list[Tensor] = []
    model[1].register_forward_hook(lambda m, arguments, output: masks.append(output.detach() != 0))
    return model, masks


def test_candidates_share_their_dropout_masks_and_batches_do_not() -> None:
    model, masks = masked_net()
    driver = Driver(model, PgdAT(attack_mode="train"), BALL)
    batch = Batch(
        torch.full((50, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(50).long(), torch.arange(50), 0, 0
    )
    for steps in (0, 1, 3):
        masks.clear()
        driver.field(batch, Control(alpha=0.1, steps=steps))
        assert len(masks) == steps + 1
        assert len({m.numpy().tobytes() for m in masks}) == steps + 1  # another mask for every pass
        if steps == 0:
            update = masks[0]
        assert same(masks[-1], update)
    masks.clear()
    list(driver.fields([batch], V))
    inner, updates = masks[:3], masks[3:]
    assert all(same(m, update) for m in updates)
    assert len(updates) == 3
    masks.clear()
    driver.step(batch, V, 0.1)  # training itself draws what scoring drew
    assert same(masks, [*inner, update])
    masks.clear()
    driver.field(batch._replace(number=1), V)
    assert not same(masks[-1], update)


# ----------------------------------------------------------------- a method with several updates and a memory


@dataclass(frozen=True)
class Free:
    """Free adversarial training: `steps` replays of descent in theta and ascent in a carried perturbation."""

    @property
    def controls(self) -> ControlSpace:
        return ControlSpace({"alpha": ALPHA, "steps": Knob("integer", 1)}, cost=lambda u: 2 * u["steps"])

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        carried = ctx.memory.setdefault("delta", torch.zeros_like(batch.x))
        delta = carried[: len(batch.x)]  # slot i belongs to position i of the batch
        for _ in range(int(u["steps"])):
            x = (batch.x + delta).clamp(0, 1)
            with ctx.view("train") as view:
                ascent = view.gradient(x, lambda logits: cross_entropy(logits, batch.y)).sign()
            saturated = (batch.x + delta).sub(0.5).abs() > 0.5  # where the clamp has no gradient
            delta.add_(u["alpha"] * ascent.masked_fill(saturated, 0)).clamp_(-ctx.ball.eps, ctx.ball.eps)
            yield Update(lambda x=x: F.cross_entropy(ctx.logits(x), batch.y))  # type: ignore[misc]


def free_by_hand(
    model: nn.Module, batches: list[Batch], o: SGDSettings, eps: float, alpha: float, m: int, rate: float
) -> tuple[Tensor, list[Tensor]]:
    """One backward pass gives both gradients; delta and the gradients of theta are returned."""
    optimizer = torch.optim.SGD(model.parameters(), rate, o.momentum, weight_decay=o.weight_decay)
    delta, gradients = torch.zeros_like(batches[0].x), []
    for batch in batches:
        for _ in range(m):
            d = delta[: len(batch.x)].clone().requires_grad_()
            optimizer.zero_grad()
            F.cross_entropy(model(torch.clamp(batch.x + d, 0, 1)), batch.y).backward()
            gradients.append(flat(p.grad for p in model.parameters()))
            delta[: len(batch.x)] = torch.clamp(d.detach() + alpha * d.grad.sign(), -eps, eps)
            optimizer.step()
    return delta, gradients


FREE = {"schedule": "pgd:steps=3,alpha=0.06", "rate": 0.2, "epochs": 2}


def test_a_method_with_several_updates_and_a_memory_equals_the_loop_written_by_hand() -> None:
    p, driver, model = spec(split(10), **FREE), Driver(mlp(), Free(), BALL, HEAVY), mlp()
    steps = list(rollout(driver, p))
    batches = [b for e in range(p.epochs) for b in p.batches(e)]
    delta, _ = free_by_hand(model, batches, HEAVY, 0.1, 0.06, 3, 0.2)
    torch.testing.assert_close(flat(driver.parameters), flat(model.parameters()), rtol=1e-12, atol=1e-14)
    assert same(driver.memory, {"delta": delta})
    assert [s.spent.gradients for s in steps] == [s.samples * 6 for s in steps]


def test_the_memory_is_part_of_snapshots_and_of_what_they_restore() -> None:
    p, driver = spec(split(10), **FREE), Driver(mlp(), Free(), BALL, HEAVY)
    store, steps = recorded(driver, p, 1)
    end = driver.snapshot()
    assert store[0].memory == {}
    assert set(store[1].memory) == {"delta"}
    assert not same(store[1].memory, store[2].memory)
    for number in (4, 1, 0, 4):
        driver.restore(store[number])
        assert same(after(driver, p, *divmod(number, p.batches_per_epoch)), (end, steps[number:]))


def test_the_field_of_several_updates_is_the_sum_of_their_gradients_along_plain_steps() -> None:
    driver, model, rate = Driver(mlp(), Free(), BALL, HEAVY), mlp(), 0.2
    u = Control(alpha=0.06, steps=3)
    _, gradients = free_by_hand(model, [probe()], SGD, 0.1, 0.06, 3, rate)
    found = flat(driver.field(probe(), u, rate).gradients)
    torch.testing.assert_close(found, sum(gradients), rtol=1e-12, atol=1e-14)
    plain = Driver(mlp(), Free(), BALL, SGD)
    before = flat(plain.parameters)
    plain.step(probe(), u, rate)
    torch.testing.assert_close(found, (before - flat(plain.parameters)) / rate, rtol=1e-9, atol=1e-13)


def test_the_field_starts_from_the_memory_and_leaves_it_alone() -> None:
    driver, u = Driver(mlp(), Free(), BALL, SGD), Control(alpha=0.01, steps=3)
    fresh = flat(driver.field(probe(), u, 0.2).gradients)
    assert driver.memory == {}
    driver.step(probe(), u, 0.0)
    assert 0.02 < driver.memory["delta"].abs().max() < 0.09  # it has room to move
    state = driver.snapshot()
    carried = flat(driver.field(probe(), u, 0.2).gradients)
    assert same(driver.snapshot(), state)
    assert not same(carried, fresh)


def test_a_method_without_prefixes_has_no_sweep_and_says_so() -> None:
    with pytest.raises(ValueError, match="Free offers no sweep over K: score its controls one by one"):
        list(Driver(mlp(), Free(), BALL).fields([probe()], V))


# -------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_value_that_is_not_finite_is_reported_with_its_place_and_moves_nothing(
    norm: str, steps: int
) -> None:
    model = mlp()
    driver = Driver(model, PgdAT(), Ball(0.1, norm), HEAVY)
    driver.step(probe(), V, 0.1)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    before = driver.snapshot()
    batch, u = probe(number=17)._replace(epoch=4), Control(alpha=0.05, steps=steps)
    with pytest.raises(NonFiniteError) as error:
        driver.step(batch, u, 0.1)
    assert f"epoch 4, batch 17, {u}" in str(error.value)
    assert str(error.value).count("epoch") == 1
    after = driver.snapshot()
    assert same(after.optimizer, before.optimizer)
    assert same(torch.nan_to_num(flat(after.model.values())), torch.nan_to_num(flat(before.model.values())))


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).sqrt() + x

    model = nn.Sequential(*mlp(), Root())
    with pytest.raises(NonFiniteError, match=r"training loss \d.*, gradient norm nan \(epoch 0, batch 0"):
        Driver(model, PgdAT(), BALL).step(probe(), Control(alpha=0, steps=0), 0.1)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    for model in (nn.Flatten(), mlp().requires_grad_(False)):
        with pytest.raises(
            ValueError, match="no parameters that require gradients: there is nothing to train"
        ):
            Driver(model, PgdAT(), BALL)


def test_parameters_that_need_no_gradient_stay_as_they_are() -> None:
    model = mlp()
    model[1].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    driver = Driver(model, PgdAT(), BALL, HEAVY)
    driver.step(probe(), V, 0.1)
    assert [same(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert len(driver.field(probe(), V).gradients) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0.1"),
        ({"momentum": float("nan")}, "momentum must be"),
        ({"weight_decay": -1.0}, "weight_decay must be >= 0 and finite, got -1"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite, got inf"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs momentum > 0"),
    ],
)
def test_wrong_settings_of_sgd_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDSettings(**options)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_bf16_rounds_the_activations_and_keeps_float32_parameters(mode: str) -> None:
    data = split(9, SHAPE)
    p = spec(Split(data.x.float(), data.y), schedule=ATTACKED, epochs=1)
    kinds: set[torch.dtype] = set()

    def run(autocast: torch.dtype | None) -> Driver:
        model = cnn_bn().float()
        driver = Driver(model, PgdAT(attack_mode=mode), BALL, HEAVY, autocast=autocast)
        model[0].register_forward_hook(lambda m, arguments, output: kinds.add(output.dtype))
        list(rollout(driver, p))
        return driver

    full = run(None)
    assert kinds == {torch.float32}
    kinds.clear()
    mixed = run(torch.bfloat16)
    assert kinds == {torch.bfloat16}
    assert {q.dtype for q in mixed.parameters} == {torch.float32}
    assert {s["momentum_buffer"].dtype for s in mixed.sgd.state.values()} == {torch.float32}
    difference = (flat(mixed.parameters) - flat(full.parameters)).norm()
    assert 0 < difference < 0.1 * flat(full.parameters).norm()


# ------------------------------------------------------------------------------------------------------ plans


@seeded
@given(st.integers(1, 20), st.integers(1, 25), st.integers(0, 5), st.integers(0, 3))
def test_the_batches_of_an_epoch_take_every_sample_once(n: int, size: int, seed: int, epoch: int) -> None:
    data = split(n)
    p = spec(data, batch_size=size, epochs=4, seed=seed)
    batches = list(p.batches(epoch))
    index = torch.cat([b.indices for b in batches])
    assert sorted(index.tolist()) == list(range(n))
    assert len(batches) == p.batches_per_epoch
    assert [len(b.x) for b in batches[:-1]] == [size] * (len(batches) - 1)
    assert [(b.epoch, b.number) for b in batches] == [(epoch, i) for i in range(len(batches))]
    for b in batches:
        assert same((b.x, b.y), (data.x[b.indices], data.y[b.indices]))


def order(p: RunSpec, epoch: int) -> list[int]:
    return torch.cat([b.indices for b in p.batches(epoch)]).tolist()


def test_the_order_of_samples_is_a_function_of_seed_and_epoch_alone() -> None:
    p = spec(split(30), seed=5)
    others = [
        spec(split(30, seed=9), seed=5, batch_size=7, epochs=9, rate=0.3, schedule="pgd:steps=1,alpha=0.1"),
        spec(split(30), seed=5),
    ]
    torch.manual_seed(123)
    assert [order(q, 3) for q in others] == [order(p, 3)] * 2
    assert order(p, 3) != order(p, 2)
    assert order(p, 3) != order(spec(split(30), seed=6), 3)


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_an_epoch_can_be_entered_at_any_batch(first: int) -> None:
    p = spec(split(14))
    assert same(list(p.batches(1, first)), list(p.batches(1))[first:])


def test_the_control_is_that_at_the_start_of_the_step() -> None:
    p = spec(split(8), schedule="table:steps=0:1:2:3,tau=1,resolution=0.5", epochs=2, batch_size=2)
    found = [p.control(b)["steps"] for e in (0, 1) for b in p.batches(e)]
    assert found == [0, 0, 1, 1, 2, 2, 3, 3]


RATES: dict[str, Callable[[float, float], float]] = {
    "0.3": lambda t, T: 0.3,
    "multistep:lr=0.4,at=1:2.5,factor=0.1": lambda t, T: 0.4 if t < 1 else 0.04 if t < 2.5 else 0.004,
    "onecycle:lr=0.5,peak=0.25": lambda t, T: 0.5 * (4 * t / T if t < T / 4 else (T - t) / (0.75 * T)),
}


@pytest.mark.parametrize("text", RATES)
@pytest.mark.parametrize(("n", "epochs"), [(9, 3), (7, 4), (4, 5)])
def test_the_mean_rate_is_the_mean_over_steps_of_the_rate_at_their_middle(
    text: str, n: int, epochs: int
) -> None:
    p, eta = spec(split(n), rate=text, epochs=epochs), RATES[text]
    per_epoch = -(-n // 4)
    rates = [[eta(e + (b + 0.5) / per_epoch, epochs) for b in range(per_epoch)] for e in range(epochs)]
    assert p.mean_rate() == pytest.approx(sum(map(sum, rates)) / (per_epoch * epochs), rel=1e-12)
    for e in range(epochs):
        assert p.mean_rate(e) == pytest.approx(sum(rates[e]) / per_epoch, rel=1e-12)


def test_a_rollout_uses_the_plan_s_rates() -> None:
    p = spec(split(9), rate="onecycle:lr=0.5", epochs=2)
    steps = list(rollout(Driver(mlp(), PgdAT(), BALL, HEAVY), p))
    assert [s.rate for s in steps] == pytest.approx([0.5 * r / 6 for r in (1, 3, 5, 5, 3, 1)], rel=1e-12)
    assert p.mean_rate() == pytest.approx(sum(s.rate for s in steps) / 6, rel=1e-12)


@pytest.mark.parametrize(("batch_size", "epochs"), [(0, 1), (1, 0), (-3, 1)])
def test_a_plan_needs_at_least_one_sample_and_one_epoch(batch_size: int, epochs: int) -> None:
    with pytest.raises(ValueError, match=r"(batch_size|epochs) must be a whole number >= 1, got"):
        RunSpec(split(4), batch_size, epochs, parse_schedule("none", 1), parse_rate(0.1))


def normalised(kind: type[nn.Module], *, pixels: bool) -> nn.Module:
    """BatchNorm over images, or over features."""
    with rng.scoped(0, "normalised"):
        layers = (
            [kind(1), nn.Flatten()] if pixels else [nn.Flatten(), nn.Linear(4, 3), kind(3), nn.Linear(3, 3)]
        )
        return nn.Sequential(*layers, *([nn.Linear(4, 3)] if pixels else [])).double()


@pytest.mark.parametrize(("batch_size", "processes"), [(4, 1), (1, 1), (2, 1), (3, 2), (6, 2)])
def test_a_batch_of_one_sample_that_batchnorm_cannot_take_is_refused_before_the_first_step(
    batch_size: int, processes: int
) -> None:
    """Nine samples: the last batch, or a process's share of it, has one row."""
    model = normalised(nn.BatchNorm1d, pixels=False)
    driver, before = Driver(model, PgdAT(), BALL), trace(model)
    for rank in range(processes):
        p = replace(spec(split(9), batch_size=batch_size), world=World(rank, processes))
        with pytest.raises(
            ValueError, match=r"9 training samples in batches of \d leave \d .*BatchNorm cannot"
        ):
            next(rollout(driver, p))
    with pytest.raises(ValueError, match="choose another batch_size or number of training samples"):
        Recording.of(driver, spec(split(9), batch_size=4))
    assert same(trace(model), before)
    assert same(driver.snapshot().optimizer["state"], {})


def test_a_batch_of_one_sample_trains_where_batchnorm_has_pixels_or_or_is_absent() -> None:
    p = spec(split(9), batch_size=4, epochs=1)
    assert len(list(rollout(Driver(normalised(nn.BatchNorm2d, pixels=True), PgdAT(), BALL), p))) == 3
    assert len(list(rollout(Driver(mlp(), PgdAT(), BALL), p))) == 3
    even = spec(split(10), batch_size=4, epochs=1)
    assert len(list(rollout(Driver(normalised(nn.BatchNorm1d, pixels=False), PgdAT(), BALL), even))) == 3


def test_probe_batches_of_one_sample_are_refused_too() -> None:
    (x, y), model = samples(8), normalised(nn.BatchNorm1d, pixels=False)
    with pytest.raises(ValueError, match=r"the 8 probe batches hold 1 sample each, .*: make fewer"):
        criterion(model, x, y, {"alpha": 0.1, "steps": 1}, eps=0.1, gamma=0, batches=8)
    assert criterion(model, x, y, {"alpha": 0.1, "steps": 1}, eps=0.1, gamma=0, batches=4).value >= 0
