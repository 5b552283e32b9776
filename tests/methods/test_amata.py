"""Amata on each: every knob of every method follows a schedule, and the hybrids are those of the paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import flat, same
from systems import OPTIONS, PLAIN, Case, batch, constant, driver, trained_on
from torch import Tensor, nn

import controlat
from controlat._util.files import read_json_lines
from controlat.app import cli
from controlat.app.settings import Problem
from controlat.control.schedules import Schedule
from controlat.control.space import Control
from controlat.data import Split
from controlat.dynamics.driver import Driver, SGDSettings, Step
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.methods import names

EPS, EPOCHS = 0.1, 3
KNOBS = [
    (name, knob)
    for name, case in PLAIN.items()
    for knob, bounds in case.method().controls.items()
    if bounds.low < bounds.high
]
every = pytest.mark.parametrize("name", names())


def problem(name: str, epochs: int = EPOCHS, **options: Any) -> Problem:
    return Problem(method=name, method_options=OPTIONS.get(name, {}) | options, epochs=epochs, eps=EPS)


def ramp(name: str, knob: str) -> tuple[float, float]:
    """Ends that are admissible for any knob: by one an epoch for whole numbers."""
    bounds = PLAIN[name].method().controls[knob]
    first = bounds.low + (1 if bounds.kind == "integer" else 0.001)
    return first, min(first + (EPOCHS if bounds.kind == "integer" else 0.06), bounds.high)


def text(name: str, **chosen: str) -> str:
    """A schedule that gives every control of a method: three steps where it may, and few samples stop."""
    u = PLAIN[name].control(steps=3, fosc=0.001)
    knobs = {k: f"{v:g}" for k, v in u.items()} | chosen
    return "set:" + ",".join(f"{k}={v}" for k, v in knobs.items())


def run(d: Driver, schedule: Schedule, n: int = 6, **options: Any) -> list[Step]:
    spec = replace(constant(schedule(0), n, epochs=int(schedule.epochs), **options), controller=schedule)
    return list(rollout(d, spec))


def test_every_method_has_a_knob_that_can_be_scheduled() -> None:
    assert {name for name, _ in KNOBS} == set(names())
    assert {("free", "steps"), ("cat", "steps"), ("fast", "random"), ("yopo", "inner")} < set(KNOBS)


@pytest.mark.parametrize(("name", "knob"), KNOBS, ids=[f"{name}-{knob}" for name, knob in KNOBS])
def test_every_knob_of_every_method_follows_its_schedule(
    name: str, knob: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = ramp(name, knob)
    schedule = problem(name).schedule_of(text(name, **{knob: f"{first:g}..{last:g}"}))
    given: list[Control] = []
    kind = type(PLAIN[name].method())
    updates = kind.updates
    monkeypatch.setattr(kind, "updates", lambda self, ctx, b, u: given.append(u) or updates(self, ctx, b, u))
    steps = run(d := driver(PLAIN[name]), schedule)
    expected = [first + (last - first) * t / EPOCHS for t in range(EPOCHS) for _ in range(2)]
    assert [s.control[knob] for s in steps] == pytest.approx(expected)
    assert given == [s.control for s in steps]
    assert len(set(expected)) == EPOCHS
    for step in steps:
        assert PLAIN[name].method().controls.check(step.control) == step.control
    if d.method.controls[knob].kind == "integer":
        assert {type(s.control[knob]) for s in steps} == {int}
    still = driver(PLAIN[name])
    run(still, problem(name).schedule_of(text(name, **{knob: f"{first:g}"})))
    assert not same(flat(d.parameters), flat(still.parameters)), "the knob makes a difference"


@pytest.mark.parametrize(("name", "knob"), KNOBS, ids=[f"{name}-{knob}" for name, knob in KNOBS])
def test_whole_numbers_are_rounded_and_others_are_not(name: str, knob: str) -> None:
    bounds = PLAIN[name].method().controls[knob]
    low = bounds.low if knob != "steps" else max(bounds.low, 1)
    high = min(low + 1, bounds.high)
    schedule = problem(name, 10).schedule_of(text(name, **{knob: f"{low:g}..{high:g}@5"}))
    found = [schedule(t)[knob] for t in range(7)]
    if bounds.kind == "integer":
        assert found == [low] * 3 + [low + 1] * 4  # at 0, 0.2, 0.4, 0.6, ...
        assert {type(v) for v in found} == {int}
    else:
        assert found == pytest.approx([low + (high - low) * v for v in (0, 0.2, 0.4, 0.6, 0.8, 1, 1)])


@every
def test_a_control_that_a_method_lacks_is_refused_with_a_list_of_those_it_has(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = ", ".join(sorted(PLAIN[name].method().controls))
    wrong = text(name) + ",zeal=1..2"
    message = f"a control of this method has {listed}; got "
    with pytest.raises(ValueError, match=message) as raised:
        problem(name).schedule_of(wrong)
    assert repr(wrong) in str(raised.value)
    assert "zeal" in str(raised.value)
    with pytest.raises(ValueError, match=message):
        controlat.train(tmp_path / "run", method=name, method_options=OPTIONS.get(name, {}), schedule=wrong)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--out", str(tmp_path / "run"), "--method", name, "--schedule", wrong])
    output, error = capsys.readouterr()
    assert stopped.value.code == 2
    assert output == ""
    assert error.startswith("controlat: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "schedule", "message"),
    [
        ("yopo", "amata:min=0,max=5,tau=0.3", "steps must be >= 1, got 0"),
        ("free", "none", "steps must be >= 1, got 0"),
        ("fast", "pgd:steps=2,alpha=0.1", "steps must be in"),
        ("fast", "set:alpha=0.1,random=0..2", "random must be in"),
        ("atta", "pgd:steps=1,alpha=0.1,reset=0:10@5", "reset must be >= 1, got 0"),
        ("awp", "pgd:steps=1,alpha=0.1,radius=0.01..-1", "radius must be >= 0"),
        ("dynamic", "pgd:steps=1,alpha=0.1", "a control of this method has alpha, fosc, steps"),
        ("cat", "pgd:steps=1,alpha=0.1", "a control of this method has steps; got alpha, steps"),
    ],
)
def test_a_schedule_that_leaves_the_admissible_set_in_any_epoch_is_refused(
    name: str, schedule: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        problem(name, 10).schedule_of(schedule)


# ------------------------------------------------------------------------------- the hybrids of the paper

YOPO = "amata:min=2,max=5,tau=0.06,inner=10"
FREE = f"amata:min=2,max=4,tau={2 * EPS}"
FAST = "set:alpha=10/255,start=0.5:1@8,random=0:1@8"
ATTA = "pgd:steps=1,alpha=0.06,reset=2:10@5"


def trained(tmp_path: Path, method: str, schedule: str, epochs: int) -> list[dict[str, Any]]:
    """The log of a real run on 180 digits, which is what it says about its controls."""
    few: dict[str, Any] = {"train_points": 200, "batch_size": 60, "threads": 1, "progress": False}
    found = controlat.train(tmp_path / "run", method=method, schedule=schedule, epochs=epochs, eps=EPS, **few)
    log = read_json_lines(tmp_path / "run" / "log.jsonl")
    assert log == found["epochs"]
    planned = problem(method, epochs).schedule_of(schedule)
    assert [e["control"] for e in log] == [dict(planned(t)) for t in range(epochs)]
    assert found["gradients"] == sum(e["gradients"] for e in log) == log[-1]["total_gradients"]
    assert log[-1]["loss"] < log[0]["loss"]
    return log


def test_yopo_takes_more_passes_of_smaller_steps(tmp_path: Path) -> None:
    log = trained(tmp_path, "yopo", YOPO, 6)
    assert [e["control"]["steps"] for e in log] == [2, 3, 3, 4, 4, 5]
    assert [e["control"]["inner"] for e in log] == [10] * 6
    assert [e["control"]["alpha"] * e["control"]["steps"] for e in log] == pytest.approx([0.06] * 6)
    assert [e["gradients"] for e in log] == [180 * m for m in (2, 3, 3, 4, 4, 5)]


@pytest.mark.parametrize("mode", ["both", "direct", "hamiltonian"])
def test_the_update_of_yopo_does_not_grow_with_the_number_of_equal_passes(mode: str) -> None:
    b, found = batch(margin=0.2), {}
    for options in ({}, {"gradients": "sum"}):
        case = Case("yopo", {"first_layer_grad": mode, **options})
        for m in (2, 3, 5):
            d = driver(case, optimizer=SGDSettings(momentum=0.0))
            before = flat(d.parameters)
            d.step(b, case.control(alpha=0.0, steps=m, inner=10), 0.1)
            found[m] = flat(d.parameters) - before
        for m in (3, 5):
            grown = m / 2 if options else 1.0
            torch.testing.assert_close(found[m], grown * found[2], rtol=1e-9, atol=1e-12)


def test_free_takes_twice_the_replays_with_half_the_step(tmp_path: Path) -> None:
    log = trained(tmp_path, "free", FREE, 4)
    assert [e["control"]["steps"] for e in log] == [2, 3, 3, 4]
    assert [e["control"]["alpha"] for e in log] == pytest.approx([EPS, EPS / 1.5, EPS / 1.5, EPS / 2])
    assert [e["gradients"] for e in log] == [180 * m for m in (2, 3, 3, 4)]


def test_free_carries_its_perturbation_on_when_the_replays_change() -> None:
    d = driver(PLAIN["free"])
    seen = trained_on(d.model)
    steps = run(d, problem("free", 4).schedule_of(FREE), 4, batch_size=4)
    assert len(seen) == sum(s.control["steps"] for s in steps) == 2 + 3 + 3 + 4
    spec = constant(PLAIN["free"].control(), 4, batch_size=4, epochs=4)
    moved = []
    for s in steps:
        (b,) = spec.batches(s.epoch)
        passes = [seen.pop(0) - b.x for _ in range(s.control["steps"])]
        moved.append(passes[0].abs().max() > 0)
        assert max(float(delta.abs().max()) for delta in passes) <= EPS + 1e-12
    assert moved == [False, True, True, True]


def test_fast_starts_at_one_constant_at_first_and_at_random_later(tmp_path: Path) -> None:
    d, starts = driver(PLAIN["fast"]), []

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not any(p.requires_grad for p in module.parameters()):
            starts.append(arguments[0].detach().clone())

    d.model.register_forward_pre_hook(look)
    inner = batch(40, margin=EPS)
    data, schedule = Split(inner.x, inner.y), problem("fast", 12).schedule_of(FAST)
    run(d, schedule, data=data, batch_size=40)
    spec = constant(schedule(0), data=data, batch_size=40, epochs=12)
    assert len(starts) == 12
    for epoch, x in enumerate(starts):
        (b,) = spec.batches(epoch)
        delta = x - b.x
        if epoch < 8:
            torch.testing.assert_close(delta, torch.full_like(delta, EPS / 2), rtol=0, atol=1e-15)
        else:
            assert delta.abs().max() <= EPS + 1e-12
            assert float(delta.mean().abs()) < EPS / 10
            assert float(delta.std()) == pytest.approx(EPS / 3**0.5, rel=0.1)
    log = trained(tmp_path, "fast", "set:alpha=10/255,start=0.5:1@3,random=0:1@3", 5)
    assert [(e["control"]["start"], e["control"]["random"]) for e in log] == [(0.5, 0)] * 3 + [(1, 1)] * 2
    assert {(e["control"]["alpha"], e["control"]["steps"]) for e in log} == {(10 / 255, 1)}
    assert [e["gradients"] for e in log] == [180 * 2] * 5


def test_atta_forgets_every_second_epoch_at_first_and_every_tenth_later(tmp_path: Path) -> None:
    schedule = problem("atta", 32).schedule_of(ATTA)
    spec = replace(constant(schedule(0), 4, batch_size=2, epochs=32), controller=schedule)
    found = Recording.of(driver(PLAIN["atta"]), spec, stride=2).stored
    assert len(found) == 32
    empty = [step // 2 + 1 for step, state in found.items() if not state.rows]
    assert empty == [1, 2, 4, 10, 20, 30]  # in the first epoch there is nothing yet
    log = trained(tmp_path, "atta", ATTA, 10)
    assert [e["control"]["reset"] for e in log] == [2] * 5 + [10] * 5
    assert [e["gradients"] for e in log] == [180 * 2] * 10
