"""The figures of a result: they open, and show something."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from controlat import parse_schedule, report
from controlat._util.files import read_json
from controlat.control.schedules import Schedule
from controlat.report.sections import problem

DEMO = Path(__file__).resolve().parents[2] / "analysis" / "demo" / "result.json"
FIGURES = ["schedules.png", "criterion.png", "tradeoff.png", "horizons.png", "costates.png", "surfaces.png"]


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    result: dict[str, Any] = read_json(DEMO)
    return result


def test_a_result_has_the_figures_that_it_has_numbers_for(demo: dict[str, Any]) -> None:
    assert list(report.figures(demo)) == FIGURES
    swept = demo | {"settings": demo["settings"] | {"sweeps": True}}
    assert list(report.figures(swept)) == [*FIGURES, "sweeps.png"]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_open_and_show_something(demo: dict[str, Any], name: str, tmp_path: Path) -> None:
    report.figures(demo)[name].draw(demo, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert width > 700
    assert height > 300
    inked = (pixels < 250).any(axis=2)
    assert 0.005 < inked.mean() < 0.7
    coloured = np.ptp(pixels.astype(int), axis=2) > 60
    for half in (coloured[:, : width // 2], coloured[:, width // 2 :]):
        assert half.sum() > 100, "there are curves in both panels, not axes only"


def test_the_controls_of_a_closed_loop_are_marked_with_the_seed_that_they_were_taken_under(
    demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(problem, "save", lambda figure, path: drawn.append(figure))
    loop, *others = demo["schedules"]
    result = demo | {"schedules": [loop | {"closed_loop": True}, *others]}
    problem.draw(result, tmp_path / "schedules.png")
    (legend,) = drawn[0].legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [f"{loop['text']} (seed 0)", *(entry["text"] for entry in others)]
    assert f"Closed loop ({loop['text']}): controls depend on the state" in report.summary(result)
    assert "Closed loop" not in report.summary(demo)


def test_a_schedule_of_many_pieces_is_asked_once_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing takes time in proportion to the pieces: no search, no pass over them for each."""
    asked = 0
    plain = Schedule.__call__

    def counted(self: Schedule, t: float) -> Any:
        nonlocal asked
        asked += 1
        return plain(self, t)

    monkeypatch.setattr(Schedule, "__call__", counted)
    steps = ":".join(str(i % 3) for i in range(400))
    schedule = parse_schedule(f"table:steps={steps},tau=0.3,resolution=1/20", 20)
    problem.draw({"schedules": [{"text": "many", "schedule": schedule.to_json()}]}, tmp_path / "s.png")
    assert asked == 2 * (400 + 1)  # alpha and steps, both ends
