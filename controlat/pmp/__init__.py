"""Pontryagin's maximum principle: terminal costs, costates, the Hamiltonian's maximum over G, Amata's C."""

from controlat.pmp.candidates import Candidates
from controlat.pmp.costate import backward
from controlat.pmp.examination import examine, looked_at
from controlat.pmp.full_criterion import Criterion
from controlat.pmp.greedy import epoch_scale, probe_batches, score, training_probe
from controlat.pmp.greedy_criterion import criterion
from controlat.pmp.maximise import MAXIMISERS
from controlat.pmp.objective import (
    WEIGHT,
    Outcome,
    objective,
    outcome_at,
    planned_evaluations,
    rollout_cost,
    weighed,
)
from controlat.pmp.relaxed import relaxed
from controlat.pmp.surface import FORMS, Gap, Surface, interval
from controlat.pmp.terminal import (
    AdversarialLoss,
    Evaluations,
    Terminal,
    Weighted,
    build_terminal,
    described,
    differentiated,
    parse_terminal,
    terminal_evaluations,
    try_terminal,
)
from controlat.pmp.trust import HALVINGS, LAMBDAS, Trust, trust

__all__ = [
    "FORMS",
    "HALVINGS",
    "LAMBDAS",
    "MAXIMISERS",
    "WEIGHT",
    "AdversarialLoss",
    "Candidates",
    "Criterion",
    "Evaluations",
    "Gap",
    "Outcome",
    "Surface",
    "Terminal",
    "Trust",
    "Weighted",
    "backward",
    "build_terminal",
    "criterion",
    "described",
    "differentiated",
    "epoch_scale",
    "examine",
    "interval",
    "looked_at",
    "objective",
    "outcome_at",
    "parse_terminal",
    "planned_evaluations",
    "probe_batches",
    "relaxed",
    "rollout_cost",
    "score",
    "terminal_evaluations",
    "training_probe",
    "trust",
    "try_terminal",
    "weighed",
]
