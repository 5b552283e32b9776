"""Real K through the commands: what is estimated, logged, scored, and shown in the summary and the figure."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import controlat
from controlat import parse_schedule
from controlat.app.estimate import estimate
from controlat.report.sections import problem

TEXT = "pgd:steps=2.5,alpha=0.1,rounding=dither"
SMALL: dict[str, Any] = {
    "schedules": [TEXT],
    "seeds": [0],
    "epochs": 3,
    "train_points": 160,
    "held_out": 20,
    "test_points": 20,
    "batch_size": 28,  # 5 batches of 28
    "probe": 56,
    "alphas": [0.05, 0.1],
    "attacks": ["fgsm"],
    "checks": 0,
    "threads": 1,
    "progress": False,
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dithered") / "out"
    controlat.evaluate(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return controlat.evaluate(out, **SMALL)  # read again


def taken() -> list[list[int]]:
    s = parse_schedule(TEXT, 3)
    return [[s.at(epoch, b, 5)["steps"] for b in range(5)] for epoch in range(3)]


def test_what_is_estimated_is_what_is_spent_and_within_a_batch_of_the_real_number(
    result: dict[str, Any],
) -> None:
    (run,) = result["schedules"][0]["runs"]
    spent = [epoch["gradients"] for epoch in run["epochs"]]
    assert spent == [28 * sum(k + 1 for k in ks) for ks in taken()]
    assert all(abs(n - 140 * 3.5) < 28 for n in spent)
    told = estimate(**SMALL)["gradients"]
    assert told["training"] == sum(spent)
    assert told["criterion"] == sum(epoch["gradients"] for epoch in run["criterion"])


def test_the_log_has_the_real_number_and_the_criterion_that_of_the_first_step(result: dict[str, Any]) -> None:
    (run,) = result["schedules"][0]["runs"]
    assert [epoch["control"]["steps"] for epoch in run["epochs"]] == [2.5] * 3
    first = [ks[0] for ks in taken()]
    assert [epoch["norm"]["control"]["steps"] for epoch in run["criterion"]] == first
    assert set(first) == {2, 3}
    assert result["grid"]["max_steps"] == 3
    assert [block["control"]["steps"] for block in run["full"]["blocks"]] == [2.5] * 3


def test_the_summary_shows_the_real_number(out: Path) -> None:
    text = (out / "summary.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| 0 ", "| 1 ", "| 2 "))]
    assert len(rows) == 2 * 3  # greedy and full
    assert all("K=2.5" in row for row in rows)
    assert "rounding=dither" in text.partition("## Estimates")[0].partition("\n- ")[2]


def test_the_figure_shows_the_real_number(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(problem, "save", lambda figure, path: drawn.append(figure))
    problem.draw(result, Path("unused.png"))
    values = {
        axis.get_ylabel(): {v for line in axis.get_lines() for v in line.get_ydata()}  # type: ignore[union-attr]
        for axis in drawn[0].axes
    }
    assert values["steps K"] == {2.5}
