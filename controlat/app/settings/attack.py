"""The settings of `attack`, and what attacks in settings may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlat._util.checks import choice, number, whole
from controlat._util.files import expanded
from controlat.app.ranges import check_kinds, check_ranges
from controlat.attacks.balls import Ball
from controlat.models.frozen import graph_use
from controlat.robust_accuracy import parse_attack
from controlat.robust_accuracy.auto import require as require_autoattack
from controlat.robust_accuracy.masking import CHECKS

__all__ = ["ATTACKS", "AttackSettings", "check_attacks", "checkpoint_of"]

ATTACKS = ("fgsm", "pgd-20", "pgd-50-5", "cw-30", "cw-30-k50")


@dataclass
class AttackSettings:
    """Measure the robustness of a checkpoint.

    Args:
        checkpoint: A run directory, for its best.pt, or else its last.pt; or one of these files.
        attacks: Evaluation attacks: fgsm, pgd-20, pgd-50-10 (restarts), cw-30, cw-30-k50.
        autoattack: AutoAttack on this many test points too; 0 for none (pyautoattack; its cost is printed).
        surrogate: Checkpoint of a network trained independently, for transfer attacks.
        sweeps: Sweep over eps and over steps too; with --out FILE.json the figure is FILE.png.
        checks: Points that are checked for gradient masking.
        eps: Radius; that of training if left out.
        norm: linf or l2; that of training if left out.
        points: Test on this many samples (a fixed subset); as many as the run if left out.
        data_dir: Folder of the data files.
        seed: Of the random starts.
        batch_size: Samples at a time.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
        threads: CPU threads; if left out, OMP_NUM_THREADS, else as many as suit the network.
        cuda_graphs: auto (on a CUDA device, attacks as CUDA graphs where the network can be captured) or off.
        progress: Show a progress bar (on a terminal).
    """

    checkpoint: str
    attacks: Sequence[str] = ATTACKS
    autoattack: int = 0
    surrogate: str | None = None
    sweeps: bool = False
    checks: int = CHECKS
    eps: str | float | None = None
    norm: str | None = None
    points: int | None = None
    data_dir: str | None = None
    seed: int = 0
    batch_size: int = 256
    device: str = "auto"
    threads: int | None = None
    cuda_graphs: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        choice(self.cuda_graphs, "cuda_graphs", graph_use.MODES)
        self.checkpoint = str(checkpoint_of(self.checkpoint))
        if self.data_dir is not None:
            self.data_dir = str(expanded(self.data_dir).absolute())
        check_ranges(self)
        check_attacks(self.attacks, self.autoattack)
        if self.surrogate is not None:
            self.surrogate = str(checkpoint_of(self.surrogate))
        self.seed = whole(self.seed, "seed")
        # The norm may be that of training, which is not known here: that of the wider bound stands for it.
        Ball(0.0 if self.eps is None else number(self.eps, "eps"), self.norm or "l2")


def check_attacks(attacks: Sequence[str], autoattack: int) -> None:
    """Refuse what no evaluation can do, before anything long begins.

    Raises:
        ValueError: an attack is malformed, or the library of AutoAttack is missing.
    """
    for attack in attacks:
        parse_attack(attack)
    if autoattack:
        require_autoattack()


def checkpoint_of(path: str | Path) -> Path:
    """A checkpoint by its name, or by that of its run directory: the best one, or else the last."""
    file = expanded(path)
    if not file.is_dir():
        return file
    for name in ("best.pt", "last.pt"):
        if (file / name).is_file():
            return file / name
    raise ValueError(f"{path}: no such checkpoint; the directory has neither best.pt nor last.pt")
