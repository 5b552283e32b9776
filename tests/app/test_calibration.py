"""The inner problem of a run over its epochs: exact where its answer is known, and no trace in training."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import controlat
from controlat._util.errors import NonFiniteError
from controlat._util.files import read_json, write_json
from controlat.app import calibration
from controlat.app.calibration import Inner, inner_problem, measure, measured
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy
from controlat.control.cost import Meter

FEW: dict[str, Any] = {"train_points": 200, "test_points": 40, "threads": 1, "progress": False}
MEASURES = {"convergence", "curvature", "secant", "slope", "after_one"}

OWN = """
from controlat.methods.pgd_at import PgdAT
from torch import nn

class Enough(PgdAT):
    def end_epoch(self, epoch, u):
        if epoch.epoch == 1:
            epoch.stop("enough")

def noisy(in_shape, num_classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10)
    )
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    controlat.train(folder, epochs=3, schedule="amata:min=1,max=4,tau=0.3", seed=2, **FEW)
    return folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's."""
    (tmp_path / "calibrated_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def _measured(run: Path, **options: Any) -> dict[str, Any]:
    return measure(run, **({"probe": 64, "progress": False} | options))


# ------------------------------------------------------------------------------------------ known answers


def _parabola(slope: Tensor, curvature: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Sum over pixels of a u - c u^2/2, u = x - 1/2."""

    def loss(logits: Tensor, y: Tensor) -> Tensor:
        u = logits - 0.5
        return (slope * u - curvature * u**2 / 2).sum(1)

    return loss


def _on_parabola(slope: Tensor, curvature: float, ball: Ball, steps: int = 16, **options: Any) -> Inner:
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


# --------------------------------------------------------------------------------------------- of a run


def test_a_run_is_measured_at_every_epoch_and_ends_with_its_own_bits(run: Path) -> None:
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    found = _measured(run)
    assert found["same"] is True
    assert found["warning"] is None
    assert found["times"] == [0, 1, 2, 3]
    assert found["epochs"] == 3
    assert set(found["measures"]) == MEASURES
    for m in found["measures"].values():
        assert len(m["values"]) == len(m["marks"]) == 4
        assert all(math.isfinite(v) for v in m["values"])
    assert [len(row) for row in found["losses"]] == [21] * 4
    assert all(v > 0 for v in found["measures"]["convergence"]["values"])
    assert all(v >= 1 / 0.15 for v in found["measures"]["curvature"]["values"])
    assert (found["seed"], found["probe"], found["mode"], found["steps"]) == (2, 64, "eval", 20)
    assert (found["eps"], found["alpha"], found["budget"]) == pytest.approx((0.15, 0.015, 0.3))
    assert found["schedule"] == "amata:min=1,max=4,tau=0.3"
    trained = [json.loads(line)["gradients"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert found["training_gradients"] == sum(trained)
    assert found["gradients"] >= 4 * 64 * 21
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before, "nothing is written"


def test_the_same_numbers_twice_and_the_last_is_that_of_the_trained_network(run: Path) -> None:
    first, second = _measured(run), _measured(run)
    for found in (first, second):
        del found["seconds"], found["training_seconds"]
    assert first == second
    other = _measured(run, probe=63)
    assert other["probe"] == 63
    assert other["losses"] != first["losses"]


def test_losses_at_the_start_are_those_of_the_untrained_network(run: Path) -> None:
    found = _measured(run, probe=10_000, steps=10)
    assert found["probe"] == 180, "all there are"
    assert found["losses"][0][0] == pytest.approx(math.log(10), rel=0.1)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert found["losses"][3][0] < log[2]["loss"] * 1.2
    assert [len(row) for row in found["losses"]] == [11] * 4


@pytest.mark.usefixtures("own")
def test_batch_norm_and_dropout_behave_as_in_the_attacks_of_the_method(tmp_path: Path) -> None:
    """Measuring in training mode moves neither running statistics nor random numbers."""
    options = {"model": "calibrated_own:noisy", "schedule": "pgd:steps=2,alpha=0.1", "epochs": 2}
    controlat.train(tmp_path / "run", method_options={"attack_mode": "train"}, **options, **FEW)
    found = _measured(tmp_path / "run", steps=10)
    assert found["same"] is True
    assert found["mode"] == "train"


@pytest.mark.usefixtures("own")
def test_a_run_that_its_method_ended_is_measured_up_to_there(tmp_path: Path) -> None:
    options = {"method": "calibrated_own:Enough", "schedule": "fgsm:alpha=0.15", "epochs": 5}
    controlat.train(tmp_path / "run", **options, **FEW)
    found = _measured(tmp_path / "run", steps=10)
    assert found["same"] is True
    assert found["times"] == [0, 1, 2]
    assert found["epochs"] == 2


def test_a_measurement_is_kept_under_everything_that_decides_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "run", list[dict[str, Any]]()
    shutil.copytree(run, folder)
    options: dict[str, Any] = {"probe": 64, "steps": 10, "threads": 1, "progress": False}
    whole = measure(folder, **options)

    def counted(run: Path, **given: Any) -> dict[str, Any]:
        made.append(given)
        return whole | {"number": len(made)}

    monkeypatch.setattr(calibration, "measure", counted)

    def number() -> int:
        return int(measured(folder, **options)["number"])

    assert [number(), number()] == [1, 1]
    for other in ({"probe": 63}, {"steps": 11}, {"threads": 2}):
        assert [measured(folder, **options | other)["number"], number()] == [len(made) - 1, len(made)]
    for name, value in (("_VERSION", 0), ("BUDGET", 3.0), ("SHARE", 0.9)):
        with monkeypatch.context() as there:
            there.setattr(calibration, name, value)
            assert number() == len(made)
        assert number() == len(made)
    before = len(made)
    settings = read_json(folder / "settings.json")
    write_json(folder / "settings.json", settings | {"train_points": settings["train_points"] - 1})
    assert number() == len(made) == before + 1  # other data
    stored = torch.load(folder / "last.pt", weights_only=True)
    next(iter(stored["model"].values()))[0, 0] += 1e-6
    torch.save(stored, folder / "last.pt")
    assert number() == len(made) == before + 2  # another network
    (folder / "calibration.json").write_text("[1, 2")
    assert [number(), number()] == [before + 3, before + 3]  # a damaged one is made again


def test_other_bits_are_told_with_what_differs(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    stored = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    next(iter(stored["model"].values()))[0, 0] += 1e-6
    torch.save(stored, tmp_path / "run" / "last.pt")
    found = _measured(tmp_path / "run", steps=10)
    assert found["same"] is False
    assert "the environments agree" in found["warning"]
    stored["environment"] |= {"torch": "1.0", "threads": 10_000}
    torch.save(stored, tmp_path / "run" / "last.pt")
    found = _measured(tmp_path / "run", steps=10, threads=1)
    assert "torch 1.0 there" in found["warning"]
    assert "threads 10000 there, 1 here" in found["warning"]


def test_what_is_no_finished_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not the directory of a controlat train: it has no settings"):
        measure(tmp_path)
    write_json(tmp_path / "evaluated" / "settings.json", {"command": "evaluate"})
    with pytest.raises(ValueError, match="is not the directory of a controlat train"):
        measure(tmp_path / "evaluated")
    for name in ("cut", "behind", "none", "elsewhere"):
        shutil.copytree(run, tmp_path / name)
    lines = (run / "log.jsonl").read_text().splitlines(True)
    (tmp_path / "cut" / "log.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match="has 2 of 3 epochs; finish it with --resume"):
        measure(tmp_path / "cut")
    stored = torch.load(run / "last.pt", weights_only=True)
    stored["tally"]["epoch"] = 2
    torch.save(stored, tmp_path / "behind" / "last.pt")
    with pytest.raises(ValueError, match="has a checkpoint of 2 of 3 epochs; finish it with --resume"):
        measure(tmp_path / "behind")
    (tmp_path / "none" / "last.pt").unlink()
    with pytest.raises(ValueError, match="no such checkpoint"):
        measure(tmp_path / "none")
    settings = read_json(run / "settings.json") | {"data": "mnist"}
    write_json(tmp_path / "elsewhere" / "settings.json", settings)
    with pytest.raises(ValueError, match="mnist"):
        measure(tmp_path / "elsewhere", data_dir=str(tmp_path / "empty"))


@pytest.mark.parametrize(("name", "value"), [("probe", 1), ("steps", 9), ("threads", 0), ("device", "tpu9")])
def test_numbers_out_of_range_are_refused_before_anything_is_trained(
    run: Path, name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        measure(run, **{name: value})


def test_the_loss_of_the_measures_is_the_cross_entropy_by_default() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.rand(20, 1, 4, 4), torch.arange(20) % 3
    found = inner_problem(model, x, y, Ball(0.1))
    with torch.no_grad():
        assert found.losses[0] == pytest.approx(float(cross_entropy(model(x), y).mean()), rel=1e-5)
