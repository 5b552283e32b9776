"""Figures and summaries of derivations: complete, readable, and functions of the result file alone."""

import json
import math
import re
import struct
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import controlat
from controlat.report.derivation.document import markdown
from controlat.report.derivation.figures import FIGURES
from controlat.report.derivation.terminal import printed
from controlat.report.derivation.words import greek
from controlat.symbolic import Task, fit

SEXTIC = "theta^2/2 - x^4 + theta*x^2 - theta*x/10"  # no closed form of its inner maximum that sympy picks
NAMES = ("amata", "bare", "clipped", "fitted")
ALWAYS = {"landscape.png", "schedule.png", "network.png"}


def _measured(times, values):
    """What `controlat.app.calibration.calibration` returns, as far as it is shown."""
    marks = [""] * (len(times) - 1) + ["one step is enough"]
    what = "steps K of size 2 eps/K to 95% of the gain"
    spent = {"gradients": 91648, "forwards": 12800, "training_gradients": 42048}
    return {
        "run": "runs/some",
        "schedule": "pgd:steps=5,alpha=0.1",
        "seed": 3,
        "times": times,
        "epochs": times[-1],
        "measures": {"convergence": {"what": what, "values": values, "marks": marks}},
        "probe": 512,
        "eps": 0.15,
        **spent,
        "seconds": 0.5,
        "training_seconds": 7.0,
        "same": True,
        "warning": None,
    }


def _fitted():
    """A derivation whose calibration is one of made-up values, from epoch 2 on near a path."""
    times = list(range(11))
    values = [9.0, 6.0] + [
        7 / (1 + 1.44 * math.exp(-0.6 * t)) * (1 + 0.05 * (-1) ** t) for t in range(len(times) - 2)
    ]
    found = fit(Task(theta0=1), times, values)
    task = found.task(Task(theta0=1), found.amplitude)
    numbers = {name: str(float(getattr(task, name))) for name in ("theta0", "tau", "horizon")}
    result = controlat.derive(**numbers, epochs=10, checks=False, progress=False).result
    return result | {"calibration": {"fit": found.to_json(), "measured": _measured(times, values)}}


@pytest.fixture(scope="module")
def results():
    """Results as they are read back from their files."""
    plain = {"checks": False, "progress": False}
    clipped = {"mapping": "clip", "k_min": 11, "k_max": 15, "order": 6, "epochs": 40}
    found = {
        "amata": controlat.derive(progress=False).result,
        "bare": controlat.derive(SEXTIC, theta0=2, **plain).result,
        "clipped": controlat.derive(**clipped, **plain).result,
        "fitted": _fitted(),
    }
    return {name: json.loads(json.dumps(result)) for name, result in found.items()}


def _words(text):
    """Text without its line breaks."""
    return " ".join(text.replace("\n- ", "\n").split())


def _table(text, head):
    """The cells of the first table that has this heading."""
    lines = text.split("\n")
    heads = [[cell.strip() for cell in line.split("|")] for line in lines]
    first = next(i for i, cells in enumerate(heads) if head in cells[1:] and lines[i + 1].startswith("|--"))
    cells = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip() for cell in line.strip("|").split("|")])
    return cells


def _drawn(name, result, path):
    """Draw a figure; its picture as an array, after a look at the file's header."""
    FIGURES[name].draw(result, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-12:] == b"\0\0\0\0IEND\xaeB`\x82"
    width, height = struct.unpack(">II", data[16:24])
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (height, width)
    return picture


@pytest.mark.parametrize("which", NAMES)
def test_figures_are_pictures_of_something(results, which, tmp_path):
    result = results[which]
    wanted = {name for name, figure in FIGURES.items() if figure.wanted(result)}
    more = {"amata": {"principle.png", "bound.png"}, "fitted": {"calibration.png"}}
    assert wanted == ALWAYS | more.get(which, set())
    for name in wanted:
        picture = _drawn(name, result, tmp_path / name)
        assert min(picture.shape[:2]) > 300
        coloured = np.ptp(picture[..., :3], axis=-1) > 0.2  # lines and markers, not axes and texts
        assert coloured.mean() > 1e-3, name


