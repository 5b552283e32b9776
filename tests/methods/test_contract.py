"""What every method of the folder must keep to: bits, counts, bounds, snapshots, scoring."""

from itertools import islice
from typing import Any

import pytest
import torch
from helpers import SHAPE, cnn_bn, flat, same, samples, slow, split, trace
from systems import LONG, PLAIN, VARIANTS, Case, batch, constant, driver, passes, smooth, those, trained_on
from torch import nn

from controlat.attacks.balls import Ball
from controlat.control.space import Control
from controlat.dynamics.driver import SGDSettings
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.methods import Context, Prefixes, names

EPS = 0.1
PLAIN_SGD = SGDSettings(momentum=0.0)
every = pytest.mark.parametrize("case", LONG)
plain = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


def test_every_file_of_the_folder_is_tested() -> None:
    assert {case.name for case in PLAIN.values()} == set(names())
    assert {case.name for case in VARIANTS.values()} <= set(names())


def without_dropout(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0  # its mask is drawn in the order of memory, so that it depends on the layout
    return model


# --------------------------------------------------------------------------------------------------- one step


@every
@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_moves_the_network_by_finite_numbers(case: Case, norm: str, dtype: torch.dtype) -> None:
    d = driver(case, smooth().to(dtype), Ball(EPS, norm))
    b = batch()
    b = b._replace(x=b.x.to(dtype))
    seen, before = trained_on(d.model), flat(d.parameters)
    step = d.step(b, case.control(), 0.1)
    assert 0 < step.loss < 20
    assert step.samples == 6
    assert seen
    assert all(x.dtype == dtype and x.shape == b.x.shape for x in seen)
    assert flat(d.parameters).dtype == dtype
    assert 1e-4 < (flat(d.parameters) - before).norm() < 10


@every
def test_a_step_leaves_the_callers_things_alone(case: Case) -> None:
    d, b = driver(case, cnn_bn()), batch(shape=SHAPE)
    copies = b.x.clone(), b.y.clone(), b.indices.clone()
    torch.manual_seed(5)
    before = trace(d.model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in d.model.modules()]
    d.step(b, case.control(), 0.1)
    d.step(b._replace(epoch=1), case.control(), 0.1)
    after = trace(d.model)
    assert same((b.x, b.y, b.indices), copies)
    assert not b.x.requires_grad
    assert b.x.grad is None
    for name in ("identity", "strides", "wanted", "grad", "random"):
        assert same(after[name], before[name]), name
    assert all(after["flags"])  # in training mode, every module of it
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in d.model.modules()] == hooks
    assert not any(t.requires_grad for t in d.memory.values())
    assert not any(r.values.requires_grad for r in d.rows.values())


