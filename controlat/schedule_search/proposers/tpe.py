"""The tree-structured Parzen estimator of hyperopt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from controlat._util.checks import whole
from controlat.schedule_search.proposers import Told
from controlat.schedule_search.space import Parameter, Space

__all__ = ["PROPOSER", "TPE"]


class TPE:
    """hyperopt's TPE: it models where good points and where others lie, and proposes by their ratio.

    J differs from seed to seed; TPE does not model that, but orders points by J alone, which noise disturbs
    little as long as the good quarter is mostly right. Failed trials are left out.

    Args:
        space: what is searched.
        seed: of its random numbers.
        startup: random points before the model is used.

    Source:
        Bergstra et al. (2011), "Algorithms for hyper-parameter optimization", section 4.
    """

    def __init__(self, space: Space, seed: int, startup: int = 15) -> None:
        from hyperopt import Trials
        from hyperopt.base import Domain

        self.space, self._startup = space, whole(startup, "startup", 1)
        self._rng = np.random.default_rng(seed)
        self._trials = Trials()
        self._domain = Domain(lambda _: 0.0, {p.name: _prior(p) for p in space.parameters})
        self._asked: list[dict[str, Any]] = []

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points; those of one call do not know of each other, but for their random numbers."""
        from hyperopt import tpe

        self._asked = []
        for _ in range(count):
            ids = self._trials.new_trial_ids(1)
            draw = int(self._rng.integers(2**31 - 1))
            self._asked += tpe.suggest(ids, self._domain, self._trials, draw, n_startup_jobs=self._startup)
        return [self._point(document) for document in self._asked]

    def tell(self, trials: Sequence[Told]) -> None:
        """Add finished trials to the model."""
        from hyperopt import JOB_STATE_DONE, STATUS_FAIL, STATUS_OK

        for document, told in zip(self._asked, trials, strict=True):
            failed = told.value is None
            document["result"] = (
                {"status": STATUS_FAIL} if failed else {"status": STATUS_OK, "loss": told.value}
            )
            document["state"] = JOB_STATE_DONE
        self._trials.insert_trial_docs(self._asked)
        self._trials.refresh()
        self._asked = []

    def _point(self, document: dict[str, Any]) -> dict[str, float]:
        values = document["misc"]["vals"]
        return {p.name: p.value(p.share(float(values[p.name][0]))) for p in self.space.parameters}


def _prior(p: Parameter) -> Any:
    from hyperopt import hp

    if p.scale == "log":
        return hp.loguniform(p.name, np.log(p.low), np.log(p.high))
    if p.scale == "whole":
        return hp.uniformint(p.name, int(p.low), int(p.high))
    return hp.uniform(p.name, p.low, p.high)


PROPOSER = TPE
