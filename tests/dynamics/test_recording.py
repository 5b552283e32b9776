"""A recorded roll-out, visited again: the same bits, however few states were stored."""

import functools
import itertools
import pickle
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import same, slow, split, trace
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import CASES, HEAVY, LONG, PLAIN, Case, constant, driver, smooth
from torch import Tensor, nn

from controlat._util.errors import NonFiniteError
from controlat._util.parallel import World
from controlat.control.cost import Meter
from controlat.control.space import Control, ControlSpace
from controlat.data._stream import Streamed
from controlat.dynamics.driver import Driver, SGDSettings, Step
from controlat.dynamics.recording import Recording, Visit
from controlat.dynamics.rollout import rollout
from controlat.dynamics.rows import gather
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import Rest, State
from controlat.dynamics.strides import strides
from controlat.dynamics.window import state_bytes
from controlat.methods import (
    Batch,
    Context,
    Epoch,
    Update,
)

SIZE = (1, 4, 4)
EPOCHS, PER_EPOCH = 3, 3
TOTAL = EPOCHS * PER_EPOCH
every = pytest.mark.parametrize("case", LONG)


def planned(u: Control, epochs: int = EPOCHS, n: int = 10) -> RunSpec:
    """Three batches per epoch, the last one shorter; the rate changes with every step."""
    spec = constant(u, n, epochs=epochs, held_out=split(8, SIZE, seed=5))
    return replace(spec, rate=lambda t, T: 0.1 * (1 - 0.7 * t / T))


def setup(case: Case) -> tuple[Driver, RunSpec]:
    return driver(case, channels_last=False), planned(case.control())


class Counting:
    """Standard training that counts its hooks: in memory, which is part of the state, and in a list."""

    controls = ControlSpace({}, cost=lambda u: 1)

    def __init__(self, saves: int = -1, stops: int = -1) -> None:
        self.saves, self.stops = saves, stops
        self.calls: list[tuple[str, int]] = []

    def updates(self, ctx: Context, batch: Batch, u: Control) -> Iterator[Update]:
        yield Update(lambda: F.cross_entropy(ctx.logits(batch.x), batch.y))

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        self._count(ctx, "start")

    def end_epoch(self, ctx: Epoch, u: Control) -> None:
        self._count(ctx, "end")
        if ctx.epoch == self.saves:
            ctx.save("mine")
        if ctx.epoch == self.stops:
            ctx.reload("mine")
            ctx.stop("enough")

    def _count(self, ctx: Epoch, name: str) -> None:
        self.calls.append((name, ctx.epoch))
        ctx.memory[name] = ctx.memory.get(name, torch.tensor(0)) + 1


def advance(d: Driver, spec: RunSpec, number: int) -> None:
    """Run the first steps of a plan, and the hooks between whole epochs."""
    epoch, batch = divmod(number, spec.batches_per_epoch)
    for _ in rollout(d, spec, until=epoch):
        pass
    for _ in itertools.islice(rollout(d, spec, epoch=epoch), batch):
        pass


def reference(d: Driver, spec: RunSpec) -> tuple[list[State], State, list[Step], list[Batch]]:
    """The whole state before every step, and the end; batches as they come."""
    states: list[State] = []
    steps = list(rollout(d, spec, before=lambda _: states.append(d.snapshot())))
    batches = [b for e in range(spec.epochs) for b in spec.batches(e)]
    return states, d.snapshot(), steps, batches


def agrees(d: Driver, visit: Visit, states: list[State], batches: list[Batch], spec: RunSpec) -> None:
    """All of the state is as it was, of rows those of the samples that the step touches."""
    expected, b = states[visit.number], batches[visit.number]
    assert same(visit.batch[:5], b[:5])
    assert (visit.control, visit.rate) == (spec.control(b), spec.learning_rate(b.epoch, b.number))
    assert same(replace(d.snapshot(), rows={}), replace(expected, rows={}))
    assert set(d.rows) == set(expected.rows)
    for name, store in d.rows.items():
        found = gather(expected.rows[name], b.indices)
        assert same(gather(store, b.indices), found)


# -------------------------------------------------------------------------------------------------- same bits


