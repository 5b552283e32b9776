"""TF32 in a block: on, off and put back, whichever of torch's two sets of flags the user has."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from controlat._util.precision import TF32, assigned, full_precision, tf32, tf32_state

CUDNN, CUDA = torch.backends.cudnn, torch.backends.cuda
FLAGS = ((CUDNN.conv, "fp32_precision"), (CUDNN.rnn, "fp32_precision"), (CUDA.matmul, "fp32_precision"))

USERS: dict[str, Callable[[], None]] = {
    "torch's defaults": lambda: None,
    "older: convolutions off": lambda: setattr(CUDNN, "allow_tf32", False),
    "older: matrix products on": lambda: setattr(CUDA.matmul, "allow_tf32", True),
    "older: medium": lambda: torch.set_float32_matmul_precision("medium"),
    "newer: convolutions off": lambda: setattr(CUDNN.conv, "fp32_precision", "ieee"),
    "newer: matrix products on": lambda: setattr(CUDA.matmul, "fp32_precision", "tf32"),
}


def older() -> object:
    """What torch's older flags say, or that it refuses to tell."""
    try:
        return CUDNN.allow_tf32, CUDA.matmul.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return "refused"


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = [getattr(of, name) for of, name in FLAGS]
    yield
    CUDNN.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for (of, name), value in zip(FLAGS, before, strict=True):
        setattr(of, name, value)


@pytest.mark.parametrize("user", USERS)
def test_tf32_is_set_for_convolutions_and_matrix_products_and_put_back(user: str) -> None:
    USERS[user]()
    before = tf32_state(), older()

    def fail_inside(on: bool) -> None:
        with tf32(on):
            assert tf32_state() == TF32(on, on)
            raise RuntimeError("stop")

    for on in (True, False):
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside(on)
        assert (tf32_state(), older()) == before
    with tf32(None):
        assert tf32_state() == before[0]


@pytest.mark.parametrize("user", USERS)
def test_full_precision_decorates_and_ends_within_tf32(user: str) -> None:
    USERS[user]()
    measure = full_precision()(tf32_state)
    with tf32(True):
        assert [measure(), measure()] == 2 * [TF32(convolutions=False, matmul=False)]
        assert tf32_state() == TF32(convolutions=True, matmul=True)


def test_inside_a_block_users_may_still_set_flags_of_cudnn() -> None:
    with full_precision(), CUDNN.flags(enabled=False, allow_tf32=False):  # reads the older flag
        assert not CUDNN.enabled
    assert CUDNN.enabled


def test_blocks_of_several_threads_put_back_what_was_before_all_of_them() -> None:
    class One:
        a = 1

    one = One()
    for order in itertools.permutations(range(3)):  # in which the blocks end
        blocks = [assigned((one, "a", value)) for value in (10, 11, 12)]
        for block in blocks:
            block.__enter__()
        left = [10, 11, 12]
        for i in order:
            assert one.a == left[-1]
            blocks[i].__exit__(None, None, None)
            left.remove(10 + i)
        assert one.a == 1


def test_assigned_puts_back_what_it_had_assigned_when_a_later_one_fails() -> None:
    class Two:
        a = 1

        @property
        def b(self) -> int:
            return 2

    two = Two()

    def enter() -> None:
        with assigned((two, "a", 5), (two, "b", 6)):
            raise AssertionError("b cannot be assigned")

    with pytest.raises(AttributeError):
        enter()
    assert two.a == 1
