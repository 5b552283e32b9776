"""Candidates over any knob: the set, its scores against running each control, and TPE over mixed spaces."""

import itertools
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import samples
from systems import CASES, PLAIN, driver

import controlat
from controlat.attacks.balls import Ball
from controlat.control.cost import Meter
from controlat.control.space import Control, ControlSpace, Knob
from controlat.methods import Batch, Context, Update, build
from controlat.methods.pgd_at import PgdAT
from controlat.pmp import AdversarialLoss, Candidates, criterion, probe_batches, score
from controlat.pmp.maximise import score_one, score_sweep, tpe

EPS = 0.1
TRADES = build("trades").controls.check({"alpha": 0.05, "steps": 4, "beta": 3})


def read(texts: list[str] | None, method: str, **options: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"eps": 0.4, "max_steps": 3} | options
    return dict(Candidates.read(texts, build(method).controls, **given).values)


# --------------------------------------------------------------------------------------------- the set


def test_the_default_step_sizes_are_spaced_logarithmically() -> None:
    found = Candidates.default(0.3, 7)
    assert found.values["alpha"] == pytest.approx([0.3 / 40 * 80 ** (i / 4) for i in range(5)], rel=1e-5)
    assert found.values["steps"] == range(8)
    assert len(found.around(PgdAT(), Control(alpha=0.1, steps=1))) == 5 * 7 + 1


def test_values_are_sorted_without_repetitions_and_texts_are_numbers() -> None:
    assert Candidates.of((0.3, 0.1, 0.3), 2).values["alpha"] == (0.1, 0.3)
    assert Candidates.of(("8/255",), 2).values["alpha"] == (8 / 255,)
    assert Candidates.of((0.1,), 2, beta=(6, 1, 6)).values["beta"] == (1, 6)


def test_candidates_are_compared_hashed_and_pickled() -> None:
    one, two = (Candidates.of((0.1, 0.2), 3, beta=(1, 2)) for _ in range(2))
    assert one == two == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(two)
    assert one != Candidates.of((0.1, 0.2), 4, beta=(1, 2))


@pytest.mark.parametrize(
    ("alphas", "steps", "message"),
    [
        ((), 3, "alpha must be a list of step sizes > 0, got none"),
        ((0.0, 0.1), 3, "must be > 0"),
        ((-0.1,), 3, "must be > 0"),
        ((float("nan"),), 3, "a value of alpha must be finite"),
        ((0.1,), 0, "max_steps must be a whole number >= 1, got 0"),
        ((0.1,), 2.5, "max_steps must be a whole number >= 1, got 2.5"),
    ],
)
def test_a_set_that_is_none_is_refused(alphas: tuple[float, ...], steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidates.of(alphas, steps)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": ()}, "beta must be a list of values of beta, got none"),
        ({"beta": "1:2"}, "beta must be a list of values of beta, got"),
        ({"steps": range(0, 6, 2)}, "a range of steps must have steps of 1 and not be empty"),
        ({"steps": range(3, 3)}, "a range of steps must have steps of 1 and not be empty"),
    ],
)
def test_values_that_are_none_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Candidates(values)


def test_candidates_are_all_combinations_and_other_knobs_stay_as_in_u() -> None:
    found = Candidates.of((0.1, 0.2), 2).around(build("trades"), TRADES)
    assert found[0] == Control(alpha=0, steps=0, beta=3)
    assert set(found) == {Control(alpha=a, steps=k, beta=3) for a in (0.1, 0.2) for k in range(3)}
    found = Candidates({"beta": (1, 6)}).around(build("trades"), TRADES)
    assert found == [Control(alpha=0.05, steps=4, beta=b) for b in (1, 6)]
    found = Candidates.of((0.1,), 1, slack=range(2)).around(
        build("fat"), Control(alpha=0.3, steps=2, slack=7)
    )
    assert len(found) == len(set(found)) == 4
    assert {type(v["slack"]) for v in found} == {int}