@every
def test_states_taken_again_have_the_bits_of_the_run(case: Case) -> None:
    states, end, steps, batches = reference(*setup(case))
    assert len(states) == TOTAL
    for stride in (1, 4):
        d, spec = setup(case)
        rec = Recording.of(d, spec, stride=stride)
        assert (rec.first, rec.last, sorted(rec.stored)) == (0, TOTAL, list(range(0, TOTAL, stride)))
        assert same(rec.end, end)
        assert rec.steps == steps
        for walk, order in ((rec.backward, range(TOTAL)[::-1]), (rec.forward, range(TOTAL)))[:stride]:
            numbers = []
            for visit in walk():
                agrees(d, visit, states, batches, spec)
                step = d.step(visit.batch, visit.control, visit.rate)  # the step itself, and a changed driver
                assert step == steps[visit.number]
                numbers.append(visit.number)
            assert numbers == list(order)


def test_the_cases_keep_networks_and_rows_so_that_the_last_test_says_something() -> None:
    for name, what in (("cat curriculum", "kept"), ("fast early stop", "kept"), ("atta", "rows")):
        d, spec = setup(CASES[name])
        assert getattr(Recording.of(d, spec).end, what), name


WINDOWS = [(1, 5, 2), (2, 4, 1), (3, 6, 3), (4, 9, 2), (0, 9, 5), (8, 9, 1), (5, 8, 9), (0, 3, 2)]


@pytest.mark.parametrize(("first", "last", "stride"), WINDOWS)
def test_windows_may_begin_and_end_anywhere(first: int, last: int, stride: int) -> None:
    method = Counting(saves=0)
    states, end, steps, batches = reference(driver(method), spec := planned(Control()))
    method.calls.clear()
    d = driver(method)
    advance(d, spec, first)
    before = len(method.calls)
    rec = Recording.of(d, spec, first=first, last=last, stride=stride)
    hooks = [("start", e) for e in range(EPOCHS) if first <= e * PER_EPOCH < last]
    hooks += [("end", e) for e in range(EPOCHS) if first < (e + 1) * PER_EPOCH < last]
    hooks += [("end", EPOCHS - 1)] * (last == TOTAL)
    assert sorted(method.calls[before:]) == sorted(hooks)
    assert rec.steps == steps[first:last]
    assert rec.events == [(3, "save", "mine")] * (first < 3 < last)
    if last == TOTAL:
        assert same(rec.end, end)
    for walk in (rec.forward, rec.backward):
        for visit in walk():
            agrees(d, visit, states, batches, spec)
    for number in (last - 1, first):
        agrees(d, rec.at(number), states, batches, spec)


@pytest.mark.parametrize("name", ["atta", "atta reset", "free", "cat", "cat curriculum", "fast early stop"])
@pytest.mark.parametrize(("first", "last", "stride"), [(1, 5, 2), slow(4, 9, 3), (2, 7, 5)])
def test_windows_of_methods_that_carry_something(name: str, first: int, last: int, stride: int) -> None:
    states, _, steps, batches = reference(*setup(CASES[name]))
    d, spec = setup(CASES[name])
    advance(d, spec, first)
    rec = Recording.of(d, spec, first=first, last=last, stride=stride)
    assert rec.steps == steps[first:last]
    for visit in itertools.chain(rec.backward(), rec.forward()):
        agrees(d, visit, states, batches, spec)


def test_only_rows_that_are_touched_are_stored() -> None:
    d, spec = setup(CASES["atta"])
    rec = Recording.of(d, spec, stride=2)
    stored = {n: z for n, z in rec.stored.items() if z.rows}
    assert sorted(stored) == [2, 4, 6, 8]
    for n, z in stored.items():
        touched = spec.indices(n, n + 2)
        assert same(z.index, touched)
        assert len(z.rows["delta"].values) == len(touched)


def test_a_run_goes_on_where_a_recorded_window_ended() -> None:
    d, spec = setup(CASES["atta"])
    _, end, *_ = reference(d, spec)
    d, _ = setup(CASES["atta"])
    for first, last in ((0, 2), (2, 5), (5, TOTAL)):
        Recording.of(d, spec, first=first, last=last)
    assert same(d.snapshot(), end)


