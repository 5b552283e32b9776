"""PGD-AT against training loops written by hand on torch.optim.SGD, and its exact sweep over K."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPE, cnn_bn, flat, mlp, same, samples, spec, split
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from controlat._util import rng
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Batch, Prefixes
from controlat.methods.pgd_at import PgdAT

SEED = 3
SETTINGS = {
    "plain": SGDSettings(momentum=0.0),
    "momentum": SGDSettings(momentum=0.9),
    "Nesterov": SGDSettings(momentum=0.9, nesterov=True),
    "weight decay": SGDSettings(momentum=0.5, weight_decay=1e-2),
}
seeded = settings(derandomize=True, deadline=None, max_examples=25)

# ---------------------------------------------------------------------------------- the loops written by hand

Attack = Callable[[nn.Module, Batch], Tensor]


def no_attack(model: nn.Module, batch: Batch) -> Tensor:
    return batch.x


def by_hand(
    model: nn.Module, spec: RunSpec, o: SGDSettings, attack: Attack = no_attack, clean_weight: float = 0.0
) -> nn.Module:
    """Training as anybody would write it; only the order of samples and the noise are the plan's."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay
    )
    for epoch in range(spec.epochs):
        for batch in spec.batches(epoch):
            x = attack(model, batch)
            model.train()
            with rng.scoped(spec.seed, epoch, batch.number, "update", 0):
                loss = F.cross_entropy(model(x), batch.y)
                if clean_weight:
                    loss = loss + clean_weight * F.cross_entropy(model(batch.x), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = spec.learning_rate(epoch, batch.number)
            optimizer.step()
    return model


def hand_pgd(
    eps: float, alpha: float, steps: int, *, start: bool = True, norm: str = "linf", mode: str = "eval"
) -> Attack:
    """Projected ascent on a copy of the model; its noise is that of the driver's inner loop."""

    def onto(delta: Tensor) -> Tensor:
        if norm == "linf":
            return torch.clamp(delta, -eps, eps)
        return (
            delta
            * torch.clamp(eps / delta.flatten(1).norm(dim=1).clamp_min(1e-10), max=1)[:, None, None, None]
        )

    def attack(model: nn.Module, batch: Batch) -> Tensor:
        twin = copy.deepcopy(model).train(mode == "train")
        x0, x = batch.x, batch.x.clone()
        if start:
            x = Ball(eps, norm).start(x0, rng.generator(SEED, batch.epoch, batch.number, "start"))
        with rng.scoped(SEED, batch.epoch, batch.number, "inner", 0):
            for _ in range(steps):
                x = x.detach().requires_grad_()
                F.cross_entropy(twin(x), batch.y, reduction="sum").backward()
                g = x.grad
                if norm == "linf":
                    direction = torch.sign(g)
                else:
                    direction = g / g.flatten(1).norm(dim=1)[:, None, None, None]
                x = torch.clamp(x0 + onto(x + alpha * direction - x0), 0, 1)
        return x.detach()

    return attack


def hand_fgsm(eps: float) -> Attack:
    def attack(model: nn.Module, batch: Batch) -> Tensor:
        x = batch.x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch.y), x)
        return (batch.x + eps * gradient.sign()).clamp(0, 1)

    return attack


def trained(model: nn.Module, spec: RunSpec, o: SGDSettings, method: PgdAT, ball: Ball) -> nn.Module:
    driver = Driver(model, method, ball, o, spec.seed, channels_last=False)
    for _ in rollout(driver, spec):
        pass
    return model


