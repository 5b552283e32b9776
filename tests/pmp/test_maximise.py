"""TPE against the exact maximum."""

import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import mlp, same, samples, slow
from torch import nn

from controlat._util import rng
from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.methods import Batch, Context, Update
from controlat.methods.pgd_at import PgdAT
from controlat.pmp import (
    FORMS,
    AdversarialLoss,
    Candidates,
    Surface,
    criterion,
    probe_batches,
    score,
)
from controlat.pmp.maximise import tpe

EPS = 0.2
U = Control(alpha=0.02, steps=1)
BOX = Candidates.of((0.02, 0.4), 4)
SMALL = Candidates.of((0.08,), 4)


def linear() -> nn.Module:
    """Two classes; without a random start its gradient depends on d = min(alpha K, eps) alone."""
    with rng.scoped(0, "linear"):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()


def scored(
    u: Control = U, grid: Candidates = BOX, *, seed: int = 0, method: Any = None, **options: Any
) -> Surface:
    x, y = samples(12, classes=2, seed=1)
    driver = Driver(linear(), method or PgdAT(random_start=False), Ball(EPS), seed=seed)
    phi = AdversarialLoss(*samples(9, classes=2, seed=5), Ball(EPS))
    return score(driver, probe_batches(x, y, 3), u, grid, terminal=phi, **options)


def by_tpe(
    u: Control = U, grid: Candidates = BOX, *, gamma: float = 1e-3, trials: int = 60, **options: Any
) -> Surface:
    return scored(u, grid, maximiser="tpe", gamma=gamma, trials=trials, **options)


def best(surface: Surface, gamma: float, form: str = "norm") -> float:
    return float((surface.reward(form) - gamma * surface.evaluations).max())


# -------------------------------------------------------------------------------------------------------- TPE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [1e-3, 2e-2, 0.1])
def test_tpe_finds_the_enumerated_maximum_of_a_small_set(gamma: float, form: str) -> None:
    exact = scored(grid=SMALL).gap(U, gamma, form)
    found = by_tpe(grid=SMALL, gamma=gamma, form=form, trials=40).gap(U, gamma, form)
    assert found.maximiser == exact.maximiser
    assert found.value == pytest.approx(exact.value, rel=1e-12, abs=1e-15)


def test_the_small_sets_above_have_maxima_of_different_kinds() -> None:
    gaps = [scored(grid=SMALL).gap(U, gamma, "costate") for gamma in (1e-3, 2e-2, 0.1)]
    assert [gap.maximiser["steps"] for gap in gaps] == [3, 2, 0]


@functools.cache
def along_d() -> tuple[Any, Any]:
    """(d, reward) on a dense line; with K = 1, d = alpha."""
    dense = scored(grid=Candidates.of(tuple(np.linspace(1e-3, EPS, 400)), 1))
    return np.array([v["alpha"] for v in dense.controls]), dense.reward("norm")


def supremum(gamma: float) -> float:
    """max over the whole box, alpha continuous: for each K only d = min(alpha K, eps) counts."""
    low, high, (d, q) = *BOX.values["alpha"], along_d()
    value = [q[d == 0].max() - gamma]
    for k in range(1, 5):
        reachable = (d >= min(low * k, EPS) - 1e-3) & (d <= min(high * k, EPS) + 1e-3)
        value.append(q[reachable].max() - gamma * (k + 1))
    return max(value)


@pytest.mark.parametrize("gamma", [0.0, slow(1e-3), 1e-2])
def test_tpe_never_beats_the_maximum_over_its_box_and_comes_close_to_it(gamma: float) -> None:
    found, top = best(by_tpe(gamma=gamma), gamma), supremum(gamma)
    assert found <= top + 1e-5
    assert found >= top - 0.02 * abs(top)


@pytest.mark.parametrize("gamma", [slow(0.0), 1e-2])
def test_the_candidates_of_tpe_lie_in_the_box_and_u_is_among_them(gamma: float) -> None:
    for u in (U, Control(alpha=0.9, steps=9), Control(alpha=1e-4, steps=2), Control(alpha=0, steps=0)):
        found = by_tpe(u, gamma=gamma, trials=30)
        assert found.controls[0] == u
        assert 1 < len(found.controls) <= 31
        for v in found.controls[1:]:
            assert v["steps"] == 0 or 0.02 <= v["alpha"] <= 0.4
            assert 0 <= v["steps"] <= 4
        assert found.gap(u, gamma).value >= 0


def test_tpe_tries_no_attack_and_the_most_steps_too() -> None:
    steps = {v["steps"] for v in by_tpe(trials=60).controls}
    assert steps == {0, 1, 2, 3, 4}


def test_the_values_of_tpe_are_those_of_running_its_candidates() -> None:
    found = by_tpe(trials=10)
    for i, v in enumerate(found.controls):
        alone = scored(v, Candidates.of((0.1,), 1))
        np.testing.assert_allclose(found.gram[i], alone.gram[0], rtol=1e-12)
        np.testing.assert_allclose(found.costate[i], alone.costate[0], rtol=1e-12)
        assert found.evaluations[i] == v["steps"] + 1
    assert found.spent == sum(12 * (v["steps"] + 1) for v in found.controls) + 9 * 21


def test_tpe_is_a_function_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPEROPT_FMIN_SEED", "77")
    first = by_tpe(trials=25).controls
    np.random.seed(9)  # noqa: NPY002
    monkeypatch.setenv("HYPEROPT_FMIN_SEED", "78")
    assert by_tpe(trials=25).controls == first
    assert by_tpe(trials=25, seed=1).controls != first


