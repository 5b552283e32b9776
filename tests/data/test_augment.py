"""Augmentation: pixels by hand, a slow reference, the inverse to the last bit, and its place in the plan."""

import math
from collections.abc import Callable

import pytest
import torch
from helpers import SHAPE, cnn_bn, same, spec, split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from controlat.attacks.balls import Ball
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.data import Augment, Placement, parse_augment
from controlat.dynamics.driver import Driver, SGDSettings, Step
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.methods.pgd_at import PgdAT

seeded = settings(derandomize=True, deadline=None, max_examples=60)


def placement(top: list[int], left: list[int], flip: list[bool], pad: int, fill: float = 0.0) -> Placement:
    return Placement(torch.tensor(top), torch.tensor(left), torch.tensor(flip), pad, fill)


# ---------------------------------------------------------------------------------------------------- by hand


def test_pixels_end_where_they_should() -> None:
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).expand(3, 1, 2, 3)
    p = placement([1, 0, 2], [1, 2, 0], [False, False, True], pad=1, fill=0.5)
    f = 0.5
    assert p.frame(x)[0, 0].tolist() == [[f] * 5, [f, 1, 2, 3, f], [f, 4, 5, 6, f], [f] * 5]
    middle, upper_right, lower_left_mirrored = p(x)[:, 0].tolist()
    assert middle == [[1, 2, 3], [4, 5, 6]]
    assert upper_right == [[f, f, f], [2, 3, f]]
    assert lower_left_mirrored == [[5, 4, f], [f, f, f]]


def test_a_window_is_put_back_by_hand() -> None:
    frame = torch.zeros(2, 1, 3, 4)
    x = torch.tensor([[1.0, 2]]).expand(2, 1, 1, 2)
    found = placement([0, 2], [1, 2], [False, True], pad=1).invert(x, frame)
    assert found[:, 0].tolist() == [
        [[0, 1, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 2, 1]],
    ]
    assert frame.max() == 0


