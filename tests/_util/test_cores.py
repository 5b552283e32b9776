"""The cores of this process: its affinity and what its control groups grant."""

import os
from pathlib import Path

import pytest

from controlat._util import cores


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores, and a tree of control groups that this process is in nowhere as yet."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_affinity_alone(groups: Path) -> None:
    assert cores.available_cores() == 8


@pytest.mark.parametrize(
    ("limit", "expected"), [("max 100000\n", 8), ("250000 100000\n", 3), ("5000 100000\n", 1), ("x\n", 8)]
)
def test_version_2(groups: Path, limit: str, expected: int) -> None:
    write(groups / "membership", "0::/box/job\n")
    write(groups / "groups/box/job/cpu.max", limit)
    assert cores.available_cores() == expected


def test_the_narrowest_of_nested_groups_counts(groups: Path) -> None:
    write(groups / "membership", "0::/box/job\n")
    write(groups / "groups/box/job/cpu.max", "400000 100000\n")
    write(groups / "groups/box/cpu.max", "200000 100000\n")
    assert cores.available_cores() == 2


@pytest.mark.parametrize(("quota", "expected"), [("-1\n", 8), ("150000\n", 2)])
def test_version_1(groups: Path, quota: str, expected: int) -> None:
    write(groups / "membership", "9:memory:/elsewhere\n1:cpu:/box\n")
    write(groups / "groups/cpu/box/cpu.cfs_quota_us", quota)
    write(groups / "groups/cpu/box/cpu.cfs_period_us", "100000\n")
    assert cores.available_cores() == expected
