"""How many runs of an evaluation are under way at a time, and where: each in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from controlat._util.cores import available_cores
from controlat._util.parallel import started
from controlat._util.pool import InProcess, Pool
from controlat._util.registry import Named, importable
from controlat._util.sending import unsendable
from controlat.app.experiment import Experiment
from controlat.app.settings import EvaluateSettings, Problem, names_factory
from controlat.data import Samples
from controlat.dynamics.recording import GIBI
from controlat.pmp.terminal import parse_terminal

__all__ = ["PER_CARD", "cards", "number_of_jobs", "only_here", "workers"]

_WORTH = 10_000  # samples that a process should train on, counted in every epoch: it takes seconds to start
PER_CARD = 4  # processes on one GPU, whose launches overlap then
_MEMORY = 0.75 * GIBI  # of a process that has imported all, without data


def number_of_jobs(chosen: EvaluateSettings, experiment: Experiment) -> int:
    """Runs that are under way at a time: as asked for, else as many as cores, memory and their size allow.

    How fast anything is plays no part: the number of threads, and with it the bits of the results, may depend
    on whether there are several.

    Raises:
        ValueError: more than one is asked for under torchrun, whose processes work on one run together.
    """
    if started() > 1:
        if (chosen.jobs or 1) > 1:
            raise ValueError(f"jobs must be 1 under torchrun, got {chosen.jobs}; start it without torchrun")
        return 1
    runs = len(chosen.schedules) * len(chosen.seeds)
    jobs = min(runs, available_cores() if chosen.jobs is None else chosen.jobs)
    if chosen.jobs is None:
        work = runs * chosen.epochs * len(experiment.training)
        jobs = max(1, min(jobs, work // _WORTH, _fitting(chosen, experiment)))
    return 1 if jobs > 1 and only_here(chosen, "runs are made") else jobs


def workers(chosen: Problem, jobs: int, unit: str) -> Pool | InProcess:
    """So many processes for tasks under some settings; this one alone where others cannot have the parts.

    Args:
        chosen: the settings.
        jobs: tasks at a time.
        unit: what a task is, in the plural.
    """
    if only_here(chosen, f"{unit} are done"):
        return InProcess()
    return Pool(jobs, environments=cards(chosen), unit=unit)


def only_here(chosen: Problem, what: str) -> bool:
    """Whether a part of the user's cannot be sent to other processes; a note says so."""
    told = _unknown_to_workers(chosen)
    if told:
        tqdm.write(f"controlat: note: {told}; {what} one after the other", file=sys.stderr)
    return bool(told)


def _unknown_to_workers(chosen: Problem) -> str:
    """The first of the user's own parts that other processes cannot have, and why; empty if there is none."""
    terminals = (name for _, name in parse_terminal(getattr(chosen, "terminal", "clean")))
    schedules = filter(names_factory, getattr(chosen, "schedules", ()))
    for name in (chosen.data, chosen.model, chosen.method, *terminals, *schedules):
        module, colon, _ = name.partition(":")
        if isinstance(name, Named):
            if reason := unsendable(name):
                return f"{name} cannot be sent to other processes ({reason})"
        elif colon and not importable(module):
            return f"{name} is part of the program itself, which other processes do not import"
    return ""


def cards(chosen: Problem) -> list[dict[str, str]]:
    """What tells each worker in turn which GPU it has: every one there is, unless one is named."""
    if chosen.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return [{}]
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = known.split(",") if known else map(str, range(torch.cuda.device_count()))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names]


def _fitting(chosen: EvaluateSettings, experiment: Experiment) -> int:
    """Processes that fit in the free memory, with data and the states that the full criterion may record."""
    need = _MEMORY + 2 * sum(_bytes(samples) for samples in (experiment.data.train, experiment.data.test))
    states = min(chosen.memory * GIBI, _recorded(experiment)) if chosen.full else 0.0
    if experiment.device.type == "cpu":
        return int(_available() // (need + states))
    if experiment.device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(experiment.device)
    each = min(PER_CARD, int(free // (2 * need + states)))
    return min(len(cards(chosen)) * each, int(_available() // need))


def _recorded(experiment: Experiment) -> float:
    """Bytes of the states of a whole run: parameters and the optimiser's buffer before every step."""
    steps = experiment.problem.epochs * -(-len(experiment.training) // experiment.problem.batch_size)
    return 2.0 * steps * sum(p.numel() * p.element_size() for p in experiment.model(0).parameters())


def _bytes(samples: Samples) -> int:
    """Of samples that are held in memory."""
    tensors = (t for t in getattr(samples, "__dict__", {}).values() if isinstance(t, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def _available() -> float:
    """Bytes of memory that are free, within the limit of a container."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = 1024.0 * int(line.split()[1])
    limit, used = (
        next(_lines(Path("/sys/fs/cgroup") / name), "max") for name in ("memory.max", "memory.current")
    )
    return free if "max" in (limit, used) else min(free, float(limit) - float(used))


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from path.read_text().splitlines()
    except OSError:
        return
