"""Going on from a run directory: its last checkpoint, and its log up to there."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from controlat._util.files import write_text
from controlat.app.checkpoints import check_optimizer, check_weights, load_checkpoint, read_checkpoint
from controlat.app.tally import Tally
from controlat.control.controller import run_lengths
from controlat.data import Split
from controlat.dynamics.driver import Driver
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State
from controlat.records import LogLine, missing, read_epochs

__all__ = ["LAST", "LOG", "put_back", "read_log", "resume", "warn"]

LAST, LOG = "last.pt", "log.jsonl"


def read_log(directory: str | Path, epochs: int | None = None) -> list[dict[str, Any]]:
    """The lines of log.jsonl, one for each epoch from 0 on; no more than so many, where they are known.

    Raises:
        ValueError: a line is malformed, or comes out of order; names it.
    """
    path = Path(directory) / LOG
    try:
        return read_epochs(path, LogLine, epochs)
    except ValueError as error:
        raise ValueError(
            f"{error}; where it is deleted, training on (--resume) writes it from {LAST}"
        ) from None


def resume(
    driver: Driver, spec: RunSpec, directory: Path, data: Mapping[str, str | None]
) -> tuple[Tally, list[dict[str, Any]]]:
    """Put the driver where the last checkpoint left it, and the log with it: the first process reads."""
    last, world = directory / LAST, spec.world
    tally, kept = Tally(), None
    if world.broadcast(last.exists()):
        content = world.broadcast_bytes(read_checkpoint(last) if world.first else b"")
        stored = load_checkpoint(last, driver.device, content)
        world.once(lambda: _compare_data(stored.get("data", {}), data, spec, str(last)))
        put_back(driver, spec, stored, str(last))
        if world.first:
            _compare_environment(stored["environment"], driver.device, world.size)
        tally, kept = Tally(**({"evaluations": None} | stored["tally"])), stored.get("log")
        if spec.open_loop and not tally.controls:  # a checkpoint of before does not have them
            first = tally.epoch * spec.batches_per_epoch
            tally.controls = run_lengths(spec.plan(first, first + tally.batch))
    return tally, world.once(lambda: _mended_log(directory, tally, kept))


def warn(text: str) -> None:
    """One line on standard error, beside a progress bar."""
    tqdm.write(f"controlat: warning: {text}", file=sys.stderr)


def _compare_environment(there: Mapping[str, Any], device: torch.device, processes: int) -> None:
    """Warn where the run was begun with other numbers of processes or CPU threads, which decide its bits."""
    here = {"processes": processes}
    if device.type == "cpu":
        here["threads"] = torch.get_num_threads()
    for name, number in here.items():
        if (before := there.get(name, 1)) != number:
            warn(f"this run was begun with {before} {name}; with {number} it ends with other bits")


def _compare_data(
    there: Mapping[str, str | None], here: Mapping[str, str | None], spec: RunSpec, where: str
) -> None:
    """Refuse data that changed since the run was begun; only warn where pictures may have been copied."""
    for name, mark in here.items():
        if None in (mark, there.get(name)) or mark == there[name]:  # not known: of before, or a user's own
            continue
        told = f"{name} samples are not those that {where} was made with"
        if isinstance(spec.data, Split):
            raise ValueError(f"{told}; put the data of before in their place, or train into a new directory")
        warn(f"{told}, by names, sizes and times of files; if more than the times differ, train anew")


def put_back(driver: Driver, spec: RunSpec, stored: Mapping[str, Any], where: str) -> None:
    """Put the driver where a checkpoint left it, if it is one of this driver's and this plan's."""
    for part in (stored, *stored.get("kept", {}).values()):
        check_weights(driver.model, part["model"], where)
        check_optimizer(driver.sgd, part["optimizer"], where)
    for name, rows in stored.get("rows", {}).items():
        values, seen = rows["values"], rows["seen"]
        fits = seen.dtype == torch.bool and seen.dim() == 1 and values.shape[:1] == seen.shape
        if not fits or len(seen) > len(spec.data):
            raise ValueError(f"{where}: rows.{name} are not of the {len(spec.data)} training samples")
    epoch, batch = stored["tally"]["epoch"], stored["tally"]["batch"]
    if epoch + (batch > 0) > spec.epochs or batch >= spec.batches_per_epoch:
        raise ValueError(f"{where}: tally is at epoch {epoch}, batch {batch}, which this run does not have")
    if (taken := stored["tally"].get("controls", [])) and taken[-1][0] >= batch:
        raise ValueError(f"{where}: tally has controls of more than the {batch} batches of epoch {epoch}")
    driver.restore(State.from_dict(stored, driver.names))


def _mended_log(directory: Path, tally: Tally, kept: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The log up to where the checkpoint stands; the file is made to agree, from the checkpoint's copy."""
    path = directory / LOG
    done = [line for line in read_log(directory, tally.epoch) if line["epoch"] < tally.epoch]
    if kept is None:  # a checkpoint of before has no copy
        if lost := missing(done, tally.epoch):
            raise ValueError(f"{path} lacks epoch {lost[0]}; {LAST} has no copy; train in a new directory")
        kept = done
    whole = list(kept)
    if [line["epoch"] for line in whole] != list(range(tally.epoch)):
        raise ValueError(f"{directory / LAST}: log should have the epochs before {tally.epoch}, each once")
    for line in done:
        if line != whole[line["epoch"]]:
            raise ValueError(
                f"{path}: epoch {line['epoch']} is not as {LAST} has it; delete the file, and training on "
                "(--resume) writes it again"
            )
    if len(done) < len(whole):
        warn(f"{path} lacked {len(whole) - len(done)} of {len(whole)} epochs; written again from {LAST}")
    text = "".join(json.dumps(line) + "\n" for line in whole)
    if (path.exists() and path.read_text() != text) or (text and not path.exists()):
        write_text(path, text)
    return whole
