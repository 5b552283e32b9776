"""Inner solvers A_{theta,u} and evaluation attacks: they take a loss, a ball and a view of a network."""

from controlat.attacks.pgd import ascend, fgsm, path, pgd

__all__ = ["ascend", "fgsm", "path", "pgd"]
