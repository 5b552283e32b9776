"""What is asked of a judge and what it answers; every answer is kept in a file, and never asked for twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from controlat._util.files import append_json_line, read_json_lines
from controlat.schedule_search.space import Point, Space

__all__ = ["Answer", "Ledger", "Question", "Trial"]


class Question(NamedTuple):
    """One training that is to be judged.

    Args:
        text: of the schedule, for a run of full length, or of the closed loop.
        seed: of initial weights, order of samples and random starts.
        epochs: length of the run; the schedule is compressed to it, a closed loop decides as in any run of
            that length.
        points: training samples; None for all.
        attacked: whether accuracies on test samples are wanted too.
        until: epochs that are trained of those, Phi being taken then; None for all. J is that of the state
            there, with the cost so far.
        surface: whether the Hamiltonian of every candidate in every epoch is wanted too.
        method: of training, under its own controls; empty for that of the search.
    """

    text: str
    seed: int
    epochs: int
    points: int | None = None
    attacked: bool = False
    until: int | None = None
    surface: bool = False
    method: str = ""


class Answer(NamedTuple):
    """What a training came to.

    Args:
        phi: the terminal cost Phi(theta_T); None if the training failed.
        mean_cost: n, gradient evaluations per sample and step: the sum over the steps that were trained,
            divided by the number of steps of the whole run.
        gradients: gradient evaluations that it took to train, the decisions of a closed loop among them, and
            to take Phi, in samples; without those of a beginning that an earlier training has left.
        seconds: wall time of both.
        error: why it failed; empty if it did not.
        clean: accuracy on test samples, where it was asked for.
        robust: the share of them that survive every attack.
        surface: gains of candidates over the run's own controls, where they were asked for, as plain data.
        taken: the schedule that a closed loop took, as plain data, where accuracies were asked for.
    """

    phi: float | None
    mean_cost: float
    gradients: float
    seconds: float
    error: str = ""
    clean: float | None = None
    robust: float | None = None
    surface: dict[str, Any] | None = None
    taken: dict[str, Any] | None = None


@dataclass(frozen=True)
class Trial:
    """A point of a space with the answers of one or more seeds at one fidelity."""

    space: Space
    point: Point
    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]

    @property
    def text(self) -> str:
        """The schedule."""
        return self.space.text_of(self.point)

    @property
    def failed(self) -> bool:
        """Whether a training failed under any seed."""
        return any(answer.phi is None for answer in self.answers)

    @property
    def reach(self) -> float:
        """The share of the run that was trained."""
        return min((q.until or q.epochs) / q.epochs for q in self.questions)

    def whole(self, epochs: int, points: int | None) -> bool:
        """Whether its runs are of so many epochs on so many samples, and were trained to the end."""
        return self.reach == 1 and {(q.epochs, q.points) for q in self.questions} == {(epochs, points)}

    def values(self, price: float) -> list[float]:
        """J of every seed, at a price of the mean cost n of a step; infinite where training failed."""
        return [math.inf if a.phi is None else a.phi + price * a.mean_cost for a in self.answers]

    def mean(self, price: float) -> float:
        """Mean J; infinite if any training failed."""
        return math.inf if self.failed else float(np.mean(self.values(price)))

    def error(self, price: float) -> float | None:
        """Standard error of the mean over seeds; None for fewer than two."""
        values = self.values(price)
        if self.failed or len(values) < 2:
            return None
        return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _said(fields: Question | Answer) -> dict[str, Any]:
    """The fields of a question or an answer, those left out that have their default."""
    defaults = fields._field_defaults
    return {k: v for k, v in fields._asdict().items() if k not in defaults or v != defaults[k]}


Judge = Callable[[Sequence[Question], Callable[[int, Answer], None]], None]


class Ledger:
    """All answers so far, by their questions, in a file with a line for each.

    A training with its surface answers the question for the same one without, too: the bits are the same.
    A search asks the same questions again when it goes on after an interruption; those that the file answers
    take no time, so that it comes to where it was and goes on with the same trials.

    Args:
        path: of the file, of JSON lines; None to keep them in memory alone.
        judge: judge(questions, done) trains, and calls done(i, answer) as each training ends.

    Raises:
        ValueError: a line of the file cannot be read; the message names it. A last line that an interruption
            cut off is left out.
    """

    def __init__(self, path: Path | None, judge: Judge) -> None:
        self.path, self._judge = path, judge
        self._known: dict[Question, Answer] = {}
        for number, row in enumerate([] if path is None else read_json_lines(path), start=1):
            try:
                self._known[Question(**row["question"])] = Answer(**row["answer"])
            except (TypeError, KeyError) as error:
                raise ValueError(f"{path}, line {number}: no answer of a search ({error})") from None

    def __len__(self) -> int:
        return len(self._known)

    @property
    def answers(self) -> dict[Question, Answer]:
        """All of them."""
        return dict(self._known)

    def ask(self, questions: Iterable[Question], each: Callable[[], object] = lambda: None) -> list[Answer]:
        """The answers, in the order of the questions; those that are not known are found out together.

        Args:
            questions: what to judge.
            each: called as each of them is answered.
        """
        questions = list(questions)
        new = [q for q in dict.fromkeys(questions) if self.answered(q) not in self._known]

        def done(i: int, answer: Answer) -> None:
            if self.path is not None:
                append_json_line(self.path, {"question": _said(new[i]), "answer": _said(answer)})
            self._known[new[i]] = answer
            each()

        for _ in range(len(set(questions)) - len(new)):
            each()
        if new:
            self._judge(new, done)
        return [self._known[self.answered(q)] for q in questions]

    def answered(self, question: Question) -> Question:
        """The question whose answer is that of another one: itself, or the same one with its surface."""
        looked = question._replace(surface=True)
        return looked if question not in self._known and looked in self._known else question
