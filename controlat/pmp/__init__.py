"""Pontryagin's maximum principle: terminal costs, the Hamiltonian's maximum over G, Amata's criterion C."""

from controlat.pmp.greedy import FORMS, Gap, Surface, criterion, measure
from controlat.pmp.maximise import MAXIMISERS, Grid
from controlat.pmp.terminal import AdversarialLoss

__all__ = ["FORMS", "MAXIMISERS", "AdversarialLoss", "Gap", "Grid", "Surface", "criterion", "measure"]
