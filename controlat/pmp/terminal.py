"""Terminal costs Phi(theta_T): what training is for."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from controlat._util import registry
from controlat._util.checks import (
    brief,
    choice,
    instance,
    number,
    whole,
)
from controlat._util.errors import NonFiniteError
from controlat._util.rng import generator, scoped
from controlat.attacks.balls import Ball
from controlat.attacks.losses import LOSSES
from controlat.attacks.pgd import ascend, check_batch
from controlat.control.cost import Meter
from controlat.dynamics.driver import Driver
from controlat.models.frozen.asking import ask
from controlat.models.frozen.batchnorm import followed
from controlat.models.frozen.borrowed import alone, buffers_kept, in_mode, merges, owned
from controlat.models.frozen.view import FrozenModel

__all__ = [
    "TERMINALS",
    "AdversarialLoss",
    "Price",
    "Terminal",
    "Weighted",
    "build_terminal",
    "described",
    "differentiated",
    "parse_terminal",
    "price",
    "try_terminal",
]

# What `build_terminal` knows by name: the arguments of `AdversarialLoss`.
TERMINALS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"adversarial": {}, "margin": {"loss": "margin"}, "clean": {"steps": 0}}
)

_BATCH = 256
_WEIGHT, _NAME = r"[\d.]+(?:[eE][+-]?\d+)?(?:/\d+)?", r"[^\W\d][\w.:]*"
_TERM = re.compile(rf"\s*([+-]?)\s*(?:({_WEIGHT})\s*\*\s*)?({_NAME})\s*")


class Price(NamedTuple):
    """Gradient evaluations of one call of a terminal cost's `value` and of its `gradient`, in samples."""

    value: int
    gradient: int


