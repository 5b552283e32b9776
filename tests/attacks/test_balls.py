"""Perturbation sets, against brute force and random feasible points."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import controlat
from controlat.app.settings import AttackSettings, EvaluateSettings, TrainSettings
from controlat.attacks.balls import NORMS, Ball, unit

seeded = settings(derandomize=True, deadline=None, max_examples=60)
norms = pytest.mark.parametrize("norm", list(NORMS))
radii = st.sampled_from([0.0, 1e-3, 8 / 255, 0.3, 1.0])
seeds = st.integers(0, 10**6)


def images(seed: int, *shape: int) -> Tensor:
    """Pixels in [0, 1], a good part of them at 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*(shape or (4, 1, 3, 3)), generator=g, dtype=torch.float64) * 1.6 - 0.3).clamp(0, 1)


def noise(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randn(*(shape or (4, 1, 3, 3)), generator=g, dtype=torch.float64)


def length(d: Tensor, norm: str) -> Tensor:
    """The norm per sample, independently of the package."""
    return torch.linalg.vector_norm(d.reshape(len(d), -1), ord=math.inf if norm == "linf" else 2, dim=1)


def assert_admissible(x: Tensor, x0: Tensor, eps: float, norm: str) -> None:
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    assert float(length(x - x0, norm).max()) <= eps * (1 + 1e-12) + 1e-15


# ----------------------------------------------------------------------------------------------- projection


@norms
@seeded
@given(seed=seeds, eps=radii, far=st.sampled_from([0.01, 1.0, 100.0]))
def test_projection_is_inside_and_idempotent(norm: str, seed: int, eps: float, far: float) -> None:
    ball, x0 = Ball(eps, norm), images(seed)
    x = ball.project(x0 + far * noise(seed), x0)
    assert_admissible(x, x0, eps, norm)
    assert torch.allclose(ball.project(x, x0), x, rtol=0, atol=1e-15)


@norms
@seeded
@given(seed=seeds, eps=radii)
def test_projection_leaves_points_of_the_set_alone(norm: str, seed: int, eps: float) -> None:
    ball, x0 = Ball(eps, norm), images(seed)
    d = noise(seed)
    inside = x0 + d * (0.9 * eps / length(d, norm)).view(-1, 1, 1, 1)
    inside = inside.clamp(0, 1)
    assert torch.allclose(ball.project(inside, x0), inside, rtol=0, atol=1e-15)


@seeded
@given(seed=seeds, eps=radii, far=st.sampled_from([0.1, 1.0, 10.0]))
def test_linf_projection_is_the_nearest_point_pixel_by_pixel(seed: int, eps: float, far: float) -> None:
    x0 = images(seed)
    x = x0 + far * noise(seed)
    found = Ball(eps).project(x, x0)
    for p, p0, q in zip(x.flatten().tolist(), x0.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert q == pytest.approx(sorted((max(p0 - eps, 0), p, min(p0 + eps, 1)))[1], abs=1e-15)


def test_linf_projection_against_a_grid_search() -> None:
    x0, eps = torch.tensor([[0.1, 0.95]], dtype=torch.float64), 0.2
    axis = torch.linspace(0, 1, 1001, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    feasible = grid[((grid - x0).abs() <= eps + 1e-12).all(1)]
    for x in noise(3, 20, 2) + x0:
        nearest = feasible[(feasible - x).square().sum(1).argmin()]
        assert torch.allclose(Ball(eps).project(x[None], x0)[0], nearest, rtol=0, atol=5.1e-4)


@seeded
@given(seed=seeds, eps=st.sampled_from([1e-3, 0.1, 0.3]))
def test_l2_projection_is_the_nearest_point_where_the_box_does_not_matter(seed: int, eps: float) -> None:
    x0, d = torch.full((4, 1, 3, 3), 0.5, dtype=torch.float64), noise(seed)
    found = Ball(eps, "l2").project(x0 + d, x0)
    for row, p0, p in zip(found, x0, x0 + d, strict=True):
        distance = float((p - p0).norm())
        assert torch.allclose(row, p0 + (p - p0) * min(1, eps / distance), rtol=0, atol=1e-14)


@norms
def test_projection_on_a_point(norm: str) -> None:
    x0 = images(0)
    ball = Ball(0, norm)
    assert torch.equal(ball.project(x0 + noise(0), x0), x0)
    assert torch.equal(ball.project(x0, x0), x0)
    assert torch.equal(ball.start(x0), x0)


# -------------------------------------------------------------------------------------------------- starts


@norms
@seeded
@given(seed=seeds, eps=radii)
def test_a_start_is_inside_and_a_function_of_the_generator(norm: str, seed: int, eps: float) -> None:
    ball, x0 = Ball(eps, norm), images(seed)
    first, again = (ball.start(x0, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert_admissible(first, x0, eps, norm)
    assert torch.equal(first, again)


@norms
def test_a_start_leaves_the_batch_alone(norm: str) -> None:
    x0 = images(0)
    kept = x0.clone()
    Ball(0.3, norm).start(x0)
    assert torch.equal(x0, kept)


def test_linf_starts_are_uniform() -> None:
    x0 = torch.full((20_000, 2), 0.5, dtype=torch.float64)
    d = Ball(0.2).start(x0, torch.Generator().manual_seed(0)) - x0
    assert float(d.mean()) == pytest.approx(0, abs=5 * 0.2 / math.sqrt(3 * 40_000))
    sorted_d, uniform = d.flatten().sort().values, torch.linspace(-0.2, 0.2, 40_000, dtype=torch.float64)
    assert float((sorted_d - uniform).abs().max()) / 0.4 < 1.95 / math.sqrt(40_000)  # Kolmogorov, 0.1 %


def test_l2_starts_have_uniform_length_and_direction() -> None:
    x0 = torch.full((20_000, 3), 0.5, dtype=torch.float64)
    d = Ball(0.2, "l2").start(x0, torch.Generator().manual_seed(0)) - x0
    lengths = d.norm(dim=1)
    uniform = torch.linspace(0, 0.2, 20_000, dtype=torch.float64)
    assert float((lengths.sort().values - uniform).abs().max()) / 0.2 < 1.95 / math.sqrt(20_000)
    directions = d / lengths[:, None]
    assert float(directions.mean(0).norm()) < 5 / math.sqrt(20_000)
    # on the sphere in three dimensions each coordinate is uniform on [-1, 1] (Archimedes)
    uniform = torch.linspace(-1, 1, 20_000, dtype=torch.float64)
    for coordinate in directions.T:
        assert float((coordinate.sort().values - uniform).abs().max()) / 2 < 1.95 / math.sqrt(20_000)


# --------------------------------------------------------------------------------- direction and support


def feasible(norm: str, eps: float, count: int, size: int) -> Tensor:
    """Random perturbations of norm at most eps, most of them on the boundary."""
    d = noise(9, count, size)
    d = d.sign() * torch.rand(count, size, dtype=torch.float64).round() if norm == "linf" else d
    return eps * d / length(d, norm).clamp_min(1e-300)[:, None]


@norms
@seeded
@given(seed=seeds, eps=st.sampled_from([1e-3, 0.3, 1.0]))
def test_the_support_function_bounds_every_perturbation_and_is_attained(
    norm: str, seed: int, eps: float
) -> None:
    ball, g = Ball(eps, norm), noise(seed, 3, 6)
    support = ball.support(g)
    assert support.shape == (3,)
    products = feasible(norm, eps, 2000, 6) @ g.T
    assert bool((products <= support * (1 + 1e-12)).all())
    best = eps * NORMS[norm].direction(g)
    assert float(length(best, norm).max()) <= eps * (1 + 1e-9)
    assert torch.allclose((best * g).sum(1), support, rtol=1e-8, atol=0)


def test_the_support_function_is_the_maximum_over_all_corners() -> None:
    g = noise(1, 3, 5)
    corners = torch.cartesian_prod(*[torch.tensor([-0.3, 0.3], dtype=torch.float64)] * 5)
    assert torch.allclose(Ball(0.3).support(g), (corners @ g.T).max(0).values, rtol=1e-12)


def test_the_support_function_by_hand() -> None:
    g = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert Ball(0.5).support(g).tolist() == [3.5, 0.0]
    assert Ball(0.5, "l2").support(g).tolist() == [2.5, 0.0]


@norms
def test_a_vanishing_gradient_does_not_move(norm: str) -> None:
    x0 = images(2)
    assert torch.equal(Ball(0.3, norm).step(x0, torch.zeros_like(x0), 0.1, x0), x0)


SCALES = {  # down to the smallest number of each dtype
    torch.float64: (1e300, 1.0, 1e-160, 1e-308, 5e-324),
    torch.float32: (1e30, 1.0, 1e-10, 1e-25, 1e-38, 1.4e-45),
    torch.bfloat16: (1e30, 1.0, 1e-25, 1e-38, 9.2e-41),
    torch.float16: (9e3, 1.0, 1e-7),
}


@pytest.mark.parametrize(("dtype", "scale"), [(d, s) for d, every in SCALES.items() for s in every])
def test_an_l2_step_has_its_length_however_small_the_gradient(dtype: torch.dtype, scale: float) -> None:
    g = (noise(0, 3, 7).sign() * scale * torch.arange(1, 8)).to(dtype)
    x0 = torch.full_like(g, 0.5)
    power = 2.0 ** (500 if scale < 1 else -500)  # exact, and away from the smallest and largest doubles
    for row, found in zip((g.double() * power).tolist(), unit(g).double(), strict=True):
        expected = torch.tensor([v / math.hypot(*row) for v in row], dtype=torch.float64)
        assert torch.allclose(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    moved = Ball(0.3, "l2").step(x0, g, 0.1, x0).double() - 0.5
    assert torch.allclose(moved.norm(dim=1), torch.full((3,), 0.1).double(), rtol=4 * torch.finfo(dtype).eps)


def test_projections_starts_and_lengths_of_l2_at_any_scale() -> None:
    x0, d = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    for scale in (1e-30, 1e-15, 1.0):
        ball = Ball(2.5 * scale, "l2")
        assert torch.allclose(ball.shrink(scale * d), scale * d / 2, rtol=1e-6, atol=0)
        assert float(ball.distance(scale * d, x0)) == pytest.approx(5 * scale, rel=1e-6)
        assert float(ball.support(scale * d)) == pytest.approx(12.5 * scale**2, rel=1e-6, abs=1e-45)
        assert 0 < float(unit(ball.noise(d)).norm()) <= 1 + 1e-6


def test_the_derivative_of_an_l2_direction_is_that_of_g_over_its_length_and_finite() -> None:
    for scale in (1.0, 1e-8, 1e-150):
        g = scale * torch.tensor([[3.0, -4.0]], dtype=torch.float64)
        found = torch.autograd.functional.jacobian(lambda v: unit(v)[0], g)[:, 0]
        d, eye = g[0] / (5 * scale), torch.eye(2, dtype=torch.float64)
        assert torch.allclose(found, (eye - torch.outer(d, d)) / (5 * scale), rtol=1e-12, atol=1e-15 / scale)
    for scale in (0.0, 1e-45, 1e-40, 1e-35):
        g = scale * torch.tensor([[3.0, -4.0]])
        for function in (unit, Ball(0.3, "l2").shrink, Ball(0.3, "l2").support):
            jacobian = torch.autograd.functional.jacobian(function, g)
            assert bool(jacobian.isfinite().all())


@norms
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_step(norm: str, bad: float) -> None:
    x0 = images(2)
    g = noise(2)
    g[1, 0, 0, 0] = bad
    moved = Ball(0.3, norm).step(x0, g, 0.1, x0)
    assert bool(moved[1].isnan().any())
    assert bool(moved[[0, 2, 3]].isfinite().all())


@norms
def test_a_step_far_inside_the_set_goes_along_the_direction(norm: str) -> None:
    x0, g = torch.full((4, 1, 3, 3), 0.5, dtype=torch.float64), noise(4)
    moved = Ball(0.3, norm).step(x0, g, 0.01, x0) - x0
    assert torch.allclose(length(moved, norm), torch.full((4,), 0.01, dtype=torch.float64), rtol=1e-9)
    assert torch.allclose((moved * g).flatten(1).sum(1), Ball(0.01, norm).support(g), rtol=1e-9)


@norms
@seeded
@given(seed=seeds, alpha=st.sampled_from([0.0, 0.01, 10.0]))
def test_a_step_stays_inside(norm: str, seed: int, alpha: float) -> None:
    ball, x0 = Ball(0.3, norm), images(seed)
    x = ball.start(x0, torch.Generator().manual_seed(seed))
    assert_admissible(ball.step(x, noise(seed), alpha, x0), x0, 0.3, norm)


def test_distance_by_hand() -> None:
    x0 = torch.zeros(2, 1, 1, 2)
    x = torch.tensor([[3.0, -4.0], [0.0, 0.5]]).view(2, 1, 1, 2)
    assert Ball(1).distance(x, x0).tolist() == [4.0, 0.5]
    assert Ball(1, "l2").distance(x, x0).tolist() == [5.0, 0.5]


# ------------------------------------------------------------------------------------------------- errors


def test_a_radius_may_be_a_fraction() -> None:
    assert Ball("8/255").eps == 8 / 255
    assert Ball("8/255") == Ball(8 / 255)


@pytest.mark.parametrize(
    ("eps", "norm", "message"),
    [
        (-1, "linf", "eps must be >= 0, got -1"),
        (math.nan, "linf", "eps must be finite, got nan"),
        (math.inf, "l2", "eps must be finite, got inf"),
        ("big", "linf", "eps must be a number such as 0.3, 1e-3 or 8/255, got 'big'"),
        (None, "linf", "eps must be a number"),
        (True, "linf", "eps must be a number"),
        (0.3, "l1", "norm must be one of linf, l2, got 'l1'"),
        (0.3, ["l2"], "norm must be one of linf, l2"),
        (8, "linf", r"eps must be at most 1, .* in linf, got 8: was 8/255 meant\?"),
        ("1.5", "linf", "eps must be at most 1,"),
        (1e39, "l2", r"eps must be at most 1000, .* in l2, got 1e\+39$"),
    ],
)
def test_a_wrong_ball_is_refused(eps: object, norm: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ball(eps, norm)  # type: ignore[arg-type]


def test_a_radius_beyond_the_box_of_the_data_is_refused_by_every_call() -> None:
    """[0, 1]^4 has the diameter 2 in l_2."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(16, 1, 2, 2), torch.arange(16) % 3
    calls: list[Any] = [
        lambda **k: controlat.pgd(model, x, y, alpha=0.1, steps=1, **k),
        lambda **k: controlat.fgsm(model, x, y, **k),
        lambda **k: controlat.robustness(model, x, y, attacks=["fgsm"], checks=0, **k),
        lambda **k: controlat.criterion(model, x, y, {"alpha": 0.1, "steps": 1}, gamma=0, alphas=[0.1], **k),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"at most 1, .* got 8: was 8/255 meant\?"):
            call(eps=8)
        with pytest.raises(ValueError, match=r"at most 2, .* in l2, got 2.1"):
            call(eps=2.1, norm="l2")
        call(eps=2, norm="l2")
    for kind in (TrainSettings, EvaluateSettings):
        with pytest.raises(ValueError, match="8/255 meant"):
            kind(eps="8")
    with pytest.raises(ValueError, match="8/255 meant"):
        AttackSettings("last.pt", eps=8, norm="linf")


def test_training_refuses_a_radius_beyond_the_box_and_notes_a_step_far_beyond_the_ball(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, Any] = {"epochs": 2, "train_points": 40, "test_points": 10, "progress": False}
    with pytest.raises(ValueError, match=r"eps must be at most 8, .* got 128: was 128/255 meant"):
        controlat.train(tmp_path / "a", eps=128, norm="l2", **few)
    controlat.train(tmp_path / "b", eps=0.1, schedule="step:steps=1:2,at=1,alpha=0.4:2", **few)
    note = "note: step:steps=1:2,at=1,alpha=0.4:2: alpha 2 is 20 eps (eps 0.1): every step leaves the ball"
    assert capsys.readouterr().err.count(note) == 1


def test_a_step_far_beyond_the_ball_is_noted_and_one_across_it_is_not() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(16, 1, 2, 2), torch.arange(16) % 3
    calls: list[Any] = [
        lambda a: controlat.pgd(model, x, y, eps=0.1, alpha=a, steps=1),
        lambda a: controlat.robustness(model, x, y, eps=0.1, attacks=[f"pgd:steps=2,alpha={a}"], checks=0),
        lambda a: controlat.criterion(model, x, y, {"alpha": a, "steps": 1}, eps=0.1, gamma=0),
    ]
    for call in calls:
        call(0.4)
        with pytest.warns(UserWarning, match=r"alpha 8 is 80 eps \(eps 0.1\).*was 8/255 meant\?") as told:
            call(8)
        assert [w.filename for w in told] == [__file__]
    assert Ball(0).step_size_warning(1.0) == ""