@every
def test_the_steps_once_more_by_a_driver_at_the_first_state(case: Case) -> None:
    for first, last in ((0, TOTAL), (2, 7)):
        d, spec = setup(case)
        advance(d, spec, first)
        begin = d.snapshot()
        rec = Recording.of(d, spec, first=first, last=last, stride=3)
        other, _ = setup(case)
        other.restore(begin if first else rec.stored[0])  # at an epoch's start, its hook has been called
        assert list(rec.again(other)) == rec.steps
        assert same(other.snapshot(), rec.end)


# ----------------------------------------------------------------------------------------- an end before time


def stopped() -> tuple[Driver, Counting, RunSpec, Recording]:
    """The second of three epochs ends training, with the network of the first."""
    method = Counting(saves=0, stops=1)
    d, spec = driver(method), planned(Control())
    return d, method, spec, Recording.of(d, spec, stride=2)


def test_a_run_that_its_method_stops_ends_there() -> None:
    d, _, spec, rec = stopped()
    states, end, steps, batches = reference(driver(Counting(saves=0, stops=1)), spec)
    assert (rec.last, len(rec.steps), rec.end.stopped) == (6, 6, "enough")
    assert rec.events == [(3, "save", "mine"), (6, "reload", "mine")]
    assert rec.steps == steps
    assert same(rec.end, end)
    for visit in itertools.chain(rec.backward(), rec.forward()):
        agrees(d, visit, states, batches, spec)
    with rec.put_back():
        d.restore(rec.stored[0])
    assert same(d.snapshot(), rec.end)


def test_steps_once_more_end_as_the_run_that_its_method_stopped() -> None:
    _, method, _, rec = stopped()
    other = driver(method)
    other.restore(rec.stored[0])
    assert list(rec.again(other)) == rec.steps
    assert same(other.snapshot(), rec.end)  # with the network that the last hook put back


def test_a_method_that_has_stopped_leaves_nothing_to_record() -> None:
    d, _, spec, rec = stopped()
    with pytest.raises(ValueError, match="enough"):
        Recording.of(d, spec, first=rec.last)


# ------------------------------------------------------------------------------------------------------ limit


def held(*states: State) -> int:
    """Bytes of all tensors, each counted once."""
    sizes: dict[int, int] = {}

    def walk(value: object) -> None:
        if isinstance(value, Tensor):
            sizes[id(value)] = value.numel() * value.element_size()
        if isinstance(value, (State, Rest)):
            value = vars(value)
        if isinstance(value, dict):
            value = list(value.values())
        for part in value if isinstance(value, (list, tuple)) else ():
            walk(part)

    walk(states)
    return sum(sizes.values())


@pytest.mark.parametrize("name", [*PLAIN, "atta reset", "fast previous"])
def test_states_take_no_more_than_the_limit(name: str) -> None:
    """Also of a driver that has taken no step, whose momentum buffers and rows are still to come."""
    case = CASES[name]
    d, spec = driver(case, channels_last=False), planned(case.control(), n=24, epochs=2)
    full = held(reference(d, spec)[1])
    for factor in (8, 40):
        d = driver(case, channels_last=False)
        rec = Recording.of(d, spec, limit=factor * full)
        stretch = rec.stride if rec.stride > 1 else 0  # states of one stretch are held beside the stored ones
        assert held(*rec.stored.values(), rec.end) + stretch * full <= factor * full
        assert rec.stride <= 4