@every
def test_running_statistics_see_what_is_trained_on_once(case: Case) -> None:
    d, passed = driver(case, cnn_bn()), []
    d.model.register_forward_hook(
        lambda m, arguments, output: passed.append(all(p.requires_grad for p in m.parameters()))
    )
    d.step(batch(shape=SHAPE), case.control(), 0.1)
    counts = {int(m.num_batches_tracked) for m in d.model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {sum(passed) - case.own.looks}


# ----------------------------------------------------------------------------------------------------- random


@plain
def test_the_same_seed_gives_the_same_bits_and_another_one_others(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    draw = Context.generator

    def spied(self: Context, purpose: str, device: Any = "cpu") -> torch.Generator:
        asked.append(purpose)
        return draw(self, purpose, device)

    monkeypatch.setattr(Context, "generator", spied)
    found = []
    for seed in (0, 0, 1):
        d = driver(case, ball=Ball(EPS, "l2"), seed=seed)
        torch.manual_seed(len(found))  # plays no part
        steps = [d.step(batch(number=i), case.control(), 0.1) for i in range(2)]
        found.append((d.snapshot(), steps))
    assert same(found[0], found[1])
    assert same(found[0][0].model, found[2][0].model) == (not asked)
    assert bool(asked) == case.own.draws


@those(lambda case: case.own.draws, PLAIN)
def test_batches_and_epochs_draw_other_numbers(case: Case) -> None:
    d, u = driver(case, ball=Ball(EPS, "l2")), case.control()
    found = [flat(d.field(batch(epoch=e, number=i), u).gradients) for e, i in ((0, 0), (0, 1), (1, 0))]
    assert not same(found[0], found[1])
    assert not same(found[0], found[2])


# ------------------------------------------------------------------------------------------------------ costs


@every
@norms
@pytest.mark.parametrize("network", ["smooth", "cnn_bn"])
def test_evaluations_are_counted_as_the_network_sees_them(case: Case, norm: str, network: str) -> None:
    shape = SHAPE if network == "cnn_bn" else (1, 4, 4)
    d = driver(case, cnn_bn() if network == "cnn_bn" else smooth(), Ball(EPS, norm))
    u = case.control(steps=3)
    for epoch in (0, 1):
        forwards, backwards = passes(d.model)
        step = d.step(batch(8, shape, epoch=epoch), u, 0.1)
        assert step.spent.gradients == sum(backwards)
        assert step.spent.forwards == sum(forwards) - sum(backwards)
        assert step.spent.gradients <= 8 * d.method.controls.cost(u)
        assert (step.spent.layers > 0) == case.own.layers
        d = driver(case, d.model, Ball(EPS, norm))
        d.model._forward_hooks.clear()


@plain
def test_scoring_counts_what_it_spends_apart_from_training(case: Case) -> None:
    d, b, u = driver(case), batch(), case.control()
    spent = type(d.meter)()
    d.field(b, u, meter=spent)
    assert d.meter == type(d.meter)()
    assert spent == d.step(b, u, 0.1).spent


# ----------------------------------------------------------------------------------------------------- bounds


@every
@norms
@pytest.mark.parametrize("alpha", [0.03, 0.25])
def test_what_is_trained_on_lies_in_the_ball_and_within_the_pixels(
    case: Case, norm: str, alpha: float
) -> None:
    d, u = driver(case, ball=Ball(EPS, norm)), case.control(alpha=alpha)
    seen, far = trained_on(d.model), 0.0
    d.memory.update(case.own.memory)
    for i in range(3):
        b = batch(6 if i < 2 else 4, number=i, seed=i)
        b = b._replace(x=(b.x * 1.5 - 0.25).clamp(0, 1))  # a good part of the pixels is black or white
        seen.clear()
        d.step(b, u, 0.1)
        for x in seen:
            distance = float(d.ball.distance(x, b.x).max())
            far = max(far, distance)
            assert distance <= case.own.reach(u, EPS) + 1e-9
            within = float(x.min()) >= -1e-12 and float(x.max()) <= 1 + 1e-12
            assert within or (case.own.starts_outside and x is seen[0])
    assert far > 0.3 * EPS
    for carried in (*d.memory.values(), *(rows.values for rows in d.rows.values())):
        if carried.is_floating_point():
            assert d.ball.distance(carried, torch.zeros_like(carried)).max() <= EPS + 1e-9


def test_without_a_clip_n_fgsm_leaves_the_ball() -> None:
    case = PLAIN["nfgsm"]
    d, b = driver(case), batch(margin=0.4)
    (seen,) = [trained_on(d.model)]
    d.step(b, case.control(alpha=EPS), 0.1)
    assert 2 * EPS < d.ball.distance(seen[0], b.x).max() <= 3 * EPS


# ------------------------------------------------------------------------------- BatchNorm, layout, precision


@every
@norms
def test_batchnorm_dropout_and_short_batches_are_no_obstacle(case: Case, norm: str) -> None:
    model = cnn_bn().float()
    data = split(7, SHAPE)
    data = type(data)(data.x.float(), data.y)
    p = constant(case.control(), shape=SHAPE, epochs=2, data=data, held_out=data)
    steps = list(rollout(driver(case, model, Ball(EPS, norm)), p))
    assert len(steps) == 4
    assert all(0 < s.loss < 20 for s in steps)
    assert {t.dtype for t in model.parameters()} == {torch.float32}


@every
def test_the_memory_layout_plays_no_part_but_for_rounding(case: Case) -> None:
    found = []
    for layout in (True, False):
        d = driver(case, without_dropout(cnn_bn()), channels_last=layout)
        for i in range(2):
            d.step(batch(shape=SHAPE, number=i), case.control(), 0.05)
        found.append(flat(d.parameters))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@every
def test_mixed_precision_runs_on_float32_parameters(case: Case) -> None:
    model = cnn_bn().float()
    d, kinds = driver(case, model, autocast=torch.bfloat16), set()
    model[0].register_forward_hook(lambda m, arguments, output: kinds.add(output.dtype))
    b = batch(shape=SHAPE)
    for i in range(2):
        step = d.step(b._replace(x=b.x.float(), number=i), case.control(), 0.1)
        assert 0 < step.loss < 20
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in d.parameters} == {torch.float32}
    assert all(t.dtype == torch.float32 for t in d.memory.values() if t.is_floating_point() and t.dim() > 1)


# -------------------------------------------------------------------------------------------------- snapshots


def carried_on(case: Case, cut: int, fresh: bool) -> None:
    """Stop after `cut` steps, save, go on, and go on again from what was saved."""
    p = constant(case.control(), held_out=split(8, (1, 4, 4), seed=5))
    d = driver(case)
    steps = rollout(d, p)
    first = [next(steps) for _ in range(cut)]
    saved = d.snapshot()
    rest = list(steps)
    end = d.snapshot()
    assert len(first) + len(rest) == 9
    other = driver(case) if fresh else d
    other.restore(saved)
    epoch = (cut - 1) // 3  # at the end of an epoch its hook is still to come
    assert same(list(rollout(other, p, epoch=epoch, batch=cut - 3 * epoch)), rest)
    assert same(other.snapshot(), end)


@every
@pytest.mark.parametrize("cut", [*(slow(n) for n in (1, 3, 6, 8)), 5])
def test_a_snapshot_is_continued_bit_for_bit_in_another_driver(case: Case, cut: int) -> None:
    carried_on(case, cut, fresh=True)


@every
@pytest.mark.parametrize("cut", [slow(1), 4])
def test_a_snapshot_is_continued_bit_for_bit_in_the_same_driver(case: Case, cut: int) -> None:
    carried_on(case, cut, fresh=False)


@every
def test_a_snapshot_between_two_epochs_is_continued_bit_for_bit(case: Case) -> None:
    p = constant(case.control(), held_out=split(8, (1, 4, 4), seed=5))
    d, other = driver(case), driver(case)
    list(rollout(d, p, until=2))
    other.restore(d.snapshot())
    assert same(list(rollout(other, p, epoch=2)), list(rollout(d, p, epoch=2)))
    assert same(other.snapshot(), d.snapshot())


@every
@pytest.mark.parametrize("stride", [slow(1), 2])
def test_from_every_recorded_state_the_steps_up_to_the_next_can_be_repeated(case: Case, stride: int) -> None:
    p = constant(case.control(), held_out=split(8, (1, 4, 4), seed=5))
    d = driver(case)
    rec = Recording.of(d, p, stride=stride)
    steps, store = rec.steps, rec.stored
    assert sorted(store) == list(range(0, 9, stride))
    for number in sorted(store, reverse=True):
        d.restore(store[number])
        epoch, i = divmod(number, p.batches_per_epoch)
        found = list(islice(rollout(d, p, epoch=epoch, batch=i), stride))
        assert same(found, steps[number : number + stride])


@plain
def test_every_recorded_step_leads_to_the_next_recorded_state(case: Case) -> None:
    p, store = constant(case.control()), {}
    d = driver(case)
    steps = list(rollout(d, p, before=lambda n: store.update({n: d.snapshot()})))
    after = {**store, len(steps): d.snapshot()}
    for number in reversed(range(len(steps))):
        d.restore(store[number])
        epoch, i = divmod(number, p.batches_per_epoch)
        b = next(p.batches(epoch, i))
        assert same(d.step(b, p.control(b), p.learning_rate(epoch, i)), steps[number])
        if i + 1 == p.batches_per_epoch:
            d.end_epoch(p, epoch)
        found, expected = d.snapshot().to_dict(), after[number + 1].to_dict()
        assert all(same(found[name], expected[name]) for name in ("model", "optimizer", "memory"))


# ---------------------------------------------------------------------------------------------------- scoring


@every
def test_scoring_changes_no_bit_of_training_and_repeats_itself(case: Case) -> None:
    p = constant(case.control(), held_out=split(8, (1, 4, 4), seed=5))
    v = case.control(alpha=0.06, steps=1)
    d, disturbed = driver(case), driver(case)
    steps = list(rollout(d, p))
    found = []
    for step in rollout(disturbed, p):
        found.append(step)
        b = next(p.batches(step.epoch, step.batch))
        disturbed.model.eval()
        before = trace(disturbed.model)
        assert same(disturbed.field(b, v, 0.1), disturbed.field(b, v, 0.1))
        assert same(trace(disturbed.model), before)
    assert same(found, steps)
    assert same(disturbed.snapshot(), d.snapshot())


@every
@norms
def test_scoring_the_control_that_is_used_gives_the_step(case: Case, norm: str) -> None:
    rate, d = 0.1, driver(case, ball=Ball(EPS, norm), optimizer=PLAIN_SGD)
    for i in range(3):
        b, u = batch(number=i), case.control()
        found, before = flat(d.field(b, u, rate).gradients), flat(d.parameters)
        d.step(b, u, rate)
        torch.testing.assert_close(found, (before - flat(d.parameters)) / rate, rtol=1e-9, atol=1e-12)
        assert found.norm() > 1e-3


@every
def test_the_sweep_over_k_is_offered_by_those_who_can(case: Case) -> None:
    d, b, u = driver(case), batch(), case.control(steps=3)
    if not isinstance(d.method, Prefixes):
        with pytest.raises(ValueError, match="offers no sweep over K"):
            list(d.fields([b], u))
        return
    fields = [field for (field,) in d.fields([b], u)]
    assert len(fields) == 3
    for field in fields:
        alone = d.field(b, field.control)
        torch.testing.assert_close(field.gradients, alone.gradients, rtol=1e-9, atol=1e-13)
        assert same(field.statistics, alone.statistics)


# -------------------------------------------------------------------------------------------------- no attack

# (options, knobs, times the clean gradient) where eps = 0 is not one clean step of itself
REDUCED: dict[str, tuple[dict[str, Any], dict[str, float], float]] = {
    "awp": ({}, {"radius": 0.0}, 1.0),
    "cat": ({"curriculum": False}, {}, 1.0),
    "free": ({}, {"steps": 1}, 1.0),
    "nfgsm": ({}, {"alpha": 0.0}, 1.0),
    "pgd_at": ({"clean_weight": 0.5}, {}, 1.5),
    "yopo": ({"first_layer_grad": "direct"}, {}, 1.0),
}


@plain
@norms
def test_a_ball_of_radius_zero_gives_standard_training(case: Case, norm: str) -> None:
    options, knobs, times = REDUCED.get(case.name, (case.options, {}, 1.0))
    bare = Case(case.name, options, knobs)
    d = driver(bare, ball=Ball(0.0, norm))
    clean = driver(Case("pgd_at"), ball=Ball(0.0, norm))
    b = batch()
    expected = times * flat(clean.field(b, Control(alpha=0, steps=0)).gradients)
    torch.testing.assert_close(
        flat(d.field(b, bare.control(), 0.1).gradients), expected, rtol=1e-10, atol=1e-13
    )


# ---------------------------------------------------------------------------------------------- what is wrong


@every
def test_options_and_controls_are_listed_and_checked(case: Case) -> None:
    method = case.method()
    assert all(knob.meaning for knob in method.controls.values())
    with pytest.raises(ValueError, match="a control of this method has"):
        method.controls.check({"unheard_of": 1})
    with pytest.raises(ValueError, match=f"method '{case.name}'"):
        Case(case.name, {"unheard_of": 1}).method()


def test_samples_are_those_of_the_helpers() -> None:
    assert same(batch().x, samples(6, (1, 4, 4), seed=7)[0])
