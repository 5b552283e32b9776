"""Images decoded as they are needed: the same values as in memory, a few batches ahead, no thread left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from helpers import GUARD, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.data import Augment, Dataset, Split
from controlat.data._stream import Streamed, default_workers
from controlat.dynamics.run_spec import RunSpec

SHAPE = (3, 2, 4)
AHEAD = 2  # batches that may be decoded beside the one in use


def image(position: int) -> Tensor:
    """An image that no other position has."""
    return torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(position)).to(torch.uint8)


class Reader:
    """A source that counts what is read, and can have a bad picture."""

    def __init__(self, bad: int | None = None) -> None:
        self.bad, self.read, self.more = bad, list[int](), threading.Condition()
        self.error = ValueError(f"picture {bad}: cannot be read")

    def __call__(self, position: int) -> Tensor:
        with self.more:
            self.read.append(position)
            self.more.notify_all()
        if position == self.bad:
            raise self.error
        return image(position)

    def wait_for(self, n: int) -> None:
        """Until n pictures have been read."""
        with self.more:
            assert self.more.wait_for(lambda: len(self.read) >= n, GUARD)


def streamed(n: int, read: Callable[[int], Tensor] = image, workers: int = 3) -> Streamed:
    """n images, of which sample i is at position 10 + i of the source."""
    return Streamed(read, torch.arange(n) % 4, SHAPE, torch.arange(n) + 10, workers)


def in_memory(n: int) -> Split:
    return Split(torch.stack([image(10 + i) for i in range(n)]), torch.arange(n) % 4, scale=255)


def decoders() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("decode")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert decoders() == []


# ----------------------------------------------------------------------------------------------------- values


@given(data=st.data(), n=st.integers(1, 12), workers=st.integers(1, 5))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_a_stream_is_take_of_each_chunk_whatever_the_number_of_workers(
    data: st.DataObject, n: int, workers: int
) -> None:
    chunk = st.lists(st.integers(0, n - 1), min_size=0, max_size=5)
    chunks = [torch.tensor(c, dtype=torch.int64) for c in data.draw(st.lists(chunk, max_size=6))]
    reference, found = in_memory(n), streamed(n, workers=workers)
    expected = [reference.take(c) for c in chunks]
    assert same(list(found.stream(chunks)), expected)
    assert same(list(reference.stream(chunks)), expected)
    assert same([found.take(c) for c in chunks], expected)


def test_the_order_holds_where_the_first_picture_takes_longest() -> None:
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for index in (torch.arange(9), order):
        read = Reader()

        def last(position: int, read: Reader = read) -> Tensor:
            if position == 10:
                read.wait_for(8)
            return read(position)

        x, y = streamed(9, last, workers=4).take(index)
        assert read.read[-1] == 10
        assert same((x, y), in_memory(9).take(index))


def test_what_is_handed_out() -> None:
    x, y = streamed(5).take(torch.tensor([4, 1, 1]))
    assert (x.dtype, y.dtype, y.tolist()) == (torch.float32, torch.int64, [0, 1, 1])
    assert torch.equal(x[0], image(14).float().div(255))
    x.fill_(9)
    assert streamed(5).take(torch.tensor([4]))[0].max() <= 1
    assert (len(streamed(5)), streamed(5).in_shape) == (5, SHAPE)


def test_nothing_asked_for_is_nothing_read() -> None:
    read = Reader()
    x, y = streamed(5, read).take(torch.tensor([], dtype=torch.int64))
    assert (x.shape, y.shape) == ((0, *SHAPE), (0,))
    assert list(streamed(5, read).stream([])) == []
    streamed(5, read).stream([torch.arange(5)])  # not before the first batch is asked for
    assert read.read == []


@given(data=st.data(), n=st.integers(1, 12))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_subsets_of_subsets_by_position_and_by_mask(data: st.DataObject, n: int) -> None:
    found, reference = streamed(n), in_memory(n)
    for _ in range(data.draw(st.integers(1, 3))):
        size = len(found)
        if data.draw(st.booleans()):
            index = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8)))
        else:
            mask = data.draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
            index = torch.tensor(mask)
        found, reference = found.subset(index), reference.subset(index)
    assert torch.equal(found.y, reference.y)
    everything = torch.arange(len(found))
    assert same(found.take(everything), reference.take(everything))
    assert (found.workers, found.in_shape) == (3, SHAPE)


def test_a_device_is_kept_by_subsets_and_used_by_batches() -> None:
    found = streamed(6).to("meta").subset(torch.tensor([3, 0, 5]))
    x, y = found.take(torch.tensor([1, 2]))
    assert (x.device.type, y.device.type, x.shape) == ("meta", "meta", (2, *SHAPE))
    back = found.to("cpu")
    assert same(back.take(torch.arange(3)), in_memory(6).take(torch.tensor([3, 0, 5])))
    assert (found.device, back.device) == ("meta", "cpu")


@pytest.mark.parametrize("n", [1, 7, 300])  # 300: more than one chunk
def test_in_memory_is_the_same_to_the_bit(n: int) -> None:
    found = streamed(n).in_memory()
    assert isinstance(found, Split)
    assert (found.x.dtype, found.scale) == (torch.uint8, 255)
    assert same((found.x, found.y), (in_memory(n).x, in_memory(n).y))
    assert same(found.take(torch.arange(n)), streamed(n).take(torch.arange(n)))


def test_every_stored_value_survives_memory() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    found = Streamed(lambda _: grey, torch.tensor([0]), (1, 16, 16), torch.tensor([0])).in_memory()
    assert torch.equal(found.x[0], grey)


def test_a_data_set_of_streams_is_cut_like_one_in_memory() -> None:
    a = Dataset("a", streamed(20), streamed(8), 4)
    b = Dataset("b", in_memory(20), in_memory(8), 4)
    for left, right in zip(a.hold_out(6), b.hold_out(6), strict=True):
        everything = torch.arange(len(left))
        assert same(left.take(everything), right.take(everything))
    assert torch.equal(a.limited(5, None).train.y, b.limited(5, None).train.y)


def test_a_plan_gives_the_same_batches_streamed_and_in_memory() -> None:
    found = []
    for data in (streamed(11, workers=1), streamed(11, workers=4), in_memory(11)):
        p = RunSpec(data, 4, 2, parse_schedule("none", 2), parse_rate(0.1), 0, Augment(1, True))
        found.append([b[:3] for first in (0, 1) for b in p.batches(1, first=first)])
    assert same(found[0], found[1])
    assert same(found[0], found[2])


# ---------------------------------------------------------------------------------------------- how far ahead


@pytest.mark.parametrize("workers", [1, 4])
def test_two_batches_are_decoded_ahead_and_never_more(workers: int) -> None:
    read = Reader()
    size, count = 4, 7
    asked = []

    def chunks() -> Iterator[Tensor]:
        for number, chunk in enumerate(torch.arange(size * count).split(size)):
            asked.append(number)
            yield chunk

    for number, _ in enumerate(streamed(size * count, read, workers).stream(chunks())):
        allowed = min(number + 1 + AHEAD, count)
        read.wait_for(size * allowed)
        assert len(asked) == allowed
        assert len(read.read) == size * allowed
    assert sorted(read.read) == list(range(10, 10 + size * count))  # each of them once


def test_pictures_of_a_batch_are_decoded_side_by_side() -> None:
    together = threading.Barrier(3, timeout=GUARD)  # nobody gets on before three threads are reading

    def meet(position: int) -> Tensor:
        together.wait()
        return image(position)

    found = streamed(6, meet, workers=3)
    assert same(found.take(torch.arange(6)), in_memory(6).take(torch.arange(6)))


def test_no_more_threads_than_workers() -> None:
    names, pair = set(), threading.Barrier(2, timeout=GUARD)

    def watched(position: int) -> Tensor:
        names.add(threading.current_thread().name)
        pair.wait()  # nobody reads two pictures in a row
        return image(position)

    list(streamed(30, watched, workers=2).stream(torch.arange(30).split(3)))
    assert len(names) == 2


# ------------------------------------------------------------------------------------------------- early ends


def test_closing_early_stops_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    read, dropped = Reader(), threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, *_: object, **options: bool) -> None:
            super().shutdown(wait=False, **options)
            dropped.set()
            super().shutdown()

    def held_up(position: int) -> Tensor:
        """Pictures after the first batch take until those that wait have been dropped."""
        if position >= 10 + 50:
            assert dropped.wait(GUARD)
        return read(position)

    monkeypatch.setattr("controlat.data._stream.ThreadPoolExecutor", Pool)
    found = streamed(300, held_up, workers=2).stream(torch.arange(300).split(50))
    next(found)
    assert len(decoders()) == 2
    found.close()  # type: ignore[attr-defined]
    assert decoders() == []
    assert 50 <= len(read.read) <= 50 + 2  # at most one more for each thread


@pytest.mark.parametrize("augment", [None, Augment(1, True)])
def test_leaving_a_plan_in_mid_epoch_leaves_no_thread(augment: Augment | None) -> None:
    p = RunSpec(streamed(40), 4, 1, parse_schedule("none", 1), parse_rate(0.1), 0, augment)
    for batch in p.batches(0):
        if batch.number == 2:
            assert decoders()
            break
    del batch
    assert decoders() == []
    batches = p.batches(0)
    next(batches)
    with pytest.raises(KeyboardInterrupt):
        batches.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert decoders() == []


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_at_its_batch_and_ends_the_threads(workers: int) -> None:
    read = Reader(bad=10 + 9)
    found = streamed(40, read, workers).stream(torch.arange(40).split(4))
    first = [next(found), next(found)]
    assert same(first, [in_memory(40).take(c) for c in torch.arange(8).split(4)])
    with pytest.raises(ValueError, match="picture 19: cannot be read") as caught:
        next(found)
    assert caught.value is read.error
    assert decoders() == []
    assert len(read.read) <= 4 * (3 + AHEAD)
    assert list(found) == []


def test_an_error_of_take_and_of_memory() -> None:
    read = Reader(bad=12)
    with pytest.raises(ValueError, match="picture 12"):
        streamed(5, read).take(torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="picture 12"):
        streamed(5, read).in_memory()
    streamed(5, read).take(torch.tensor([0, 1, 3, 4]))


def test_streams_side_by_side_do_not_disturb_each_other() -> None:
    found = streamed(12)
    chunks = torch.arange(12).split(3)
    pairs = list(zip(found.stream(chunks), found.stream(chunks), strict=True))
    assert same([a for a, _ in pairs], [b for _, b in pairs])


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    streamed(5, lambda _: torch.zeros(SHAPE, dtype=torch.uint8)).in_memory()
    assert torch.equal(torch.random.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ fingerprint


def test_a_fingerprint_without_stamps_looks_at_some_pictures() -> None:
    n = 1000
    known = streamed(n).fingerprint()
    assert streamed(n, workers=1).subset(torch.arange(n)).fingerprint() == known
    assert streamed(n, lambda i: 255 - image(i)).fingerprint() != known
    assert streamed(n).subset(torch.arange(n).flip(0)).fingerprint() != known
    read = Reader()
    streamed(n, read).fingerprint()
    assert (len(read.read), min(read.read), max(read.read)) == (64, 10, 10 + 63 * n // 64)


def test_a_fingerprint_with_stamps_decodes_nothing() -> None:
    read, stamps = Reader(), [str(i) for i in range(13)]
    found = replace(streamed(3, read), stamp=lambda i: stamps[i])
    known = found.fingerprint()
    assert found.to("cpu").fingerprint() == known
    stamps[12] = "changed"
    assert found.fingerprint() != known
    assert found.subset(torch.tensor([0, 1])).fingerprint() not in (known, found.fingerprint())
    assert read.read == []


# --------------------------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    none = torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match="a split has no images"):
        Streamed(image, none, SHAPE, none)
    with pytest.raises(ValueError, match="a split has no images"):
        streamed(3).subset(torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels must be >= 0, got -1 at position 2"):
        Streamed(image, torch.tensor([0, 1, -1]), SHAPE, torch.arange(3))
    for workers in (0, -1):
        with pytest.raises(ValueError, match=f"workers must be >= 1, got {workers}"):
            streamed(3, workers=workers)
    assert 1 <= default_workers() <= 16
