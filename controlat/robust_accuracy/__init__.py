"""Robust accuracy: several attacks in turn, checks of the attacks themselves, and confidence intervals.

`robustness` is the core; `autoattack`, `transfer` and `curves` complement it, and `protocol` runs all
requested parts on one network, as the commands do.
"""

from __future__ import annotations

from controlat.robust_accuracy.accuracy import Accuracy, wilson
from controlat.robust_accuracy.attack import Attack, parse_attack
from controlat.robust_accuracy.auto import AutoAttacked, autoattack
from controlat.robust_accuracy.curves import Curves, curves
from controlat.robust_accuracy.masking_result import Masking, MaskingWarning
from controlat.robust_accuracy.protocol import Evaluation, Extras, protocol
from controlat.robust_accuracy.robust import Robustness, robustness
from controlat.robust_accuracy.transfer import Transfer, transfer

__all__ = [
    "Accuracy",
    "Attack",
    "AutoAttacked",
    "Curves",
    "Evaluation",
    "Extras",
    "Masking",
    "MaskingWarning",
    "Robustness",
    "Transfer",
    "autoattack",
    "curves",
    "parse_attack",
    "protocol",
    "robustness",
    "transfer",
    "wilson",
]
