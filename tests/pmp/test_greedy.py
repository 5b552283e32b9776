"""The greedy criterion (14), against sets G that are enumerated by hand and gradients of plain loops."""

import copy
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPE, cnn_bn, flat, mlp, same, samples, split, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import controlat
from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat.app.schedule_run import ScheduleRun
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.methods import Batch, build
from controlat.methods.pgd_at import PgdAT
from controlat.pmp import (
    FORMS,
    AdversarialLoss,
    Candidates,
    Gap,
    Surface,
    criterion,
    interval,
    probe_batches,
    score,
)
from controlat.pmp.maximise import score_one

EPS = 0.2
BALL = Ball(EPS)
GRID = Candidates.of((0.05, 0.3), 3)
NONE = Control(alpha=0, steps=0)
INSIDE = Control(alpha=0.05, steps=2)
OUTSIDE = Control(alpha=0.11, steps=5)
seeded = settings(derandomize=True, deadline=None, max_examples=25)


def candidates(grid: Candidates = GRID) -> list[Control]:
    return [
        NONE,
        *(Control(alpha=a, steps=k) for a in grid.values["alpha"] for k in grid.values["steps"][1:]),
    ]


# ----------------------------------------------------------------------------------- an independent reference


def hand_attack(model: nn.Module, x0: Tensor, y: Tensor, start: Tensor, alpha: float, steps: int) -> Tensor:
    """Sign ascent in the l_inf ball, on a model in whatever mode it is in."""
    x = start.clone()
    for _ in range(steps):
        x = x.detach().requires_grad_()
        F.cross_entropy(model(x), y, reduction="sum").backward()
        x = torch.clamp(x + alpha * torch.sign(x.grad), min=x0 - EPS, max=x0 + EPS).clamp(0, 1)
    return x.detach()


def hand_gradient(model: nn.Module, batch: Batch, v: Mapping[str, float], seed: int = 0) -> Tensor:
    """grad of the mean loss of one batch under PGD with a random start, by loss.backward()."""
    twin = copy.deepcopy(model).eval()
    draws = rng.generator(seed, batch.epoch, batch.number, "start")
    start = (batch.x + torch.empty_like(batch.x).uniform_(-EPS, EPS, generator=draws)).clamp(0, 1)
    steps = int(v["steps"])
    x = hand_attack(twin, batch.x, batch.y, start, v["alpha"], steps) if steps else batch.x
    twin.train().zero_grad()
    F.cross_entropy(twin(x), batch.y).backward()
    return flat(p.grad for p in twin.parameters())


def hand_terminal(model: nn.Module, x: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """grad of the mean loss of held-out data under PGD-20 with step size eps/4, in eval mode."""
    twin = copy.deepcopy(model).eval()
    draws = rng.generator(seed, "terminal", 0)
    start = (x + torch.empty_like(x).uniform_(-EPS, EPS, generator=draws)).clamp(0, 1)
    x = hand_attack(twin, x, y, start, EPS / 4, 20)
    twin.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    return flat(p.grad for p in twin.parameters())


def brute_force(
    model: nn.Module,
    batches: list[Batch],
    u: Control,
    gamma: float,
    form: str,
    grid: Candidates = GRID,
    scale: float = 1.0,
    phi: Tensor | None = None,
) -> tuple[float, Control]:
    """(14) as it is written: C and the maximiser."""
    value = {}
    for v in [*candidates(grid), u]:
        g = torch.stack([hand_gradient(model, b, v) for b in batches]).mean(0)
        reward = g @ g if form == "norm" else g @ phi
        value[v] = scale * float(reward) - gamma * (v["steps"] + 1)
    best = max(value, key=value.__getitem__)
    return value[best] - value[u], best


def probe(n: int = 12, m: int = 3, seed: int = 1) -> list[Batch]:
    return probe_batches(*samples(n, seed=seed), m)


def terminal(n: int = 9) -> AdversarialLoss:
    return AdversarialLoss(*samples(n, seed=5), BALL)


def surface(u: Control = INSIDE, **options: Any) -> Surface:
    given = {"batches": probe(), "grid": GRID, "terminal": terminal(), "method": PgdAT(), "model": mlp()}
    given |= options
    driver = Driver(given.pop("model"), given.pop("method"), BALL)
    return score(driver, given.pop("batches"), u, given.pop("grid"), **given)


usual = functools.cache(surface)  # of a control alone


# -------------------------------------------------------------------------------- (14) itself, by enumeration


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("u", [NONE, INSIDE, OUTSIDE, Control(alpha=0.3, steps=3)])
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 1e-2, 0.3])
def test_c_is_that_of_the_enumerated_set(form: str, u: Control, gamma: float) -> None:
    phi = hand_terminal(mlp(), *samples(9, seed=5))
    expected, best = brute_force(mlp(), probe(), u, gamma, form, scale=2.5, phi=phi)
    gap = usual(u, scale=2.5).gap(u, gamma, form)
    assert gap.value == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert gap.maximiser == best
    assert gap.value == pytest.approx(
        gap.reward[0] - gap.reward[1] - gap.cost[0] + gap.cost[1], rel=1e-9, abs=1e-15
    )
    assert gap.cost == pytest.approx((gamma * (best["steps"] + 1), gamma * (u["steps"] + 1)), rel=1e-14)


