"""Inner solvers and evaluation attacks: functions of a loss, a ball and a frozen network."""

from controlat.attacks.pgd import ascend, fgsm, path, pgd

__all__ = ["ascend", "fgsm", "path", "pgd"]
