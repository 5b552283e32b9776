"""What several test files share: small float64 systems, and comparison to the last bit."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from controlat._util import rng
from controlat.control.learning_rate import parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.data import Split
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import Rest, State
from controlat.models import build

SHAPE = (1, 8, 8)
CLASSES = 3
GUARD = 600.0  # seconds: ends a test that hangs, on the busiest machine no other


def slow(*values: Any, id: str | None = None) -> Any:  # noqa: A002
    """Values of a parametrised test that run with all tests only: they repeat what others of them show."""
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


def samples(
    n: int, shape: tuple[int, int, int] = (1, 2, 2), classes: int = CLASSES, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """n random pixels in [0, 1] in float64, and labels."""
    generator = rng.generator(seed, "samples")
    x = torch.rand((n, *shape), generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def split(n: int, shape: tuple[int, int, int] = (1, 2, 2), classes: int = CLASSES, seed: int = 0) -> Split:
    return Split(*samples(n, shape, classes, seed))


def mlp(inputs: int = 4, hidden: int = 5, classes: int = CLASSES, seed: int = 0) -> nn.Module:
    """A smooth network in float64."""
    with rng.scoped(seed, "mlp"):
        layers = nn.Flatten(), nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)
        return nn.Sequential(*layers).double()


def cnn_bn(seed: int = 0) -> nn.Module:
    """The package's network with BatchNorm and dropout, in float64, for images of `SHAPE`."""
    with rng.scoped(seed, "cnn_bn"):
        return build("cnn_bn", SHAPE, CLASSES).double()


def spec(
    data: Split,
    *,
    schedule: str = "none",
    rate: str | float = 0.1,
    epochs: int = 2,
    batch_size: int = 4,
    seed: int = 0,
) -> RunSpec:
    return RunSpec(
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        controller=parse_schedule(schedule, epochs),
        rate=parse_rate(rate),
        seed=seed,
    )


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def same(a: Any, b: Any) -> bool:
    """Whether two nested structures hold the same bits, dtypes and shapes."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, (State, Rest)):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, Mapping):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything of a model, and of torch's generator, that an analysis must leave as it was."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {name: t.detach().clone() for name, t in named.items()},
        "identity": {name: id(t) for name, t in named.items()},
        "strides": {name: t.stride() for name, t in named.items()},
        "flags": [m.training for m in model.modules()],
        "wanted": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random": torch.random.get_rng_state(),
    }


def shorten_autoattack(patch: pytest.MonkeyPatch, iterations: int = 5, queries: int = 30) -> None:
    """Let AutoAttack take few steps, here and in pyautoattack itself."""
    import pyautoattack

    from controlat.robust_accuracy import auto

    class Short(pyautoattack.AutoAttack):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for attack in (self.apgd, self.apgd_targeted, self.fab):
                attack.n_iter = iterations
            self.square.n_queries = queries

    patch.setattr(pyautoattack, "AutoAttack", Short)
    patch.setattr(auto, "_ITERATIONS", iterations)
    patch.setattr(auto, "_QUERIES", queries)


class Counting(nn.Module):
    """A network that counts the samples that pass through it with a graph, and without one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.graph = self.plain = 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.graph += len(x)
        else:
            self.plain += len(x)
        out: Tensor = self.net(x)
        return out


class Counted(int):
    """A whole number that counts how often numbers of its kind are compared: what bookkeeping costs."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return int(self) == other

    def __lt__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) < other

    def __le__(self, other: int) -> bool:
        Counted.compared += 1
        return int(self) <= other

    def __gt__(self, other: int) -> bool:
        return not self <= other

    def __ge__(self, other: int) -> bool:
        return not self < other

    __hash__ = int.__hash__

    @classmethod
    def during(cls, work: Callable[[], object]) -> int:
        """Comparisons in the course of some work."""
        before = cls.compared
        work()
        return cls.compared - before


@contextlib.contextmanager
def guarded(seconds: float = 60.0) -> Iterator[None]:
    """Fail with a TimeoutError where the block does not end, such as by waiting for a named pipe."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
