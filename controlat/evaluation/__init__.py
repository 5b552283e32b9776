"""Honest robust accuracy: several attacks in turn, checks of the attacks themselves, and intervals.

`robustness` is the core; `autoattack`, `transfer` and `curves` add to it, and `protocol` runs what is asked
for on one network, as the commands do.
"""

from __future__ import annotations

from controlat.evaluation.accuracy import Accuracy, wilson
from controlat.evaluation.attack import Attack, parse_attack
from controlat.evaluation.auto import AutoAttacked, autoattack
from controlat.evaluation.curves import Curves, curves
from controlat.evaluation.masking import Masking, MaskingWarning
from controlat.evaluation.protocol import Evaluation, Extras, protocol
from controlat.evaluation.robust import Robustness, robustness
from controlat.evaluation.transfer import Transfer, transfer

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