def test_ranges_lie_within_the_bounds_of_the_method() -> None:
    free = Candidates.of((0.1,), 3).around(build("free"), Control(alpha=0.05, steps=1))
    assert [v["steps"] for v in free] == [1, 2, 3]
    cat = Candidates.of((0.1,), 3).around(build("cat"), Control(steps=1))
    assert cat == [Control(steps=k) for k in range(4)]
    with pytest.raises(ValueError, match="random must be in"):
        Candidates({"random": (0.5, 2)}).within(build("fast").controls)
    with pytest.raises(ValueError, match="steps must be in"):
        Candidates({"steps": range(5, 8)}).within(build("fast").controls)
    with pytest.raises(ValueError, match=r"slack must be an integer, got 0\.5"):
        Candidates({"slack": (0.5, 2)}).within(build("fat").controls)
    with pytest.raises(ValueError, match="beta cannot be searched: the method has alpha, steps"):
        Candidates({"beta": (1,)}).around(PgdAT(), Control(alpha=0.1, steps=1))


def test_long_ranges_are_thinned_where_each_costs_a_run_and_lists_never() -> None:
    u = Control(alpha=0.3, steps=2, slack=1)
    few = Candidates.of((0.1,), 40).around(build("fat"), u)
    assert [v["steps"] for v in few] == [*range(9), 10, 12, 14, 16, 20, 24, 28, 32, 40]
    assert len(Candidates.of((0.1,), 40).around(PgdAT(), Control(alpha=0.3, steps=2))) == 41
    listed = Candidates({"steps": (0, 11, 13), "slack": range(20)}).around(build("fat"), u)
    assert {v["steps"] for v in listed} == {0, 11, 13}
    assert max(v["slack"] for v in listed) == 19


# ------------------------------------------------------------------------------------------- from text


def test_texts_say_which_knobs_are_searched() -> None:
    usual = {"alpha": (0.01, 0.0299070, 0.0894427, 0.267496, 0.8), "steps": range(4)}
    found = read(None, "trades")
    assert found["alpha"] == pytest.approx(usual["alpha"], rel=1e-5)
    assert found["steps"] == usual["steps"]
    assert sorted(read(None, "cat")) == ["steps"]
    assert read(["steps"], "trades") == {"steps": range(4)}
    assert read(["steps=1:5"], "trades") == {"steps": (1, 5)}
    assert read(["beta=1:3/2:6"], "trades") == {"beta": (1, 1.5, 6)}
    assert read(["beta=1..16"], "trades") == {"beta": (1, 2, 4, 8, 16)}
    assert read(["beta=0..4"], "trades") == {"beta": (0, 1, 2, 3, 4)}
    assert read(["slack=0..3"], "fat") == {"slack": range(4)}
    assert read(["alpha"], "pgd_at", alphas=[0.1, "0.2"]) == {"alpha": (0.1, 0.2)}
    assert read(["alpha=0.1"], "pgd_at") == {"alpha": (0.1,)}


def test_a_name_alone_is_searched_around_its_default_or_between_its_bounds() -> None:
    assert read(["beta"], "trades") == {"beta": (1.5, 3, 6, 12, 24)}
    assert read(["random"], "fast") == {"random": (0, 0.25, 0.5, 0.75, 1)}
    assert read(["inner"], "yopo") == {"inner": range(3)}
    assert read(["reset"], "atta") == {"reset": range(1, 21)}


