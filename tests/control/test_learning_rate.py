"""Learning rates, against torch's own schedulers and values written out by hand."""

import math
import warnings

import pytest
import torch

from controlat.control.learning_rate import Rate, parse_rate


def torch_rates(make, epochs: int, lr: float) -> list[float]:
    """The rate of each epoch under a torch scheduler stepped once per epoch."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, found = make(optimiser), []
    for _ in range(epochs):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


def test_constant() -> None:
    assert [Rate(0.1)(t, 10) for t in (0, 3.7, 10, 11)] == [0.1] * 4


def test_multistep_is_that_of_torch() -> None:
    rate = parse_rate("multistep:lr=0.1,at=3:5:9,factor=0.5")
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 5, 9], 0.5), 12, 0.1)
    assert [rate(t, 12) for t in range(12)] == pytest.approx(expected, rel=1e-12)


def test_multistep_drops_at_the_start_of_the_named_epoch() -> None:
    rate = parse_rate("multistep:lr=0.2,at=50:75")
    assert [rate(t, 100) for t in (0, 49.999, 50, 74.999, 75, 200)] == pytest.approx(
        [0.2, 0.2, 0.02, 0.02, 0.002, 0.002], rel=1e-12
    )


def test_one_cycle_by_hand() -> None:
    assert [Rate(0.2, "onecycle")(t, 4) for t in (0, 0.5, 1, 2, 3, 4)] == [0, 0.05, 0.1, 0.2, 0.1, 0]
    quarter = parse_rate("onecycle:lr=0.2,peak=0.25")
    assert [quarter(t, 8) for t in (0, 1, 2, 5, 8)] == pytest.approx([0, 0.1, 0.2, 0.1, 0], abs=1e-15)


def test_one_cycle_is_that_of_torch() -> None:
    def make(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: min(t / 4, (10 - t) / 6))

    rate = Rate(0.3, "onecycle", peak=0.4)
    assert [rate(t, 10) for t in range(10)] == pytest.approx(torch_rates(make, 10, 0.3), rel=1e-12)


def test_one_cycle_stays_at_zero_beyond_the_end() -> None:
    assert [Rate(0.2, "onecycle")(t, 4) for t in (4, 4.5, 100)] == [0, 0, 0]


@pytest.mark.parametrize("text", ["0.1", "1/10", 0.1, "constant:lr=0.1", " 1e-1 "])
def test_a_number_is_a_constant_rate(text: str | float) -> None:
    assert parse_rate(text) == Rate(0.1)


def test_parse_gives_the_rate_it_says() -> None:
    assert parse_rate("multistep:lr=1/5,at=50:75,factor=1/10") == Rate(0.2, "multistep", (50.0, 75.0), 0.1)
    assert parse_rate("onecycle:lr=0.2") == Rate(0.2, "onecycle")


@pytest.mark.parametrize("bad", ["-0.1", "0", "", "fast", "cosine:lr=0.1", None, math.nan, math.inf, True])
def test_what_is_no_rate_is_refused_with_examples(bad: object) -> None:
    with pytest.raises(
        ValueError, match=r"a learning rate is a number > 0, multistep:.* or onecycle:.* got"
    ) as e:
        parse_rate(bad)  # type: ignore[arg-type]
    assert repr(bad) in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("multistep:lr=0.1", "'multistep' lacks at"),
        ("constant", "'constant' lacks lr"),
        ("onecycle:lr=0.1,at=3", "does not take at; it takes lr, peak"),
        ("onecycle:lr=0.1,peak=1", r"peak must be in \(0, 1\), a fraction of the run, got 1"),
        ("onecycle:lr=0,peak=0.5", "lr must be > 0, got 0"),
        ("multistep:lr=-1,at=3", "lr must be > 0, got -1"),
        ("multistep:lr=0.1,at=3,factor=0", "factor must be > 0, got 0"),
        ("multistep:lr=0.1,at=5:3", "at must be increasing epochs > 0, got 3 after 5"),
        ("multistep:lr=0.1,at=3:3", "at must be increasing"),
        ("multistep:lr=0.1,at=0:3", "at must be increasing"),
        ("multistep:lr=0.1,at=a", "at must be a number .* got 'a'"),
        ("multistep:lr=b,at=3", "lr must be a number .* got 'b'"),
        ("multistep:lr=0.1,lr=0.2,at=3", "lr is given twice"),
    ],
)
def test_a_wrong_part_of_a_text_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rate(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": math.nan}, "lr must be finite, got nan"),
        ({"lr": 0.1, "factor": math.inf}, "factor must be finite"),
        ({"lr": 0.1, "peak": math.nan}, "peak must be finite, got nan"),
        ({"lr": 0.1, "peak": 0}, r"peak must be in \(0, 1\).* got 0"),
        ({"lr": 0.1, "kind": "multistep", "at": (math.nan,)}, "at must be finite, got nan"),
        ({"lr": 0.1, "kind": "cosine"}, "one of constant, multistep, onecycle, got 'cosine'"),
    ],
)
def test_the_constructor_checks_too(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rate(**arguments)  # type: ignore[arg-type]


def test_texts_for_numbers_become_numbers() -> None:
    rate = Rate("1/5", "onecycle", peak="1/4")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rate(1, 4) == 0.2
    assert rate == Rate(0.2, "onecycle", peak=0.25)
