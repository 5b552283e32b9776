"""Run directories: settings decide whether a directory is continued, reprinted or refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import controlat
from controlat._util.files import left_over, write_json
from controlat._util.parallel import World, current
from controlat._util.precision import tf32_state
from controlat._util.registry import NAMED
from controlat.app.placement import threads
from controlat.models.frozen import graph_use
from controlat.records import Settings, read_record

__all__ = ["claimed", "environment", "slug"]

SETTINGS, LOCK = "settings.json", ".lock"


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_state() -> str | None:
    """Commit of the user's working directory, with + where it has changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, hardware, precision, threads and git state at present, to be stored with every result."""
    device, cudnn, chosen = torch.device(device), torch.backends.cudnn, threads()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    return {
        "controlat": controlat.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of torch's own, which weights_only would refuse
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "hardware": name,
        "cores": os.cpu_count(),
        "threads": chosen.number,
        "threads_chosen": chosen.why,
        "cudnn": {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic},
        "tf32": tf32_state()._asdict(),
        "cuda_graphs": graph_use.status(device),
        "processes": current().size,
        "git": _git_state(),
    }


def slug(text: str) -> str:
    """A schedule's text as a folder name.

    >>> slug("pgd:steps=10,alpha=2/255")
    'pgd-steps=10-alpha=2_255'
    """
    name = text.replace("/", "_").replace(":", "-").replace(",", "-").replace(" ", "")
    return "".join(c for c in name if c.isalnum() or c in "-_=.")[:80].strip(".") or "schedule"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    every = sorted(set(old) | set(new), key=lambda k: (k != "command", k))
    different = [k for k in every if old.get(k) != new.get(k)]
    shown = {k: (_short(old.get(k)), _short(new.get(k))) for k in different}
    # A schedule of the same text differs in what another setting decides, such as the number of epochs.
    told = {k: v for k, v in shown.items() if v[0] != v[1]} or shown
    return [f"{k}: {there} there, {here} here" for k, (there, here) in told.items()]


def _short(value: object) -> str:
    if isinstance(value, list):
        value = [v["text"] if isinstance(v, dict) and "text" in v else v for v in value]
    if isinstance(value, dict) and "text" in value:
        value = value["text"]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextlib.contextmanager
def claimed(directory: str | Path, settings: Mapping[str, Any], world: World = World()) -> Iterator[bool]:  # noqa: B008
    """Hold a run directory: yields whether it already was one, of these very settings.

    Where several processes work on the run, the first one holds it for all.

    A new or empty directory is made one: the settings are written to it. Nothing in it is ever deleted or
    overwritten by other settings, and one process at a time works in it.

    Args:
        directory: the run directory.
        settings: plain data that decides the results.
        world: the processes of the run.

    Raises:
        ValueError: the directory holds something else, or other settings, or another process works in it.
    """
    if not world.first:
        told = world.broadcast(None)
        if isinstance(told, str):
            raise ValueError(told)
        yield bool(told)
        return
    directory = Path(directory)
    with contextlib.ExitStack() as stack:
        try:
            known = _claim(stack, directory, settings)
        except ValueError as error:
            world.broadcast(str(error))  # the others wait for an answer
            raise
        try:
            yield bool(world.broadcast(known))
        except BaseException:
            there = {p.name for p in directory.iterdir()} - {LOCK}
            if not known and there <= {SETTINGS, "schedule.json"}:
                for name in sorted(there):  # nothing was made: other settings may be tried here
                    (
                        directory / name
                    ).unlink()  # the settings last: without them the rest is not known as ours
            raise


def _claim(stack: contextlib.ExitStack, directory: Path, settings: Mapping[str, Any]) -> bool:
    """Hold the directory until the stack is closed; whether it was a run of these settings before."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; give the name of a directory")
    _check_ours(directory)  # a folder of other things gets not even a lock
    directory.mkdir(parents=True, exist_ok=True)
    _lock(stack, directory)
    _check_ours(directory)  # what came while another process held it
    for folder in (directory, *directory.glob("runs/*")):
        for left in left_over(folder):  # half-written files of a process that was killed
            left.unlink()
    if not (directory / SETTINGS).exists():
        write_json(directory / SETTINGS, dict(settings))
        return False
    different = _differences(read_record(directory / SETTINGS, Settings), settings)
    if different:
        listed = "; ".join(different[:3]) + ("; ..." if len(different) > 3 else "")
        cure = "give those, or another directory"
        if NAMED in listed:
            program = f"what begins with {NAMED} was given as an object by a Python program"
            cure = f"{program}: give the same from there, or another directory"
        raise ValueError(f"{directory} was made with other settings ({listed}); {cure}")
    return True


def _check_ours(directory: Path) -> None:
    """Refuse a folder that holds files and no settings, but for what a start that was killed leaves.

    Every run writes its settings before anything else: where others are seen, the settings are there by now.
    """
    if not directory.is_dir():
        return
    others = {p.name for p in directory.iterdir()} - {LOCK}
    others -= {p.name for p in left_over(directory, SETTINGS)}
    if others and not (directory / SETTINGS).exists():
        raise ValueError(f"{directory} holds other files and no {SETTINGS}; give a new directory")


def _lock(stack: contextlib.ExitStack, directory: Path) -> None:
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"another process is working in {directory}; wait for it or give another") from None
