"""What a report gets of the full criterion."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controlat._util.files import read_json
from controlat.app.full_criterion import report_payload
from controlat.control.schedules import load_schedule
from controlat.pmp import Criterion

RUN = Path(__file__).parents[1] / "records/release_0_1/evaluated/runs/01-pgd-steps=2-alpha=0.1-seed0"


@pytest.fixture
def stored() -> dict[str, Any]:
    """The full criterion of a run, as release 0.1 wrote it."""
    found: dict[str, Any] = read_json(RUN / "full.json")
    return found


def shown(stored: dict[str, Any]) -> dict[str, Any]:
    return report_payload(stored, load_schedule(RUN / "schedule.json"))


def test_the_report_has_the_criterion_by_horizon_price_and_block(stored: dict[str, Any]) -> None:
    payload, criterion = shown(stored), Criterion.from_json(stored["criterion"])
    assert {h["steps"]: h["value"] for h in payload["horizons"]} == {
        h: criterion.value(h) for h in criterion.horizons
    }
    assert [p["gamma"] for p in payload["prices"]] == [criterion.gamma / 4, 4 * criterion.gamma]
    for price in payload["prices"]:
        assert price["value"] == replace(criterion, gamma=price["gamma"]).value()
    assert payload["C_rho"] == criterion.value(rho=stored["calibration"]["rho"])
    assert payload["cosine"] == pytest.approx(np.mean(criterion.cosines()))
    gains = [block["gain"] for block in payload["blocks"]]
    assert sum(gains) == pytest.approx(stored["calibration"]["gain"], rel=1e-12)
    assert payload["calibration"] == stored["calibration"]


@pytest.mark.parametrize("steps", [1, 99, 150, 200, 201, 350, 1000, 1001])
def test_thinned_norms_keep_the_first_and_the_last(stored: dict[str, Any], steps: int) -> None:
    """A figure of the costate ends where the run does, and growth is the ratio of its two ends."""
    norms = [[step, 2.0 + step] for step in range(steps)]
    stored["criterion"]["norms"] = norms
    payload = shown(stored)
    kept = payload["norms"]
    assert [kept[0], kept[-1]] == [norms[0], norms[-1]]
    assert kept == [pair for pair in norms if pair in kept], "in order, each once"
    assert len(kept) <= 201
    assert payload["growth"] == kept[0][1] / kept[-1][1]
