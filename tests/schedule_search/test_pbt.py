"""Population based training where J is a sum over stages of how far K is from the best value there."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from controlat.schedule_search.loop import Branch, Plan, Rung, Search
from controlat.schedule_search.proposers import Told, build
from controlat.schedule_search.proposers.pbt import PBT
from controlat.schedule_search.space import SPACES, Space, named_space
from controlat.schedule_search.trials import Answer, Ledger, Question

STAGES = Space("step:steps=0~8:0~8:0~8:0~8,at=3:6:9,alpha=0.1,rounding=dither", 12)
BEST = (1.0, 2.0, 4.0, 5.0)
NEW = 100.0  # gradient evaluations of an epoch


def steps_of(text: str) -> list[float]:
    return list(map(float, text.partition("steps=")[2].partition(",")[0].split(":")))


def phi_of(text: str, until: int = 12) -> float:
    pairs = list(zip(steps_of(text), BEST, strict=True))[: until // 3]
    return sum((k - best) ** 2 for k, best in pairs) / 64


class Staged:
    """A judge of such a J with some noise, to which a beginning that it has seen costs nothing."""

    def __init__(self, noise: float = 0.01, fails: Callable[[Question], bool] = lambda q: False) -> None:
        self.noise, self.fails = noise, fails
        self.asked: list[Question] = []

    def __call__(self, questions: Sequence[Question], done: Callable[[int, Answer], None]) -> None:
        for i, q in enumerate(questions):
            until = q.until or 12
            known = [12, *(p.until for p in self.asked if p.until and p.until < until)]
            starts = [e for e in known if any(self._begins(p, q, e) for p in self.asked if p.until == e)]
            self.asked.append(q)
            gradients = NEW * (until - max(starts, default=0))
            if self.fails(q):
                done(i, Answer(None, 0.0, gradients, 1.0, "diverged"))
                continue
            rng = np.random.default_rng([q.seed, until, *q.text.encode()])
            done(i, Answer(phi_of(q.text, until) + self.noise * rng.standard_normal(), 5.0, gradients, 1.0))

    @staticmethod
    def _begins(p: Question, q: Question, epoch: int) -> bool:
        return p.seed == q.seed and steps_of(p.text)[: epoch // 3] == steps_of(q.text)[: epoch // 3]


def search(
    path: Path, judge: Staged, name: str = "pbt", seed: int = 0, budget: float = 16.0, **changes: object
) -> Search:
    settings = {"price": 0.0, "rungs": (Rung(12), Rung(12, seeds=3)), "batch": 4, "exploring": 1.0}
    plan = Plan(budget=budget * 12 * NEW, seeds=tuple(range(8)), **{**settings, **changes})  # type: ignore[arg-type]
    return Search([Branch(STAGES, build(name, STAGES, seed), 1.0)], Ledger(path, judge), plan)


def test_it_comes_closer_than_random_schedules_for_the_same_gradient_evaluations(tmp_path: Path) -> None:
    def mean(name: str) -> float:
        runs = [search(tmp_path / f"{name}{seed}.jsonl", Staged(), name, seed) for seed in range(4)]
        values = [phi_of(run.run().text) for run in runs]
        assert all(16 <= run.branches[0].spent() / (12 * NEW) < 16 + 4 for run in runs)
        return float(np.mean(values))

    assert mean("pbt") < 0.6 * mean("random")


def test_every_member_begins_as_one_before_did_and_ends_as_a_whole_schedule() -> None:
    pbt, rng = PBT(STAGES, 3), np.random.default_rng(0)
    for _ in range(2):  # populations
        before: list[list[float]] = []
        for done, until in enumerate((3, 6, 9, None)):
            texts = []
            while len(texts) < 8:
                points = pbt.ask(3)
                assert pbt.fidelity == {"epochs": 12, "until": until}
                texts += [STAGES.text_of(p) for p in points]
                pbt.tell([Told(p, float(rng.random())) for p in points])
            members = [steps_of(text) for text in texts]
            assert all(len(set(m[done:])) == 1 for m in members), "what is not decided yet stays as it is"
            if before:
                assert {tuple(m[:done]) for m in members} < {tuple(m[:done]) for m in before}
                assert sum(m in before for m in members) >= 4
                assert len({m[done] for m in members}) > 4, "copies are changed"
            before = members


def test_the_worst_are_replaced_by_copies_of_the_best_and_failures_first() -> None:
    pbt = PBT(STAGES, 0, population=4, replaced=0.5)
    first = pbt.ask(4)
    pbt.tell([Told(p, v) for p, v in zip(first, (0.3, None, 0.1, 0.2), strict=True)])
    second = pbt.ask(4)
    assert second[2:] == first[2:]
    assert {p["steps[0]"] for p in second[:2]} <= {p["steps[0]"] for p in first[2:]}
    assert all(p["steps[1]"] == p["steps[3]"] != first[2]["steps[1]"] for p in second[:2])
    pbt.tell([Told(p, v) for p, v in zip(second, (None, None, 0.1, None), strict=True)])
    third = pbt.ask(4)
    assert len({(p["steps[0]"], p["steps[1]"]) for p in third}) == 1, "copies of the only one"
    pbt.tell([Told(p, None) for p in third])
    assert pbt.fidelity["until"] == 9
    assert not {p["steps[0]"] for p in pbt.ask(4)} & {p["steps[0]"] for p in first}, "all failed: a new one"
    assert pbt.fidelity["until"] == 3


def test_stages_begin_where_parameters_begin_to_act() -> None:
    pbt = PBT(Space("step:steps=0~8:0~8:0~8,at=4:6.5,alpha=0.1~0.3,rounding=dither", 12), 0, population=2)
    for until in (4, 7, None):
        points = pbt.ask(2)
        assert pbt.fidelity["until"] == until
        pbt.tell([Told(p, 0.0) for p in points])


@pytest.mark.parametrize("name", [name for name in SPACES if name != "stages"])
def test_what_is_no_space_of_stages_is_refused(name: str) -> None:
    space = named_space(name, eps=0.1, max_steps=8, epochs=12)
    with pytest.raises(ValueError, match=f"a space of stages, as --spaces stages: .*; got '{space.text[:9]}"):
        build("pbt", space, 0)
    PBT(named_space("stages", eps=0.1, max_steps=8, epochs=12), 0)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"replaced must be from 0 to 0\.5, got 0\.7"):
        PBT(STAGES, 0, replaced=0.7)
    with pytest.raises(ValueError, match="population"):
        PBT(STAGES, 0, population=1)


def test_a_search_that_goes_on_ends_the_same(tmp_path: Path) -> None:
    def failing(q: Question) -> bool:
        return steps_of(q.text)[0] > 7

    whole = Staged(fails=failing)
    first = search(tmp_path / "whole.jsonl", whole).run()
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    for cut in (3, 17, 41):
        path = tmp_path / f"{cut}.jsonl"
        path.write_text("".join(lines[:cut]))
        judge = Staged(fails=failing)
        judge.asked = whole.asked[:cut]  # their states
        again = search(path, judge).run()
        assert (again.text, again.answers) == (first.text, first.answers)
        assert judge.asked == whole.asked


def test_what_was_trained_in_part_is_promoted_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    s = search(tmp_path / "short.jsonl", Staged(), budget=3.5)  # the last stage is not reached
    s.run()
    (branch,) = s.branches
    assert {q.until for t in branch.trials for q in t.questions} == {3, 6}
    furthest = sorted((t for t in branch.trials if t.reach == 0.5), key=lambda t: t.mean(0.0))
    assert {t.text for t in s.promoted} == {t.text for t in furthest[: len(s.promoted)]}
    assert all(t.reach == 1 for t in s.promoted)
    s = search(tmp_path / "long.jsonl", Staged(), budget=9.0)
    s.run()
    full = sorted((t for t in s.branches[0].trials if t.reach == 1), key=lambda t: t.mean(0.0))
    assert [t.text for t in s.promoted] == [full[0].text]


def test_a_budget_in_seconds_is_that_of_the_answers(tmp_path: Path) -> None:
    s = search(tmp_path / "trials.jsonl", Staged(), budget=30 / (12 * NEW), unit="seconds")
    s.run()
    assert len(s.branches[0].trials) in (30, 31)  # a second each