def from_criterion(u: Control = INSIDE, gamma: float | str = 1e-3, **options: Any) -> Gap:
    """`criterion` on the probe and G of `surface`."""
    same_set = {"eps": EPS, "alphas": (0.05, 0.3), "max_steps": 3, "batches": 3}
    return criterion(mlp(), *samples(12, seed=1), u, gamma=gamma, **(same_set | options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("held_out", [samples(9, seed=5), None], ids=["held-out data", "the probe itself"])
def test_the_function_for_the_user_s_loop_gives_the_same(
    form: str, held_out: tuple[Tensor, Tensor] | None
) -> None:
    phi = hand_terminal(mlp(), *(samples(12, seed=1) if held_out is None else held_out))
    expected, best = brute_force(mlp(), probe(), INSIDE, 1e-3, form, phi=phi)
    gap = from_criterion(gamma="1/1000", form=form, held_out=held_out)
    assert gap.value == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert gap.maximiser == best


def test_c_of_a_logistic_model_is_that_of_its_closed_form() -> None:
    """One sample: ||g||^2 = 2 (1 - p_y)^2 (||x'||^2 + 1), x' = x + min(alpha K, eps) sign(w_1 - w_0)."""
    w = torch.tensor([[0.3, -0.7, 0.2, 0.5], [1.1, 0.4, -0.6, 0.9]], dtype=torch.float64)
    b = torch.tensor([0.2, -0.3], dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(w)
        model[1].bias.copy_(b)
    x = torch.tensor([0.4, 0.5, 0.6, 0.3], dtype=torch.float64)

    def squared(d: float) -> float:
        moved = [float(xi) + d * math.copysign(1, float(w[1, i] - w[0, i])) for i, xi in enumerate(x)]
        z = [sum(float(w[c, i]) * m for i, m in enumerate(moved)) + float(b[c]) for c in (0, 1)]
        p = 1 / (1 + math.exp(z[1] - z[0]))
        return 2 * (1 - p) ** 2 * (sum(m * m for m in moved) + 1)

    gamma, alphas = 0.02, (0.03, 0.07, 0.4)
    value = {
        v: squared(min(v["alpha"] * v["steps"], EPS)) - gamma * (v["steps"] + 1)
        for v in candidates(Candidates.of(alphas, 4))
    }
    for u in value:
        gap = criterion(
            model, x.view(1, 1, 2, 2), torch.tensor([0]), u, eps=EPS, gamma=gamma, alphas=alphas, max_steps=4,
            batches=1, method=PgdAT(random_start=False),
        )  # fmt: skip
        assert gap.value == pytest.approx(max(value.values()) - value[u], rel=1e-12, abs=1e-15)
        assert (gap.value == 0) == (value[u] == max(value.values()))
    assert max(value, key=value.__getitem__) == Control(alpha=0.4, steps=1)  # K = 1 reaches the corner


# ---------------------------------------------------------------------------------------- what C must satisfy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [0.0, 1e-3, 0.3])
def test_c_is_zero_exactly_where_the_control_is_the_maximiser(form: str, gamma: float) -> None:
    found = usual()
    best = found.gap(INSIDE, gamma, form).maximiser
    for v in found.controls:
        gap = usual(v).gap(v, gamma, form)
        assert (gap.value == 0) == (v == best)
        assert gap.maximiser == best
    gap = usual(best).gap(best, gamma, form)
    assert gap.value == 0.0
    assert gap.reward[0] == gap.reward[1]
    assert gap.cost[0] == gap.cost[1]


def test_where_the_control_ties_with_the_best_it_is_its_own_maximiser() -> None:
    flat_surface = Surface((NONE, INSIDE, OUTSIDE), np.ones(3), np.ones((3, 2, 2)), None, 1.0, 0)
    for u in flat_surface.controls:
        gap = flat_surface.gap(u, 0.1)
        assert gap.maximiser == u
        assert gap.value == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_a_high_price_makes_no_attack_the_maximiser(form: str) -> None:
    found = usual()
    for gamma in (1e2, 1e9):
        gap = found.gap(INSIDE, gamma, form)
        assert gap.maximiser == NONE
        assert gap.value == pytest.approx(gamma * INSIDE["steps"], rel=1e-1)
    assert found.gap(INSIDE, 0.0, form).maximiser["steps"] > 0


@pytest.mark.parametrize("form", FORMS)
def test_the_maximiser_spends_no_more_as_the_price_rises(form: str) -> None:
    found = usual()
    spent = [found.gap(INSIDE, g, form).maximiser["steps"] for g in np.geomspace(1e-6, 10, 40)]
    assert spent == sorted(spent, reverse=True)


ALPHAS = st.lists(st.floats(1e-3, 2 * EPS), min_size=1, max_size=3, unique=True)
GAMMAS = st.floats(0, 1, allow_nan=False)


@seeded
@given(ALPHAS, ALPHAS, st.integers(1, 3), st.integers(0, 2), GAMMAS, st.sampled_from(FORMS))
def test_adding_candidates_never_lowers_c(
    alphas: list[float], more: list[float], steps: int, longer: int, gamma: float, form: str
) -> None:
    small = surface(OUTSIDE, grid=Candidates.of(tuple(alphas), steps))
    large = surface(OUTSIDE, grid=Candidates.of((*alphas, *more), steps + longer))
    assert set(small.controls) <= set(large.controls)
    assert large.gap(OUTSIDE, gamma, form).value >= small.gap(OUTSIDE, gamma, form).value


@seeded
@given(ALPHAS, st.integers(1, 4), st.floats(0, 0.5), st.integers(0, 6), GAMMAS, st.sampled_from(FORMS))
def test_c_is_never_negative_and_u_is_always_among_the_candidates(
    alphas: list[float], steps: int, alpha: float, k: int, gamma: float, form: str
) -> None:
    u = Control(alpha=alpha, steps=k)
    found = surface(u, grid=Candidates.of(tuple(alphas), steps))
    gap = found.gap(u, gamma, form)
    assert gap.value >= 0
    assert found.controls[0] == u
    assert set(found.controls) == {u, *candidates(Candidates.of(tuple(alphas), steps))}
    assert len(set(found.controls)) == len(found.controls)


@pytest.mark.parametrize("form", FORMS)
def test_the_scale_multiplies_the_reward_only(form: str) -> None:
    one, three = (usual(OUTSIDE, scale=s) for s in (1.0, 3.0))
    a, b = (s.gap(OUTSIDE, 0.0, form) for s in (one, three))
    assert b.reward == pytest.approx([3 * r for r in a.reward], rel=1e-14)
    assert (b.value, b.unbiased) == pytest.approx((3 * a.value, 3 * a.unbiased), rel=1e-12)
    priced, tripled = one.gap(OUTSIDE, 0.01, form), three.gap(OUTSIDE, 0.03, form)
    assert tripled.maximiser == priced.maximiser
    assert tripled.value == pytest.approx(3 * priced.value, rel=1e-12)
    assert three.gap(OUTSIDE, 0.01, form).cost[1] == priced.cost[1]


# -------------------------------------------------------------------------------- the sweep and what it costs


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("build", [mlp, cnn_bn])
def test_the_sweep_equals_running_every_candidate_by_itself(
    build: Callable[[], nn.Module], mode: str
) -> None:
    shape = SHAPE if build is cnn_bn else (1, 2, 2)
    batches, phi = (
        probe_batches(*samples(6, shape, seed=1), 2),
        AdversarialLoss(*samples(4, shape, seed=5), BALL),
    )
    found = surface(model=build(), method=PgdAT(attack_mode=mode), batches=batches, terminal=phi)
    driver = Driver(build(), PgdAT(attack_mode=mode), BALL)
    p = flat(phi.gradient(driver)[: len(driver.parameters)])
    assert set(found.controls) == set(candidates())
    for v, n, gram, costate in zip(found.controls, found.evaluations, found.gram, found.costate, strict=True):
        _, cost, fields = score_one(driver, batches, v, 0.0, Meter())
        g = torch.stack([flat(field.gradients) for field in fields])
        np.testing.assert_allclose(gram, g @ g.T, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(costate, g @ p, rtol=1e-12, atol=1e-15)
        assert n == cost == v["steps"] + 1


def test_gram_and_costate_are_the_inner_products_of_the_batch_gradients() -> None:
    found, model = usual(), mlp()
    phi = hand_terminal(model, *samples(9, seed=5))
    for i, v in enumerate(found.controls):
        g = torch.stack([hand_gradient(model, b, v) for b in probe()])
        np.testing.assert_allclose(found.gram[i], g @ g.T, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(found.costate[i], g @ phi, rtol=1e-9, atol=1e-15)


def counted(model: nn.Module) -> list[int]:
    seen: list[int] = []
    model.register_forward_hook(lambda module, arguments, output: seen.append(len(arguments[0])))
    return seen


@pytest.mark.parametrize("build", [mlp, cnn_bn])
@pytest.mark.parametrize("with_terminal", [False, True])
def test_a_sweep_costs_twice_k_max_for_each_step_size(
    build: Callable[[], nn.Module], with_terminal: bool
) -> None:
    shape, model = SHAPE if build is cnn_bn else (1, 2, 2), build()
    seen, u, grid = counted(model), Control(alpha=0.07, steps=4), Candidates.of((0.02, 0.05, 0.3), 3)
    phi = AdversarialLoss(*samples(5, shape), BALL, steps=7) if with_terminal else None
    found = surface(u, model=model, batches=probe_batches(*samples(6, shape), 2), grid=grid, terminal=phi)
    sweep, no_attack, under_u, once = 6 * 3 * (3 + 3), 6, 6 * (4 + 1), 5 * (7 + 1) * with_terminal
    assert found.spent == sum(seen) == sweep + no_attack + under_u + once
    assert found.evaluations.tolist() == [v["steps"] + 1 for v in found.controls]


def test_the_declared_and_the_counted_cost_agree_with_a_clean_term() -> None:
    found = surface(OUTSIDE, method=PgdAT(clean_weight=0.5))
    assert found.evaluations.tolist() == [v["steps"] + 2 for v in found.controls]


# ---------------------------------------------------------------------------------- estimates and their noise


def population(form: str, members: Iterable[int], count: int) -> tuple[float, float]:
    """(plain, unbiased) estimate of s q at OUTSIDE from those members of a tiny population."""
    x, y = samples(3, seed=11)
    index = list(members)
    batches, method = probe_batches(x[index], y[index], count), PgdAT(random_start=False)
    found = surface(OUTSIDE, batches=batches, method=method, grid=Candidates.of((0.1,), 1))
    return found.reward(form)[0], found.reward(form, unbiased=True)[0]


def per_sample(n: int, u: Control = OUTSIDE) -> Tensor:
    x, y = samples(n, seed=11)
    driver = Driver(mlp(), PgdAT(random_start=False), BALL)
    return torch.stack([flat(driver.field(b, u).gradients) for b in probe_batches(x, y, n)])


def test_with_batches_of_one_sample_the_unbiased_estimate_is_the_per_sample_formula() -> None:
    g = per_sample(7)
    mean, n = g.mean(0), len(g)
    expected = (n**2 * mean @ mean - (g * g).sum()) / (n * (n - 1))
    x, y = samples(7, seed=11)
    found = surface(OUTSIDE, batches=probe_batches(x, y, 7), method=PgdAT(random_start=False), scale=2.0)
    assert found.reward("norm", unbiased=True)[0] == pytest.approx(2 * float(expected), rel=1e-12)
    assert found.reward("norm")[0] == pytest.approx(2 * float(mean @ mean), rel=1e-12)


def test_the_unbiased_estimate_is_unbiased_and_the_plain_one_too_large_by_the_variance_over_n() -> None:
    """All 81 probes of four draws from a population of three, in two batches of two."""
    g = per_sample(3)
    mean = g.mean(0)
    squared, variance = float(mean @ mean), float((g - mean).square().sum() / 3)
    found = [population("norm", probe, 2) for probe in itertools.product(range(3), repeat=4)]
    plain, unbiased = (sum(column) / 81 for column in zip(*found, strict=True))
    assert unbiased == pytest.approx(squared, rel=1e-10)
    assert plain == pytest.approx(squared + variance / 4, rel=1e-10)
    assert variance / 4 > 0.01 * squared


def test_the_costate_estimate_is_unbiased_as_it_is() -> None:
    phi = hand_terminal(mlp(), *samples(9, seed=5))
    found = [population("costate", probe, 1) for probe in itertools.product(range(3), repeat=2)]
    assert sum(p for p, _ in found) / 9 == pytest.approx(float(per_sample(3).mean(0) @ phi), rel=1e-10)
    assert all(p == u for p, u in found)


def by_hand(found: Surface, form: str, members: list[int], unbiased: bool) -> np.ndarray:
    """s q(v) from the raw products, in loops."""
    value = []
    for gram, costate in zip(found.gram, found.costate, strict=True):
        pairs = [(i, j) for i in members for j in members if not (unbiased and i == j and len(members) > 1)]
        if form == "norm":
            value.append(sum(gram[i, j] for i, j in pairs) / len(pairs))
        else:
            value.append(sum(costate[i] for i in members) / len(members))
    return found.scale * np.array(value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [2, 3, 4, 6])
@pytest.mark.parametrize("gamma", [0.0, 5e-3])
def test_all_the_estimates_follow_from_the_products_by_hand(form: str, m: int, gamma: float) -> None:
    found = surface(OUTSIDE, batches=probe(12, m), scale=1.5)
    u, price, every = found.controls.index(OUTSIDE), gamma * found.evaluations, list(range(m))
    gap = found.gap(OUTSIDE, gamma, form)

    plain = by_hand(found, form, every, False) - price
    best = int(np.argmax(plain))
    assert gap.value == pytest.approx(plain[best] - plain[u], rel=1e-10, abs=1e-15)

    unbiased = by_hand(found, form, every, True) - price
    assert gap.unbiased == pytest.approx(unbiased.max() - unbiased[u], rel=1e-10, abs=1e-15)

    crossed = []
    for choose, judge in ((every[0::2], every[1::2]), (every[1::2], every[0::2])):
        chosen = int(np.argmax(by_hand(found, form, choose, False) - price))
        judged = by_hand(found, form, judge, True) - price
        crossed.append(judged[chosen] - judged[u])
    halves_have_two = form == "costate" or m >= 4
    expected = pytest.approx(sum(crossed) / 2, rel=1e-10, abs=1e-15) if halves_have_two else None
    assert gap.cross_fitted == expected

    left_out = [by_hand(found, form, [i for i in every if i != k], False) - price for k in every]
    values = [w[best] - w[u] for w in left_out]
    assert gap.jackknife == pytest.approx(values, rel=1e-10, abs=1e-15)
    mean = sum(values) / m
    error = math.sqrt((m - 1) / m * sum((v - mean) ** 2 for v in values))
    half = stats.t.ppf(0.975, m - 1) * error
    low, high = max(0.0, gap.value - half), gap.value + half  # C >= 0
    assert gap.interval == pytest.approx((low, high), rel=1e-9, abs=1e-15)


def test_the_jackknife_of_a_mean_is_its_student_interval() -> None:
    values = [0.3, 1.2, -0.4, 2.2, 0.9]
    mean = sum(values) / 5
    without = [(5 * mean - v) / 4 for v in values]
    expected = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert interval(mean, without) == pytest.approx(expected, rel=1e-12)
    assert interval(mean, without, least=0.0) == pytest.approx((0.0, expected[1]), rel=1e-12)
    assert expected[0] < 0
    assert interval(mean, ()) is None
    assert interval(mean, (1.0,)) is None


def drawn(means: np.ndarray, noise: list[float], m: int, seed: int, dimension: int = 40) -> Surface:
    """A surface of gradients that are means (V, dimension) and independent noise on every batch."""
    draws = np.random.default_rng(seed).normal(size=(len(means), m, dimension))
    g = means[:, None] + np.array(noise)[:, None, None] * draws
    phi = np.ones(dimension) / dimension**0.5
    controls = tuple(Control(alpha=0.1, steps=k) for k in range(len(means)))
    return Surface(controls, np.arange(len(means)) + 1.0, g @ g.transpose(0, 2, 1), g @ phi, 1.0, 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("lead", [0.0, 3.0])
def test_the_cross_fitted_gap_is_the_true_one_on_average_or_no_number(form: str, m: int, lead: float) -> None:
    """Candidates that all tie are worth nothing, however noisy; one that leads clearly is worth its lead."""
    means = np.zeros((4, 40)) + 1 / 40**0.5
    means[-1] *= (1 + lead) ** 0.5 if form == "norm" else 1 + lead
    noise, u = [0.1, 0.2, 0.05, 0.1 if lead else 0.4], Control(alpha=0.1, steps=0)
    gaps = [drawn(means, noise, m, seed).gap(u, 0.0, form) for seed in range(300)]
    found = [gap.cross_fitted for gap in gaps]
    if form == "norm" and m < 4:
        assert set(found) == {None}
        return
    error = np.std(found, ddof=1) / 300**0.5
    assert abs(np.mean(found) - lead) < 4 * error
    assert error < 0.1
    if not lead:
        assert np.mean([gap.value for gap in gaps]) > 10 * error  # the plain maximum over noise is biased
    assert all(gap.interval[0] >= 0 for gap in gaps if gap.interval)


@pytest.mark.parametrize("lead", [0.0, 0.01, 0.03])
def test_the_interval_covers_the_true_gap_also_where_noise_hides_it(lead: float) -> None:
    """A rival that is better by less than the noise: u is then often the best, and 0 is not certain."""
    means = np.zeros((2, 40)) + 1 / 40**0.5
    means[1] *= 1 + lead
    u = Control(alpha=0.1, steps=0)
    found = [drawn(means, [0.05, 0.05], 8, seed).gap(u, 0.0, "costate") for seed in range(400)]
    bounds = [gap.interval or (math.nan, math.nan) for gap in found]
    assert 20 < sum(gap.value == 0 for gap in found) < 380
    assert min(low for low, _ in bounds) == 0
    covered = sum(low <= lead <= high for low, high in bounds) / 400
    assert covered > 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5


def test_where_u_is_the_best_the_interval_ends_with_what_another_may_gain() -> None:
    found = usual(NONE)
    gap = found.gap(NONE, 0.1)
    assert gap.maximiser == NONE
    price, every = 0.1 * found.evaluations, list(range(found.batches))
    value = by_hand(found, "norm", every, False) - price
    without = [by_hand(found, "norm", [i for i in every if i != k], False) - price for k in every]
    highest = 0.0
    for v in range(len(found.controls)):
        jackknife = [float(w[v] - w[0]) for w in without]
        highest = max(highest, interval(float(value[v] - value[0]), jackknife)[1])
    assert gap.interval == pytest.approx((0.0, highest), rel=1e-9)
    assert highest > 0


def test_an_unbiased_squared_norm_needs_two_batches() -> None:
    found = usual()
    with pytest.raises(ValueError, match="needs at least two probe batches, got 1"):
        found.reward("norm", [0], unbiased=True)
    assert (found.reward("costate", [0], unbiased=True) == found.reward("costate", [0])).all()


@pytest.mark.parametrize(
    ("size", "probe", "count"),
    [(64, 512, 8), (16, 512, 16), (128, 512, 4), (129, 512, 4), (171, 512, 4), (256, 512, 4), (4096, 512, 4),
     (256, 2048, 8), (256, 9, 4), (256, 5, 2), (256, 2, 2)],
)  # fmt: skip
def test_the_default_probe_has_two_batches_in_each_half_whatever_the_batch_size(
    size: int, probe: int, count: int
) -> None:
    settings = SimpleNamespace(batch_size=size, probe=probe, augmentation=None)
    training = split(2048, (1, 2, 2))
    unused: Any = None
    run = ScheduleRun(
        experiment=SimpleNamespace(training=training),  # type: ignore[arg-type]
        settings=settings,  # type: ignore[arg-type]
        text="",
        controller=unused,
        seed=0,
        directory=unused,
        candidates=unused,
        gamma=unused,
    )
    found = run.probe(3)
    assert [len(b.x) for b in found] == [probe // count] * count


def test_a_terminal_cost_of_the_probe_itself_leaves_no_unbiased_number() -> None:
    shared, apart = (from_criterion(form="costate", held_out=h) for h in (None, samples(9, seed=5)))
    assert (shared.unbiased, shared.cross_fitted) == (None, None)
    assert apart.unbiased is not None
    assert apart.cross_fitted is not None


def test_a_probe_in_one_batch_has_no_estimates_of_its_noise() -> None:
    gap = surface(batches=probe(12, 1)).gap(INSIDE, 1e-3)
    assert (gap.unbiased, gap.cross_fitted, gap.jackknife, gap.interval) == (None, None, (), None)
    assert gap.value > 0


def test_the_cross_fitted_value_may_be_negative_where_the_plain_one_is_not() -> None:
    """Two candidates, each better on one half only: the choice of one half fails on the other."""
    gram = np.zeros((2, 4, 4))
    for v in (0, 1):
        for i in range(4):
            gram[v, i, i] = 5.0 if i % 2 == v else 1.0
            gram[v, i, (i + 2) % 4] = gram[v, i, i]
    found = Surface((NONE, INSIDE), np.ones(2), gram, None, 1.0, 0)
    gap = found.gap(NONE, 0.0)
    assert gap.value == 0.0
    assert gap.cross_fitted == pytest.approx((0.0 + (1.0 - 5.0)) / 2)


def test_the_probe_is_split_in_order_into_equal_batches_with_numbers_of_their_own() -> None:
    x, y = samples(11)
    found = probe_batches(x, y, 3, epoch=6)
    assert same([b.x for b in found], [x[0:3], x[3:6], x[6:9]])
    assert same([b.y for b in found], [y[0:3], y[3:6], y[6:9]])
    assert [(b.epoch, b.number) for b in found] == [(6, -1), (6, -2), (6, -3)]


# ------------------------------------------------------------------------------------------- the costate form


def frozen_terminal(phi: AdversarialLoss, model: nn.Module, shift: float, direction: Tensor) -> float:
    """Phi at (theta, r) + shift * direction with the adversary of (theta, r), in eval mode."""
    twin = copy.deepcopy(model).eval()
    draws = rng.generator(phi.seed, "terminal", 0)
    start = (phi.x + torch.empty_like(phi.x).uniform_(-EPS, EPS, generator=draws)).clamp(0, 1)
    x = hand_attack(twin, phi.x, phi.y, start, EPS / 4, phi.steps)
    z = [*twin.parameters(), *(b for b in twin.buffers() if b.is_floating_point())]
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(z) + shift * direction, z)
        return F.cross_entropy(twin(x), phi.y).item()


@pytest.mark.parametrize("build", [mlp, cnn_bn])
def test_the_gradient_of_the_terminal_cost_is_that_of_finite_differences(
    build: Callable[[], nn.Module],
) -> None:
    shape = SHAPE if build is cnn_bn else (1, 2, 2)
    model, phi = build(), AdversarialLoss(*samples(6, shape, seed=5), BALL)
    gradient = flat(phi.gradient(Driver(model, PgdAT(), BALL)))
    for seed in range(3):
        with rng.scoped(seed, "direction"):
            direction = torch.randn_like(gradient)
        h = 1e-6 / float(direction.norm())
        slope = (frozen_terminal(phi, model, h, direction) - frozen_terminal(phi, model, -h, direction)) / (
            2 * h
        )
        assert float(gradient @ direction) == pytest.approx(slope, rel=1e-5)


def test_the_terminal_cost_is_the_mean_over_all_samples_when_they_are_taken_in_parts() -> None:
    x, y = samples(300, seed=5)  # more than the 256 of one part
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    y = y % 2
    found = flat(AdversarialLoss(x, y, BALL).gradient(Driver(linear, PgdAT(), BALL)))
    w = linear[1].weight.detach()
    away = torch.where(y[:, None] == 0, w[1] - w[0], w[0] - w[1]).sign().view(-1, 1, 2, 2)
    F.cross_entropy(linear((x + EPS * away).clamp(0, 1)), y).backward()  # the worst corner, in closed form
    torch.testing.assert_close(found, flat(p.grad for p in linear.parameters()), rtol=1e-12, atol=1e-14)


def test_the_terminal_cost_is_taken_once_however_many_candidates_there_are() -> None:
    for grid in (Candidates.of((0.1,), 1), Candidates.of((0.01, 0.1, 0.3), 5)):
        model = mlp()
        seen = counted(model)
        with_phi = surface(model=model, grid=grid, terminal=terminal(9))
        of_phi = [n for n in seen if n == 9]  # the probe's batches have 4 samples
        assert len(of_phi) == 20 + 1
        assert with_phi.spent - surface(grid=grid, terminal=None).spent == 9 * 21


def test_norm_and_costate_agree_where_the_terminal_gradient_is_that_of_the_candidate() -> None:
    """A two-class linear model has one worst corner, which every attack with alpha K >= 2 eps reaches."""
    with rng.scoped(0, "linear"):
        linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    x, y = samples(8, classes=2)
    phi = AdversarialLoss(x, y, BALL)
    found = surface(
        OUTSIDE,
        model=linear,
        batches=probe_batches(x, y, 1),
        terminal=phi,
        grid=Candidates.of((0.05, 0.4), 8),
    )
    corner = np.array([v["alpha"] * v["steps"] >= 2 * EPS - 1e-12 for v in found.controls])
    norm, costate = found.reward("norm"), found.reward("costate")
    np.testing.assert_allclose(norm[corner], costate[corner], rtol=1e-12)
    assert corner.sum() == 8 + 1 + 1  # every K at 0.4, K = 8 at 0.05, and u
    assert (np.abs(norm - costate)[~corner] > 1e-6).all()


def test_the_terminal_cost_leaves_no_trace_and_noise_in_eval_mode_is_drawn_from_its_seed() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * torch.randn_like(x)

    model = nn.Sequential(*mlp(), Noise()).train()
    driver, before = Driver(model, PgdAT(), BALL), trace(model)
    first = terminal().gradient(driver)
    torch.manual_seed(99)
    assert same(terminal().gradient(driver), first)
    torch.random.set_rng_state(before["random"])
    assert same(trace(model), before)
    assert not same(AdversarialLoss(*samples(9, seed=5), BALL, seed=1).gradient(driver), first)


def test_a_terminal_gradient_that_is_not_finite_is_reported() -> None:
    model = cnn_bn()
    model[1].running_var.fill_(-1.0)  # seen in eval mode only
    with pytest.raises(NonFiniteError):
        AdversarialLoss(*samples(3, SHAPE), BALL, steps=0).gradient(Driver(model, PgdAT(), BALL))


# ------------------------------------------------------------------------------------------ surfaces and JSON


@pytest.mark.parametrize("with_terminal", [True, False])
def test_a_surface_comes_back_from_json(with_terminal: bool) -> None:
    found = surface(OUTSIDE, scale=10 / 3, terminal=terminal() if with_terminal else None)
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Surface.from_json(json.loads(text))
    assert (again.controls, again.scale, again.spent) == (found.controls, found.scale, found.spent)
    assert again.evaluations.tolist() == found.evaluations.tolist()
    np.testing.assert_allclose(again.gram, found.gram, rtol=1e-6)
    if with_terminal:
        np.testing.assert_allclose(again.costate, found.costate, rtol=1e-6)
    else:
        assert again.costate is None
    assert json.dumps(again.to_json()) == text
    for form in FORMS[: 1 + with_terminal]:
        a, b = again.gap(OUTSIDE, 1e-3, form), found.gap(OUTSIDE, 1e-3, form)
        assert a.maximiser == b.maximiser
        assert a.value == pytest.approx(b.value, abs=1e-6 * b.reward[0])
        assert a.interval == pytest.approx(b.interval, abs=1e-5 * b.reward[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [0.0, 2e-3, 0.1])
def test_c_at_another_gamma_follows_from_the_surface_without_a_run(form: str, gamma: float) -> None:
    new = from_criterion(OUTSIDE, gamma, form=form, held_out=samples(9, seed=5))
    found = surface(OUTSIDE, gamma=7.0).gap(OUTSIDE, gamma, form)
    extra = new.spent if form == "norm" else found.spent  # one surface holds both forms, with grad Phi
    assert replace(found, spent=extra) == new


def test_a_gap_is_plain_data() -> None:
    gap = usual().gap(INSIDE, 1e-3)
    found = json.loads(json.dumps(gap.to_json(), allow_nan=False))
    assert found["value"] == gap.value
    assert Control(**found["control"]) == INSIDE
    assert Control(**found["maximiser"]) == gap.maximiser
    assert found["interval"] == list(gap.interval)
    assert found["jackknife"] == list(gap.jackknife)
    assert set(found) == set(Gap.__dataclass_fields__) | {"interval"}


def test_a_control_that_was_not_scored_has_no_gap() -> None:
    with pytest.raises(ValueError, match=r"Control\(alpha=0.11, steps=5\) is not among the 7 candidates"):
        usual(INSIDE).gap(OUTSIDE, 0.1)


@pytest.mark.parametrize("gamma", [-1, math.nan, math.inf])
def test_a_surface_refuses_a_price_that_is_none(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be"):
        usual().gap(INSIDE, gamma)


def test_the_costate_form_needs_a_terminal_cost_and_unknown_forms_are_named() -> None:
    found = surface(terminal=None)
    with pytest.raises(ValueError, match="form 'costate' needs a terminal cost: give held-out data"):
        found.gap(INSIDE, 0.1, "costate")
    with pytest.raises(ValueError, match="form must be one of norm, costate, got 'l2'"):
        found.gap(INSIDE, 0.1, "l2")


# --------------------------------------------------------------------------------------- the user's optimiser


SGDS = {"plain": {}, "momentum": {"momentum": 0.9}, "Nesterov": {"momentum": 0.8, "nesterov": True},
        "dampened": {"momentum": 0.9, "dampening": 0.4}, "dampening alone": {"dampening": 0.4}}  # fmt: skip


def displaced(**sgd: Any) -> float:
    """How far torch's SGD moves theta in the end per unit of time, on a gradient of 1."""
    theta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer, places = torch.optim.SGD([theta], lr=0.01, **sgd), []
    for _ in range(400):
        theta.grad = torch.ones_like(theta)
        optimizer.step()
        places.append(theta.item())
    return (places[-2] - places[-1]) / 0.01


@pytest.mark.parametrize("sgd", SGDS.values(), ids=SGDS)
def test_the_scale_is_how_far_torchs_sgd_moves(sgd: dict[str, Any]) -> None:
    model, (x, y) = mlp(), samples(12, seed=1)
    given = {"eps": EPS, "gamma": 1e-3, "batches": 3, "alphas": (0.05, 0.3), "max_steps": 3}
    by_scale = criterion(model, x, y, INSIDE, **given, scale=displaced(**sgd))
    found = criterion(model, x, y, INSIDE, **given, optimizer=torch.optim.SGD(model.parameters(), 0.3, **sgd))
    assert found.maximiser == by_scale.maximiser
    assert (found.value, *found.reward) == pytest.approx((by_scale.value, *by_scale.reward), rel=1e-9)
    assert found.dropped == ()


def test_with_momentum_the_advice_is_that_of_scale_10_and_not_that_of_plain_sgd() -> None:
    model, (x, y), gamma = mlp(), samples(12, seed=1), 0.04
    heavy = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    plain, ten, exact, read = (
        criterion(model, x, y, INSIDE, eps=EPS, gamma=gamma, batches=3, alphas=(0.02,), max_steps=10, **how)
        for how in ({}, {"scale": 10.0}, {"scale": 1 / (1 - 0.9)}, {"optimizer": heavy})
    )
    assert read == exact
    assert read.value == pytest.approx(ten.value, rel=1e-12)
    assert read.maximiser == ten.maximiser
    assert read.maximiser["steps"] > plain.maximiser["steps"]


def test_the_rate_counts_against_its_mean_over_the_run() -> None:
    model, (x, y) = mlp(), samples(12, seed=1)
    given = {"eps": EPS, "gamma": 1e-3, "batches": 3, "alphas": (0.05, 0.3), "max_steps": 3}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    decayed = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    decayed.step()
    alone = criterion(model, x, y, INSIDE, **given, optimizer=optimizer)
    assert alone.dropped == ("how the rate changes over the run (give mean_rate)",)
    assert alone.reward == criterion(model, x, y, INSIDE, **given, scale=2).reward
    found = criterion(model, x, y, INSIDE, **given, optimizer=optimizer, mean_rate="1/25")
    assert found.dropped == ()
    expected = criterion(model, x, y, INSIDE, **given, scale=2 * 0.01 / 0.04)
    assert (found.value, *found.reward) == pytest.approx((expected.value, *expected.reward), rel=1e-12)


def test_the_rate_between_the_updates_of_a_step_is_that_of_the_optimizer() -> None:
    model, (x, y) = mlp(), samples(12, seed=1)
    u, given = {"alpha": 0.1, "steps": 3}, {"eps": EPS, "gamma": 0.0, "method": "free", "batches": 2}
    found = criterion(
        model, x, y, u, **given, max_steps=3, optimizer=torch.optim.SGD(model.parameters(), 0.5)
    )
    driver, batches = Driver(mlp(), build("free"), BALL), probe_batches(x, y, 2)
    g = torch.stack([flat(driver.field(b, Control(**u), 0.5).gradients) for b in batches]).mean(0)
    assert found.reward[1] == pytest.approx(float(g @ g), rel=1e-12)
    assert found.reward[1] != criterion(model, x, y, u, **given, max_steps=3).reward[1]


def halves(model: nn.Module, **second: Any) -> list[dict[str, Any]]:
    *first, last = model.parameters()
    return [{"params": first}, {"params": [last], **second}]


DECAY, PARTS = (
    "weight decay",
    "groups of parameters with another rate or momentum (those of the largest are taken)",
)


@pytest.mark.parametrize(
    ("make", "form", "names", "scale"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, weight_decay=1e-3), "norm", (DECAY,), 1),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, weight_decay=1e-3), "costate", (), 1),
        (lambda m: torch.optim.SGD(halves(m, weight_decay=0.1), 0.1, 0.5), "norm", (DECAY,), 2),
        (lambda m: torch.optim.SGD(halves(m, momentum=0.9), 0.1, 0.5), "norm", (PARTS,), 2),
        (lambda m: torch.optim.SGD(halves(m, lr=0.9), 0.1, 0.5), "norm", (PARTS,), 2),
        (lambda m: torch.optim.SGD(m[1].parameters(), 0.1), "norm",
         ("that the optimizer holds some of the parameters only",), 1),
        (lambda m: torch.optim.SGD(m.parameters(), 0.1, maximize=True), "norm",
         ("maximize (the loss is taken to be descended)",), 1),
    ],
)  # fmt: skip
def test_what_the_number_does_not_cover_is_named(
    make: Callable[[nn.Module], Any], form: str, names: tuple[str, ...], scale: float
) -> None:
    model, (x, y) = mlp(), samples(12, seed=1)
    given = USER | {"form": form, "held_out": samples(9, seed=5)}
    gap = criterion(model, x, y, INSIDE, **given, optimizer=make(model))
    assert gap.dropped == names
    assert gap.reward == criterion(model, x, y, INSIDE, **given, scale=scale).reward
    assert all(name in str(gap) for name in names)
    assert json.loads(json.dumps(gap.to_json()))["dropped"] == list(names)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.LBFGS])
def test_an_optimizer_that_is_not_sgd_is_named_with_a_warning(kind: Any) -> None:
    model, (x, y) = mlp(), samples(12, seed=1)
    name = f"the steps of {kind.__name__} "
    with pytest.warns(UserWarning, match=f"C leaves out: {name}"):
        gap = criterion(model, x, y, INSIDE, **USER, optimizer=kind(model.parameters(), 1e-3))
    assert gap.dropped[0].startswith(name)
    assert f"leaves out: {name}" in str(gap)
    assert gap.value == criterion(model, x, y, INSIDE, **USER).value


def test_a_gap_says_itself_in_one_line() -> None:
    found = usual()
    gap = found.gap(INSIDE, 0.0)
    knobs = f"alpha={gap.maximiser['alpha']:.3g}, steps={gap.maximiser['steps']}"
    low, high = gap.interval
    assert str(gap) == f"C = {gap.value:.3g} [{low:.3g}, {high:.3g}] at alpha=0.05, steps=2, better: {knobs}"
    assert str(replace(found, dropped=("a", "b")).gap(NONE, 99.0)) == (
        "C = 0 [0, 0] at alpha=0, steps=0, u is the best; leaves out: a; b"
    )


# --------------------------------------------------------------------------------------- the user's own model


def user_model() -> nn.Module:
    model = cnn_bn().eval()
    model[1].train()
    model[0].weight.data = model[0].weight.data.contiguous(memory_format=torch.channels_last)
    model[-1].bias.requires_grad_(False)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i)) if i % 2 == 0 and p.requires_grad else None
    return model


