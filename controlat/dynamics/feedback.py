"""Closed loops: the controller is asked for u_t at the state z, which carries what it remembers."""

from __future__ import annotations

import copy
import json
from typing import Any

from controlat._util import rng
from controlat._util.checks import brief
from controlat._util.parallel import World
from controlat.control.controller import Controller, Moment, is_open
from controlat.control.cost import Meter
from controlat.control.space import Control

__all__ = ["ahead", "decide", "forget_epoch", "observe"]

_EPOCH = "_epoch"  # in a controller's memory: the epoch and the control of its first step


def decide(controller: Controller, now: Moment, z: Any, world: World) -> Control:
    """u_t: the first process asks a closed loop, and all take the control and what it remembers.

    The first step of an epoch is decided before the method's hook at its beginning, and only once: its
    control is remembered to the end of the epoch, for the hook there.

    Args:
        controller: an open or a closed loop.
        now: t.
        z: the driver at the state before the step; an open loop does not need it.
        world: the processes.

    Raises:
        ValueError: a closed loop gives no admissible control, or remembers what is no plain data.
    """
    if is_open(controller):
        return controller.control(now)
    opening = z.controller_memory.get(_EPOCH)
    known = opening is not None and opening["epoch"] == now.epoch
    if known and now.batch == 0:
        return Control(**opening["control"])

    def ask() -> list[Any]:
        u = dict(_asked(controller, now, z))  # the memory is read after it
        return [u, z.controller_memory]

    knobs, z.controller_memory = world.once(ask)
    z.controller_memory[_EPOCH] = opening if known else {"epoch": now.epoch, "control": knobs}
    return Control(**knobs)


def observe(controller: Controller, step: Any, z: Any, world: World) -> None:
    """Show a closed loop what happened in a step: the first process looks, and all remember the same.

    Args:
        controller: nothing happens where it has no method `observe`.
        step: a `controlat.dynamics.driver.Step`.
        z: the driver at the state after it.
        world: the processes.

    Raises:
        ValueError: what the controller remembers is no plain data.
    """
    if is_open(controller) or not hasattr(controller, "observe"):
        return

    def look() -> dict[str, Any]:
        controller.observe(step, z)
        _check_memory(z)
        remembered: dict[str, Any] = z.controller_memory
        return remembered

    opening = z.controller_memory[_EPOCH]
    z.controller_memory = world.once(look) | {_EPOCH: opening}


def ahead(controller: Controller, now: Moment, z: Any) -> Control:
    """u_t as `decide` would give it to this process, without a trace: memory and meter stay as they are."""
    if is_open(controller):
        return controller.control(now)
    memory, meter = copy.deepcopy(z.controller_memory), z.meter
    z.meter = Meter()
    try:
        return _asked(controller, now, z)
    finally:
        z.controller_memory, z.meter = memory, meter


def forget_epoch(z: Any) -> None:
    """Forget the control with which an epoch of that number began in another roll-out of the driver."""
    z.controller_memory.pop(_EPOCH, None)


def _asked(controller: Controller, now: Moment, z: Any) -> Control:
    """u_t of a closed loop, checked against the controls of the method."""
    try:
        with rng.scoped(z.seed, now.epoch, now.batch, "control", device=z.device):
            u = controller.control(now, z)
        _check_memory(z)
        return z.method.controls.check(u)  # type: ignore[no-any-return]
    except ValueError as error:
        name, where = type(controller).__name__, f"epoch {now.epoch}, batch {now.batch}"
        raise ValueError(f"controller {name} ({where}): {error}") from error


def _check_memory(z: Any) -> None:
    """Raise ValueError unless what the controller remembers is the same after it was written as JSON."""
    try:
        plain = json.loads(json.dumps(z.controller_memory, allow_nan=False)) == z.controller_memory
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise ValueError(
            "controller_memory must be plain data: finite numbers, texts, true or false, lists, and "
            f"dictionaries with texts for keys; got {brief(z.controller_memory)}"
        )