def test_a_figure_without_some_of_its_data(results, tmp_path):
    """No series, no comparison, a multiplier that is undefined, an ascent that diverges: still a picture."""
    result = json.loads(json.dumps(results["amata"]))
    result["series"]["values"] = []
    result["curves"]["series"] = [math.nan] * len(result["curves"]["t"])
    checked = result["verification"]
    checked["derived"]["m"] = [None] * len(checked["derived"]["t"])
    checked["comparisons"] = [{"name": "constant", "error": "it leaves the landscape"}]
    result["pictures"][0]["path"][3:] = [1e10] * len(result["pictures"][0]["path"][3:])
    result["pictures"][0]["losses"][3:] = [-1e300] * len(result["pictures"][0]["losses"][3:])
    checked["hamiltonian"][0]["H"][:3] = [None, -1e300, -1e20]
    checked["derived"]["gap"][:2] = ["inf", "nan"]  # as `write_json` writes them
    checked["derived"] |= {"C": "inf", "J": "nan"}
    for name in ("landscape.png", "schedule.png", "principle.png"):
        assert _drawn(name, result, tmp_path / name).std() > 0.01
    for text in (printed(result), markdown(result)):
        assert "near 0 in numbers" not in text
        assert ["constant", "-", "-", "-"] in _table(text, "schedule")
        assert _table(text, "schedule")[0][1:3] == ["-", "-"]
    assert "constant: it leaves the landscape" in markdown(result)


@pytest.mark.parametrize("which", NAMES)
def test_texts_have_no_holes(results, which):
    for text in (printed(results[which]), markdown(results[which])):
        assert not re.search(r"\b(nan|None|inf|True|False)\b", text)
        assert not re.search(r"[{}]['\"]|\(\)|\(, ", text)
    lines = printed(results[which]).split("\n")
    assert max(len(line) for line in lines if "\\" not in line) <= 100  # LaTeX is copied, not read


@pytest.mark.parametrize("which", NAMES)
def test_texts_are_functions_of_the_result_alone(results, which):
    result = results[which]
    again = json.loads(json.dumps(result, sort_keys=True))
    assert printed(again) == printed(result)
    assert markdown(again) == markdown(result)


def test_what_derive_returns_prints_as_its_result_reads_back():
    found = controlat.derive(checks=False, progress=False)
    assert str(found) == printed(json.loads(json.dumps(found.result)))


@pytest.mark.parametrize("which", NAMES)
def test_every_formula_is_there_or_how_else_it_is_known(results, which):
    result = results[which]
    text, words, terminal = markdown(result), _words(markdown(result)), _words(printed(result))
    for key, answer in result["formulas"].items():
        if "latex" in answer:
            assert f"= {answer['latex']}" in text, key
        else:
            assert f"{'numerically (scipy): ' * (answer['by'] == 'scipy')}{greek(answer['why'])}" in words, (
                key
            )
            assert greek(answer["why"]) in terminal, key
    assert ("numerically (scipy):" in words) == (which == "bare")
    assert {row[1] for row in _table(text, "by")} == {a["by"] for a in result["formulas"].values()}


def test_main_formulas_are_drawn(results):
    lines = [line.strip() for line in printed(results["amata"]).split("\n")]
    lefts = {"alpha": "α*(θ)", "theta": "θ(t)", "K": "K*(t)", "series": "K*(t) near 0", "J": "J"}
    for key, left in lefts.items():
        drawn = [line.strip() for line in results["amata"]["formulas"][key]["drawn"].split("\n")]
        assert sum(line.startswith(f"{left} = ") for line in drawn) == 1
        assert "\n".join(drawn) in "\n".join(lines)


def test_a_formula_too_large_to_draw_is_on_lines(results):
    text = printed(results["clipped"])
    assert ")·t^6" in text
    assert "**" not in text


