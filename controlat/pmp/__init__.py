"""Pontryagin's maximum principle: terminal costs, the Hamiltonian's maximum over G, Amata's criterion C."""

from controlat.pmp.greedy import criterion, measure, probe_batches
from controlat.pmp.maximise import MAXIMISERS, Grid
from controlat.pmp.surface import FORMS, Gap, Surface, interval
from controlat.pmp.terminal import AdversarialLoss

__all__ = [
    "FORMS",
    "MAXIMISERS",
    "AdversarialLoss",
    "Gap",
    "Grid",
    "Surface",
    "criterion",
    "interval",
    "measure",
    "probe_batches",
]