class Terminal(Protocol):
    """A terminal cost: one of this module, or the user's own. The driver's state must stay as it is.

    A method ``describe() -> str`` besides says in words what it is; `described` does without one. So does
    `price` without an attribute ``price``: it counts a trial.
    """

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's present parameters."""

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi: one tensor per parameter that is trained, then one for each of ``driver.statistics``.

        `differentiated` gives both. Without the latter, results say that they were left out.
        """

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """What the gradient leaves out, by name; results print it."""

    @property
    def lower(self) -> float:
        """A lower bound of Phi, -inf if there is none."""


@dataclass(frozen=True)
class AdversarialLoss:
    """Phi(theta) = mean of l(h_theta(A(x)), y) over held-out data, A = PGD with a random start, eval mode.

    The ascent is on the cross-entropy whatever l is; K = 0 gives the clean loss.

    Args:
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        steps: K of the attack.
        alpha: step size > 0; eps/4 by default, as FOSC's evaluation.
        seed: of the random start.
        loss: ``"cross_entropy"``, or ``"margin"``: max over j != y of z_j, less z_y.

    Raises:
        ValueError: unknown loss, a number out of range, x that is empty or not in [0, 1], y that is not one
            integer label per sample.

    >>> import torch
    >>> AdversarialLoss(torch.rand(8, 1, 4, 4), torch.arange(8), Ball("8/255"), steps=0).describe()
    'clean cross-entropy on 8 held-out points'
    """

    x: Tensor
    y: Tensor
    ball: Ball
    steps: int = 20
    alpha: float | None = None
    seed: int = 0
    loss: str = "cross_entropy"

    def __post_init__(self) -> None:
        choice(self.loss, "loss", LOSSES)
        check_batch(self.x, self.y)
        object.__setattr__(self, "x", owned(self.x))
        object.__setattr__(self, "y", owned(self.y))
        instance(self.ball, Ball, "ball")
        object.__setattr__(self, "seed", whole(self.seed, "seed"))
        steps = number(self.steps, "steps")
        if steps < 0 or not steps.is_integer():
            raise ValueError(f"steps must be a whole number >= 0 (0 for the clean loss), got {steps:g}")
        object.__setattr__(self, "steps", int(steps))
        if self.alpha is None:
            return
        object.__setattr__(self, "alpha", number(self.alpha, "alpha"))
        if not self.alpha > 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha:g}; leave it out for eps/4")

    @property
    def lower(self) -> float:
        """A lower bound of Phi: 0 for the cross-entropy, none for the margin."""
        return 0.0 if self.loss == "cross_entropy" else -math.inf

    @property
    def price(self) -> Price:
        """K of the attack for each sample, and one more for a gradient."""
        return Price(self.steps * len(self.x), (self.steps + 1) * len(self.x))

    def describe(self) -> str:
        """Loss, samples and attack in words."""
        what = f"{self.loss.replace('_', '-')} on {len(self.x)} held-out points"
        if self.steps == 0:
            return f"clean {what}"
        attack = f"PGD-{self.steps}" + (" on cross-entropy" if self.loss != "cross_entropy" else "")
        alpha = "eps/4" if self.alpha is None else f"{self.alpha:g}"
        within = f"eps = {self.ball.eps:g} ({self.ball.norm})"
        return f"adversarial {what}, {attack}, {within}, alpha = {alpha}, one random start"

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """Phi at the driver's present parameters, with one forward pass beside the attack.

        Raises:
            NonFiniteError: it is not finite.
        """
        meter = Meter() if meter is None else meter
        with self._evaluating(driver), torch.no_grad():
            total = sum(float(part()) for part in self._parts(driver, meter))
        meter.forwards += len(self.x)
        return _finite_value(total)

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """grad Phi in theta and in running statistics, with the adversary held fixed.

        Raises:
            NonFiniteError: it is not finite.
        """
        meter = Meter() if meter is None else meter
        total = [torch.zeros_like(t) for t in (*driver.parameters, *driver.statistics)]
        with self._evaluating(driver):
            for part in self._parts(driver, meter):
                torch._foreach_add_(total, differentiated(driver, part))
        meter.gradients += len(self.x)
        return _finite_gradient(total)

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """Weights that are merged in eval mode have no path to what is trained; l_2 steps depend on theta."""
        names = ["weights that the network merges in eval mode (Phi)"] if merges(driver.model) else []
        if self.ball.norm != "linf" and self.steps:
            names.append("the adversary's (l_2 steps of Phi)")
        return tuple(names)

    def _parts(self, driver: Driver, meter: Meter) -> Iterator[Callable[[], Tensor]]:
        """Phi as a sum over batches, each under its attack."""
        alpha = self.ball.eps / 4 if self.alpha is None else self.alpha
        device, channels_last = self.x.device, driver.channels_last
        for i in range(0, len(self.x), _BATCH):
            x, y = self.x[i : i + _BATCH], self.y[i : i + _BATCH]
            start = generator(self.seed, "terminal", i, device=device)
            with scoped(self.seed, "terminal", "network", i, device=device):  # for noise in eval mode
                with FrozenModel(driver.model, channels_last=channels_last, meter=meter) as view:
                    x = ascend(view, x, y, ball=self.ball, alpha=alpha, steps=self.steps, generator=start)
                yield partial(self._sum, driver.model, x, y)

    def _sum(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a batch adds to Phi."""
        return LOSSES[self.loss](ask(model, x, model), y).sum() / len(self.x)

    @contextmanager
    def _evaluating(self, driver: Driver) -> Iterator[None]:
        """Eval mode; flags and buffers as they were, afterwards."""
        with alone(driver.model), in_mode(driver.model, False), buffers_kept(driver.model):
            yield


@dataclass(frozen=True)
class Weighted:
    """A weighted sum of terminal costs, such as adversarial and clean loss.

    Args:
        parts: (weight, terminal cost) of each.

    Raises:
        ValueError: no parts, a weight that is no finite number, a part that is no `Terminal`.
    """

    parts: tuple[tuple[float, Terminal], ...]

    def __post_init__(self) -> None:
        given = self.parts if isinstance(self.parts, (tuple, list)) else None
        if given is None or not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in given):
            raise ValueError(f"parts must be pairs (weight, terminal cost), got {brief(self.parts)}")
        parts = tuple((number(weight, "a weight"), part) for weight, part in given)
        if not parts:
            raise ValueError("a weighted sum needs at least one (weight, terminal cost), got none")
        for _, part in parts:
            check_terminal(part, "a part of a weighted sum")
        if not any(weight for weight, _ in parts):
            raise ValueError("all weights of a weighted sum of terminal costs are 0: nothing is left of it")
        object.__setattr__(self, "parts", parts)

    @property
    def lower(self) -> float:
        """The sum of the parts' lower bounds, if no weight is negative."""
        if any(weight < 0 for weight, _ in self.parts):
            return -math.inf
        return sum(weight * part.lower for weight, part in self.parts if weight > 0)

    def describe(self) -> str:
        """The parts in words, with their weights."""
        return " + ".join(f"{weight:g} * ({described(part)})" for weight, part in self.parts)

    def value(self, driver: Driver, meter: Meter | None = None) -> float:
        """The sum of weight * Phi.

        Raises:
            NonFiniteError: it is not finite.
        """
        return _finite_value(sum(weight * part.value(driver, meter) for weight, part in self.parts))

    def gradient(self, driver: Driver, meter: Meter | None = None) -> list[Tensor]:
        """The sum of weight * grad Phi, in running statistics where all parts have it.

        Raises:
            NonFiniteError: it is not finite.
        """
        found = [part.gradient(driver, meter) for _, part in self.parts]
        known = min(map(len, found))  # without running statistics where one part leaves them out
        total = [torch.zeros_like(t) for t in found[0][:known]]
        for (weight, _), gradient in zip(self.parts, found, strict=True):
            torch._foreach_add_(total, gradient[:known], alpha=weight)
        return _finite_gradient(total)

    def dropped(self, driver: Driver) -> tuple[str, ...]:
        """What any part leaves out."""
        return tuple(sorted({name for _, part in self.parts for name in part.dropped(driver)}))


