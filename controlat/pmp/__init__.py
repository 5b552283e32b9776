"""Pontryagin's maximum principle: terminal costs, costates, the Hamiltonian's maximum over G, Amata's C."""

from controlat.pmp.candidates import Candidates
from controlat.pmp.costate import backward
from controlat.pmp.full_criterion import (
    HALVINGS,
    LAMBDAS,
    Calibration,
    Criterion,
    calibrate,
    examine,
    looked_at,
)
from controlat.pmp.greedy import probe_batches, score
from controlat.pmp.greedy_criterion import criterion
from controlat.pmp.maximise import MAXIMISERS
from controlat.pmp.relaxed import relaxed
from controlat.pmp.surface import FORMS, Gap, Surface, interval
from controlat.pmp.terminal import (
    AdversarialLoss,
    Price,
    Terminal,
    Weighted,
    build_terminal,
    described,
    differentiated,
    parse_terminal,
    price,
    try_terminal,
)

__all__ = [
    "FORMS",
    "HALVINGS",
    "LAMBDAS",
    "MAXIMISERS",
    "AdversarialLoss",
    "Calibration",
    "Candidates",
    "Criterion",
    "Gap",
    "Price",
    "Surface",
    "Terminal",
    "Weighted",
    "backward",
    "build_terminal",
    "calibrate",
    "criterion",
    "described",
    "differentiated",
    "examine",
    "interval",
    "looked_at",
    "parse_terminal",
    "price",
    "probe_batches",
    "relaxed",
    "score",
    "try_terminal",
]
