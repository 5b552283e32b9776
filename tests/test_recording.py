"""A recorded roll-out, visited again: the same bits, however few states were stored."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import same, split, trace
from systems import CASES, HEAVY, PLAIN, Case, constant, driver, smooth
from torch import Tensor

from controlat.control import Control, ControlSpace
from controlat.dynamics import Driver, SGDSettings, Step, rollout
from controlat.methods import Batch, Context, Epoch, Rows, Update
from controlat.network import Meter, NonFiniteError
from controlat.parallel import World
from controlat.plan import Plan
from controlat.recording import Recording, Visit
from controlat.state import Snapshot, gather

SIZE = (1, 4, 4)
EPOCHS, PER_EPOCH = 3, 3
TOTAL = EPOCHS * PER_EPOCH
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def planned(u: Control, epochs: int = EPOCHS, n: int = 10) -> Plan:
    """Three batches per epoch, the last one shorter; the rate changes with every step."""
    plan = constant(u, n, epochs=epochs, held_out=split(8, SIZE, seed=5))
    return replace(plan, rate=lambda t, T: 0.1 * (1 - 0.7 * t / T))


def setup(case: Case) -> tuple[Driver, Plan]:
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


def advance(d: Driver, plan: Plan, number: int) -> None:
    """Run the first steps of a plan, and the hooks between whole epochs."""
    epoch, batch = divmod(number, plan.batches_per_epoch)
    for _ in rollout(d, plan, until=epoch):
        pass
    for _ in itertools.islice(rollout(d, plan, epoch=epoch), batch):
        pass


def reference(d: Driver, plan: Plan) -> tuple[list[Snapshot], Snapshot, list[Step], list[Batch]]:
    """The whole state before every step, and the end; batches as they come."""
    states: list[Snapshot] = []
    steps = list(rollout(d, plan, record=lambda number, _: states.append(d.snapshot())))
    batches = [b for e in range(plan.epochs) for b in plan.batches(e)]
    return states, d.snapshot(), steps, batches


def agrees(d: Driver, visit: Visit, states: list[Snapshot], batches: list[Batch], plan: Plan) -> None:
    """All of the state is as it was, of rows those of the samples that the step touches."""
    expected, b = states[visit.number], batches[visit.number]
    assert same(visit.batch[:5], b[:5])
    assert (visit.control, visit.rate) == (plan.control(b), plan.learning_rate(b.epoch, b.number))
    assert same(d.snapshot()._replace(rows={}), expected._replace(rows={}))
    assert set(d.rows) == set(expected.rows)
    for name, store in d.rows.items():
        found = gather(Rows(expected.rows[name]["values"], expected.rows[name]["seen"]), b.indices)
        assert same(gather(store, b.indices), found)


# -------------------------------------------------------------------------------------------------- same bits


@every
def test_states_taken_again_have_the_bits_of_the_run(case: Case) -> None:
    states, end, steps, batches = reference(*setup(case))
    assert len(states) == TOTAL
    for stride in (1, 4):
        d, plan = setup(case)
        rec = Recording.of(d, plan, stride=stride)
        assert (rec.first, rec.last, sorted(rec.stored)) == (0, TOTAL, list(range(0, TOTAL, stride)))
        assert same(rec.end, end)
        assert rec.steps == steps
        for walk, order in ((rec.backward, range(TOTAL)[::-1]), (rec.forward, range(TOTAL)))[:stride]:
            numbers = []
            for visit in walk():
                agrees(d, visit, states, batches, plan)
                step = d.step(visit.batch, visit.control, visit.rate)  # the step itself, and a changed driver
                assert step == steps[visit.number]
                numbers.append(visit.number)
            assert numbers == list(order)


def test_the_cases_keep_networks_and_rows_so_that_the_last_test_says_something() -> None:
    for name, what in (("cat curriculum", "kept"), ("fast early stop", "kept"), ("atta", "rows")):
        d, plan = setup(CASES[name])
        assert getattr(Recording.of(d, plan).end, what), name


WINDOWS = [(1, 5, 2), (2, 4, 1), (3, 6, 3), (4, 9, 2), (0, 9, 5), (8, 9, 1), (5, 8, 9), (0, 3, 2)]


@pytest.mark.parametrize(("first", "last", "stride"), WINDOWS)
def test_windows_may_begin_and_end_anywhere(first: int, last: int, stride: int) -> None:
    method = Counting(saves=0)
    states, end, steps, batches = reference(driver(method), plan := planned(Control()))
    method.calls.clear()
    d = driver(method)
    advance(d, plan, first)
    before = len(method.calls)
    rec = Recording.of(d, plan, first=first, last=last, stride=stride)
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
            agrees(d, visit, states, batches, plan)
    for number in (last - 1, first):
        agrees(d, rec.at(number), states, batches, plan)


@pytest.mark.parametrize("name", ["atta", "atta reset", "free", "cat", "cat curriculum", "fast early stop"])
@pytest.mark.parametrize(("first", "last", "stride"), [(1, 5, 2), (4, 9, 3), (2, 7, 5)])
def test_windows_of_methods_that_carry_something(name: str, first: int, last: int, stride: int) -> None:
    states, _, steps, batches = reference(*setup(CASES[name]))
    d, plan = setup(CASES[name])
    advance(d, plan, first)
    rec = Recording.of(d, plan, first=first, last=last, stride=stride)
    assert rec.steps == steps[first:last]
    for visit in itertools.chain(rec.backward(), rec.forward()):
        agrees(d, visit, states, batches, plan)


def test_only_rows_that_are_touched_are_stored() -> None:
    d, plan = setup(CASES["atta"])
    rec = Recording.of(d, plan, stride=2)
    stored = {n: s.rows["delta"] for n, s in rec.stored.items() if s.rows}
    assert sorted(stored) == [2, 4, 6, 8]
    for n, rows in stored.items():
        touched = plan.indices(n, n + 2)
        assert same(rows["index"], touched)
        assert len(rows["values"]) == len(touched)


def test_a_run_goes_on_where_a_recorded_window_ended() -> None:
    d, plan = setup(CASES["atta"])
    _, end, *_ = reference(d, plan)
    d, _ = setup(CASES["atta"])
    for first, last in ((0, 2), (2, 5), (5, TOTAL)):
        Recording.of(d, plan, first=first, last=last)
    assert same(d.snapshot(), end)


@every
def test_the_steps_once_more_by_a_driver_at_the_first_state(case: Case) -> None:
    for first, last in ((0, TOTAL), (2, 7)):
        d, plan = setup(case)
        advance(d, plan, first)
        begin = d.snapshot()
        rec = Recording.of(d, plan, first=first, last=last, stride=3)
        other, _ = setup(case)
        other.restore(begin if first else rec.stored[0])  # at an epoch's start, its hook has been called
        assert list(rec.again(other)) == rec.steps
        assert same(other.snapshot(), rec.end)


# ----------------------------------------------------------------------------------------- an end before time


def stopped() -> tuple[Driver, Counting, Plan, Recording]:
    """The second of three epochs ends training, with the network of the first."""
    method = Counting(saves=0, stops=1)
    d, plan = driver(method), planned(Control())
    return d, method, plan, Recording.of(d, plan, stride=2)


def test_a_run_that_its_method_stops_ends_there() -> None:
    d, _, plan, rec = stopped()
    states, end, steps, batches = reference(driver(Counting(saves=0, stops=1)), plan)
    assert (rec.last, len(rec.steps), rec.end.stopped) == (6, 6, "enough")
    assert rec.events == [(3, "save", "mine"), (6, "reload", "mine")]
    assert rec.steps == steps
    assert same(rec.end, end)
    for visit in itertools.chain(rec.backward(), rec.forward()):
        agrees(d, visit, states, batches, plan)
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
    d, _, plan, rec = stopped()
    with pytest.raises(ValueError, match="enough"):
        Recording.of(d, plan, first=rec.last)


# ------------------------------------------------------------------------------------------------------ limit


def held(*states: Snapshot) -> int:
    """Bytes of all tensors, each counted once."""
    sizes: dict[int, int] = {}

    def walk(value: object) -> None:
        if isinstance(value, Tensor):
            sizes[id(value)] = value.numel() * value.element_size()
        for part in value.values() if isinstance(value, dict) else value if _listed(value) else ():  # type: ignore[attr-defined]
            walk(part)

    walk(states)
    return sum(sizes.values())


def _listed(value: object) -> bool:
    return isinstance(value, (list, tuple))


@pytest.mark.parametrize("name", [*PLAIN, "atta reset", "fast previous"])
def test_states_take_no_more_than_the_limit(name: str) -> None:
    """Also of a driver that has taken no step, whose momentum buffers and rows are still to come."""
    case = CASES[name]
    d, plan = driver(case, channels_last=False), planned(case.control(), n=24, epochs=2)
    full = held(reference(d, plan)[1])
    for factor in (8, 40):
        d = driver(case, channels_last=False)
        rec = Recording.of(d, plan, limit=factor * full)
        stretch = rec.stride if rec.stride > 1 else 0  # states of one stretch are held beside the stored ones
        assert held(*rec.stored.values(), rec.end) + stretch * full <= factor * full
        assert rec.stride <= 4


def test_the_stride_is_the_smallest_that_fits() -> None:
    d, plan = driver(CASES["pgd_at"], channels_last=False), planned(CASES["pgd_at"].control(), n=100)
    for _ in itertools.islice(rollout(d, plan), 1):  # then there are momentum buffers
        pass
    size, begun, strides = held(d.snapshot()), d.snapshot(), {}
    for states in (80, 76, 75, 40, 20, 19):  # 74 steps
        d.restore(begun)
        strides[states] = Recording.of(d, plan, first=1, limit=(states + 0.5) * size).stride
    fits = {n: [s for s in range(1, 75) if -(-74 // s) + s * (s > 1) + 1 <= n] for n in strides}
    assert strides == {n: found[0] for n, found in fits.items()}
    assert strides[75] == 1
    assert strides[40] == 2
    assert strides[20] > 4


@pytest.mark.parametrize("n", range(4, 120, 8))
def test_a_limit_that_is_too_small_is_an_error_that_says_what_to_allow(n: int) -> None:
    plan = planned(Control(), n=4 * n, epochs=1)
    optimizer = SGDSettings(0.0)
    with pytest.raises(ValueError, match=r"do not fit .* allow \S+ GiB, or look at a shorter window") as e:
        Recording.of(driver(Counting(), optimizer=optimizer), plan, limit=1000)
    allowed = float(re.findall(r"allow (\S+) GiB", str(e.value))[0]) * 2**30
    rec = Recording.of(driver(Counting(), optimizer=optimizer), plan, limit=allowed)
    assert held(*rec.stored.values(), rec.end) <= allowed


def test_a_refused_limit_leaves_the_driver_alone() -> None:
    d, plan = setup(CASES["pgd_at"])
    before = d.snapshot()
    with pytest.raises(ValueError, match="allow"):
        Recording.of(d, plan, limit=0)
    assert same(d.snapshot(), before)


# --------------------------------------------------------------------------------------------- what it leaves


@every
def test_the_driver_is_put_back_to_the_end_and_its_meter_is_untouched(case: Case) -> None:
    d, plan = setup(case)
    rec = Recording.of(d, plan, stride=2)
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
        d, plan = setup(case)
        rec = Recording.of(d, plan, stride=4)
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
    d, plan = setup(CASES["pgd_at"])
    rec = Recording.of(d, plan, stride=1)
    list(rec.backward())
    assert rec.spent == Meter()


def test_hooks_are_called_again_in_stretches_only_and_are_not_noticed_twice() -> None:
    method = Counting(saves=0)
    d, plan = driver(method), planned(Control())
    rec = Recording.of(d, plan, stride=4)  # steps 0-3, 4-7, 8: epochs begin at 3 and 6
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
    d, plan = driver(Counting(saves=0)), planned(Control())
    d.notice = notice = lambda what, name: heard.append((what, name))
    Recording.of(d, plan)
    assert d.notice is notice
    assert heard == [("save", "mine")]


def test_progress_is_told_every_step() -> None:
    d, plan = setup(CASES["pgd_at"])
    told: list[Step] = []
    rec = Recording.of(d, plan, progress=told.append)
    assert told == rec.steps


@pytest.mark.parametrize("name", ["atta", "cat curriculum", "free", "fast early stop"])
def test_any_step_can_be_gone_to(name: str) -> None:
    states, _, _, batches = reference(*setup(CASES[name]))
    d, plan = setup(CASES[name])
    rec = Recording.of(d, plan, first=0, last=8, stride=4)
    meter, counts = d.meter, d.meter.copy()
    for number in (7, 0, 3, 4, 2, 6):
        visit = rec.at(number)
        assert visit.number == number
        agrees(d, visit, states, batches, plan)
    assert d.meter is meter
    assert meter == counts
    for number in (-1, 8):
        with pytest.raises(ValueError, match=rf"the steps 0\.\.7, not {number}"):
            rec.at(number)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (0, 10), (3, 3), (5, 2), (9, None), (0, 0), (12, 15)])
def test_windows_outside_of_the_plan_are_refused(first: int, last: int | None) -> None:
    d, plan = setup(CASES["pgd_at"])
    before = d.snapshot()
    stop = TOTAL if last is None else last
    with pytest.raises(ValueError, match=rf"within 0\.\.9, first below last, got {first} and {stop}"):
        Recording.of(d, plan, first=first, last=last)
    assert same(d.snapshot(), before)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_stride_below_one_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride must be >= 1, got {stride}"):
        Recording.of(*setup(CASES["pgd_at"]), stride=stride)


def test_several_processes_are_refused() -> None:
    d, plan = setup(CASES["pgd_at"])
    with pytest.raises(ValueError, match="without torchrun"):
        Recording.of(d, replace(plan, world=World(0, 2)))


def test_training_that_diverges_is_an_error_and_leaves_no_notice() -> None:
    d = driver(Counting(), smooth(), optimizer=HEAVY)
    plan = replace(planned(Control()), rate=lambda t, T: 1e300)
    with pytest.raises(NonFiniteError):
        Recording.of(d, plan)
    assert d.notice is None