def differentiated(driver: Driver, loss: Callable[[], Tensor]) -> list[Tensor]:
    """The gradient of a loss at the driver's state, in its parameters and then in its running statistics.

    Without the latter where layers run unseen, as in compiled networks: results then say so.

    Args:
        driver: at the state; its network is in the mode that the loss is meant for (``model.eval()``).
        loss: computes a scalar with ``driver.model``.

    >>> from controlat.methods import build
    >>> layers = nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)
    >>> model = nn.Sequential(*layers).eval()
    >>> driver, x = Driver(model, build("pgd_at"), Ball(0.1)), torch.rand(5, 1, 2, 2)
    >>> [tuple(g.shape) for g in differentiated(driver, lambda: model(x).square().mean())]
    [(3, 4), (3,), (3,), (3,), (3,), (3,)]
    """
    r = [t.detach().clone().requires_grad_() for t in driver.statistics]
    inputs = [*driver.parameters, *r]
    with torch.enable_grad(), followed(driver.model, list(r)) as reached:
        value = loss()
        if not value.requires_grad:  # all that is trained is merged, see `AdversarialLoss.dropped`
            return [torch.zeros_like(t) for t in inputs]
        found = torch.autograd.grad(value, inputs, allow_unused=True)
    if 2 * len(reached) < len(r):  # compiled
        found, inputs = found[: len(driver.parameters)], driver.parameters
    return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


def _finite_value(total: float) -> float:
    if not math.isfinite(total):
        raise NonFiniteError("the terminal cost is not finite")
    return total


def _finite_gradient(total: list[Tensor]) -> list[Tensor]:
    if not all(bool(torch.isfinite(t).all()) for t in total):
        raise NonFiniteError("the gradient of the terminal cost is not finite")
    return total


def check_terminal(made: object, what: str) -> None:
    """Refuse what has not the form of a `Terminal`."""
    if isinstance(made, type):
        raise ValueError(f"{what} is the class {made.__name__}; it must be an object of it")
    lacks = [name for name in ("value", "gradient", "dropped") if not callable(getattr(made, name, None))]
    lower = getattr(made, "lower", None)
    if not isinstance(lower, numbers.Real) or math.isnan(lower):
        lacks.append("lower (a number, -inf for none)")
    if lacks:
        kind = type(made).__name__
        raise ValueError(f"{what} is a {kind} without {', '.join(lacks)}; see controlat.pmp.Terminal")


def described(terminal: Terminal) -> str:
    """What a terminal cost is, in words: its own, or the name of its class."""
    describe = getattr(terminal, "describe", None)
    return str(describe()) if callable(describe) else type(terminal).__name__


def price(terminal: Terminal, driver: Driver) -> Price:
    """What calls of a terminal cost spend: as it declares it, else counted in one call of each.

    Args:
        terminal: one of this module, or the user's own.
        driver: of an untrained network.

    >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8)
    >>> price(AdversarialLoss(x, y, Ball("8/255"), steps=3), driver=None)
    Price(value=24, gradient=32)
    """
    if isinstance(terminal, Weighted):
        found = [price(part, driver) for _, part in terminal.parts]
        return Price(sum(p.value for p in found), sum(p.gradient for p in found))
    declared = getattr(terminal, "price", None)
    if isinstance(declared, Price):
        return declared
    value, gradient = Meter(), Meter()
    terminal.value(driver, value)
    terminal.gradient(driver, gradient)
    return Price(value.gradients, gradient.gradients)