def assert_close(model: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------ limits that are other methods


@pytest.mark.parametrize("o", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_steps_is_standard_training_bit_for_bit(o: SGDSettings, dtype: torch.dtype) -> None:
    data = split(14)
    data = type(data)(data.x.to(dtype), data.y)
    p = spec(data, rate="onecycle:lr=0.5", epochs=3, seed=SEED)
    found = trained(mlp().to(dtype), p, o, PgdAT(), Ball(0.1))
    assert same(found.state_dict(), by_hand(mlp().to(dtype), p, o).state_dict())
    assert not same(found.state_dict(), mlp().to(dtype).state_dict())


def test_no_steps_is_standard_training_bit_for_bit_with_batchnorm_and_dropout() -> None:
    p = spec(split(10, SHAPE), seed=SEED)
    o = SETTINGS["momentum"]
    found = trained(cnn_bn(), p, o, PgdAT(attack_mode="train"), Ball(0.1))
    assert same(found.state_dict(), by_hand(cnn_bn(), p, o).state_dict())


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # its mask is drawn in the order of memory, so that it depends on the layout
    return model


def test_no_steps_in_the_fast_memory_layout_is_standard_training_up_to_rounding() -> None:
    p = spec(split(10, SHAPE), seed=SEED)
    model, o = without_dropout(cnn_bn()), SETTINGS["momentum"]
    for _ in rollout(Driver(model, PgdAT(), Ball(0.1), o, SEED, channels_last=True), p):
        pass
    assert_close(model, by_hand(without_dropout(cnn_bn()), p, o))


def test_one_step_of_size_eps_without_random_start_is_fgsm_training() -> None:
    p = spec(split(14), schedule="fgsm:alpha=0.2", rate=0.5, seed=SEED)
    o = SETTINGS["momentum"]
    found = trained(mlp(), p, o, PgdAT(random_start=False), Ball(0.2))
    assert same(found.state_dict(), by_hand(mlp(), p, o, hand_fgsm(0.2)).state_dict())
    assert not same(found.state_dict(), by_hand(mlp(), p, o).state_dict())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("random_start", [True, False])
def test_a_ball_of_radius_zero_gives_standard_training(norm: str, steps: int, random_start: bool) -> None:
    p = spec(split(14), schedule=f"pgd:steps={steps},alpha=0.1", rate=0.5, seed=SEED)
    o = SETTINGS["momentum"]
    found = trained(mlp(), p, o, PgdAT(random_start=random_start), Ball(0, norm))
    assert same(found.state_dict(), by_hand(mlp(), p, o).state_dict())


# ------------------------------------------------------------------------------------ the whole training loop


@pytest.mark.parametrize("o", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", [True, False])
def test_pgd_training_equals_the_loop_written_by_hand(o: SGDSettings, norm: str, start: bool) -> None:
    p = spec(split(14), schedule="pgd:steps=3,alpha=0.05", rate=0.5, seed=SEED)
    found = trained(mlp(), p, o, PgdAT(random_start=start), Ball(0.1, norm))
    attack = hand_pgd(0.1, 0.05, 3, start=start, norm=norm)
    assert_close(found, by_hand(mlp(), p, o, attack))
    assert flat(found.parameters()).sub(flat(by_hand(mlp(), p, o).parameters())).abs().max() > 1e-4


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_pgd_training_with_batchnorm_and_dropout_equals_the_loop_written_by_hand(mode: str) -> None:
    p = spec(split(10, SHAPE), schedule="pgd:steps=2,alpha=0.05", seed=SEED)
    o = SETTINGS["momentum"]
    found = trained(cnn_bn(), p, o, PgdAT(attack_mode=mode), Ball(0.1))
    assert_close(found, by_hand(cnn_bn(), p, o, hand_pgd(0.1, 0.05, 2, mode=mode)))
    other = hand_pgd(0.1, 0.05, 2, mode="train" if mode == "eval" else "eval")
    assert not same(flat(found.parameters()), flat(by_hand(cnn_bn(), p, o, other).parameters()))


def test_running_statistics_see_the_training_batch_once_whatever_the_attack_does() -> None:
    p = spec(split(8, SHAPE), schedule="pgd:steps=3,alpha=0.05", epochs=1, seed=SEED)
    found = trained(cnn_bn(), p, SETTINGS["plain"], PgdAT(attack_mode="train"), Ball(0.1))
    counts = [int(m.num_batches_tracked) for m in found.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts == [p.batches_per_epoch] * 3


@pytest.mark.parametrize("build", [mlp, cnn_bn])
def test_the_clean_term_is_added_with_its_weight(build: Callable[[], nn.Module]) -> None:
    shape = SHAPE if build is cnn_bn else (1, 2, 2)
    p = spec(split(10, shape), schedule="pgd:steps=2,alpha=0.05", seed=SEED)
    o = SETTINGS["plain"]
    found = trained(build(), p, o, PgdAT(clean_weight=0.7), Ball(0.1))
    assert_close(found, by_hand(build(), p, o, hand_pgd(0.1, 0.05, 2), clean_weight=0.7))


def test_without_attack_the_clean_term_multiplies_the_gradient() -> None:
    batch = Batch(*samples(6), torch.arange(6), 0, 0)
    none = Control(alpha=0, steps=0)
    plain = Driver(mlp(), PgdAT(), Ball(0.1)).field(batch, none).gradients
    both = Driver(mlp(), PgdAT(clean_weight=0.5), Ball(0.1)).field(batch, none).gradients
    torch.testing.assert_close(flat(both), 1.5 * flat(plain), rtol=1e-14, atol=1e-16)


# ------------------------------------------------------------------------------------------- the sweep over K


def driver_and_batch(
    build: Callable[[], nn.Module], n: int, method: PgdAT, ball: Ball, channels_last: bool = True
) -> tuple[Driver, Batch]:
    shape = SHAPE if build is cnn_bn else (1, 2, 2)
    driver = Driver(build(), method, ball, seed=SEED, channels_last=channels_last)
    return driver, Batch(*samples(n, shape), torch.arange(n), 1, 2)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
@pytest.mark.parametrize("build", [mlp, cnn_bn])
def test_every_prefix_is_the_update_of_that_k(
    build: Callable[[], nn.Module], norm: str, mode: str, clean_weight: float
) -> None:
    method = PgdAT(attack_mode=mode, clean_weight=clean_weight)
    driver, batch = driver_and_batch(build, 5, method, Ball(0.3, norm))
    fields = [field for (field,) in driver.fields([batch], Control(alpha=0.06, steps=4))]
    assert [field.control for field in fields] == [Control(alpha=0.06, steps=k) for k in (1, 2, 3, 4)]
    for field in fields:
        alone = driver.field(batch, field.control)
        if build is mlp:  # all K are computed together
            torch.testing.assert_close(field.gradients, alone.gradients, rtol=1e-10, atol=1e-14)
        else:
            assert same(field, alone), field.control
    assert not same(fields[0].gradients, fields[3].gradients)


def test_every_prefix_is_the_update_of_that_k_when_the_attack_works_in_parts() -> None:
    driver, batch = driver_and_batch(cnn_bn, 70, PgdAT(), Ball(0.1))  # more than the 64 of one part
    for ((v, gradients, _),) in driver.fields([batch], Control(alpha=0.03, steps=2)):
        torch.testing.assert_close(
            flat(gradients), flat(driver.field(batch, v).gradients), rtol=1e-9, atol=1e-12
        )


@seeded
@given(
    st.floats(0, 0.5), st.floats(0, 0.6), st.integers(1, 5), st.booleans(), st.sampled_from(["linf", "l2"])
)
def test_prefixes_and_updates_agree_for_every_control(
    eps: float, alpha: float, steps: int, start: bool, norm: str
) -> None:
    driver, batch = driver_and_batch(mlp, 5, PgdAT(random_start=start), Ball(eps, norm))
    for ((v, gradients, _),) in driver.fields([batch], Control(alpha=alpha, steps=steps)):
        torch.testing.assert_close(gradients, driver.field(batch, v).gradients, rtol=1e-9, atol=1e-13)


def test_the_method_offers_the_sweep() -> None:
    assert isinstance(PgdAT(), Prefixes)


# ------------------------------------------------------------------------------- what it costs, what it drops


def count_samples(model: nn.Module) -> list[int]:
    seen: list[int] = []
    model.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments[0])))
    return seen


@pytest.mark.parametrize("build", [mlp, cnn_bn])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_one_step_costs_what_the_network_is_evaluated(
    build: Callable[[], nn.Module], mode: str, clean_weight: float, steps: int
) -> None:
    method = PgdAT(attack_mode=mode, clean_weight=clean_weight)
    driver, batch = driver_and_batch(build, 5, method, Ball(0.3))
    seen, u = count_samples(driver.model), Control(alpha=0.1, steps=steps)
    step = driver.step(batch, u, 0.1)
    assert sum(seen) == step.spent.gradients == driver.meter.gradients == 5 * method.controls.cost(u)
    assert sum(seen) == 5 * (steps + 1 + (clean_weight > 0))
    assert step.spent.forwards == 0


def test_the_sweep_costs_k_steps_and_k_parameter_gradients() -> None:
    driver, batch = driver_and_batch(mlp, 5, PgdAT(), Ball(0.3))
    seen, meter = count_samples(driver.model), Meter()
    list(driver.fields([batch], Control(alpha=0.1, steps=4), meter=meter))
    assert sum(seen) == meter.gradients == 5 * (4 + 4)


@pytest.mark.parametrize(
    ("norm", "steps", "expected"),
    [("linf", 3, ()), ("l2", 3, ("the adversary's (l_2 steps)",)), ("l2", 0, ()), ("linf", 0, ())],
)
def test_only_the_smooth_steps_of_l2_are_dropped(norm: str, steps: int, expected: tuple[str, ...]) -> None:
    driver, batch = driver_and_batch(mlp, 5, PgdAT(), Ball(0.3, norm))
    assert driver.step(batch, Control(alpha=0.1, steps=steps), 0.1).dropped == expected


@pytest.mark.parametrize(("norm", "drops"), [("linf", False), ("l2", True)])
def test_holding_the_adversary_fixed_is_exact_for_linf_and_not_for_l2(norm: str, drops: bool) -> None:
    x, y = samples(6)
    attack, batch, h = hand_pgd(0.3, 0.1, 3, norm=norm), Batch(x, y, torch.arange(6), 0, 0), 1e-6

    def loss(h: float, adversary: Tensor | None) -> float:
        model = mlp()
        with torch.no_grad():
            for p in model.parameters():
                p += h
        return F.cross_entropy(model(attack(model, batch) if adversary is None else adversary), y).item()

    total, partial = ((loss(h, a) - loss(-h, a)) / (2 * h) for a in (None, attack(mlp(), batch)))
    driver = Driver(mlp(), PgdAT(), Ball(0.3, norm), seed=SEED)
    field = driver.field(batch, Control(alpha=0.1, steps=3)).gradients
    assert partial == pytest.approx(flat(field).sum().item(), rel=1e-6)
    assert (abs(total - partial) > 1e-3 * abs(partial)) == drops


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attack_mode": "test"}, "attack_mode must be one of eval, train, got 'test'"),
        ({"clean_weight": -1.0}, "clean_weight must be >= 0, got -1"),
        ({"clean_weight": float("nan")}, "clean_weight must be finite, got nan"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PgdAT(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("u", "message"),
    [
        ({"alpha": 0.1}, "has alpha, steps; got alpha"),
        ({"alpha": -0.1, "steps": 1}, "alpha must be >= 0, got -0.1"),
        ({"alpha": 0.1, "steps": -1}, "steps must be >= 0, got -1"),
        ({"alpha": 0.1, "steps": 1.5}, "steps must be an integer, got 1.5"),
    ],
)
def test_controls_outside_the_admissible_set_are_refused(u: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PgdAT().controls.check(u)
