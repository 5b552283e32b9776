"""Closed loops: u_t = pi(t, z) from the state z, which includes the controller's memory."""

from __future__ import annotations

import json
from typing import Any

from controlat._util import rng
from controlat._util.checks import brief
from controlat._util.parallel import World
from controlat.control.controller import Controller, Moment, is_open
from controlat.control.space import Control

__all__ = ["decide", "forget_epoch", "observe"]

_EPOCH = "_epoch"  # key in the controller's memory for the epoch and the control of its first step


def decide(controller: Controller, now: Moment, z: Any, world: World) -> Control:
    """u_t; a closed loop is evaluated by the first process, which broadcasts the control and its memory.

    The control of an epoch's first step is computed once, before the method's `start_epoch` hook, and kept
    until the end of the epoch for the `end_epoch` hook.

    Args:
        controller: an open or a closed loop.
        now: t.
        z: the driver at the state before the step; an open loop does not need it.
        world: the processes.

    Raises:
        ValueError: the control of a closed loop is not admissible, or its memory is not plain data.
    """
    if is_open(controller):
        return controller.control(now)
    opening = z.controller_memory.get(_EPOCH)
    known = opening is not None and opening["epoch"] == now.epoch
    if known and now.batch == 0:
        return Control(**opening["control"])

    def evaluate() -> list[Any]:
        u = dict(_closed_loop_control(controller, now, z))  # first, as it updates the memory
        return [u, z.controller_memory]

    knobs, z.controller_memory = world.once(evaluate)
    z.controller_memory[_EPOCH] = opening if known else {"epoch": now.epoch, "control": knobs}
    return Control(**knobs)


def observe(controller: Controller, step: Any, z: Any, world: World) -> None:
    """Call a closed loop's `observe` after a step in the first process, and broadcast its memory.

    Args:
        controller: nothing is done if it has no method `observe`.
        step: a `controlat.dynamics.driver.Step`.
        z: the driver at the state after it.
        world: the processes.

    Raises:
        ValueError: the controller's memory is not plain data.
    """
    if is_open(controller) or not hasattr(controller, "observe"):
        return

    def updated_memory() -> dict[str, Any]:
        controller.observe(step, z)
        _check_memory(z)
        memory: dict[str, Any] = z.controller_memory
        return memory

    opening = z.controller_memory[_EPOCH]
    z.controller_memory = world.once(updated_memory) | {_EPOCH: opening}


def forget_epoch(z: Any) -> None:
    """Drop the control of an epoch's first step that an earlier roll-out of the driver has left."""
    z.controller_memory.pop(_EPOCH, None)


def _closed_loop_control(controller: Controller, now: Moment, z: Any) -> Control:
    """u_t of a closed loop, checked to be admissible for the method."""
    try:
        with rng.scoped(z.seed, now.epoch, now.batch, "control", device=z.device):
            u = controller.control(now, z)
        _check_memory(z)
        return z.method.controls.check(u)  # type: ignore[no-any-return]
    except ValueError as error:
        name, where = type(controller).__name__, f"epoch {now.epoch}, batch {now.batch}"
        raise ValueError(f"controller {name} ({where}): {error}") from error


def _check_memory(z: Any) -> None:
    """Raise ValueError unless the controller's memory is equal to itself after a round trip through JSON."""
    try:
        plain = json.loads(json.dumps(z.controller_memory, allow_nan=False)) == z.controller_memory
    except (TypeError, ValueError):
        plain = False
    if not plain:
        raise ValueError(
            "controller_memory must be plain data: finite numbers, texts, true or false, lists, and "
            f"dictionaries with texts for keys; got {brief(z.controller_memory)}"
        )