def test_tpe_leaves_every_global_generator_alone() -> None:
    def states() -> list[Any]:
        return [
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            np.random.get_state()[2],  # noqa: NPY002
            torch.random.get_rng_state(),
            random.getstate(),
            dict(os.environ),
        ]

    before = states()
    by_tpe(trials=25)
    assert same(states(), before)


class FailsAt(PgdAT):
    """PGD training whose loss is not finite at K = 3, where it would be largest."""

    at: tuple[int, ...] = (3,)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        for update in super().updates(ctx, batch, u):
            yield Update(lambda: update.loss() * (torch.nan if u["steps"] in self.at else u["steps"] + 1))  # noqa: B023


def test_a_candidate_that_is_not_finite_does_not_win() -> None:
    grid = Candidates.of((0.05,), 3)
    found = by_tpe(grid=grid, gamma=0.0, method=FailsAt(), trials=40)
    assert {v["steps"] for v in found.controls} == {0, 1, 2}
    assert found.gap(U, 0.0).maximiser["steps"] == 2
    with pytest.raises(NonFiniteError, match=r"Control\(alpha=0.05, steps=3\)"):
        by_tpe(Control(alpha=0.05, steps=3), grid, method=FailsAt())  # u_t itself must be finite


def test_values_that_are_not_finite_do_not_mislead_the_search() -> None:
    """The objective fails in three ways at K >= 3; the maximum of the rest is K = 2, alpha small."""
    bad = {3: np.nan, 4: np.inf}
    tried: list[Control] = []

    def objective(v: Control) -> float:
        tried.append(v)
        if v["steps"] == 5:
            raise NonFiniteError("not finite")
        return bad.get(int(v["steps"]), v["steps"] - 10 * v["alpha"])

    tpe(objective, Candidates.of((0.01, 1.0), 5), 80, 0, first=[U])
    assert len(tried) == 1 + 80
    assert {v["steps"] for v in tried} == {0, 1, 2, 3, 4, 5}
    late = [v for v in tried[40:] if v["steps"] == 2]
    assert len(late) > 40 / 6  # more than a search without knowledge
    assert min(v["alpha"] for v in late) < 0.02


def test_a_search_in_which_everything_fails_is_an_error_with_the_number_of_trials_and_the_first_reason() -> (
    None
):
    with pytest.raises(
        NonFiniteError, match=r"all 5 trials of TPE failed.*the value of Control\(.*\) is nan"
    ):
        tpe(lambda v: np.nan, BOX, 5, 0)
    everywhere = type("Fails", (FailsAt,), {"at": (0, 1, 2, 3, 4)})
    with pytest.raises(NonFiniteError, match=r"all 5 trials of TPE failed.*training loss nan"):
        by_tpe(Control(alpha=0.05, steps=5), method=everywhere(), trials=5)

    def only_u(v: Control) -> float:
        return 1.0 if v == U else np.nan

    with pytest.raises(NonFiniteError, match="all 5 trials of TPE failed"):  # u is no trial of the search
        tpe(only_u, BOX, 5, 0, first=[U])


def test_trials_that_failed_are_named_with_the_gap_and_kept_in_files() -> None:
    found = by_tpe(grid=Candidates.of((0.05,), 3), gamma=0.0, method=FailsAt(), trials=40)
    (name,) = found.gap(U, 0.0).dropped
    failed = int(name.split()[0])
    assert 0 < failed < 40
    assert name.startswith(f"{failed} of 40 trials of TPE, which failed (the first: training loss nan")
    again = Surface.from_json(found.to_json())
    assert again.gap(U, 0.0).dropped == (name,)
    old = {key: value for key, value in found.to_json().items() if key != "dropped"}
    assert Surface.from_json(old).dropped == ()
    assert by_tpe(trials=10).dropped == scored().dropped == ()


def test_tpe_takes_the_first_controls_within_its_bounds_first_and_then_makes_its_trials() -> None:
    tried: list[Control] = []

    def objective(v: Control) -> float:
        tried.append(v)
        return 0.0

    first = [Control(alpha=0.3, steps=2), Control(alpha=0, steps=0)]
    outside = [Control(alpha=0.9, steps=2), Control(alpha=0.3, steps=4), Control(alpha=0.01, steps=1)]
    tpe(objective, Candidates.of((0.1, 0.5), 3), 7, 0, first=[*outside, *first])
    assert tried[:2] == first
    assert len(tried) == 2 + 7
    tried.clear()
    tpe(objective, Candidates.of((0.1, 0.5), 3), 1, 0, first=outside)
    assert len(tried) == 1


@pytest.mark.parametrize("trials", [0, -1])
def test_tpe_needs_a_trial(trials: int) -> None:
    with pytest.raises(ValueError, match=f"trials must be >= 1, got {trials}"):
        tpe(lambda v: 0.0, BOX, trials, 0)


def test_the_criterion_offers_tpe_by_name() -> None:
    x, y = samples(12, seed=1)
    options = {"eps": EPS, "gamma": 1e-3, "alphas": (0.05,), "max_steps": 3, "batches": 3}
    exact = criterion(mlp(), x, y, U, **options)
    found = criterion(mlp(), x, y, U, maximiser="tpe", trials=30, **options)
    assert found.maximiser == exact.maximiser
    assert found.value == pytest.approx(exact.value, rel=1e-12)
