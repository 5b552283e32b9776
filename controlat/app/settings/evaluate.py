"""The settings of `evaluate`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from controlat._util.checks import brief, number, whole
from controlat._util.files import expanded
from controlat._util.registry import Named
from controlat.app.checkpoints import load_checkpoint
from controlat.app.ranges import check_kinds
from controlat.app.settings.attack import ATTACKS, check_attacks, checkpoint_of
from controlat.app.settings.problem import OBJECTS, Problem, tidy
from controlat.app.settings.schedules import default_schedules, names_controller
from controlat.app.settings.train import finished_run
from controlat.methods import build
from controlat.pmp.candidates import Candidates
from controlat.pmp.greedy import GAMMA
from controlat.pmp.maximise import MAXIMISERS
from controlat.pmp.objective import WEIGHT
from controlat.pmp.terminal import parse_terminal
from controlat.robust_accuracy.masking import CHECKS

__all__ = ["EvaluateSettings"]


@dataclass
class EvaluateSettings(Problem):
    """Train under several schedules and compare: criterion C, robustness, cost.

    Args:
        schedules: Short texts, JSON files, or closed loops as the controller of train; six of the demo,
            scaled to eps, for digits if left out.
        seeds: One run of every schedule for each; 0 if left out (0 1 2 for digits).
        weight: What the whole cost of the most expensive schedule weighs in J, in units of the loss (nats):
            it decides gamma in J and in the full criterion. The greedy forms keep Amata's gamma = 0.04.
        gamma: Price of one gradient evaluation per sample, in units of the squared gradient norm, in J and
            all forms of the criterion, in the place of weight.
        maximiser: sweep (exact in K for each step size) or tpe (hyperopt over the same, as in the paper).
        trials: Evaluations of tpe at each instant.
        probe: Training samples that the criterion is computed on.
        knobs: What is searched, such as alpha steps beta=1:3:6 slack=0..4, of the controls of the method; the
            others stay as in the schedule. alpha and steps if left out.
        alphas: Step sizes of G; five spaced logarithmically in [eps/40, 2 eps] if left out.
        max_steps: Largest K of G; the largest of the schedules compared if left out.
        terminal: Terminal cost Phi on held-out samples: a file of controlat/pmp/terminal, your own
            package.module:factory of (x, y, ball, seed) returning a controlat.pmp.Terminal, or a sum of them
            such as adversarial+0.1*clean.
        attacks: Evaluation attacks: fgsm, pgd-20, pgd-50-10 (restarts), cw-30, cw-30-k50.
        autoattack: AutoAttack on this many test points too; 0 for none (pyautoattack; its cost is printed).
        surrogate: Checkpoint of a network trained independently, for transfer attacks.
        sweeps: Sweep over eps and over steps too, with a figure.
        checks: Points that every evaluation checks for gradient masking.
        full: Compute the full criterion too, over several horizons, and what its size means; rolls every run
            out again.
        horizons: Horizons of the full criterion in steps; 1, an epoch and the whole run if left out.
        looks: Steps of every epoch (or shorter stretch of one control) that the full criterion looks at.
        memory: GiB that states of a recorded roll-out may take; with less, more steps are taken again.
        jobs: Runs at a time, each in a process of its own with its share of the cores; as many as cores,
            memory and the size of the runs allow if left out.
        run: Directory of a finished controlat train: its problem, schedule and seed are evaluated, and the
            network is compared with its own. Takes the place of the settings that are named there.
    """

    schedules: Sequence[str] = ()
    seeds: Sequence[int] = ()
    weight: float = WEIGHT
    gamma: str | float | None = None
    maximiser: str = "sweep"
    trials: int = 100
    probe: int = 512
    knobs: Sequence[str] | None = None
    alphas: Sequence[str | float] | None = None
    max_steps: int | None = None
    terminal: str = "adversarial"
    attacks: Sequence[str] = ATTACKS
    autoattack: int = 0
    surrogate: str | None = None
    sweeps: bool = False
    checks: int = CHECKS
    full: bool = True
    horizons: Sequence[int] | None = None
    looks: int = 2
    memory: float = 4.0
    jobs: int | None = None
    run: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self, OBJECTS)
        if self.run is not None:
            self.run = str(expanded(self.run))
            self._take(Path(self.run))
        super().__post_init__()
        if not self.schedules:
            if self.data != "digits":
                raise ValueError(
                    "schedules are missing: give one or more, such as none amata:min=2,max=10,tau=20/255"
                )
            self.schedules = default_schedules(self.eps or 0)
        if not isinstance(self.seeds, Sequence) or isinstance(self.seeds, str):
            raise ValueError(f"seeds must be a list of whole numbers, got {brief(self.seeds)}")
        seeds = tuple(whole(seed, "a seed") for seed in self.seeds)
        self.seeds = seeds or ((0, 1, 2) if self.data == "digits" else (0,))
        for name in ("schedules", "seeds", "attacks"):
            values = list(getattr(self, name))
            setattr(self, name, values)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different ones, got {values}")
        for text in self.schedules:
            self.controller_of(text)
        check_attacks(self.attacks, self.autoattack)
        if self.surrogate is not None:
            self.surrogate = str(checkpoint_of(self.surrogate))
        if self.gamma is not None:
            self.gamma = tidy(self.gamma)
        if self.maximiser not in MAXIMISERS:
            raise ValueError(f"maximiser must be one of {', '.join(MAXIMISERS)}, got {self.maximiser!r}")
        parse_terminal(self.terminal)
        if self.alphas is not None:
            self.alphas = [number(a, "alphas") for a in self.alphas]
        space = build(self.method, self.method_options).controls
        Candidates.read(
            self.knobs, space, eps=self.ball.eps, max_steps=self.max_steps or 1, alphas=self.alphas
        )

    def _take(self, run: Path) -> None:
        """The problem, schedule and seed of a finished run; settings that say otherwise are refused."""
        self.name_object("data")
        self.name_object("method")
        stored = finished_run(run, (self.data, self.method))
        if self.data_dir is None:
            self.data_dir = load_checkpoint(run / "last.pt")["settings"].get("data_dir")
        theirs = {f.name: stored[f.name] for f in fields(Problem) if f.name in stored}
        theirs |= {
            "tf32": stored.get("tf32", "auto"),
            "schedules": [str(run / "schedule.json")],
            "seeds": [stored["seed"]],
        }
        for f in fields(self):
            if f.name not in theirs:
                continue
            if f.name == "model":  # after the data that it is for
                self.name_object("model")
            mine, default = (
                getattr(self, f.name),
                f.default_factory() if callable(f.default_factory) else f.default,
            )
            if _plain(mine) not in (_plain(default), _plain(theirs[f.name])):
                raise ValueError(
                    f"{f.name} {mine} contradicts {run}, which has {theirs[f.name]}: leave it "
                    "out, or evaluate without --run"
                )
            setattr(self, f.name, mine if isinstance(mine, Named) else theirs[f.name])

    @property
    def greedy_gamma(self) -> float:
        """The price in the greedy forms."""
        return GAMMA if self.gamma is None else number(self.gamma, "gamma")

    def to_json(self) -> dict[str, Any]:
        """What decides the results; schedules in full."""
        plain = super().to_json()
        if self.gamma is not None:  # the weight decides nothing then, and runs of before have no such line
            del plain["weight"]
        return plain | {
            "schedules": [
                {"text": text, "controller": True}
                if names_controller(text)
                else self.schedule_of(text).to_json()
                for text in self.schedules
            ]
        }


def _plain(value: Any) -> Any:
    """A setting as it is compared: numbers by value, sequences as lists."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return number(value, "")
    return list(value) if isinstance(value, (list, tuple)) else value
