"""The settings of `search`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from controlat import methods
from controlat._util.checks import choice, number, whole
from controlat._util.texts import only, split
from controlat.app.settings.attack import check_attacks
from controlat.app.settings.problem import Problem, tidy
from controlat.app.settings.schedules import names_controller, names_factory
from controlat.control.controller import Controller
from controlat.methods import build
from controlat.pmp.objective import WEIGHT
from controlat.pmp.terminal import parse_terminal
from controlat.records import Settings, checked, read_record, settings_of
from controlat.schedule_search import proposers
from controlat.schedule_search.space import Space, named_space

__all__ = ["RAMP", "SearchSettings", "kept_settings"]

_BUDGET = re.compile(r"([0-9.]+(?:e[0-9]+)?) *(trainings|gradients|seconds)")
_ENGINES = ("processes", "ray")
_FIRST = 10_000  # the first of the search's seeds; those of the judgement stay below
_BETWEEN = 100  # from the seeds of a search to those of the next
RAMP = "ramp"  # of `against`
_SPACES = ("anneal", "amata", "delayed", "constant")  # unless others are asked for


@dataclass
class SearchSettings(Problem):
    """Search for a schedule, and judge it against plain ones under seeds that the search has not seen.

    Args:
        spaces: What is searched: anneal, constant, amata, exponential, delayed, stages, the closed loops
            ratio, greedy and horizon, or your own: the text of a schedule or closed loop with ranges, such as
            pgd:steps=1~9~whole,alpha=0.01~0.1~log or ratio:threshold=1.05~2,tau=0.3. The first gets half of
            the budget, the others share the rest. anneal, amata, delayed and constant if left out, as far as
            the method takes them.
        proposer: Who proposes schedules: tpe, gp, msa, pbt (on --spaces stages), random, grid, or your
            own package.module:Class.
        proposer_options: Options of the proposer, such as {costates: 2} for gp; an unknown one is refused
            with those that there are.
        budget: What the search may spend, without the judgement: so many trainings of PGD-K_max, such as
            3trainings, gradient evaluations, such as 2e8gradients, or seconds, such as 600seconds, summed
            over its trainings. 60trainings for digits, 3trainings for other data if left out.
        fidelity: Cheaper trainings before the full ones, by their shares of epochs and of samples, such as
            epochs=1/4,points=1/2 epochs=1/2: the first kind explores, every other one is for the best of the
            kind before. All trainings are full ones if left out.
        max_steps: K_max, the largest K; that of the method where it takes fewer.
        weight: What the whole cost of PGD-K_max weighs in J, in units of the loss (nats): it decides gamma.
        gamma: Price of one gradient evaluation per sample, in units of the squared gradient norm, in the
            place of weight.
        terminal: Terminal cost Phi on held-out samples, as in evaluate.
        attacks: Evaluation attacks of the judgement, on test samples.
        search_seed: Another one repeats the search with other trainings and other proposals.
        judge_seeds: Seeds of the judgement; 0 to 7 for digits, 0 to 4 for other data if left out.
        against: What the one that is found is judged against, beside the best of every space: schedules,
            closed loops such as greedy, or other methods: trades (under PGD-K_max, or a single step of eps)
            or METHOD@SCHEDULE, such as trades@pgd:steps=5,alpha=0.04; ramp is the plain ramp of K up from 0
            that costs as much as what was found. Plain schedules if left out, and nfgsm where the method is
            pgd_at.
        certificate: Compute the full criterion C and the reachable decrease D of what was found too, under up
            to three of the judging seeds; about ten trainings each. A finished search may be asked for it.
        jobs: Trainings at a time, each in a process of its own; as many as there are cores if left out.
        engine: Where they run: processes (of this machine) or ray (with the extra ray); results are the same.
        address: host:port of a Ray cluster, or auto for that of this machine; a Ray of its own if left out.
    """

    spaces: Sequence[str] = ()
    proposer: str = "tpe"
    proposer_options: dict[str, Any] = field(default_factory=dict)
    budget: str | None = None
    fidelity: Sequence[str] = ()
    max_steps: int = 10
    weight: float = WEIGHT
    gamma: str | float | None = None
    terminal: str = "adversarial"
    attacks: Sequence[str] = ("pgd-50-10",)
    search_seed: int = 0
    judge_seeds: Sequence[int] = ()
    against: Sequence[str] = ()
    certificate: bool = False
    jobs: int | None = None
    engine: str = "processes"
    address: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_engine()
        knob = build(self.method, self.method_options).controls.get("steps")
        self.max_steps = int(min(whole(self.max_steps, "max_steps", 1), knob.high if knob else math.inf))
        self.spaces = list(self.spaces) or [s for s in _SPACES if self._accepts(self._space, s)]
        if not self.spaces or len(set(self.spaces)) < len(self.spaces):
            none = f"; give some: {self.method} takes none of {', '.join(_SPACES)}" * (not self.spaces)
            raise ValueError(f"spaces must be one or more different ones, got {self.spaces}{none}")
        for space in self.space_list():
            proposers.build(self.proposer, space, 0, self.proposer_options)
        if self.budget is None:
            self.budget = "60trainings" if self.data == "digits" else "3trainings"
        if not _BUDGET.fullmatch(self.budget) or not self.allowance(1.0)[0] > 0:
            raise ValueError(f"budget must read 3trainings, 2e8gradients or 600seconds, got {self.budget!r}")
        self.fidelity = list(self.fidelity)
        self.shares()
        if self.gamma is not None:
            self.gamma = tidy(self.gamma)
            if not number(self.gamma, "gamma") > 0:
                raise ValueError(f"gamma must be > 0, got {self.gamma}: without a price K_max is best")
        parse_terminal(self.terminal)
        self.attacks = list(self.attacks)
        check_attacks(self.attacks, 0)
        self.search_seed = whole(self.search_seed, "search_seed", 0)
        count = 8 if self.data == "digits" else 5
        self.judge_seeds = [whole(s, "a judging seed", 0) for s in self.judge_seeds or range(count)]
        if len(set(self.judge_seeds)) < len(self.judge_seeds) or max(self.judge_seeds) >= _FIRST:
            raise ValueError(
                f"judge_seeds must be different ones below {_FIRST}, where the search's own begin, "
                f"got {self.judge_seeds}"
            )
        plain = [given for given in self._plain() if self._accepts(self._check_contender, given)]
        self.against = list(self.against) or plain
        for given in self.against:
            self._check_contender(given)

    def to_json(self) -> dict[str, Any]:
        """What decides the results; not whether they get a certificate, which may be asked for later."""
        return {name: value for name, value in super().to_json().items() if name != "certificate"}

    def _check_engine(self) -> None:
        choice(self.engine, "engine", _ENGINES)
        if self.address is not None and self.engine != "ray":
            raise ValueError(f"address {self.address!r} is that of a Ray cluster; give engine ray with it")
        if self.engine == "ray" and self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                "device must be auto, cpu or cuda with engine ray, which hands out the GPUs itself, "
                f"got {self.device!r}"
            )

    @property
    def most(self) -> str:
        """PGD-K_max: the unit of budgets and of weight."""
        return f"pgd:steps={self.max_steps},alpha={self._alpha(self.max_steps)}"

    def _alpha(self, steps: float) -> str:
        """2.5 eps/K, which reaches every point of the ball (Madry et al., 2018), but at most 2 eps."""
        return f"{min(2.5 / steps, 2) * self.ball.eps:.4g}"

    def ramp(self, end: float) -> str:
        """K in a line from 0 up to a number of steps, which are long enough to cross the ball in three."""
        return f"anneal:steps=0:{end:.3g},alpha={self.ball.eps / 1.5:.4g}"

    def _plain(self) -> list[str]:
        """No attack, PGD at several K, Amata, delayed, a plain ramp, and N-FGSM."""
        most, eps, since = self.max_steps, self.ball.eps, max(1, round(0.4 * self.epochs))
        delayed = f"delayed:steps={most},alpha={self._alpha(most)},since={since}"
        return [
            "none",
            *(f"pgd:steps={k},alpha={self._alpha(k)}" for k in sorted({max(1, round(most / 5)), most})),
            f"amata:min=1,max={most},tau={2 * eps:.4g}",
            *([delayed] if since < self.epochs else []),
            RAMP,
            *(["nfgsm"] if self.method == "pgd_at" else []),
        ]

    def _check_contender(self, given: str) -> None:
        method, text = self.contender(given)
        text = self.ramp(self.max_steps) if given == RAMP else text
        self.problem(self.epochs, method).controller_of(text)

    @staticmethod
    def _accepts(check: Callable[[str], object], given: str) -> bool:
        """Whether a check lets a default pass: Free, say, knows no training without attack."""
        try:
            check(given)
        except ValueError:
            return False
        return True

    def contender(self, given: str) -> tuple[str, str]:
        """Method, empty for that of the search, and schedule or closed loop of a text of `against`.

        >>> SearchSettings().contender("nfgsm"), SearchSettings().contender("trades@none")
        (('nfgsm', 'fgsm:alpha=0.15'), ('trades', 'none'))
        """
        method, at, text = given.partition("@")  # which schedules use too: fosc=0.5..0@40
        if at and (method in methods.names() or names_factory(method)):
            return method, text
        if given not in methods.names():
            return "", given
        steps = build(given).controls.get("steps")
        return given, f"fgsm:alpha={self.ball.eps:.4g}" if steps and steps.high == 1 else self.most

    def problem(self, epochs: int, method: str = "") -> Problem:
        """What is trained on what: over so many epochs, by another method if one is named."""
        given = {f.name: getattr(self, f.name) for f in fields(Problem)} | {"epochs": epochs}
        problem = Problem(**given | ({"method": method, "method_options": {}} if method else {}))
        problem.__dict__["_schedules"] = self.__dict__.setdefault("_schedules", {})  # files are read once
        return problem

    def controller(self, text: str, epochs: int, method: str = "") -> Controller:
        """A schedule, stretched to a run of so many epochs, or a closed loop in such a run."""
        if names_controller(text):
            return self.problem(epochs, method).controller_of(text)
        return self.problem(self.epochs, method).schedule_of(text).stretched(epochs)

    def space_list(self) -> list[Space]:
        """The spaces."""
        return list(map(self._space, self.spaces))

    def _space(self, given: str) -> Space:
        """A space by its name or text, whose schedules or closed loops the method takes."""
        knobs, eps = build(self.method, self.method_options).controls, self.ball.eps
        space = named_space(given, eps=eps, max_steps=self.max_steps, epochs=self.epochs, knobs=knobs)
        try:
            for share in (0.0, 1.0):
                self.controller_of(space.text_of(space.point([share] * len(space.parameters))))
        except ValueError as error:
            told = f"{self.method} cannot be searched on {given}: {error}; leave it out of spaces"
            raise ValueError(told) from None
        return space

    def allowance(self, training: float) -> tuple[float, str]:
        """The budget, and its unit: ``gradients``, evaluations in samples, or ``seconds``.

        Args:
            training: gradient evaluations that a training of `most` takes.
        """
        value, unit = _BUDGET.fullmatch(str(self.budget)).groups()  # type: ignore[union-attr]
        amount = number(value, "budget")
        return (amount * training, "gradients") if unit == "trainings" else (amount, unit)

    def shares(self) -> list[tuple[float, float]]:
        """The shares of epochs and of samples of the cheaper trainings.

        Raises:
            ValueError: one is malformed, out of range, less than an epoch, or cheaper than the one before.
        """
        pairs = [_shares(text) for text in self.fidelity]
        for text, (epochs, _) in zip(self.fidelity, pairs, strict=True):
            if round(epochs * self.epochs) < 1:
                raise ValueError(f"fidelity {text!r} is less than one of the {self.epochs} epochs")
        costs = [epochs * points for epochs, points in pairs] + [1.0]
        if any(b < a for a, b in pairwise(costs)):
            raise ValueError(
                "fidelity lists cheaper trainings, the cheapest first, got " + " ".join(self.fidelity)
            )
        return pairs

    def search_seeds(self, count: int) -> tuple[int, ...]:
        """Seeds of the search, none of which the judgement uses."""
        first = _FIRST + _BETWEEN * self.search_seed
        return tuple(range(first, first + count))


def kept_settings(directory: Path) -> dict[str, Any]:
    """The settings of the search that a directory holds.

    Raises:
        ValueError: it holds none, or its settings are malformed.
    """
    path = directory / "settings.json"
    if not path.exists():
        raise ValueError(f"{directory} is not the directory of a controlat search: it has no settings.json")
    stored = read_record(path, Settings)
    if stored.get("command") != "search":
        raise ValueError(f"{directory} is not the directory of a controlat search")
    checked(stored, settings_of(SearchSettings), str(path))
    return {f.name: stored[f.name] for f in fields(SearchSettings) if f.name in stored}


def _shares(text: str) -> tuple[float, float]:
    """The shares of epochs and of samples in a text of `SearchSettings.fidelity`."""
    _, given = split(f"fidelity:{text}")
    only(given, (), ("epochs", "points"), "fidelity (such as epochs=1/2,points=1/2)")
    shares = [number(given.get(name, 1.0), f"{name} of fidelity") for name in ("epochs", "points")]
    if not all(0 < share <= 1 for share in shares):
        raise ValueError(f"the shares of fidelity are above 0 and at most 1, got {text!r}")
    return shares[0], shares[1]
