"""What a report gets of the full criterion."""

from pathlib import Path

import pytest

from controlat._util.files import read_json
from controlat.app.look_back import report_payload

FULL = (
    Path(__file__).parents[1] / "records/release_0_1/evaluated/runs/01-pgd-steps=2-alpha=0.1-seed0/full.json"
)


@pytest.mark.parametrize("steps", [1, 99, 150, 200, 201, 350, 1000, 1001])
def test_thinned_norms_keep_the_first_and_the_last(steps: int) -> None:
    """A figure of the costate ends where the run does, and growth is the ratio of its two ends."""
    stored = read_json(FULL)
    norms = [[step, 2.0 + step] for step in range(steps)]
    stored["criterion"]["norms"] = norms
    payload = report_payload(stored)
    kept = payload["norms"]
    assert [kept[0], kept[-1]] == [norms[0], norms[-1]]
    assert kept == [pair for pair in norms if pair in kept], "in order, each once"
    assert len(kept) <= 201
    assert payload["growth"] == kept[0][1] / kept[-1][1]