USER = {"eps": EPS, "gamma": 1e-3, "batches": 2, "max_steps": 2, "alphas": (0.1,), "trials": 3}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("maximiser", ["sweep", "tpe"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_criterion_leaves_the_model_as_it_was(form: str, maximiser: str, mode: str) -> None:
    model, (x, y) = user_model(), samples(6, SHAPE)
    before, x_before = trace(model), x.clone()
    np.random.seed(4)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    options = USER | {"form": form, "maximiser": maximiser, "method": PgdAT(attack_mode=mode)}
    gap = controlat.criterion(model, x, y, {"alpha": 0.1, "steps": 2}, **options)
    assert same(trace(model), before)
    assert same(x, x_before)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert gap == controlat.criterion(model, x, y, {"alpha": 0.1, "steps": 2}, **options)


def test_the_criterion_leaves_the_model_as_it_was_when_it_fails() -> None:
    model, (x, y) = user_model(), samples(6, SHAPE)
    model[-1].weight.data[0] = 1e200  # the loss is finite, the squared gradient is not
    before = trace(model)
    with pytest.raises(NonFiniteError, match="gradient norm inf"):
        criterion(model, x, y, {"alpha": 0.1, "steps": 2}, **USER)
    assert same(trace(model), before)


def test_the_default_grid_is_that_of_the_definition() -> None:
    x, y = samples(8)
    for u, k_max in ((INSIDE, 10), (Control(alpha=0.1, steps=13), 13)):
        grid = Candidates.of(tuple(float(f"{EPS / 40 * 80 ** (i / 4):.6g}") for i in range(5)), k_max)
        expected, best = brute_force(mlp(), probe_batches(x, y, 2), u, 1e-3, "norm", grid)
        gap = criterion(mlp(), x, y, u, eps="1/5", gamma=1e-3, batches=2)
        assert gap.value == pytest.approx(expected, rel=1e-9)
        assert gap.maximiser == best
        assert gap.spent == 8 * (u["steps"] + 1 + 1 + 5 * 2 * k_max)  # every K up to that of u


OTHER = torch.optim.SGD(mlp().parameters(), 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1}, "gamma must be >= 0, got -1"),
        ({"gamma": math.nan}, "gamma must be finite, got nan"),
        ({"gamma": "much"}, "gamma must be a number"),
        ({"scale": -1.0}, "scale must be >= 0, got -1"),
        ({"scale": math.inf}, "scale must be finite, got inf"),
        ({"scale": 1.0, "optimizer": OTHER}, "give scale or optimizer, not both"),
        ({"mean_rate": 0.1}, "mean_rate needs optimizer"),
        ({"optimizer": OTHER}, "optimizer holds no parameter of this model"),
        ({"optimizer": "sgd"}, "optimizer must be a torch.optim.Optimizer, got str"),
        ({"batches": 0}, "batches must be a whole number >= 1, got 0"),
        ({"batches": 7}, "a probe of 6 samples cannot be split into 7 batches"),
        ({"form": "l2"}, "form must be one of norm, costate, got 'l2'"),
        ({"maximiser": "grid"}, "maximiser must be one of sweep, tpe, got 'grid'"),
        ({"method": "pgd"}, "pgd_at"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"eps": 0}, "the default step sizes need eps > 0, got 0; give alphas"),
        ({"alphas": ()}, "alpha must be a list of step sizes > 0, got none"),
        ({"alphas": (0.1, 0.0)}, "the step sizes that are searched must be > 0"),
        ({"max_steps": 0}, "max_steps must be a whole number >= 1, got 0"),
        ({"maximiser": "tpe", "trials": 0}, "trials must be a whole number >= 1, got 0"),
        ({"control": {"alpha": 0.1}}, "a control of this method has alpha, steps; got alpha"),
        ({"control": {"alpha": 0.1, "steps": 1, "m": 2}}, "has alpha, steps; got alpha, m, steps"),
        ({"control": {"alpha": 0.1, "steps": 1.5}}, "steps must be an integer, got 1.5"),
        ({"control": {"alpha": -0.1, "steps": 1}}, "alpha must be >= 0, got -0.1"),
        ({"x": 255 * samples(6)[0]}, r"x must lie in \[0, 1\]"),
        ({"x": samples(6)[0] - 1}, r"x must lie in \[0, 1\]"),
        ({"x": samples(6)[0][:0], "y": samples(6)[1][:0]}, "x must be a batch .* that is not empty"),
        ({"y": samples(6)[1].float()}, "y must hold one integer label per sample"),
        ({"y": samples(5)[1]}, "y must hold one integer label per sample"),
        ({"y": samples(6)[1] - 3}, "labels must be >= 0"),
        ({"held_out": (255 * samples(6)[0], samples(6)[1])}, r"held_out: x must lie in \[0, 1\]"),
        ({"held_out": samples(6)[::-1]}, "held_out: x must be floating point"),
        ({"held_out": (samples(6)[0], samples(4)[1])}, "held_out: y must hold one integer label"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_reason(options: dict[str, Any], message: str) -> None:
    x, y = samples(6)
    given = {"x": x, "y": y, "control": INSIDE, "eps": EPS, "gamma": 1e-3, "batches": 2, "form": "costate"}
    with pytest.raises(ValueError, match=message):
        criterion(mlp(), **(given | options))


def test_probe_batches_of_unequal_size_are_refused() -> None:
    batches = [*probe(12, 3), probe(5, 1)[0]]
    with pytest.raises(ValueError, match=r"probe batches must have one size, got \[4, 4, 4, 5\]"):
        surface(batches=batches)
    with pytest.raises(ValueError, match=r"probe batches must have one size, got \[\]"):
        surface(batches=[])


def test_a_gap_reports_the_evaluations_that_were_spent() -> None:
    n, grid = 32, 2 * (3 + 3)  # two step sizes, K_max = 3: a trajectory and a parameter gradient for each K
    x, y = samples(n, seed=1)
    found = criterion(
        mlp(), x, y, {"alpha": 0.05, "steps": 2}, eps=0.2, gamma=0.1, alphas=[0.05, 0.1], max_steps=3
    )
    assert found.spent == n * (grid + 1 + (2 + 1))