def test_the_stride_is_the_smallest_that_fits() -> None:
    d, spec = driver(CASES["pgd_at"], channels_last=False), planned(CASES["pgd_at"].control(), n=100)
    for _ in itertools.islice(rollout(d, spec), 1):  # then there are momentum buffers
        pass
    size, begun, strides = held(d.snapshot()), d.snapshot(), {}
    for states in (80, 76, 75, 40, 20, 19):  # 74 steps
        d.restore(begun)
        strides[states] = Recording.of(d, spec, first=1, limit=(states + 0.5) * size).stride
    fits = {n: [s for s in range(1, 75) if -(-74 // s) + s * (s > 1) + 1 <= n] for n in strides}
    assert strides == {n: found[0] for n, found in fits.items()}
    assert strides[75] == 1
    assert strides[40] == 2
    assert strides[20] > 4


@pytest.mark.parametrize("n", range(4, 120, 8))
def test_a_limit_that_is_too_small_is_an_error_that_says_what_to_allow(n: int) -> None:
    spec = planned(Control(), n=4 * n, epochs=1)
    optimizer = SGDSettings(0.0)
    with pytest.raises(ValueError, match=r"do not fit .* allow \S+ GiB") as e:
        Recording.of(driver(Counting(), optimizer=optimizer), spec, limit=1000)
    allowed = float(re.findall(r"allow (\S+) GiB", str(e.value))[0]) * 2**30
    rec = Recording.of(driver(Counting(), optimizer=optimizer), spec, limit=allowed)
    assert held(*rec.stored.values(), rec.end) <= allowed


def test_a_refused_limit_leaves_the_driver_alone() -> None:
    d, spec = setup(CASES["pgd_at"])
    before = d.snapshot()
    with pytest.raises(ValueError, match="allow"):
        Recording.of(d, spec, limit=1)
    assert same(d.snapshot(), before)


def test_a_limit_may_be_infinite() -> None:
    assert Recording.of(*setup(CASES["pgd_at"]), limit=float("inf")).stride == 1


@pytest.mark.parametrize("case", [CASES["pgd_at"], CASES["atta"], CASES["cat curriculum"]])
def test_whether_a_plan_fits_can_be_asked_before_it_is_run(case: Case) -> None:
    d, spec = driver(case, channels_last=False), planned(case.control(), epochs=8)
    before, left, meter = d.snapshot(), trace(d.model), d.meter.copy()
    heard: list[tuple[str, str]] = []
    d.notice = notice = lambda what, name: heard.append((what, name))
    size = state_bytes(d, spec, 0)
    steps = called(d, "step")
    answers = {n: Recording.check(d, spec, limit=(n + 0.5) * size) for n in (9, 11, 25)}
    assert len(steps) == 3  # one for each
    assert answers == {25: (1,), 11: (4, 1), 9: (6, 2, 1)}
    with pytest.raises(ValueError, match=r"24 states of .* do not fit") as asked:
        Recording.check(d, spec, limit=7.5 * size)
    assert same(d.snapshot(), before)
    assert same(trace(d.model), left)
    assert (d.meter, d.notice, heard) == (meter, notice, [])
    with pytest.raises(ValueError, match=r"24 states of .* do not fit") as run:
        Recording.of(d, spec, limit=7.5 * size)
    assert str(asked.value) == str(run.value)
    for n, nested in answers.items():
        d.restore(before)
        rec = Recording.of(d, spec, limit=(n + 0.5) * size)
        assert (rec.stride, *rec.finer) == nested
    assert Recording.check(d, spec, first=2, last=8, stride=3, limit=1) == (3, 1)


# --------------------------------------------------------------------------------------------- nested strides

LONG = 8 * PER_EPOCH
LEVELS = {11: 2, 9: 3, 8: 4}  # strides for so many steps by the number of states that a limit allows


def called(d: Driver, name: str) -> list[tuple[Any, ...]]:
    """The arguments of the calls of a driver's method from now on."""
    calls: list[tuple[Any, ...]] = []
    method = getattr(d, name)

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        return method(*arguments)

    setattr(d, name, call)
    return calls


def alive(d: Driver) -> list[int]:
    """How many snapshots there are whenever one is taken from now on."""
    counts: list[int] = []
    taken: list[weakref.ref[Tensor]] = []
    snapshot = d.snapshot

    def take(touched: Tensor | None = None) -> State:
        found = snapshot(touched)
        taken.append(weakref.ref(next(iter(found.model.values()))))
        counts.append(sum(t() is not None for t in taken))
        return found

    d.snapshot = take  # type: ignore[method-assign]
    return counts


def systems(name: str) -> tuple[Driver, RunSpec]:
    """A system by name for a longer run."""
    if name in CASES:
        return driver(CASES[name], channels_last=False), planned(CASES[name].control(), epochs=8)
    return driver(Counting(saves=2, stops=6 if name == "stops" else -1)), planned(Control(), epochs=8)


@pytest.mark.parametrize(
    "name", [*map(slow, ("pgd_at", "atta reset", "free", "cat curriculum")), "atta", "hooks", "stops"]
)
def test_states_made_at_several_levels_have_the_bits_of_the_run(name: str) -> None:
    states, end, steps, batches = reference(*systems(name))
    assert len(states) == (LONG if name != "stops" else 7 * PER_EPOCH)
    for allowed, levels in LEVELS.items():
        d, spec = systems(name)
        limit = (allowed + 0.5) * state_bytes(d, spec, 0)
        counts = alive(d)
        rec = Recording.of(d, spec, limit=limit)
        stored = dict(rec.stored)
        assert 1 + len(rec.finer) == levels
        assert rec.steps == steps
        assert same(rec.end, end)
        numbers = []
        for visit in rec.backward():
            if not rec.events:  # networks that a method puts aside come on top
                assert max(counts) <= allowed
            agrees(d, visit, states, batches, spec)
            assert d.step(visit.batch, visit.control, visit.rate) == steps[visit.number]
            numbers.append(visit.number)
        assert numbers == list(range(len(states)))[::-1]
        for visit in itertools.chain(rec.forward(), rec.backward(10), map(rec.at, (20, 0, 7, 18))):
            agrees(d, visit, states, batches, spec)
        assert rec.stored.keys() == stored.keys()
        assert all(rec.stored[n] is s for n, s in stored.items())


@given(st.integers(1, 40), st.integers(2, 16), st.data())
@settings(max_examples=40, deadline=None)
def test_no_more_states_are_held_than_the_limit_allows(steps: int, allowed: int, data: st.DataObject) -> None:
    d, spec = driver(Counting()), planned(Control(), epochs=14)
    limit, nested = (allowed + 0.5) * state_bytes(d, spec, 0), strides(steps, allowed)
    counts = alive(d)
    if not nested:
        with pytest.raises(ValueError, match="do not fit"):
            Recording.of(d, spec, last=steps, limit=limit)
        return
    rec = Recording.of(d, spec, last=steps, limit=limit)
    assert (rec.stride, *rec.finer) == nested
    again = called(d, "step")
    until = data.draw(st.integers(0, steps))
    assert [v.number for v in rec.backward(until)] == list(range(until, steps))[::-1]
    assert len(again) <= (len(nested) - 1) * steps
    assert [v.number for v in rec.forward()] == list(range(steps))
    again.clear()
    number = data.draw(st.integers(0, steps - 1))
    assert rec.at(number).number == number
    assert len(again) == number % rec.stride  # however many levels there are
    assert max(counts) <= allowed
    if len(nested) > 1:
        for _ in rec.backward():
            own = d.snapshot()  # there is room for one of the visitor's
            del own
        assert max(counts) <= allowed


@functools.cache
def least(steps: int, levels: int) -> int:
    """The fewest states that serve so many steps."""
    if levels == 1:
        return steps
    return min(-(-steps // s) + least(s, levels - 1) - 1 for s in range(1, steps + 1))


@given(st.integers(1, 80), st.integers(1, 40))
@settings(deadline=None)
def test_strides_are_the_fewest_and_then_the_smallest_that_fit(steps: int, states: int) -> None:
    found = [k for k in range(1, 9) if least(steps, k) + 1 + (k > 1) <= states]
    nested = strides(steps, states)
    assert len(nested) == min(found, default=0)
    free = states - 1 - (len(nested) > 1)
    for below, stride in zip(reversed(range(len(nested))), nested, strict=True):
        if below:
            fits = (s for s in range(1, steps + 1) if -(-steps // s) + least(s, below) - 1 <= free)
            assert stride == next(fits)
        free -= -(-steps // stride) - 1
        assert free >= 1
        steps = stride
    assert steps == 1 or not nested


def test_a_long_run_fits_in_few_states() -> None:
    """Of a large network: 60 epochs of 391 steps in 24 states of 85 MiB."""
    assert strides(11_730, 24) == (1676, 419, 105, 27, 9, 3, 1)
    assert [len(strides(11_730, n)) for n in (11_731, 218, 80, 40)] == [1, 2, 3, 5]
    assert strides(10**7, 40)


def test_states_at_every_level_have_the_rows_of_the_steps_that_they_serve() -> None:
    d, spec = setup(CASES["atta"])
    rec = Recording.of(d, spec, stride=4)
    rec.finer = (2, 1)
    taken = called(d, "snapshot")
    list(rec.backward())
    spans = [(6, 8), (7, 8), (5, 6), (2, 4), (3, 4), (1, 2)]
    assert same([touched for (touched,) in taken], [spec.indices(*span) for span in spans])


def test_a_stretch_over_several_epochs_has_every_row_once() -> None:
    d, spec = setup(CASES["atta"])
    z = Recording.of(d, spec, stride=4).stored[4]
    used = torch.cat([spec.order(1)[1], spec.order(1)[2], spec.order(2)[0], spec.order(2)[1]])
    assert z.index is not None
    assert z.index.tolist() == sorted(set(used.tolist()))
    assert len(z.rows["delta"].values) == len(z.index) < len(used)


def test_a_visitor_that_leaves_early_leaves_no_state_behind() -> None:
    d, spec = systems("pgd_at")
    limit = 8.5 * state_bytes(d, spec, 0)
    counts = alive(d)
    rec = Recording.of(d, spec, limit=limit)
    walk = rec.backward(5)
    next(walk)
    del walk
    d.snapshot()
    assert counts[-1] == len(rec.stored) + 2  # and the end


# ------------------------------------------------------------------------------------------- what it looks at


def test_a_visit_reads_its_own_batch_only() -> None:
    read: list[int] = []

    def image(position: int) -> Tensor:
        read.append(position)
        return torch.full(SIZE, position, dtype=torch.uint8)

    d = driver(Counting(), nn.Sequential(nn.Flatten(), nn.Linear(16, 4)))
    data = Streamed(image, torch.arange(10) % 4, SIZE, torch.arange(10), workers=2)
    spec = replace(planned(Control()), data=data)
    rec = Recording.of(d, spec, stride=1)
    for walk in (rec.backward(), rec.forward(), map(rec.at, (4, 0))):
        read.clear()
        for visit in walk:
            assert sorted(read) == visit.batch.indices.sort().values.tolist()
            read.clear()


def test_some_batches_of_an_epoch() -> None:
    spec = planned(Control())
    every = list(spec.batches(1))
    for first, last in itertools.product(range(4), range(4)):
        assert same(list(spec.batches(1, first, last)), every[first:last])


def test_an_epoch_is_shuffled_once_for_visits_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    d, spec = driver(Counting()), planned(Control(), n=11)
    rec = Recording.of(d, spec, stride=1)
    shuffled, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **o: shuffled.append(n) or randperm(n, **o))
    list(rec.backward())
    assert len(shuffled) <= EPOCHS


def test_plans_that_differ_have_orders_of_their_own() -> None:
    spec = planned(Control())
    others = [replace(spec, seed=8), replace(spec, batch_size=5), replace(spec, data=split(9, SIZE))]
    expected = [[p.order(e) for e in range(3)] for p in (spec, *others)]
    for _ in range(2):
        for e in (2, 0, 1):
            assert same([p.order(e) for p in (spec, *others)], [orders[e] for orders in expected])
    assert not same(expected[0][0], expected[1][0])
    assert spec == replace(spec)
    bare = replace(spec, controller=Control, rate=float)  # type: ignore[arg-type]
    assert same(pickle.loads(pickle.dumps(bare)).order(1), spec.order(1))


# --------------------------------------------------------------------------------------------- what it leaves


@every
def test_the_driver_is_put_back_to_the_end_and_its_meter_is_untouched(case: Case) -> None:
    d, spec = setup(case)
    rec = Recording.of(d, spec, stride=2)
    end, meter, counts, left = d.snapshot(), d.meter, d.meter.copy(), trace(d.model)
    with rec.put_back():
        for visit in rec.backward():
            if visit.number == 3:
                d.step(visit.batch, visit.control, visit.rate)
                break
    assert same(d.snapshot(), end)
    assert same(trace(d.model), left)
    assert d.meter is meter
    counts.add(rec.steps[3].spent)  # what the visitor did
    assert meter == counts
    with rec.put_back():
        d.restore(rec.stored[2])
        d.meter = Meter()
    assert same(d.snapshot(), end)
    assert d.meter is meter


def test_taking_steps_again_is_counted_apart_and_costs_at_most_the_run() -> None:
    for case in CASES.values():
        d, spec = setup(case)
        rec = Recording.of(d, spec, stride=4)
        ran, counts = d.meter, d.meter.copy()
        assert rec.spent == Meter()
        for _ in rec.backward():
            assert d.meter is ran
        assert ran == counts
        # states 0, 4, 8 are stored, and nothing is taken again to reach the one of the last stretch
        again = sum(s.spent.gradients for s in rec.steps[:8])
        least = again - sum(rec.steps[i].spent.gradients for i in (3, 7))
        assert least <= rec.spent.gradients <= again + 60  # hooks between epochs count too
        assert rec.spent.gradients <= counts.gradients
    d, spec = setup(CASES["pgd_at"])
    rec = Recording.of(d, spec, stride=1)
    list(rec.backward())
    assert rec.spent == Meter()


def test_hooks_are_called_again_in_stretches_only_and_are_not_noticed_twice() -> None:
    method = Counting(saves=0)
    d, spec = driver(method), planned(Control())
    rec = Recording.of(d, spec, stride=4)  # steps 0-3, 4-7, 8: epochs begin at 3 and 6
    events = list(rec.events)
    assert events == [(3, "save", "mine")]
    method.calls.clear()
    list(rec.backward())
    assert {("end", 0), ("start", 1), ("end", 1), ("start", 2)} == set(method.calls)
    assert len(method.calls) == 4
    assert rec.events == events
    assert int(rec.end.memory["start"]) == int(rec.end.memory["end"]) == EPOCHS


def test_a_users_own_notice_hears_what_happens_and_stays() -> None:
    heard: list[tuple[str, str]] = []
    d, spec = driver(Counting(saves=0)), planned(Control())
    d.notice = notice = lambda what, name: heard.append((what, name))
    Recording.of(d, spec)
    assert d.notice is notice
    assert heard == [("save", "mine")]


def test_progress_is_told_every_step() -> None:
    d, spec = setup(CASES["pgd_at"])
    told: list[Step] = []
    rec = Recording.of(d, spec, progress=told.append)
    assert told == rec.steps


@pytest.mark.parametrize("name", ["atta", "cat curriculum", "free", "fast early stop"])
def test_any_step_can_be_gone_to(name: str) -> None:
    states, _, _, batches = reference(*setup(CASES[name]))
    d, spec = setup(CASES[name])
    rec = Recording.of(d, spec, first=0, last=8, stride=4)
    meter, counts = d.meter, d.meter.copy()
    for number in (7, 0, 3, 4, 2, 6):
        visit = rec.at(number)
        assert visit.number == number
        agrees(d, visit, states, batches, spec)
    assert d.meter is meter
    assert meter == counts
    for number in (-1, 8):
        with pytest.raises(ValueError, match=rf"the steps 0\.\.7, not {number}"):
            rec.at(number)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (0, 10), (3, 3), (5, 2), (9, None), (0, 0), (12, 15)])
def test_windows_outside_of_the_plan_are_refused(first: int, last: int | None) -> None:
    d, spec = setup(CASES["pgd_at"])
    before = d.snapshot()
    stop = TOTAL if last is None else last
    with pytest.raises(ValueError, match=rf"within 0\.\.9, first below last, got {first} and {stop}"):
        Recording.of(d, spec, first=first, last=last)
    assert same(d.snapshot(), before)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_below_one_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride must be >= 1, got {stride}"):
        Recording.of(*setup(CASES["pgd_at"]), stride=stride)


@pytest.mark.parametrize("value", [2.5, 2.0, "3", True, float("nan")])
@pytest.mark.parametrize("name", ["first", "last", "stride"])
def test_what_is_not_a_whole_number_is_refused(name: str, value: Any) -> None:
    for ask in (Recording.of, Recording.check):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, got {value!r}"):
            ask(*setup(CASES["pgd_at"]), **{name: value})


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("-inf"), "1", True, None])
def test_a_limit_that_is_not_a_positive_number_is_refused(limit: Any) -> None:
    for ask in (Recording.of, Recording.check):
        with pytest.raises(ValueError, match=f"limit must be a positive number of bytes, got {limit!r}"):
            ask(*setup(CASES["pgd_at"]), limit=limit)


def test_several_processes_are_refused() -> None:
    d, spec = setup(CASES["pgd_at"])
    with pytest.raises(ValueError, match="without torchrun"):
        Recording.of(d, replace(spec, world=World(0, 2)))


def test_training_that_diverges_is_an_error_and_leaves_no_notice() -> None:
    d = driver(Counting(), smooth(), optimizer=HEAVY)
    spec = replace(planned(Control()), rate=lambda t, T: 1e300)
    with pytest.raises(NonFiniteError):
        Recording.of(d, spec)
    assert d.notice is None
