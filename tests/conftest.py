"""One thread for the whole session: the same bits on every machine, and no oversubscription under xdist.

Hypothesis draws the same examples every time, and does not measure how long they take.
"""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "controlat", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("controlat")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    import torch  # here, where xdist's own process, which runs no test, does not wait for it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
