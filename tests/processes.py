"""What `test_parallel` lets several processes do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers import SHAPE, cnn_bn, split
from rules import Follow
from systems import CASES, REPEATS, Case, constant, driver
from torch import nn

from controlat._util import rng
from controlat._util.parallel import World, current, joined
from controlat.attacks.balls import Ball
from controlat.control.controller import Moment
from controlat.control.schedule_text import parse_schedule
from controlat.control.space import Control
from controlat.data import Augment, Split
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.rollout import rollout
from controlat.pmp import controllers


class Ranked(Follow):
    """A rule that goes by something that differs from process to process."""

    def __init__(self, case: Case, rank: int) -> None:
        super().__init__(case)
        self.rank = rank

    def control(self, now: Moment, z: Any) -> Control:
        z.controller_memory["rank"] = self.rank
        u = super().control(now, z)
        return Control(**(dict(u) | ({"alpha": u["alpha"] * (1 + self.rank)} if "alpha" in u else {})))


N, BATCH = 13, 5  # batches of 5, 5, 3: no number of processes divides them


# The cases that so many processes run: two leave out those that repeat others, and take a norm in turn.
NAMES = {2: [name for name in CASES if name not in REPEATS], 3: list(CASES)}
RUNS = {
    2: [(name, ("linf", "l2")[i % 2]) for i, name in enumerate(NAMES[2])],
    3: [(name, norm) for name in NAMES[3] for norm in ("linf", "l2")],
}


def one_case(world: World, name: str, norm: str) -> dict[str, Any]:
    """A method for two epochs, augmented, on a smooth network in float64."""
    case = CASES[name]
    d = driver(case, ball=Ball(0.1, norm))
    p = constant(case.control(steps=3), N, batch_size=BATCH, epochs=2, world=world)
    p = replace(p, augment=Augment(1, True), held_out=split(8, (1, 4, 4), seed=5))
    return plain(d, [step._asdict() for step in rollout(d, p)])


def every_case(world: World) -> dict[str, Any]:
    return {f"{name}, {norm}": one_case(world, name, norm) for name, norm in RUNS[world.size]}


def dithered(world: World) -> dict[str, Any]:
    """A method with two integer knobs between two whole numbers each, for three epochs."""
    d, space = driver(CASES["yopo"]), CASES["yopo"].method().controls
    schedule = parse_schedule("set:steps=1.5..3,alpha=0.03,inner=1.3,rounding=dither", 3, space).bound(space)
    p = constant(CASES["yopo"].control(), N, batch_size=BATCH, epochs=3, world=world)
    steps = [step._asdict() for step in rollout(d, replace(p, controller=schedule))]
    return {"dithered": plain(d, steps) | {"controls": [dict(step["control"]) for step in steps]}}


def plain(d: Driver, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """A run as tensors and numbers."""
    shown = [(s["samples"], float(s["value"]), vars(s["spent"]), list(s["dropped"])) for s in steps]
    meter = [d.meter.gradients, d.meter.forwards, d.meter.layers]
    return {**d.snapshot().to_dict(), "steps": shown, "meter": meter}


def batchnorm(world: World) -> dict[str, Any]:
    """All methods for two epochs on the package's network with BatchNorm and dropout, in bf16."""
    found = {}
    for name in NAMES[world.size]:
        case = CASES[name]
        data = split(N, SHAPE)
        d = driver(case, cnn_bn().float(), autocast=torch.bfloat16)
        p = constant(case.control(), batch_size=BATCH, epochs=2, world=world)
        p = replace(p, data=Split(data.x.float(), data.y), held_out=Split(data.x.float(), data.y))
        found[name] = plain(d, [step._asdict() for step in rollout(d, p)])
    return found


def twins(world: World) -> dict[str, Any]:
    """Two processes that have the same samples: BatchNorm's statistics are those of the whole batch."""
    with rng.scoped(0, "twins"):
        first = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh()
        model = nn.Sequential(*first, nn.Flatten(), nn.Linear(48, 3)).double()
    d = driver(Case("pgd_at", {"random_start": False, "attack_mode": "train"}), model)
    half = split(4, (1, 4, 4))
    data = Split(torch.cat([half.x, half.x]), torch.cat([half.y, half.y]))
    p = constant(d.method.controls.check({"alpha": 0.03, "steps": 3}), batch_size=8, data=data, world=world)
    object.__setattr__(p, "order", lambda epoch: (torch.arange(8),))
    return {"twins": plain(d, [step._asdict() for step in rollout(d, p)])}


