"""For tests over every method: small networks, a control for any method, a plan that never changes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import CLASSES, samples, slow, split
from torch import Tensor, nn

from controlat._util import rng
from controlat.attacks.balls import Ball
from controlat.control.space import Control
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Batch, Method, build, names

HEAVY = SGDSettings(momentum=0.9, weight_decay=1e-3)


@dataclass(frozen=True)
class Own:
    """What sets a method apart, where a test of all methods has to know it.

    Args:
        draws: whether it asks for random numbers.
        layers: whether it takes samples through the first layer alone.
        looks: passes of a step, with gradients of the parameters, that running statistics do not follow.
        reach: (control, eps) -> how far from the clean input it may train.
        starts_outside: whether the first input of a step may leave [0, 1].
        memory: what makes it attack from its first step on.
        updates: control -> how often a step moves the parameters.
        carries: whether a perturbation goes on to later steps.
        cut: whether derivatives leave out how later layers act on the first one's input.
        drops_l2: whether derivatives leave out that l_2 steps move with theta.
        meets_edge: whether a carried perturbation may come back to the edge of the ball: a kink.
        counts: whether it looks at whole numbers, such as an accuracy, which have no derivative.
    """

    draws: bool = True
    layers: bool = False
    looks: int = 0
    reach: Callable[[Control, float], float] = lambda u, eps: eps
    starts_outside: bool = False
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    updates: Callable[[Control], int] = lambda u: 1
    carries: bool = False
    cut: bool = False
    drops_l2: bool = True
    meets_edge: bool = False
    counts: bool = False


OWN = {
    "atta": Own(carries=True),
    "awp": Own(looks=1),  # at the weights that it perturbs
    "cat": Own(memory={"strength": torch.tensor(3)}),
    "free": Own(
        draws=False, updates=lambda u: int(u["steps"]), carries=True, drops_l2=False, meets_edge=True
    ),
    "nfgsm": Own(reach=lambda u, eps: min(u["noise"] * eps + u["alpha"], u["clip"] * eps)),  # no projection
    "yopo": Own(layers=True, starts_outside=True),  # at the noise, as released
}


class Case(NamedTuple):
    """A method with options, knobs other than the sample control's, and what its options change of OWN."""

    name: str
    options: Mapping[str, Any] = {}
    knobs: Mapping[str, float] = {}
    changes: Mapping[str, Any] = {}

    @property
    def own(self) -> Own:
        return replace(OWN.get(self.name, Own()), **self.changes)

    def method(self) -> Method:
        return build(self.name, self.options)

    def control(self, **knobs: float) -> Control:
        return sample(self.method(), **{**self.knobs, **knobs})


# Options under which a method attacks from its first step on.
OPTIONS: dict[str, dict[str, Any]] = {"cat": {"curriculum": False}}
PLAIN = {name: Case(name, OPTIONS.get(name, {})) for name in names()}
VARIANTS = {
    "atta reset": Case("atta", {"init": "uniform"}, {"reset": 2}),
    "awp warm-up": Case("awp", {"warmup": 1}, changes={"looks": 0}),
    "cat curriculum": Case(
        "cat",
        {"patience": 1, "ready": 0.0, "expected": 0.0},
        {"steps": 3},
        {"counts": True, "drops_l2": False},  # it begins without an attack
    ),
    "cat basic": Case("cat", {"curriculum": False, "mixing": False}),
    "dynamic weighted": Case("dynamic", {"outer_weight": "loss", "displacement": "start"}),
    "fast early stop": Case("fast", {"early_stop": True}),
    "fast fixed": Case("fast", {}, {"start": 0.5, "random": 0.0}),
    "fast previous": Case("fast", {"init": "previous"}, changes={"carries": True}),
    "fast wide": Case("fast", {"clamp_start": False}, {"start": 3.0}),
    "fat train": Case("fat", {"attack_mode": "train"}, {"slack": 0}),
    "fat gaussian": Case("fat", {"start": "gaussian", "omega": 0.0}),
    "nfgsm clipped": Case("nfgsm", {}, {"clip": 1.0}),
    "pgd_at clean": Case("pgd_at", {"random_start": False, "clean_weight": 0.5}),
    "trades separate": Case("trades", {"separate_clean": True, "attack_mode": "train"}),
    "yopo direct": Case("yopo", {"first_layer_grad": "direct", "gradients": "sum"}),
    "yopo hamiltonian": Case("yopo", {"first_layer_grad": "hamiltonian"}, {"inner": 3}, {"cut": True}),
}
CASES = {**PLAIN, **VARIANTS}
# Variants whose steps are made of the same parts as those of another case: slow where a test is long.
REPEATS = (
    *("awp warm-up", "cat basic", "dynamic weighted", "fast early stop", "fast fixed", "fast wide"),
    *("fat gaussian", "fat train", "nfgsm clipped", "trades separate"),
)


