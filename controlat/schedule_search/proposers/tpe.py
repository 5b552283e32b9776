"""The tree-structured Parzen estimator of hyperopt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from controlat._util.checks import whole
from controlat.schedule_search.proposers import Told
from controlat.schedule_search.space import Space

__all__ = ["PROPOSER", "TPE"]


class TPE:
    """hyperopt's TPE: it models where good points and where others lie, and proposes by their ratio.

    J differs from seed to seed; TPE does not model that, but orders points by J alone, which noise disturbs
    little as long as the good quarter is mostly right. Failed trials are left out.

    Args:
        space: what is searched, in its unit cube.
        seed: of its random numbers.
        startup: points of the space's design before the model is used.

    Source:
        Bergstra et al. (2011), "Algorithms for hyper-parameter optimization", section 4.
    """

    def __init__(self, space: Space, seed: int, startup: int = 15) -> None:
        from hyperopt import Trials, hp
        from hyperopt.base import Domain

        self.space, self._startup = space, whole(startup, "startup", 1)
        self._rng, self._design = np.random.default_rng(seed), space.design(seed)
        self._trials = Trials()
        self._domain = Domain(lambda _: 0.0, {p.name: hp.uniform(p.name, 0, 1) for p in space.parameters})

    def ask(self, count: int) -> list[dict[str, float]]:
        """The next points; those of one call do not know of each other, but for their random numbers."""
        from hyperopt import tpe

        if len(self._trials) < self._startup:
            return list(itertools.islice(self._design, count))
        points = []
        for _ in range(count):
            ids, draw = self._trials.new_trial_ids(1), int(self._rng.integers(2**31 - 1))
            (asked,) = tpe.suggest(ids, self._domain, self._trials, draw, n_startup_jobs=1)
            points.append(self.space.point([asked["misc"]["vals"][p.name][0] for p in self.space.parameters]))
        return points

    def tell(self, trials: Sequence[Told]) -> None:
        """Add finished trials to the model."""
        from hyperopt import JOB_STATE_DONE, STATUS_FAIL, STATUS_OK

        for told in trials:
            (i,) = self._trials.new_trial_ids(1)
            result = (
                {"status": STATUS_FAIL} if told.value is None else {"status": STATUS_OK, "loss": told.value}
            )
            values = dict(zip(told.point, ([s] for s in self.space.shares(told.point)), strict=True))
            misc = {"tid": i, "cmd": self._domain.cmd, "workdir": self._domain.workdir}
            misc |= {"idxs": {name: [i] for name in values}, "vals": values}
            (document,) = self._trials.new_trial_docs([i], [None], [result], [misc])
            self._trials.insert_trial_docs([document | {"state": JOB_STATE_DONE}])
        self._trials.refresh()


PROPOSER = TPE
