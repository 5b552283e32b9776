"""The cores that this process may use."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

__all__ = ["available_cores"]

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """The cores that this process may use: its affinity, and the share of its control groups, rounded up.

    >>> 1 <= available_cores() <= os.cpu_count()
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas())]))


def _quotas() -> list[float]:
    """Cores that the control groups of this process grant, as containers set them; empty without a limit."""
    files: list[Path] = []
    with contextlib.suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = _CGROUPS / "cpu" if controllers else _CGROUPS
            group = root / path.lstrip("/")
            files += [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    return [quota for folder in files if (quota := _quota(folder)) is not None]


def _quota(folder: Path) -> float | None:
    """Cores that one control group grants: ``cpu.max`` of version 2, ``cpu.cfs_quota_us`` of version 1."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(float, " ".join((folder / name).read_text() for name in names).split())
            return quota / period if quota > 0 and period > 0 else None
    return None  # no such file, or "max"
