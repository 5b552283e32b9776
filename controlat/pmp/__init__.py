"""Pontryagin's maximum principle: terminal costs, costates, the Hamiltonian's maximum over G, Amata's C."""

from controlat.pmp.costate import sweep
from controlat.pmp.full import HALVINGS, LAMBDAS, Calibration, Criterion, calibrate, examine, looked_at
from controlat.pmp.greedy import criterion, measure, probe_batches
from controlat.pmp.maximise import MAXIMISERS, Grid
from controlat.pmp.surface import FORMS, Gap, Surface, interval
from controlat.pmp.terminal import AdversarialLoss, Terminal, Weighted

__all__ = [
    "FORMS",
    "HALVINGS",
    "LAMBDAS",
    "MAXIMISERS",
    "AdversarialLoss",
    "Calibration",
    "Criterion",
    "Gap",
    "Grid",
    "Surface",
    "Terminal",
    "Weighted",
    "calibrate",
    "criterion",
    "examine",
    "interval",
    "looked_at",
    "measure",
    "probe_batches",
    "sweep",
]