def try_terminal(terminal: Terminal, driver: Driver, name: str) -> None:
    """Call everything of a terminal cost once, so that a mistake shows before anything is trained.

    Args:
        terminal: the user's own.
        driver: of an untrained network.
        name: what errors call it.

    Raises:
        ValueError: a value that is no finite number or below its lower bound, gradients that are not finite
            or of other shapes than the parameters, dropped that is no tuple of texts, a changed network.
    """
    before = driver.snapshot().model
    value, gradient = terminal.value(driver, Meter()), terminal.gradient(driver, Meter())
    try:
        value = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"value of terminal {name} must return a number, got {type(value).__name__}"
        ) from None
    if not math.isfinite(value) or value < terminal.lower:
        raise ValueError(
            f"terminal {name} has the value {value:g} for the untrained network; it must be finite and at "
            f"least its lower bound {terminal.lower:g}"
        )
    shapes = [tuple(g.shape) for g in gradient]
    wanted = [tuple(p.shape) for p in driver.parameters]
    if shapes not in (wanted, wanted + [tuple(r.shape) for r in driver.statistics]):
        raise ValueError(f"gradient of terminal {name} must return tensors of shapes {wanted}, got {shapes}")
    if not all(bool(torch.isfinite(g).all()) for g in gradient):
        raise ValueError(f"gradient of terminal {name} is not finite for the untrained network")
    dropped = terminal.dropped(driver)
    if isinstance(dropped, str) or not all(isinstance(d, str) for d in dropped):
        raise ValueError(f"dropped of terminal {name} must return a tuple of texts, got {dropped!r}")
    after = driver.model.state_dict()
    if not all(torch.equal(t, after[n]) for n, t in before.items() if isinstance(t, Tensor)):
        raise ValueError(f"terminal {name} changes the network; it must leave it as it was")


def parse_terminal(text: str) -> tuple[tuple[float, str], ...]:
    """Weights and names of a sum of terminal costs.

    Args:
        text: names of `TERMINALS` or the user's own package.module:factory, each with a weight before it or
            without, joined by + or -.

    Raises:
        ValueError: it has another form, or a name is unknown.

    >>> parse_terminal("adversarial + 0.1*clean - 1/2*margin")
    ((1.0, 'adversarial'), (0.1, 'clean'), (-0.5, 'margin'))
    """
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"terminal must be a text such as adversarial+0.1*clean, got a {kind}")
    parts: list[tuple[float, str]] = []
    at = 0
    while at < len(text) or not parts:
        term = _TERM.match(text, at)
        if term is None or (parts and not term[1]):
            raise ValueError(
                f"terminal {text!r} cannot be read from {text[at:]!r} on; it must be a name or a sum of them "
                "with weights in front, such as adversarial+0.1*clean"
            )
        sign, weight, name = term.groups()
        size = number(weight or "1", f"a weight of terminal {text!r}")
        parts.append((-size if sign == "-" else size, _known(name)))
        at = term.end()
    return tuple(parts)


def _known(name: str) -> str:
    """A name that `build_terminal` can do something with."""
    if ":" not in name and name not in TERMINALS:
        raise ValueError(
            f"unknown terminal cost {name!r}; {registry.meant(name, TERMINALS)}choose from: "
            f"{', '.join(TERMINALS)}, or give your own as package.module:factory"
        )
    if ":" in name and not callable(found := registry.import_path(name)):
        kind = type(found).__name__
        raise ValueError(f"terminal {name!r} is a {kind}; it must be a function or class to call")
    return name


def build_terminal(text: str, x: Tensor, y: Tensor, ball: Ball, seed: int = 0) -> Terminal:
    """Make the terminal cost that a text names.

    Args:
        text: as `parse_terminal` reads it. The user's own factory is called with those of the keywords x, y,
            ball and seed that it takes.
        x: (N, ...) held-out inputs in [0, 1].
        y: (N,) labels.
        ball: the perturbation set.
        seed: of random starts.

    Raises:
        ValueError: the text cannot be read, or a factory returns no `Terminal`.

    >>> import torch
    >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8)
    >>> build_terminal("0.1*clean", x, y, Ball("8/255")).describe()
    '0.1 * (clean cross-entropy on 8 held-out points)'
    """
    parts = tuple((weight, _named(name, x, y, ball, seed)) for weight, name in parse_terminal(text))
    return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else Weighted(parts)


def _named(name: str, x: Tensor, y: Tensor, ball: Ball, seed: int) -> Terminal:
    """One terminal cost by its name."""
    if name in TERMINALS:
        return AdversarialLoss(x, y, ball, seed=seed, **TERMINALS[name])
    made = registry.call_factory(name, {"x": x, "y": y, "ball": ball, "seed": seed})
    check_terminal(made, f"what terminal {name!r} returns")
    return made  # type: ignore[return-value]
