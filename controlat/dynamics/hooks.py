"""The hooks of a method before the first and after the last step of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from controlat._util import rng
from controlat._util.parallel import World
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Epoch

if TYPE_CHECKING:
    from controlat.dynamics.driver import Driver

__all__ = ["call_hook"]


def call_hook(driver: Driver, spec: RunSpec, epoch: int, when: str) -> None:
    """Call `start_epoch` or `end_epoch` of the driver's method, if it has that hook.

    Args:
        driver: at the state before the first or after the last step of the epoch.
        spec: data and controller.
        epoch: epoch, from 0.
        when: ``"start"`` or ``"end"``.
    """
    hook = getattr(driver.method, f"{when}_epoch", None)
    if hook is not None:
        u = spec.control_at(epoch, 0, driver)  # first: a controller may move the driver, and puts it back
        random = rng.scoped(driver.seed, epoch, -1, when, device=driver.device)
        with random, _noticed(driver, spec, epoch) as ctx:
            hook(ctx, u)


@contextmanager
def _noticed(driver: Driver, spec: RunSpec, epoch: int) -> Iterator[Epoch]:
    """The context of a hook; after the block ``driver.notice`` is called with its changes to the state.

    These are the memory that it assigned or removed, and the tensors that it wrote to in place.
    """
    memory = dict(driver.memory)
    network = {"theta": driver.parameters, "running statistics": driver.statistics}
    counts = {name: [t._version for t in tensors] for name, tensors in network.items()}
    versions = {name: t._version for name, t in memory.items()}
    reloaded: list[str] = []
    yield _epoch(driver, spec, epoch, reloaded)
    if driver.notice is None:
        return
    for name, tensors in network.items():
        if not reloaded and counts[name] != [t._version for t in tensors]:
            driver.notice("moved", name)
    for name, t in memory.items():
        if t.is_floating_point() and driver.memory.get(name) is not t:
            driver.notice("set", name)
        elif t.is_floating_point() and t._version != versions[name]:
            driver.notice("moved", name)


def _epoch(driver: Driver, spec: RunSpec, epoch: int, reloaded: list[str]) -> Epoch:
    """The context of a hook; the names of copies that it reloads are appended to `reloaded`."""

    def notice(what: str, name: str) -> None:
        if driver.notice is not None:
            driver.notice(what, name)

    def forget(name: str) -> None:
        driver.rows.pop(name, None)

    def save(name: str) -> None:
        driver.kept[name] = driver.state().network().copy()
        notice("save", name)

    def reload(name: str) -> None:
        driver.restore_network(driver.kept[name])
        reloaded.append(name)
        notice("reload", name)

    def stop(reason: str) -> None:
        driver.stopped = reason

    return Epoch(
        model=driver.model,
        ball=driver.ball,
        meter=driver.meter,
        seed=driver.seed,
        epoch=epoch,
        memory=driver.memory,
        held_out=spec.held_out,
        channels_last=driver.channels_last,
        forget=forget,
        save=save,
        reload=reload,
        stop=stop,
        first=lambda: next(replace(spec, world=World()).batches(epoch)),
    )
