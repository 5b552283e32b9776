"""Randomness as a function of its key."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from controlat._util import rng


def test_derive_is_a_function_of_its_key() -> None:
    key = (3, "order", 7, "x")
    assert rng.derive(*key) == rng.derive(*key)
    others = [
        (4, "order", 7, "x"),
        (3, "other", 7, "x"),
        (3, "order", 8, "x"),
        (3, "order", 7),
        (3, "order", "7", "x"),
    ]
    assert len({rng.derive(*k) for k in [key, *others]}) == 1 + len(others)


def test_derive_keeps_neighbouring_keys_apart() -> None:
    assert rng.derive(0, "ab", "c") != rng.derive(0, "a", "bc")
    assert rng.derive(1, 23) != rng.derive(12, 3)
    assert rng.derive(0, 1, 2) != rng.derive(0, 12)
    seeds = [rng.derive(s, e, b, p) for s in range(10) for e in range(10) for b in range(10) for p in "ab"]
    assert len(set(seeds)) == 2000


def test_derive_fits_a_torch_seed() -> None:
    assert all(0 <= rng.derive(s) < 2**63 for s in range(-50, 50))


def test_derive_is_the_same_in_another_process() -> None:
    code = "from controlat._util import rng; print(rng.derive(5, 'start', 2))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(out) == rng.derive(5, "start", 2)


@pytest.mark.parametrize("three", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_derive_takes_the_integers_of_numpy_and_torch_for_what_they_are(three: object) -> None:
    assert rng.derive(three, "order", three) == rng.derive(3, "order", 3)  # type: ignore[arg-type]


def test_generators_of_one_key_draw_the_same_numbers() -> None:
    draws = [torch.rand(100, generator=rng.generator(0, "start", e)) for e in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_generator_leaves_the_global_state() -> None:
    before = torch.random.get_rng_state()
    torch.rand(5, generator=rng.generator(0, "start"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scoped_draws_are_a_function_of_the_key_whatever_ran_before() -> None:
    found = []
    for history, key in [(1, "model"), (2, "model"), (1, "other")]:
        torch.manual_seed(history)
        with rng.scoped(0, key):
            found.append(
                (torch.rand(3), torch.nn.functional.dropout(torch.ones(64)), torch.nn.Linear(3, 2).weight)
            )
    assert all(map(torch.equal, found[0], found[1]))
    assert not any(map(torch.equal, found[0], found[2]))


def test_scoped_leaves_the_global_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with rng.scoped(0, "model"):
        torch.rand(10)
    assert torch.equal(torch.rand(4), expected)


def test_scoped_leaves_the_global_state_after_an_exception() -> None:
    def fail() -> None:
        with rng.scoped(0, "model"):
            torch.rand(10)
            raise KeyError

    before = torch.random.get_rng_state()
    with pytest.raises(KeyError):
        fail()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scopes_nest() -> None:
    with rng.scoped(0, "outer"):
        alone = torch.rand(2), torch.rand(2)
    with rng.scoped(0, "outer"):
        first = torch.rand(2)
        with rng.scoped(1, "inner"):
            torch.rand(7)
        second = torch.rand(2)
    assert torch.equal(first, alone[0])
    assert torch.equal(second, alone[1])