def exchanges(world: World) -> dict[str, Any]:
    """What the processes tell each other."""
    share = world.share(7)
    mine = torch.arange(7.0)[share.rows]
    found = {
        "all_gather": share.all_gather(mine),
        "mask": share.all_gather(mine > 2),
        "sum": share.sum(torch.tensor(world.rank + 1)),
        "mean": share.mean([mine.mean(), torch.ones(2, 2, dtype=torch.float64) * mine.mean()]),
        "told": world.broadcast({"rank": world.rank, "text": "é"}),
        "bytes": list(world.broadcast_bytes(bytes([world.rank, 7]))),
        "nothing": list(world.broadcast_bytes(b"")),
    }
    world.check([torch.tensor(1.0)])
    try:
        world.check([torch.tensor(1.0), torch.tensor(float(world.rank))])
    except RuntimeError as error:
        found["checked"] = str(error)
    return {"exchanges": found}


def drifting(world: World) -> dict[str, Any]:
    """States that are not the same in all processes, and their fingerprints."""

    def network(d: Driver) -> None:
        with torch.no_grad():
            d.parameters[0].view(-1)[0].add_(1e-9 * world.rank)

    def stopped(d: Driver) -> None:
        d.stopped = "loss rises" if world.first else "loss falls"  # of one length

    def controller(d: Driver) -> None:
        d.controller_memory["steps"] = [world.rank]

    said = {}
    for change in (network, stopped, controller):
        d = driver(CASES["pgd_at"], optimizer=SGDSettings(0.0))
        world.check(d.fingerprint())
        change(d)
        try:
            world.check(d.fingerprint())
        except RuntimeError as error:
            said[change.__name__] = str(error)
    return {"drifting": said}


def closed_loop(world: World) -> dict[str, Any]:
    """The first process decides, and all take its control, though each would have seen another number."""
    found = {}
    for name in ("pgd_at", "cat curriculum", "free"):
        d = driver(CASES[name])
        p = constant(CASES[name].control(), N, batch_size=BATCH, epochs=2, world=world)
        p = replace(p, controller=Ranked(CASES[name], world.rank), held_out=split(8, (1, 4, 4), seed=5))
        steps = [step._asdict() for step in rollout(d, p)]
        taken = [dict(step["control"]) for step in steps]
        found[f"closed loop, {name}"] = plain(d, steps) | {
            "controls": taken,
            "asked": len(p.controller.asked),
        }
    return found


def measured(world: World) -> dict[str, Any]:
    """Loops that measure, and move the driver of the first process meanwhile."""
    found = {}
    for text in (
        "greedy:gamma=0.01,probe=8,alpha=0.03:0.1",
        "horizon:h=2,alpha=0.03:0.1",
        "ratio:threshold=1.0001",
    ):
        case = CASES["cat curriculum" if text.startswith("ratio") else "pgd_at"]
        d = driver(case)
        p = constant(case.control(), N, batch_size=BATCH, epochs=2, world=world)
        loop = controllers.build(text, method=d.method, ball=d.ball)
        p = replace(p, controller=loop, held_out=split(8, (1, 4, 4), seed=5))
        steps = [step._asdict() for step in rollout(d, p)]
        found[text.partition(":")[0]] = plain(d, steps) | {"controls": [dict(s["control"]) for s in steps]}
    return found


TASKS: dict[str, Callable[[World], dict[str, Any]]] = {
    task.__name__: task
    for task in (every_case, dithered, batchnorm, twins, exchanges, drifting, closed_loop, measured)
}


def run(out: Path, names: list[str]) -> None:
    """Some tasks, in each process; what it found is in a file of its own."""
    with joined("cpu") as world:
        assert current() == world
        results = {key: value for name in names for key, value in TASKS[name](world).items()}
    torch.save(results, out / f"{world.size}-{world.rank}.pt")
