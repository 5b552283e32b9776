"""The common beginnings of runs, which are trained once: states between epochs, kept as checkpoints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from controlat.app import checkpoints
from controlat.app.checkpoints import load_checkpoint
from controlat.app.resume import put_back
from controlat.app.runs import environment
from controlat.app.settings import Problem
from controlat.app.tally import Tally
from controlat.dynamics.driver import Driver
from controlat.dynamics.run_spec import RunSpec
from controlat.pmp.objective import Outcome, objective
from controlat.pmp.terminal import Terminal

__all__ = ["Prefix"]


@dataclass(frozen=True)
class Prefix:
    """The beginning of a run: its states may have been kept by another run that begins in the same way.

    The state at the beginning of epoch e depends on the controls of the steps before, on the seed, and on the
    problem: the name of its file is their digest. A closed loop is trained whole.

    Args:
        folder: of the files.
        driver: the system, at its initial state.
        spec: the run.
        problem: what is trained on what, and how.
    """

    folder: Path
    driver: Driver
    spec: RunSpec
    problem: Problem

    def objective(self, terminal: Terminal, until: int | None) -> Outcome:
        """Train on from the longest beginning that was kept, and take Phi; a run that ends early is kept.

        Args:
            terminal: Phi.
            until: epoch before which to end; None for the end of the run, whose state is not kept.

        Returns:
            The outcome: its sum of n begins with the run, its cost is that of what was new.

        Raises:
            NonFiniteError: training diverged, or Phi is not finite.
        """
        if not self.spec.open_loop:  # its controls, which name the files, are not known before the run
            return objective(self.driver, self.spec, terminal, until=until)
        epoch, before = self._restored(until or self.spec.epochs)
        outcome = objective(self.driver, self.spec, terminal, epoch=epoch, before=before, until=until)
        if until is not None:
            self._save(until, outcome.evaluations)
        return outcome

    def _restored(self, until: int) -> tuple[int, float]:
        """Put the driver where the longest beginning that ends before an epoch has led.

        A state at `until` itself is not used, so that the cost of a run that was killed after it had left its
        state, and is asked for again, is that of one that was not.

        Returns:
            The epoch to go on with, and the sum of n over the steps before: 0 and 0 where nothing was kept,
            or what was kept is damaged.
        """
        for epoch in range(until - 1, 0, -1) if self.folder.is_dir() else ():
            path = self._file(epoch)
            if not path.exists():
                continue
            try:
                stored = load_checkpoint(path, self.driver.device)
                put_back(self.driver, self.spec, stored, str(path))
            except ValueError:
                continue  # it is trained again
            return epoch, stored["tally"]["evaluations"]
        return 0, 0.0

    def _save(self, epoch: int, evaluations: float) -> None:
        """Keep the driver's state at the beginning of an epoch, and the sum of n over the steps before."""
        state = self.driver.state().to_dict()
        state |= {"tally": asdict(Tally(epoch=epoch, evaluations=evaluations))}
        state |= {"settings": {}, "environment": environment(self.driver.device)}
        checkpoints.save(self._file(epoch), state)

    def _file(self, epoch: int) -> Path:
        return self.folder / f"{self._digests[epoch]}.pt"

    @cached_property
    def _digests(self) -> list[str]:
        """Of the beginnings of 0, 1, ..., T epochs."""
        spec = self.spec
        whole = {"problem": self.problem.to_json(), "seed": spec.seed, "samples": len(spec.data)}
        whole["device"] = self.driver.device.type
        digest, digests = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()), list[str]()
        for epoch in range(spec.epochs + 1):
            digests.append(digest.hexdigest())
            first = epoch * spec.batches_per_epoch
            controls = spec.plan(first, first + spec.batches_per_epoch) if epoch < spec.epochs else []
            digest.update(json.dumps([dict(u) for u in controls]).encode())
        return digests
