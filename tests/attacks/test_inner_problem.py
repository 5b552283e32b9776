"""The inner problem of a network: exact where its answer is known."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from controlat._util.errors import NonFiniteError
from controlat.attacks.balls import Ball
from controlat.attacks.inner_problem import InnerProblem, inner_problem
from controlat.attacks.losses import cross_entropy
from controlat.control.cost import Meter


def _parabola(slope: Tensor, curvature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Sum over pixels of a u - c u^2/2, u = x - 1/2."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        u = logits - 0.5
        return (slope * u - curvature * u**2 / 2).sum(1)

    return loss


def _on_parabola(
    slope: Tensor, curvature: float, ball: Ball, steps: int = 16, **options: Any
) -> InnerProblem:
    """All in powers of two: the ascent then stops at the maximum, to the last bit."""
    x = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    options = {"loss": _parabola(slope, curvature), "steps": steps} | options
    return inner_problem(nn.Flatten(), x, torch.zeros(3, dtype=torch.int64), ball, **options)


def test_a_parabola_with_its_maximum_in_the_box_gives_exact_curvature_step_and_slope() -> None:
    """r* = a/c = eps/2: K = 1 and 2 come back to where they began, 3 has 8/9 of the gain, 4 all of it."""
    found = _on_parabola(torch.full((4,), 0.25, dtype=torch.float64), 2.0, Ball(0.25))
    assert found.curvature == pytest.approx(1 / 0.125)
    assert found.slope == pytest.approx(4 * 0.25)
    assert found.secant == pytest.approx(4 * 2.0), "-l_xx along the direction (1, 1, 1, 1)"
    assert found.after_one == pytest.approx(0)
    assert found.losses[0] == 0
    assert max(found.losses) == found.losses[-1] == pytest.approx(4 * 0.25**2 / (2 * 2.0))
    assert list(found.shares) == [0, 1, 2, 3, 4]
    assert found.shares[3] == pytest.approx(8 / 9)
    assert found.convergence == pytest.approx(3 + (0.95 - 8 / 9) / (1 / 9))
    assert found.marks == {}


@pytest.mark.parametrize("share", [0.375, 0.5, 0.75, 1.0])
def test_curvature_is_one_over_the_exact_step(share: float) -> None:
    """Also where one step of length eps goes so far that the loss falls."""
    eps, curvature = 0.25, 2.0
    slope = torch.full((4,), share * eps * curvature, dtype=torch.float64)
    found = _on_parabola(slope, curvature, Ball(eps))
    assert found.curvature == pytest.approx(1 / (share * eps))
    assert found.after_one == pytest.approx(1 - (1 - 1 / share) ** 2)
    assert (found.marks.get("curvature") == "beyond the ball") == (share == 1)


def test_a_parabola_in_the_euclidean_norm_gives_the_length_of_the_exact_step() -> None:
    slope = torch.tensor([0.125, -0.125, 0.125, -0.125], dtype=torch.float64)  # of length 1/4
    found = _on_parabola(slope, 2.0, Ball(0.25, "l2"))
    assert found.curvature == pytest.approx(1 / 0.125, rel=1e-6)
    assert found.slope == pytest.approx(0.25)
    assert found.secant == pytest.approx(2.0)


def test_a_linear_loss_needs_one_step_and_has_its_maximum_beyond_the_ball() -> None:
    found = _on_parabola(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), 0.0, Ball(0.25))
    assert found.secant == pytest.approx(0)
    assert found.slope == pytest.approx(6.5)
    assert found.after_one == pytest.approx(1)
    assert found.curvature == pytest.approx(1 / 0.25)
    assert found.convergence == pytest.approx(0.95)
    assert found.marks == {"convergence": "one step is enough", "curvature": "beyond the ball"}


def test_cross_entropy_of_a_linear_network_is_convex_along_its_gradient() -> None:
    """The secant of two classes is known: the slope is |w| times the probability of the other class."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    w = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    model[1].weight.data = w
    x, y = torch.full((5, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)
    found = inner_problem(model, x, y, Ball(0.25))
    score, steepness = float(w[0].sum() / 2), float(w.abs().sum())
    slopes = [steepness / (1 + math.exp(score - steepness * r)) for r in (0, 0.25)]
    assert found.slope == pytest.approx(slopes[0])
    assert found.secant == pytest.approx((slopes[0] - slopes[1]) / 0.25)
    assert found.secant < 0


def test_a_flat_loss_has_no_measures_and_says_so() -> None:
    found = _on_parabola(torch.zeros(4, dtype=torch.float64), 0.0, Ball(0.25))
    assert found.convergence is found.curvature is found.after_one is None
    assert set(found.marks.values()) == {"no gain"}
    assert found.slope == found.secant == 0


def test_an_ascent_that_never_keeps_its_gain_is_marked() -> None:
    """The finest of these steps already goes from one slope to the other: r* is half of it."""
    alpha = 2 * 0.25 / 16
    found = _on_parabola(torch.full((4,), 0.6 * alpha, dtype=torch.float64), 1.0, Ball(0.25))
    assert found.marks["convergence"] == "not reached"
    assert found.convergence == 16


def test_what_is_not_finite_is_an_error() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="not finite"):
            _on_parabola(torch.full((4,), value, dtype=torch.float64), 1.0, Ball(0.25))


@pytest.mark.parametrize("steps", [9, 12.5, True, "20"])
def test_a_finest_ascent_that_is_no_yardstick_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be a whole number >= 10"):
        _on_parabola(torch.ones(4, dtype=torch.float64), 1.0, Ball(0.25), steps=steps)
    with pytest.raises(ValueError, match="eps is 0"):
        _on_parabola(torch.ones(4, dtype=torch.float64), 1.0, Ball(0))


def test_evaluations_are_counted() -> None:
    meter = Meter()
    _on_parabola(torch.full((4,), 0.25, dtype=torch.float64), 2.0, Ball(0.25), meter=meter)
    assert meter.gradients == 3 * (16 + 1 + 2 + 3 + 4), "finest, secant, K = 2, 3, 4; K = 1 has its gradient"
    assert meter.forwards == 3 * (1 + 4), "the last loss of every ascent"


def test_dropout_in_mode_train_has_one_mask_and_batches_of_training() -> None:
    seen: list[tuple[int, bool]] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((len(x), self.training))
            return x.flatten(1)

    torch.manual_seed(0)
    model = nn.Sequential(Look(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = torch.rand(50, 1, 4, 4), torch.arange(50) % 3
    model.eval()
    random = torch.random.get_rng_state()
    found = [inner_problem(model, x, y, Ball(0.1), mode="train", batch_size=16, seed=s) for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert set(seen) == {(16, True), (17, True)}
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(b > a for a, b in itertools.pairwise(found[0].losses[:10])), "another mask would be noise"


def test_the_loss_of_the_measures_is_the_cross_entropy_by_default() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    found = inner_problem(model, x, y, Ball(0.1))
    with torch.no_grad():
        assert found.losses[0] == pytest.approx(float(cross_entropy(model(x), y).mean()), rel=1e-5)
