"""The committed table of the step's derivative follows from its result file, and has every method."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from controlat import methods
from controlat._util.files import read_json
from controlat.control.space import ControlSpace, Knob

HERE = Path(__file__).resolve().parent.parent / "analysis"
SCRIPT: dict[str, Any] = runpy.run_path(str(HERE / "one_step.py"))
RESULT: dict[str, Any] = read_json(HERE / "one_step" / "result.json")
NETWORKS = SCRIPT["NETWORKS"]


def test_the_tables_are_those_of_the_result_file() -> None:
    text = (HERE / "mathematics.md").read_text()
    shown = text.partition("<!-- one step -->\n")[2].partition("\n<!-- end of one step -->")[0]
    assert shown == SCRIPT["table"](RESULT)
    assert SCRIPT["markdown"](RESULT) == (HERE / "one_step" / "table.md").read_text()


def test_every_method_of_the_folder_is_in_the_result_for_both_norms() -> None:
    assert [(row["method"], row["options"], row["norm"]) for row in RESULT["rows"]] == [
        (name, options, norm)
        for name in methods.names()
        for options in SCRIPT["OPTIONS"].get(name, [{}])
        for norm in ("linf", "l2")
    ]


@pytest.mark.parametrize(
    "row",
    RESULT["rows"],
    ids=lambda row: "-".join([row["method"], *map(str, row["options"].values()), row["norm"]]),
)
def test_where_nothing_is_dropped_differences_and_products_agree(row: dict[str, Any]) -> None:
    for found in (row[kind] for kind in NETWORKS):
        assert found["compared"] >= 4
        assert found["compared"] + found["skipped"] == RESULT["settings"]["directions"]
        if row["dropped"]:
            assert 1e-4 < found["step"] < 1
            assert 1e-4 < found["gradient"] < 1
        else:
            assert found["step"] < 1e-6
            assert "gradient" not in found


def test_what_the_text_says_about_the_table() -> None:
    """Nothing is dropped for l_inf but by YOPO's hamiltonian form; for l_2 free alone drops nothing."""
    cuts = [row["options"].get("first_layer_grad") == "hamiltonian" for row in RESULT["rows"]]
    for row, cut in zip(RESULT["rows"], cuts, strict=True):
        assert bool(row["dropped"]) == (cut or (row["norm"] == "l2" and row["method"] != "free")), row
    text = " ".join((HERE / "mathematics.md").read_text().split())
    words = {"plain": "of the derivative of the gradient without BatchNorm", "BatchNorm": "with it"}
    for kind in NETWORKS:
        alike = [row for row, cut in zip(RESULT["rows"], cuts, strict=True) if row["dropped"] and not cut]
        shares = [100 * row[kind]["gradient"] for row in alike]
        assert f"{min(shares):.2g} to {max(shares):.2g} % {words[kind]}" in text
    carried = [
        100 * row[kind]["step"]
        for row in RESULT["rows"]
        for kind in NETWORKS
        if row["norm"] == "l2" and (row["method"] == "atta" or row["options"].get("init") == "previous")
    ]
    assert f"{min(carried):.2g} to {max(carried):.2g} % of the step" in text


def test_one_line_again() -> None:
    found = SCRIPT["row"]("pgd_at", {}, "l2")
    (stored,) = (r for r in RESULT["rows"] if (r["method"], r["norm"]) == ("pgd_at", "l2"))
    assert {k: found[k] for k in ("control", "dropped")} == {k: stored[k] for k in ("control", "dropped")}
    for kind in NETWORKS:
        for what in ("step", "gradient"):
            assert found[kind][what] == pytest.approx(stored[kind][what], rel=0.05)


def test_a_control_is_found_for_a_method_with_knobs_of_its_own() -> None:
    knobs = {"alpha": Knob("real", 0.0), "steps": Knob("integer", 0, 2), "own": Knob("integer", 3)}
    knobs["known"] = Knob("real", 0.0, default=0.7)

    class Own:
        controls = ControlSpace(knobs, cost=lambda u: 1)

    assert dict(SCRIPT["control"](Own(), 0.5)) == {"alpha": 0.115, "known": 0.7, "own": 3, "steps": 2}


def test_the_networks_are_smooth() -> None:
    for kind in NETWORKS:
        modules = [type(m) for m in SCRIPT["network"](kind).modules()]
        assert not {nn.ReLU, nn.MaxPool2d} & set(modules)
        assert (nn.BatchNorm2d in modules) == (kind == "BatchNorm")
