"""The command `search`: what it prints and writes, its plan, going on, and `report`."""

from pathlib import Path

import pytest

import controlat
from controlat._util.files import read_json
from controlat.app.cli import main
from controlat.app.search_plan import search_plan

WORDS = [
    *("--spaces", "constant", "--proposer", "random", "--budget", "10trainings", "--max_steps", "1"),
    *("--epochs", "1", "--train_points", "100", "--test_points", "20", "--judge_seeds", "0", "1"),
    *("--against", "none", "pgd:steps=1,alpha=0.3", "--attacks", "pgd-2"),
]
FILES = {"summary.md", "schedule.png", "progress.png", "pareto.png"}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished search."""
    out = tmp_path_factory.mktemp("search") / "out"
    assert main(["search", "--out", str(out), *WORDS, "--jobs", "1", "--progress", "false"]) == 0
    return out


def test_the_command_goes_on_by_its_directory_alone(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained, result = (done / "trainings.jsonl").read_text(), read_json(done / "result.json")
    assert main(["search", "--resume", str(done), "--jobs", "1", "--progress", "false"]) == 0
    told = capsys.readouterr().out
    assert "| found " in told
    assert "Use " in told
    assert (done / "trainings.jsonl").read_text() == trained
    again = read_json(done / "result.json")
    assert {k: v for k, v in again.items() if k != "environment"} == {
        k: v for k, v in result.items() if k != "environment"
    }


def test_the_result_has_every_trial(done: Path) -> None:
    result = read_json(done / "result.json")
    trials = result["trials"]
    assert [t["stage"] for t in trials] == sorted(t["stage"] for t in trials)  # explore, promote, race
    text, runs = trials[-1]["schedule"], trials[-1]["runs"]
    found = [t for t in trials if t["schedule"] == result["found"]]
    assert {"explore", "promote"} <= {t["stage"] for t in found}
    assert text in result["schedules"]
    assert [run["seed"] for run in runs] == list(range(10_001, 10_001 + len(runs)))  # not that of exploring
    lines = (done / "trainings.jsonl").read_text().splitlines()
    distinct = {(t["schedule"], run["seed"]) for t in trials for run in t["runs"]}
    assert len(lines) == len(distinct) + len(result["rows"]) * 2
    assert result["spent"]["trainings"] == len(distinct)


def test_report_makes_summary_and_figures_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = (done / "summary.md").read_text()
    for name in FILES:
        (done / name).unlink()
    assert main(["report", str(done)]) == 0
    assert all((done / name).exists() for name in FILES)
    assert (done / "summary.md").read_text() == told
    assert "pareto.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume", "DONE", "--budget", "3trainings"], "budget: '10trainings' there, '3trainings' here"),
        (["--resume", "DONE/.."], "is not the directory of a controlat search: it has no settings.json"),
        ([], "give --out DIR for a new search, or --resume DIR for one that was begun"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    done: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["search", *(word.replace("DONE", str(done)) for word in words)])
    assert told in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "--out", str(tmp_path / "out"), *WORDS, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "nothing was written" in told
    assert f"| judgement | {3 * 2:>9} |" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_plan_counts_what_the_search_then_takes(done: Path) -> None:
    result = read_json(done / "result.json")
    kept = ("spaces", "proposer", "budget", "max_steps", "epochs", "train_points", "test_points")
    s = result["settings"]
    plan = search_plan(**{name: s[name] for name in (*kept, "judge_seeds", "against", "attacks")})
    explored = [[t for t in r["trials"] if t["stage"] == "explore"] for r in (plan, result)]
    assert abs(len(explored[0]) - len(explored[1])) <= 1  # what is left for the last one
    for ours, theirs in zip(*explored, strict=False):
        assert ours["schedule"] == theirs["schedule"]
        ((one,), (other,)) = ours["runs"], theirs["runs"]
        assert one["mean_cost"] == pytest.approx(other["mean_cost"])
        assert one["gradients"] == pytest.approx(other["gradients"], rel=0.1)  # batches differ in size
    assert plan["price"] == pytest.approx(result["price"])


@pytest.mark.slow
def test_a_finished_search_gets_a_certificate(done: Path) -> None:
    result = controlat.search(done, resume=True, certificate=True, jobs=1, progress=False)
    assert result["certificate"]["seeds"] == [0, 1]
    assert {"C", "D", "trusted"} <= set(result["certificate"])
    there = read_json(done / "certificate" / "result.json")["schedules"][0]
    assert there["text"] == result["found"]
    j = [run["objective"]["J"] for run in there["runs"]]
    assert j == pytest.approx(result["rows"][0]["J"], rel=1e-3)  # the same J, at the same price
    again = controlat.search(done, resume=True, jobs=1, progress=False)
    assert again["certificate"] == result["certificate"]
    assert "C full" in (done / "summary.md").read_text()


def test_cheaper_trainings_are_given_one_after_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--epochs", "8", "--fidelity", "epochs=1/4,points=1/2", "epochs=1/2", "--print_config"]
    with pytest.raises(SystemExit) as stopped:
        main(["search", "--out", str(tmp_path / "out"), *words])
    assert stopped.value.code == 0
    assert "fidelity:\n- epochs=1/4,points=1/2\n- epochs=1/2\n" in capsys.readouterr().out