def test_numbers_of_the_derivation(results):
    amata, bare = results["amata"], results["bare"]
    for text in (printed(amata), markdown(amata)):
        assert "J = L(θ(T)) + γ ∫ K* dt = 0.001239 + 0.01 × 53.09 = 0.5322" in text
        assert "K* increases on all of [0, 3], from 10 to 19.95" in text
        assert "-0.6436" in text
    assert "10 + 10 t + 0 t^2" in printed(amata)
    assert "1.953 - 1.574 t + 0.5914 t^2" in printed(bare)
    assert "number 1 of 2" in printed(bare)
    assert [row[1] for row in _table(markdown(bare), "kind")] == ["maximum", "minimum", "maximum"]
    course = _table(printed(bare), "θ(t)")
    assert float(course[0][3]) == pytest.approx(bare["curves"]["K"][0], rel=1e-3)
    assert float(course[-1][3]) == pytest.approx(bare["curves"]["K"][-1], rel=1e-3)
    assert "K* decreases on all of [0, 3], from 1.953 to 0.09018" in printed(bare)
    assert "NOTE: K* < 1 during" in printed(bare)
    assert "-1/l_xx(θ, x0): no Newton step: l_xx = 4 at the data point" in printed(bare)
    assert "Newton step" not in printed(amata)


@pytest.mark.parametrize("which", NAMES)
def test_the_networks_schedule(results, which):
    network = results[which]["network"]
    rows = _table(markdown(results[which]), "K* of the landscape")
    assert len(rows) == len(network["t"])
    for row, t, real, u, cut in zip(
        *(rows, network["t"], network["real"], network["controls"], network["clipped"]), strict=True
    ):
        assert float(row[0]) == t
        assert float(row[1]) == pytest.approx(real, rel=1e-3)
        assert int(row[3]) == u["steps"]
        assert float(row[4]) == pytest.approx(u["alpha"], rel=1e-3)
        assert row[5] == ("yes" if cut else "")
    assert greek(network["note"]) in _words(printed(results[which]))


def test_a_long_schedule_is_printed_where_it_changes(results):
    rows = _table(printed(results["clipped"]), "K* of the landscape")
    assert [int(row[3]) for row in rows] == [11, 11, 12, 13, 14, 15, 15]
    assert [row[5] for row in rows] == ["yes", "", "", "", "", "", "yes"]
    assert "(33 pieces like the one before them are not shown)" in printed(results["clipped"])


def test_the_verdict_is_that_of_the_verification(results):
    checked = results["amata"]["verification"]
    for text in (printed(results["amata"]), markdown(results["amata"])):
        for line in checked["conclusion"]:
            assert greek(line)[1:] in _words(text)
        rows = {row[0]: row for row in _table(text, "C")}
        for row in checked["comparisons"]:
            shown = rows[row["name"]]
            assert float(shown[1]) == pytest.approx(row["J"], rel=1e-3)
            assert float(shown[2]) == pytest.approx(row["C"], rel=1e-3, abs=1e-12)
    sets = {row[0]: row for row in _table(markdown(results["amata"]), "given away")}
    for row in checked["sets"]:
        assert float(sets[row["admissible"]][4]) == pytest.approx(row["value"], rel=1e-3)
        assert sets[row["admissible"]][7] == ("yes" if row["better_exists"] else "none found")


def test_optimal_is_never_said_without_a_set(results):
    for which in NAMES:
        for text in (printed(results[which]), markdown(results[which])):
            for found in re.finditer(r"optimal", _words(text)):
                assert _words(text)[found.end() :].startswith(" given ")


def test_without_checks_nothing_is_said_of_them(results):
    for text in (printed(results["bare"]), markdown(results["bare"])):
        assert "principle" not in text.replace("maximum principle and Theorem 1", "")
        assert "Fitted" not in text


def test_theorem(results):
    result = results["amata"]
    assert "σ = 0: as printed it holds for 0 of 4 T, corrected it holds for 4 of 4 T" in _words(
        printed(result)
    )
    rows = _table(markdown(result), "corrected")
    for shown, row in zip(rows, result["bound"]["rows"], strict=True):
        assert [float(shown[0]), int(shown[1])] == [row["sigma"], row["T"]]
        assert float(shown[2].split(" ± ")[0]) == pytest.approx(row["left"], rel=1e-3)
        assert float(shown[3]) == pytest.approx(row["printed"], rel=1e-3)
        assert shown[4] == ("yes" if row["printed_holds"] else "NO")
        assert float(shown[5]) == pytest.approx(row["corrected"], rel=1e-3)


