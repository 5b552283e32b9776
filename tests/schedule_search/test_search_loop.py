"""The search on a judge whose J is known: what it finds, what it spends, and that it goes on where it was."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from controlat.schedule_search.loop import Branch, Plan, Rung, Search, paired
from controlat.schedule_search.proposers import Told, build
from controlat.schedule_search.space import Space
from controlat.schedule_search.trials import Answer, Ledger, Question

BOWL = Space("anneal:steps=0~8,alpha=0.01~0.1~log", 12)
FLAT = Space("delayed:steps=4,alpha=0.05,since=1~9", 12)


def phi_of(text: str) -> float:
    """0 at K = 6, alpha = 0.03; larger for other schedules, and 1 larger for all of `delayed`."""
    values = dict(part.split("=") for part in text.partition(":")[2].split(","))
    if text.startswith("delayed"):
        return 1.0
    return (float(values["steps"]) / 8 - 0.75) ** 2 + np.log10(float(values["alpha"]) / 0.03) ** 2


class Exact:
    """A judge that knows J up to noise of a given size, which depends on text and seed alone."""

    def __init__(self, noise: float = 0.0, fails: Callable[[Question], bool] = lambda _: False) -> None:
        self.noise, self.fails = noise, fails
        self.asked: list[Question] = []

    def __call__(self, questions: Sequence[Question], done: Callable[[int, Answer], None]) -> None:
        for i, q in enumerate(questions):
            self.asked.append(q)
            if self.fails(q):
                done(i, Answer(None, 0.0, 50.0, 0.1, "diverged"))
                continue
            rng = np.random.default_rng([q.seed, *q.text.encode()])
            done(i, Answer(phi_of(q.text) + self.noise * rng.standard_normal(), 5.0, 100.0, 0.1))


def plan(**changes: object) -> Plan:
    settings = {"budget": 16000.0, "price": 0.01, "rungs": (Rung(12), Rung(12, first=1)), "samples": 2}
    return Plan(rate=100 / (5 * 12 * 2), **{**settings, "seeds": tuple(range(100, 116)), **changes})  # type: ignore[arg-type]


def search(path: Path, judge: Exact, name: str = "tpe", **changes: object) -> Search:
    branches = [Branch(BOWL, build(name, BOWL, 0), 0.8), Branch(FLAT, build("random", FLAT, 0), 0.2)]
    return Search(branches, Ledger(path, judge), plan(**changes))


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_it_finds_what_is_best_under_noise(tmp_path: Path, name: str) -> None:
    winner = search(tmp_path / "trials.jsonl", Exact(0.02), name).run()
    assert winner.space is BOWL
    assert phi_of(winner.text) < 0.05
    assert len(winner.answers) >= 2


@pytest.mark.parametrize("budget", [3000.0, 6000.0, 16000.0])
def test_a_budget_is_that_of_the_whole_search_and_shared(tmp_path: Path, budget: float) -> None:
    s = search(tmp_path / "trials.jsonl", Exact(0.05), budget=budget)
    winner = s.run()
    for branch, share in zip(s.branches, (0.4, 0.1), strict=True):
        assert share * budget <= branch.spent() <= share * budget + 100  # a trial more at most
    assert s.spent == sum(a.gradients for a in s.ledger.answers.values())
    assert 0.75 * budget < s.spent <= budget
    assert winner is s.raced[0]


def test_a_search_that_goes_on_asks_nothing_twice_and_ends_the_same(tmp_path: Path) -> None:
    whole = Exact(0.02)
    first = search(tmp_path / "whole.jsonl", whole).run()
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for cut in (0, 1, 17, len(lines) - 2):
        path = tmp_path / f"{cut}.jsonl"
        path.write_text("".join(lines[:cut]) + '{"question": {"te')  # a line that was being written
        judge = Exact(0.02)
        again = search(path, judge).run()
        assert (again.text, again.answers) == (first.text, first.answers)
        assert judge.asked == whole.asked[cut:]
        assert path.read_text() == "".join(lines)


def test_failed_trainings_are_recorded_and_never_best(tmp_path: Path) -> None:
    judge = Exact(0.02, lambda q: "steps=6" in q.text or q.text.startswith("delayed"))
    s = search(tmp_path / "trials.jsonl", judge)
    winner = s.run()
    assert not winner.failed
    assert any(t.failed for b in s.branches for t in b.trials)
    everything = Exact(fails=lambda _: True)
    with pytest.raises(ValueError, match="every training of the search failed; the first one: diverged"):
        search(tmp_path / "failed.jsonl", everything).run()


def test_the_race_drops_what_is_decided_and_uses_the_same_seeds(tmp_path: Path) -> None:
    s = search(tmp_path / "trials.jsonl", Exact(0.001))
    winner = s.run()
    assert len({t.questions[0].seed for t in s.raced}) == 1
    assert all(q.seed != 100 for t in s.raced for q in t.questions), "fresh seeds"
    lengths = [len(t.answers) for t in s.raced]
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) <= {1, 2, 4, 8}
    for loser in s.raced[1:]:
        n = min(len(loser.answers), len(winner.answers))
        assert np.mean(loser.values(0.01)[:n]) >= np.mean(winner.values(0.01)[:n])


def test_paired_differences_by_hand() -> None:
    d = paired([1.0, 3.0, 2.0, 4.0], [0.0, 1.0, 1.0, 1.0])  # 1, 2, 1, 3: mean 1.75, deviation 0.957
    assert d.mean == 1.75
    assert d.high - d.mean == pytest.approx(3.1824 * 0.9574 / 2, rel=1e-4)
    assert d.decided
    assert not paired([1.0], [0.0]).decided


def test_too_few_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 9 for this plan, got 5"):
        plan(seeds=(0, 1, 2, 3, 4))


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match=r"other.jsonl, line 1: no answer of a search"):
        Ledger(tmp_path / "other.jsonl", Exact())


def test_a_training_with_its_surface_answers_for_the_one_without(tmp_path: Path) -> None:
    judge = Exact()
    plain = Question("anneal:steps=4,alpha=0.05", 7, 12)
    looked = plain._replace(surface=True)
    ledger = Ledger(tmp_path / "trials.jsonl", judge)
    (answer,) = ledger.ask([looked])
    for again in (ledger, Ledger(tmp_path / "trials.jsonl", judge)):
        assert again.ask([plain]) == [answer]
        assert again.answered(plain) == looked
    assert judge.asked == [looked]
    other = plain._replace(seed=8)
    ledger.ask([other])
    ledger.ask([other._replace(surface=True)])
    assert judge.asked == [looked, other, other._replace(surface=True)], "not the other way round"
    assert ledger.answered(other) == other


class Looking:
    """A proposer whose points are judged under several seeds, with surfaces."""

    def __init__(self, seeds: int) -> None:
        self.fidelity = {"seeds": seeds, "surface": True}

    def ask(self, count: int) -> list[dict[str, float]]:
        return [{"steps": k, "alpha": 0.03} for k in (2.0, 6.0)]

    def tell(self, trials: Sequence[Told]) -> None:
        pass


def test_what_a_proposer_has_had_judged_is_not_trained_again(tmp_path: Path) -> None:
    judge = Exact()
    s = Search([Branch(BOWL, Looking(3), 1.0)], Ledger(tmp_path / "trials.jsonl", judge), plan(budget=1200.0))
    assert s.run().text == "anneal:steps=6,alpha=0.03"
    assert s.spent == 100.0 * len(judge.asked)
    assert [len(t.answers) for t in s.raced] == [2, 2]
    assert all(q.surface for q in judge.asked), "seeds of the race are among those of exploring"


def test_more_seeds_than_a_search_has_are_refused(tmp_path: Path) -> None:
    s = Search([Branch(BOWL, Looking(17), 1.0)], Ledger(None, Exact()), plan())
    with pytest.raises(ValueError, match="17 seeds are asked for at a time; the search has 16"):
        s.run()