@pytest.mark.parametrize(
    ("texts", "method", "message"),
    [
        (
            ["betta=1"],
            "trades",
            "'betta=1' is no knob of this method; did you mean 'beta'? it has alpha,",
        ),
        (["beta=-1:2"], "trades", "beta must be >= 0, got -1"),
        (["beta=3..1"], "trades", "beta: a range a..b needs a < b, got 3..1"),
        (["beta=x"], "trades", "beta must be a number"),
        (["slack=0.5"], "fat", "slack must be an integer, got 0.5"),
        (["slack"], "fat", "slack has no default to search around: give slack=a:b:c or slack=a..b"),
        (["beta", "beta=1"], "trades", "beta is given twice among what is searched"),
        ([], "trades", "knobs must name one or more of alpha, beta, steps, got none"),
    ],
)
def test_a_wrong_text_says_what_is_wrong(texts: list[str], method: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(texts, method)


def test_step_sizes_are_given_once() -> None:
    with pytest.raises(ValueError, match="alpha is given twice"):
        read(["alpha=0.1"], "pgd_at", alphas=[0.2])


# ---------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Tilted(PgdAT):
    """PGD training with a weight of the loss: a third knob, and still the exact sweep over K."""

    @property
    def controls(self) -> ControlSpace:
        weight = Knob("real", 0.0, 4.0, default=1.0)
        return ControlSpace({**super().controls.knobs, "weight": weight}, super().controls.cost)

    def prefixes(self, ctx: Context, batch: Batch, u: Control) -> Iterator[tuple[Control, Update]]:
        for v, update in super().prefixes(ctx, batch, u):
            tilted = Control(**{**u, **v})
            yield tilted, self._weighted(update, tilted)

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        for update in super().updates(ctx, batch, u):
            yield self._weighted(update, u)

    def _weighted(self, update: Update, u: Control) -> Update:
        return update._replace(loss=lambda: u["weight"] * update.loss())


SETS = {
    "pgd_at": Candidates.of((0.02, 0.07), 3),
    "trades": Candidates.of((0.02, 0.07), 2, beta=(0, 1, 600)),
    "fat": Candidates.of((0.02,), 2, slack=range(2)),
    "yopo": Candidates({"inner": range(3), "steps": (1, 3)}),
    "dynamic": Candidates({"fosc": (0.001, 0.5)}),
    "tilted": Candidates({"weight": (0.5, 2), "alpha": (0.02, 0.07), "steps": (0, 1, 3)}),
    "tilted, K held": Candidates({"weight": (0.5, 2), "alpha": (0.02, 0.07)}),
}


@pytest.mark.parametrize("name", SETS)
def test_a_sweep_equals_running_every_candidate_by_itself(name: str) -> None:
    method = Tilted() if "tilted" in name else PLAIN[name].method()
    d, found = driver(method), SETS[name]
    u = method.controls.check({"alpha": 0.05, "steps": 2}) if "tilted" in name else PLAIN[name].control()
    x, y = samples(12, (1, 4, 4), seed=1)
    batches, meter = probe_batches(x, y, 3), Meter()
    scored = {v: (n, fields) for v, n, fields in score_sweep(d, batches, found, u, 0.1, meter)}
    assert set(scored) == set(found.around(method, u))
    for v, (n, fields) in scored.items():
        _, alone, expected = score_one(d, batches, v, 0.1, Meter())
        assert n == alone
        for mine, theirs in zip(fields, expected, strict=True):
            for a, b in zip(mine.gradients, theirs.gradients, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    if name not in ("fat", "dynamic"):  # whose cost depends on the data
        assert meter.gradients == 12 * (found.cost(method, u) - method.controls.cost(u))


def test_the_gap_is_that_of_the_enumerated_set_of_three_knobs() -> None:
    case, gamma = CASES["trades"], 1e-4
    d, u = driver(case), case.control()
    x, y = samples(12, (1, 4, 4), seed=1)
    batches, phi = probe_batches(x, y, 3), AdversarialLoss(x, y, Ball(EPS))
    found = score(d, batches, u, SETS["trades"], terminal=phi)
    worth = {}
    for a, k, b in itertools.product((0.02, 0.07), range(3), (0.0, 1.0, 600.0)):
        v = Control(alpha=a, steps=k, beta=b)
        _, n, fields = score_one(d, batches, v, 0.0, Meter())
        mean = [sum(gs) / 3 for gs in zip(*(f.gradients for f in fields), strict=True)]
        worth[v] = sum(float(g.square().sum()) for g in mean) - gamma * n
    _, n, fields = score_one(d, batches, u, 0.0, Meter())
    mean = [sum(gs) / 3 for gs in zip(*(f.gradients for f in fields), strict=True)]
    own = sum(float(g.square().sum()) for g in mean) - gamma * n
    gap = found.gap(u, gamma)
    assert gap.maximiser == max(worth, key=worth.__getitem__)
    assert gap.value == pytest.approx(max(worth.values()) - own, rel=1e-10)
    narrow = score(d, batches, u, Candidates.of((0.02, 0.07), 2), terminal=phi).gap(u, gamma)
    assert narrow.value < gap.value  # another beta is better


def test_the_criterion_searches_the_knobs_that_it_is_given() -> None:
    x, y = samples(16, (1, 4, 4), seed=2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).double()
    options: dict[str, Any] = {"eps": EPS, "gamma": 1e-3, "method": "trades", "batches": 4, "max_steps": 2}
    plain, wide = (
        controlat.criterion(model, x, y, {"alpha": 0.05, "steps": 1, "beta": 2}, knobs=knobs, **options)
        for knobs in (None, ["alpha", "steps", "beta=0.5:12"])
    )
    assert plain.maximiser["beta"] == 2
    assert wide.maximiser["beta"] == 12
    assert wide.value > plain.value
    both = [
        criterion(model, x, y, {"alpha": 0.05, "steps": 1, "beta": 2}, knobs=knobs, **options)
        for knobs in (None, ["alpha", "steps"])
    ]
    assert both[0] == both[1]
    with pytest.raises(ValueError, match="'zeal' is no knob of this method"):
        criterion(model, x, y, {"alpha": 0.05, "steps": 1}, knobs=["zeal"], **options)


# ------------------------------------------------------------------------------------------------- TPE


def test_tpe_searches_real_and_whole_knobs_within_their_bounds() -> None:
    knobs = {"rate": Knob("real", 0.0), "count": Knob("integer", 0), "share": Knob("real", 0.0, 1.0)}
    knobs["held"] = Knob("real", 0.0)
    found = Candidates({"rate": (0.01, 1), "count": range(3, 9), "share": (0, 0.5)})
    tried: list[Control] = []

    def objective(v: Control) -> float:
        tried.append(v)
        return -abs(torch.tensor(v["rate"] / 0.1).log().item()) - abs(v["count"] - 7) - abs(v["share"] - 0.4)

    first = Control(rate=0.5, count=4, share=0.1, held=2.5)
    assert tpe(objective, found, 150, 0, [first], knobs) == []
    assert tried[0] == first
    assert {v["held"] for v in tried} == {2.5}
    assert all(0.01 <= v["rate"] <= 1 and 0 <= v["share"] <= 0.5 for v in tried)
    assert {v["count"] for v in tried} == set(range(3, 9))
    assert {type(v["count"]) for v in tried} == {int}
    best = max(list(tried), key=objective)
    assert best["count"] == 7
    assert best["rate"] == pytest.approx(0.1, rel=0.2)
    assert best["share"] == pytest.approx(0.4, abs=0.1)
    assert sum(v["rate"] < 0.1 for v in tried[1:20]) > 4  # by the logarithm: 2 of 20 would be evenly


def test_tpe_comes_to_the_enumerated_maximum_of_a_mixed_set() -> None:
    case, u = CASES["fat"], CASES["fat"].control()
    x, y = samples(12, (1, 4, 4), seed=1)
    found = Candidates({"steps": range(4), "slack": range(3)})
    exact, searched = (
        score(driver(case), probe_batches(x, y, 3), u, found, maximiser=how, gamma=1e-3, trials=60)
        for how in ("sweep", "tpe")
    )
    assert searched.gap(u, 1e-3).value == pytest.approx(exact.gap(u, 1e-3).value, rel=1e-12)
    assert {v["alpha"] for v in searched.controls} <= {u["alpha"], 0.0}


def test_the_mean_cost_is_that_of_an_even_draw() -> None:
    u = CASES["awp"].control()
    found = Candidates({"steps": range(3), "radius": (0, 0.01)})
    assert found.mean_cost(build("awp"), u) == (1 + 2 + 3 + 2 + 3 + 4) / 6
