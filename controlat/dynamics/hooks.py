"""What a method may do before the first and after the last step of an epoch, and who is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from controlat._util.parallel import World
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import Epoch

if TYPE_CHECKING:
    from controlat.dynamics.driver import Driver

__all__ = ["between_epochs"]


@contextmanager
def between_epochs(driver: Driver, spec: RunSpec, epoch: int) -> Iterator[Epoch]:
    """What a hook of the method may use, inside the block; ``driver.notice`` is told what it did.

    That is what memory it set anew or removed, and what it wrote to in place.
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
    """The context of a hook; names of networks that it puts back are added to `reloaded`."""

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