def long(names: Iterable[str]) -> list[Any]:
    """Names of cases for a test that is long."""
    return [slow(n, id=n) if n in REPEATS else pytest.param(n, id=n) for n in names]


def each_optimizer(
    settings: Mapping[str, SGDSettings], few: Iterable[str] = ("plain", "Nesterov")
) -> pytest.MarkDecorator:
    """Each optimiser as `o`; those that are not among a few only where all tests run."""
    return pytest.mark.parametrize(
        "o", [pytest.param(o, id=name) if name in few else slow(o, id=name) for name, o in settings.items()]
    )


LONG = [pytest.param(CASES[p.id], id=p.id, marks=p.marks) for p in long(CASES)]
# Those whose derivative of a whole run leaves nothing out under l_inf; the others have tests of their own.
FOLLOWED = long(name for name, case in CASES.items() if not (case.own.counts or case.own.cut))


def those(kept: Callable[[Case], bool], cases: Mapping[str, Case] = CASES) -> pytest.MarkDecorator:
    """A test for some of the cases."""
    some = long(name for name, case in cases.items() if kept(case))
    return pytest.mark.parametrize("case", [pytest.param(cases[p.id], id=p.id, marks=p.marks) for p in some])


def sample(method: Method, **knobs: float) -> Control:
    """A control of any method: alpha = 0.03, two steps if it may have them, defaults, else 1 or 0.1."""
    chosen: dict[str, float] = {"alpha": 0.03, "steps": 2}
    for name, knob in method.controls.items():
        if name not in chosen and knob.default is None:
            chosen[name] = max(knob.low, 1) if knob.kind == "integer" else max(knob.low, 0.1)
    space = method.controls
    chosen = {name: min(value, space[name].high) for name, value in (chosen | knobs).items() if name in space}
    return space.check(chosen)


def smooth(seed: int = 0) -> nn.Module:
    """A network with two derivatives everywhere, in float64, for images (1, 4, 4); its f_0 is linear."""
    with rng.scoped(seed, "smooth"):
        head = nn.Conv2d(1, 4, 3, padding=1), nn.Softplus(), nn.Flatten()
        return nn.Sequential(*head, nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def batch(
    n: int = 6,
    shape: tuple[int, int, int] = (1, 4, 4),
    *,
    epoch: int = 0,
    number: int = 0,
    margin: float = 0.0,
    seed: int = 7,
) -> Batch:
    """n samples, whose pixels keep a distance from black and white."""
    x, y = samples(n, shape, seed=seed)
    return Batch(margin + (1 - 2 * margin) * x, y, torch.arange(n), epoch, number)


def driver(
    case: Case | Method,
    model: nn.Module | None = None,
    ball: Ball = Ball(0.1),  # noqa: B008
    optimizer: SGDSettings = HEAVY,
    seed: int = 3,
    **options: Any,
) -> Driver:
    method = case.method() if isinstance(case, Case) else case
    return Driver(smooth() if model is None else model, method, ball, optimizer, seed, **options)


def constant(
    u: Control,
    n: int = 10,
    shape: tuple[int, int, int] = (1, 4, 4),
    *,
    epochs: int = 3,
    batch_size: int = 4,
    rate: float = 0.1,
    seed: int = 3,
    **options: Any,
) -> RunSpec:
    """A plan with one control and one rate; the last batch of an epoch is shorter."""
    made = RunSpec(
        data=split(n, shape),
        batch_size=batch_size,
        epochs=epochs,
        controller=lambda t: u,  # type: ignore[arg-type]
        rate=lambda t, T: rate,  # type: ignore[arg-type]
        seed=seed,
    )
    return replace(made, **options)


def trained_on(model: nn.Module) -> list[Tensor]:
    """What the network sees while its parameters ask for gradients: views run on detached ones."""
    seen: list[Tensor] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if all(p.requires_grad for p in module.parameters()):
            assert module.training
            seen.append(arguments[0].detach().clone())

    model.register_forward_pre_hook(look)
    return seen


def passes(model: nn.Module) -> tuple[list[int], list[int]]:
    """Samples taken forward, and those taken backward, in passes through the whole network."""
    forwards: list[int] = []
    backwards: list[int] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        forwards.append(len(output))
        if output.requires_grad:
            output.register_hook(lambda g: backwards.append(len(g)))

    model.register_forward_hook(look)
    return forwards, backwards