def test_without_border_and_flip_nothing_changes() -> None:
    x = torch.rand(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    p = Augment().draw(4, torch.Generator().manual_seed(0))
    assert torch.equal(p(x), x)
    assert p.frame(x) is x
    assert torch.equal(p.invert(1 - x, x), 1 - x)


# -------------------------------------------------------------------------------------------------- reference


def sliced(p: Placement, frame: Tensor) -> Tensor:
    """What `apply` should give: one sample after the other, by slices."""
    height, width = (side - 2 * p.pad for side in frame.shape[2:])
    found = []
    for image, top, left, flip in zip(frame, p.top.tolist(), p.left.tolist(), p.flip.tolist(), strict=True):
        window = image[:, top : top + height, left : left + width]
        found.append(torch.flip(window, [2]) if flip else window)
    return torch.stack(found)


def inside(p: Placement, frame: Tensor) -> Tensor:
    """A mask of the windows."""
    found = torch.zeros_like(frame, dtype=torch.bool)
    height, width = (side - 2 * p.pad for side in frame.shape[2:])
    for mask, top, left in zip(found, p.top.tolist(), p.left.tolist(), strict=True):
        mask[:, top : top + height, left : left + width] = True
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[Augment, Placement, Tensor]:
    """An augmentation, a placement drawn from it, and images that fit."""
    n, channels, height, width = (draw(st.integers(1, 5)) for _ in range(4))
    augment = Augment(draw(st.integers(0, 4)), draw(st.booleans()), draw(st.sampled_from([0.0, 0.5, 1.0])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.rand(n, channels, height, width, generator=generator, dtype=dtype)
    return augment, augment.draw(n, generator), x


@given(case=cases())
@seeded
def test_apply_is_slice_and_flip(case: tuple[Augment, Placement, Tensor]) -> None:
    augment, p, x = case
    n, channels, height, width = x.shape
    assert (p.pad, p.fill) == (augment.pad, augment.fill)
    frame = torch.full((n, channels, height + 2 * p.pad, width + 2 * p.pad), p.fill, dtype=x.dtype)
    frame[:, :, p.pad : p.pad + height, p.pad : p.pad + width] = x
    assert same(p.frame(x), frame)
    assert same(p.apply(frame), sliced(p, frame))
    assert same(p(x), sliced(p, frame))
    noise = torch.rand(frame.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    assert same(p.apply(noise), sliced(p, noise))


@given(case=cases())
@seeded
def test_the_inverse_is_exact_and_touches_the_window_only(case: tuple[Augment, Placement, Tensor]) -> None:
    _, p, x = case
    n, channels, height, width = x.shape
    generator = torch.Generator().manual_seed(1)
    size = (n, channels, height + 2 * p.pad, width + 2 * p.pad)
    frame = torch.rand(size, generator=generator, dtype=x.dtype)
    before = frame.clone()
    assert same(p.invert(p.apply(frame), frame), frame)
    found = p.invert(x + 2, frame)  # every pixel of the window is new
    assert same(frame, before)
    assert torch.equal(found != frame, inside(p, frame))
    assert same(p.apply(found), x + 2)


@given(case=cases())
@seeded
def test_every_pixel_is_one_of_the_image_or_the_fill(case: tuple[Augment, Placement, Tensor]) -> None:
    _, p, x = case
    for image, found in zip(x, p(x), strict=True):
        assert torch.isin(found, torch.cat([image.flatten(), torch.tensor([p.fill], dtype=x.dtype)])).all()


# ----------------------------------------------------------------------------------------------------- random


def drawn(augment: Augment, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    p = augment.draw(n, torch.Generator().manual_seed(seed))
    return p.top, p.left, p.flip


def test_the_same_seed_gives_the_same_placement() -> None:
    augment = Augment(4, True)
    assert same(drawn(augment, 50, 3), drawn(augment, 50, 3))
    assert not same(drawn(augment, 50, 3), drawn(augment, 50, 4))


def test_the_random_state_of_the_caller_plays_no_part_and_is_left_alone() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        p = Augment(2, True).draw(20, torch.Generator().manual_seed(7))
        p.invert(p(torch.zeros(20, 1, 3, 3)), torch.zeros(20, 1, 7, 7))
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append((p.top, p.left, p.flip))
    assert same(*found)


def test_placements_are_uniform() -> None:
    top, left, flip = drawn(Augment(2, True), 10_000, 0)
    counts = torch.bincount((top * 5 + left) * 2 + flip, minlength=50)
    assert len(counts) == 50  # all 5 x 5 offsets, mirrored or not
    assert stats.chisquare(counts.numpy()).pvalue > 0.001
    assert abs(flip.double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(10_000)


def test_no_flip_and_no_crop() -> None:
    top, left, flip = drawn(Augment(3, False), 200, 0)
    assert not flip.any()
    assert (top.min(), top.max(), left.min(), left.max()) == (0, 6, 0, 6)
    top, left, flip = drawn(Augment(0, True), 200, 0)
    assert top.max() == left.max() == 0
    assert 0 < flip.sum() < 200


# ------------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("none", None),
        ("flip", Augment(0, True, 0.0)),
        ("crop:pad=4", Augment(4, False, 0.0)),
        ("crop-flip:pad=4", Augment(4, True, 0.0)),
        ("crop-flip:pad=4,fill=0.5", Augment(4, True, 0.5)),
        ("crop:fill=1/2,pad=2", Augment(2, False, 0.5)),
        (" crop : pad = 3 ", Augment(3, False, 0.0)),
        ("crop:pad=0", Augment()),
    ],
)
def test_texts(text: str, found: Augment | None) -> None:
    assert parse_augment(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown augmentation ''; write none, flip, crop:pad=4 or crop-flip:pad=4"),
        ("crops:pad=4", "unknown augmentation 'crops:pad=4'"),
        ("none:pad=4", "augmentation none does not take pad; it takes nothing"),
        ("flip:fill=0.5", "augmentation flip does not take fill; it takes nothing"),
        ("crop", "augmentation crop lacks pad"),
        ("crop-flip:fill=0.5", "augmentation crop-flip lacks pad"),
        ("crop:pad=4,flip=1", "augmentation crop does not take flip; it takes fill, pad"),
        ("crop:pad", "expected name=value, got 'pad'"),
        ("crop:pad=4,pad=4", "pad is given twice"),
        ("crop:pad=x", "pad must be a number such as .* got 'x'"),
        ("crop:pad=inf", "pad must be "),
        ("crop:pad=1.5", "pad must be a whole number, got 1.5"),
        ("crop:pad=-1", r"pad must be a whole number in 0\.\.1024, got -1"),
        ("crop:pad=1025", r"pad must be a whole number in 0\.\.1024, got 1025"),
        ("crop:pad=1,fill=x", "fill must be a number"),
        ("crop:pad=1,fill=-0.1", r"fill must be a pixel value in \[0, 1\], got -0.1"),
        ("crop:pad=1,fill=1.1", r"fill must be a pixel value in \[0, 1\], got 1.1"),
        ("crop:pad=1,fill=128", r"fill must be a pixel value in \[0, 1\], got 128"),
    ],
)
def test_texts_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_augment(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augment(pad=1.5), "whole number"),  # type: ignore[arg-type]
        (lambda: Augment(pad=-1), "got -1"),
        (lambda: Augment(pad=math.inf), "whole number in 0..1024, got inf"),  # type: ignore[arg-type]
        (lambda: Augment(pad=math.nan), "whole number in 0..1024, got nan"),  # type: ignore[arg-type]
        (lambda: Augment(fill=math.nan), "got nan"),
        (lambda: Augment(fill=2), "got 2"),
    ],
)
def test_numbers_that_are_refused(make: Callable[[], Augment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --------------------------------------------------------------------------------------------------- the plan

CROP = Augment(2, True, 0.5)


def augmented(augment: Augment | None = CROP, seed: int = 0, schedule: str = "none") -> RunSpec:
    return RunSpec(split(9, SHAPE), 4, 3, parse_schedule(schedule, 3), parse_rate(0.1), seed, augment)


def drawn_in(p: RunSpec, epoch: int, first: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    placements = [b.placement for b in p.batches(epoch, first=first)]
    return [(q.top, q.left, q.flip) for q in placements if q is not None]


def test_a_batch_is_the_placement_of_its_clean_images() -> None:
    p = augmented()
    for batch in p.batches(1):
        clean, y = p.data.take(batch.indices)
        assert batch.placement is not None
        assert (batch.placement.pad, batch.placement.fill) == (2, 0.5)
        assert same(batch.x, batch.placement(clean))
        assert torch.equal(batch.y, y)
        assert batch.x.shape == clean.shape
        frame = batch.placement.frame(clean)
        assert same(batch.placement.invert(batch.x, frame), frame)


def test_a_placement_is_a_function_of_seed_epoch_and_batch() -> None:
    p = augmented()
    epoch = drawn_in(p, 1)
    assert len(epoch) == p.batches_per_epoch == 3
    assert same(drawn_in(p, 1), epoch)
    assert same(drawn_in(p, 1, first=1), epoch[1:])
    assert same(drawn_in(p, 1, first=2), epoch[2:])
    assert drawn_in(p, 1, first=3) == []
    assert not same(drawn_in(p, 0), epoch)
    assert not same(drawn_in(augmented(seed=1), 1), epoch)
    assert not same(epoch[0], epoch[1])


def test_without_augmentation_batches_are_the_stored_images_in_the_same_order() -> None:
    plain, other = list(augmented(None).batches(1)), list(augmented().batches(1))
    before = list(spec(split(9, SHAPE), epochs=3).batches(1))
    for a, b, c in zip(plain, other, before, strict=True):
        assert a.placement is None
        assert same(a, c)
        assert same(a.x, split(9, SHAPE).take(a.indices)[0])
        assert same(a[1:5], b[1:5])  # labels, indices, epoch and number do not depend on it


def noisy() -> tuple[Driver, RunSpec]:
    """BatchNorm, dropout, random starts, momentum, and a schedule that attacks."""
    driver = Driver(cnn_bn(), PgdAT(attack_mode="train"), Ball(0.1), SGDSettings(0.9, weight_decay=1e-3))
    return driver, augmented(schedule="amata:min=0,max=2,tau=0.2")


def test_a_rollout_replays_bit_for_bit_from_every_recorded_state() -> None:
    driver, p = noisy()
    store: dict[int, State] = {}
    steps: list[Step] = list(
        rollout(driver, p, until=2, before=lambda n: store.update({n: driver.snapshot()}))
    )
    end = driver.snapshot()
    assert sorted(store) == list(range(6))
    for number, snapshot in store.items():
        driver, p = noisy()
        driver.restore(snapshot)
        assert list(rollout(driver, p, epoch=number // 3, batch=number % 3, until=2)) == steps[number:]
        assert same(driver.snapshot(), end)


def test_augmentation_changes_what_is_trained() -> None:
    (driver, p), (other, _) = noisy(), noisy()
    list(rollout(driver, p, until=1))
    list(rollout(other, spec(split(9, SHAPE), schedule="amata:min=0,max=2,tau=0.2", epochs=3), until=1))
    assert not same(driver.snapshot().model, other.snapshot().model)


def test_a_placement_goes_to_a_device_whole_and_stays_the_same() -> None:
    placement = Augment(pad=2, flip=True, fill=0.5).draw(3, torch.Generator().manual_seed(0))
    there = placement.to("meta")
    assert {t.device.type for t in (there.top, there.left, there.flip)} == {"meta"}
    assert (there.pad, there.fill) == (2, 0.5)
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(placement.to("cpu")(x), placement(x))