def test_theorem_undecided_or_without_an_answer(results):
    result = json.loads(json.dumps(results["amata"]))
    rows = result["bound"]["rows"]
    rows[4]["printed_holds"] = None
    for key in rows[0]:
        rows[0][key] = rows[0][key] if key in ("T", "sigma") else None
    rows[0]["reason"] = "a run leaves theta in [0, 1]"
    assert "as printed it holds for 3 of 4 T (1 undecided)" in _words(printed(result))
    assert "as printed it holds for 0 of 3 T" in _words(printed(result))
    for text in (printed(result), markdown(result)):
        assert "No answer for σ = 0, T = 1: a run leaves θ in [0, 1]." in _words(text)
    assert len(_table(markdown(result), "corrected")) == 7
    result["bound"] |= {"rows": [], "reason": "no minimum of the robust loss"}
    assert not FIGURES["bound.png"].wanted(result)
    for text in (printed(result), markdown(result)):
        assert "Theorem 1 says nothing here: no minimum of the robust loss." in text


def test_calibration(results):
    result = results["fitted"]
    found, text = result["calibration"]["fit"], markdown(result)
    rows = _table(text, "residual (log)")
    measured = result["calibration"]["measured"]["measures"]["convergence"]["values"]
    assert [float(row[1]) for row in rows] == pytest.approx(measured, rel=1e-3)
    begin = len(rows) - len(found["times"])
    assert begin >= 2
    assert [row[2] for row in rows[:begin]] == ["not used"] * begin
    for shown, fitted, residual in zip(rows[begin:], found["fitted"], found["residuals"], strict=True):
        assert float(shown[2]) == pytest.approx(fitted, rel=1e-3)
        assert float(shown[3]) == pytest.approx(residual, rel=1e-2)
    assert rows[-1][4] == "one step is enough"
    for words in map(_words, (text, printed(result))):
        assert (
            f"Root mean square {found['rms']:.4g}; of the best constant {found['rms_constant']:.4g}" in words
        )
        assert "ended with the run's bits" in words
        assert f"held until epoch {found['times'][0]:g}, where the fit begins" in words
        assert "91.6 k gradient evaluations, 12.8 k forward passes, 0.5 seconds; training 42 k" in words
        assert "pgd:steps=5,alpha=0.1, seed 3, 10 epochs" in words


def test_calibration_that_failed_in_part(results):
    result = json.loads(json.dumps(results["fitted"]))
    result["calibration"]["fit"] |= {"errors": None, "notes": ["theta_0 lies next to the minimum"]}
    result["calibration"]["measured"] |= {"same": False, "warning": "training did not end with the bits"}
    for words in map(_words, (markdown(result), printed(result))):
        assert "the three numbers cannot be told apart" in words
        assert "WARNING: training did not end with the bits." in words
        assert "NOTE: θ₀ lies next to the minimum." in words
        assert "ended with the run's" not in words


def test_notes_are_shown(results):
    result = results["bare"] | {"notes": ["another inner maximum is larger at theta = 1"]}
    for text in (printed(result), markdown(result)):
        assert "another inner maximum is larger at θ = 1" in text


def test_a_loss_that_does_not_depend_on_theta(results):
    result = json.loads(json.dumps(results["bare"]))
    grid = np.linspace(-3, 3, 500)
    result["minima"]["plain"] = [{"theta": float(v), "kind": "inflection"} for v in grid]
    assert "stationary for θ from -3 to 3, where it is flat" in printed(result)


def test_every_figure_that_is_shown_exists(tmp_path):
    controlat.derive(out=tmp_path / "found", checks=False, progress=False)
    text = (tmp_path / "found" / "summary.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert set(shown) == ALWAYS == {path.name for path in Path(tmp_path / "found").glob("*.png")}
    assert text == markdown(json.loads((tmp_path / "found" / "result.json").read_text(encoding="utf-8")))
