"""The shapes of the files that a run leaves: each is checked when it is read, and an error names the field.

Types are strict: a text is not a number, 1.0 is no count, and numbers are finite. Fields that are not listed
are let through, so that files of later releases can be read. What is written as null has no value.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, get_type_hints

import torch
from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from controlat.files import read_json, read_json_lines
from controlat.schedules import Schedule

__all__ = [
    "Calibrated",
    "Checkpoint",
    "CriterionLine",
    "Evaluation",
    "Full",
    "LogLine",
    "Result",
    "Settings",
    "checked",
    "missing",
    "read_epochs",
    "read_record",
    "settings_of",
]

# ---- reading


def read_record(path: str | Path, shape: Any) -> Any:
    """The content of a JSON file, as it stands there, if it has this shape.

    Args:
        path: the file.
        shape: a type of this module.

    Raises:
        ValueError: it is no JSON, or of another shape; the message names the file and the field.
    """
    return checked(read_json(path), shape, str(path))


def checked(found: Any, shape: Any, where: str) -> Any:
    """`found`, if it has this shape; `where` it is from begins the error.

    >>> checked({"command": "train"}, Settings, "settings.json")
    {'command': 'train'}
    >>> checked([], Settings, "settings.json")
    Traceback (most recent call last):
    ValueError: settings.json: should be an object, got []
    """
    try:
        _adapter(shape).validate_python(found, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_told(error, found)}") from None
    return found


_adapter = functools.cache(TypeAdapter)


def _told(error: ValidationError, found: Any) -> str:
    """The first thing that is wrong: field, what it should be (one of the alternatives), what it is."""
    every = error.errors(include_url=False, include_context=False)
    first = every[0]
    field = _field(first["loc"], found)
    wanted = dict.fromkeys(_words(e["msg"]) for e in every if _field(e["loc"], found) == field)
    if first["type"] == "missing":
        return f"{'.'.join(map(str, first['loc'][-1:]))} is missing" + (f" in {field}" if field else "")
    if first["type"] == "value_error":
        return f"{field}: {_words(first['msg'])}" if field else _words(first["msg"])
    return f"{field} should be {' or '.join(wanted)}, got {_short(first['input'])}".lstrip()


def _field(path: Sequence[Any], found: Any) -> str:
    """The names on a path that lead into `found`; names of alternatives are on it too."""
    names = []
    for part in path:
        if (isinstance(found, dict) and part in found) or (isinstance(found, list) and isinstance(part, int)):
            names.append(str(part))
            found = found[part]
    return ".".join(names)


def _words(message: str) -> str:
    """Pydantic's message, in JSON's words."""
    text = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return (
        text.replace("a valid dictionary", "an object")
        .replace("a valid integer", "a whole number")
        .replace("a valid ", "a ")
        .replace("string", "text")
    )


def _short(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def read_epochs(path: str | Path, shape: Any, epochs: int | None = None) -> list[Any]:
    """The lines of a JSONL file that has one for each epoch, in order; none where it is missing.

    Args:
        path: the file.
        shape: of a line.
        epochs: how many lines to read; what a crash left behind them is passed over. All by default.

    Raises:
        ValueError: a line is malformed or of another shape, or epochs do not rise; the message names it.
    """
    found = read_json_lines(path)[:epochs]
    last = -1
    for i, line in enumerate(found, start=1):
        epoch = checked(line, shape, f"{path}, line {i}")["epoch"]
        if epoch <= last:
            raise ValueError(f"{path}, line {i}: epoch {epoch} comes after epoch {last}; each comes once")
        last = epoch
    return found


def missing(lines: Sequence[Any], epochs: int) -> list[int]:
    """The epochs that have no line, of a run of so many; fewer where the last line says that it stopped.

    >>> missing([{"epoch": 0}, {"epoch": 2}], 4)
    [1, 3]
    >>> missing([{"epoch": 0, "stopped": "enough"}], 4)
    []
    """
    known = {line["epoch"] for line in lines}
    stopped = bool(lines) and bool(lines[-1].get("stopped"))
    return [e for e in range(lines[-1]["epoch"] + 1 if stopped else epochs) if e not in known]


# ---- what fields are

Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]
Unbounded = Number | Literal["nan", "inf", "-inf"]  # as `controlat.files` writes them
Controls = dict[str, Number]
Settings = dict[str, Any]


def _schedule(found: dict[str, Any]) -> dict[str, Any]:
    try:
        Schedule.from_json(found)
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"not a schedule ({error})") from None
    return found


def _numbered(found: dict[str, Any]) -> dict[str, Any]:
    for name in found:
        float(name)  # raises ValueError, which names it
    return found


def _tensor(found: Any) -> Any:
    if not isinstance(found, torch.Tensor) or found.layout != torch.strided or found.is_meta:
        raise ValueError(f"should be a dense tensor, got {type(found).__name__}")
    return found


ScheduleRecord = Annotated[dict[str, Any], AfterValidator(_schedule)]
Tensor = Annotated[Any, AfterValidator(_tensor)]


def _tensors(found: dict[str, Any]) -> dict[str, Any]:
    for name, value in found.items():
        if isinstance(value, torch.Tensor):  # a module's extra state may be anything
            try:
                _tensor(value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    return found


State = Annotated[dict[str, Any], AfterValidator(_tensors)]


def settings_of(kind: type) -> Any:
    """The shape of stored settings of a class, as far as they are there; the schedule is in full."""
    return _fields_of(kind)


@functools.cache
def _fields_of(kind: type) -> Any:
    hints = get_type_hints(kind)
    names = {f.name: NotRequired[hints[f.name]] for f in fields(kind)}
    names |= {"epochs": Annotated[int, Field(ge=1)], "schedule": NotRequired[ScheduleRecord]}
    return TypedDict(kind.__name__, names | {"command": NotRequired[str]})  # type: ignore[operator]


# ---- training: log.jsonl and checkpoints


class LogLine(TypedDict):
    """One epoch of training."""

    epoch: Count
    control: Controls
    lr: Number
    loss: Number
    gradients: Count
    layers: Count
    carried: dict[str, Unbounded]
    seconds: Number
    total_gradients: Count
    total_seconds: Number
    dropped: list[str]
    stopped: str
    clean: Share | None
    robust: Share | None
    validation_gradients: Count
    validation_seconds: Number


class Tally(TypedDict):
    """`controlat.training.Tally`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    epoch: Count
    batch: Count
    gradients: Count
    forwards: Count
    layers: Count
    seconds: Number
    loss: Number
    samples: Count
    epoch_gradients: Count
    epoch_seconds: Number
    best: Annotated[float, Field(ge=-1, le=1)]
    best_epoch: Annotated[int, Field(ge=-1)]
    dropped: list[str]


class Optimizer(TypedDict):
    """The state dict of an optimiser."""

    state: dict[int, State]
    param_groups: list[dict[str, Any]]


class Rows(TypedDict):
    """What samples carry."""

    values: Tensor
    seen: Tensor


class Kept(TypedDict):
    """A network that a method put aside."""

    model: State
    optimizer: Optimizer


class Environment(TypedDict):
    """Versions and hardware."""

    controlat: str
    torch: str
    hardware: str
    threads: Annotated[int, Field(ge=1)]
    processes: NotRequired[Annotated[int, Field(ge=1)]]


class _Stored(TypedDict):
    data: NotRequired[str]
    data_dir: NotRequired[str | None]


class Checkpoint(TypedDict):
    """Everything that a run consists of between two batches."""

    model: Annotated[State, Field(min_length=1)]
    optimizer: Optimizer
    memory: dict[str, Tensor]
    rows: NotRequired[dict[str, Rows]]
    kept: NotRequired[dict[str, Kept]]
    stopped: NotRequired[str]
    schedule: ScheduleRecord
    tally: Tally
    settings: _Stored
    environment: Environment
    log: NotRequired[list[LogLine]]
    data: NotRequired[dict[str, str | None]]


# ---- criterion.jsonl and full.json


def _surface(found: Any) -> Any:
    v, m = len(found["controls"]), found["batches"]
    rows = {"evaluations": found["evaluations"], "gram": found["gram"], "costate": found["costate"]}
    for name, values in rows.items():
        if values is not None and len(values) != v:
            raise ValueError(f"{v} controls, but {name} has {len(values)} rows")
    if any(len(row) != m * (m + 1) // 2 for row in found["gram"]):
        raise ValueError(f"{m} batches: every row of gram has {m * (m + 1) // 2} numbers")
    if any(len(row) != m for row in found["costate"] or ()):
        raise ValueError(f"{m} batches: every row of costate has {m} numbers")
    return found


class _Surface(TypedDict):
    controls: Annotated[list[Controls], Field(min_length=1)]
    evaluations: list[Number]
    gram: list[list[Number]]
    costate: list[list[Number]] | None
    batches: Annotated[int, Field(ge=1, lt=2**16)]
    scale: Number
    spent: Count


class CriterionLine(TypedDict):
    """The surface of one epoch."""

    epoch: Count
    control: Controls
    surface: Annotated[_Surface, AfterValidator(_surface)]
    seconds: Number


def _gains(found: Any) -> Any:
    v = len(found["controls"])
    rows = {"evaluations": found["evaluations"], "sizes": found["sizes"], **found["rewards"]}
    for name, values in rows.items():
        if len(values) != v:
            raise ValueError(f"{v} controls, but {name} has {len(values)} numbers")
    if not all(h.isdecimal() and int(h) > 0 for h in found["rewards"]):
        raise ValueError(f"horizons are whole numbers of steps, got {', '.join(found['rewards'])}")
    if found["rewards"].keys() != found["norms"].keys() or not found["rewards"]:
        raise ValueError("rewards and norms need the same horizons, one at least")
    return found


class _Gains(TypedDict):
    number: Count
    epoch: Count
    controls: Annotated[list[Controls], Field(min_length=1)]
    evaluations: list[Number]
    rewards: dict[str, list[Number]]
    sizes: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    norms: dict[str, Number]


def _criterion(found: Any) -> Any:
    blocks, first = found["blocks"], found["first"]
    steps = [g["number"] - first for g in found["looked"]]
    if any(b <= a for a, b in zip((-1, *steps), (*steps, len(blocks)), strict=True)):
        raise ValueError(f"the steps looked at must rise within the {len(blocks)} steps from {first} on")
    if lost := set(blocks) - {blocks[step] for step in steps}:
        raise ValueError(f"no step of block {min(lost)} was looked at")
    if any(g["rewards"].keys() != found["looked"][0]["rewards"].keys() for g in found["looked"]):
        raise ValueError("every step that was looked at needs the same horizons")
    return found


class _Criterion(TypedDict):
    looked: Annotated[list[Annotated[_Gains, AfterValidator(_gains)]], Field(min_length=1)]
    blocks: list[Count]
    first: Count
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    phi: Number
    evaluations: Number
    lower: Unbounded
    norms: Annotated[list[Pair], Field(min_length=1)]
    dropped: list[str]
    spent: Count
    replayed: Count


class _Calibration(TypedDict):
    gain: Number
    objective: Number
    sizes: Number
    bound: Number | None
    spent: Count
    certificate: Number
    calibrated: bool
    kappa: Number | None
    curvature: Number | None
    model_gain: Number
    rho: Number | None
    reach: Number | None
    outcomes: Annotated[dict[str, Number | None], AfterValidator(_numbered)]
    reliability: Annotated[dict[str, Number | None], AfterValidator(_numbered)]


class _Failed(TypedDict):
    failed: str


class _Full(TypedDict):
    criterion: Annotated[_Criterion, AfterValidator(_criterion)]
    calibration: _Calibration
    terminal: NotRequired[str]
    same: bool | None
    stride: Count
    gradients: dict[str, Count]
    seconds: Number


def _outcome(found: Any) -> str:
    return "failed" if isinstance(found, dict) and "failed" in found else "found"


Full = Annotated[Annotated[_Failed, Tag("failed")] | Annotated[_Full, Tag("found")], Discriminator(_outcome)]

# ---- evaluation.json


def _accuracy(found: Any) -> Any:
    if found["value"] != found["correct"] / found["points"]:
        raise ValueError(
            f"value is {found['value']}, but {found['correct']} of {found['points']} are correct"
        )
    return found


class _Accuracy(TypedDict):
    correct: Count
    points: Annotated[int, Field(ge=1, lt=2**63)]
    value: Share
    interval: Pair


Accuracy = Annotated[_Accuracy, AfterValidator(_accuracy)]


class _Radius(_Accuracy):
    eps: Number


class _Steps(_Accuracy):
    steps: Count
    loss: Number


class _Curves(TypedDict):
    eps: Annotated[list[_Radius], Field(min_length=1)]
    steps: Annotated[list[_Steps], Field(min_length=1)]
    chance: Number
    gradients: Count
    forwards: Count
    seconds: Number


class _Attacked(TypedDict):
    points: Count
    clean: Accuracy
    after: dict[str, Accuracy]
    robust: Accuracy
    gradients: Count
    forwards: Count
    seconds: Number


class _Masking(TypedDict):
    points: Count
    zero_gradients: Count
    losses: dict[str, Unbounded]
    survivors: Count
    restarts: Count
    blackbox: Count
    warnings: list[str]
    gradients: Count
    forwards: Count
    seconds: Number


class Evaluation(_Attacked):
    """The accuracy of one network under attack, and whatever else was asked for."""

    masking: _Masking
    transfer: NotRequired[_Attacked]
    autoattack: NotRequired[_Attacked]
    curves: NotRequired[_Curves]
    warnings: list[str]


# ---- result.json of an evaluation


class _Gap(TypedDict):
    value: Number
    control: Controls
    maximiser: Controls
    unbiased: Number | None
    cross_fitted: Number | None
    jackknife: list[Number]
    interval: Pair | None


class _Price(TypedDict):
    gamma: Number
    norm: Number
    costate: Number


class _Scored(TypedDict):
    epoch: Count
    norm: _Gap
    costate: _Gap
    prices: list[_Price]
    gradients: Count
    seconds: Number


class _Horizon(TypedDict):
    steps: Count
    value: Number
    interval: Pair | None
    blocks: list[Number]


class _Change(TypedDict):
    t: Number
    control: Controls
    maximiser: Controls
    gain: Number


class _Candidate(TypedDict):
    control: Controls
    gain: Number


class _Drawn(_Change):
    candidates: Annotated[list[_Candidate], Field(min_length=1)]


class _Value(TypedDict):
    gamma: Number
    value: Number


class _Shown(TypedDict):
    horizons: Annotated[list[_Horizon], Field(min_length=1)]
    blocks: list[_Change]
    surfaces: list[_Drawn]
    C_rho: Number | None
    cosine: Number | None
    growth: Number | None
    prices: list[_Value]
    steps: Annotated[int, Field(ge=1)]
    norms: Annotated[list[Pair], Field(min_length=1)]
    dropped: list[str]
    calibration: _Calibration
    same: bool | None
    gradients: dict[str, Count]
    seconds: Number


class _Run(TypedDict):
    seed: int
    directory: str
    epochs: Annotated[list[LogLine], Field(min_length=1)]
    criterion: Annotated[list[_Scored], Field(min_length=1)]
    evaluation: Evaluation
    full: NotRequired[
        Annotated[
            Annotated[_Failed, Tag("failed")] | Annotated[_Shown, Tag("found")], Discriminator(_outcome)
        ]
    ]
    gradients: Count
    forwards: Count
    seconds: Number


class _Spread(TypedDict):
    mean: Number
    sd_over_seeds: Number | None
    per_seed: Annotated[list[Number], Field(min_length=1)]


class _SpreadWithin(_Spread):
    interval: Pair | None


class _Mean(TypedDict):
    gamma: Number
    mean: Number


class _Estimates(_SpreadWithin):
    unbiased: Number | None
    cross_fitted: Number | None
    prices: list[_Mean]


class _Share(_Spread):
    points: Annotated[int, Field(ge=1)]
    interval: Pair


class _ByHorizon(_SpreadWithin):
    steps: Count


class _FullSummary(TypedDict):
    horizons: Annotated[list[_ByHorizon], Field(min_length=1)]
    objective: _Spread
    certificate: _Spread
    kappa: _Spread | None
    reliability: Annotated[dict[str, _Spread | None], AfterValidator(_numbered)]
    uncalibrated: Count
    reach: Number | None
    gain: _Spread
    model_gain: _Spread
    C_rho: _Spread | None
    cosine: _Spread | None
    growth: _Spread | None
    prices: list[_Mean]
    same: bool
    dropped: list[str]


class _Warning(TypedDict):
    text: str
    seeds: list[int]


class _Forms(TypedDict):
    norm: _Estimates
    costate: _Estimates


class _Summary(TypedDict):
    criterion: _Forms
    clean: _Share
    robust: _Share
    after: dict[str, _Share]
    autoattack: NotRequired[_Share]
    transfer: NotRequired[_Share]
    gradients: _Spread
    seconds: _Spread
    warnings: list[_Warning]
    full: NotRequired[
        Annotated[
            Annotated[_Failed, Tag("failed")] | Annotated[_FullSummary, Tag("found")], Discriminator(_outcome)
        ]
    ]
    criterion_gradients: Count
    dropped: list[str]


class _Compared(TypedDict):
    text: str
    schedule: ScheduleRecord
    runs: Annotated[list[_Run], Field(min_length=1)]
    summary: _Summary


class _Asked(TypedDict):
    data: str
    model: str
    method: str
    norm: str
    eps: str | Number
    epochs: Count
    seeds: Annotated[list[int], Field(min_length=1)]
    gamma: str | Number
    momentum: Annotated[float, Field(ge=0, lt=1)]
    maximiser: str
    trials: Count
    attacks: list[str]
    surrogate: NotRequired[str | None]
    sweeps: bool
    checks: Count
    looks: Count
    run: NotRequired[str | None]
    method_options: NotRequired[dict[str, Any] | None]


class _Sizes(TypedDict):
    train: Count
    held_out: Count
    test: Count


class _Searched(TypedDict):
    alphas: list[Number]
    max_steps: Count
    least: NotRequired[Count]
    others: NotRequired[list[str]]


class Result(TypedDict):
    """The result file of an evaluation."""

    format: Literal["controlat evaluation"]
    version: Literal[1]
    settings: _Asked
    environment: Environment
    sizes: _Sizes
    grid: _Searched
    terminal: NotRequired[str]
    reproduced: NotRequired[bool | None]
    schedules: Annotated[list[_Compared], Field(min_length=1)]


# ---- calibration.json of a run


class _Measure(TypedDict):
    what: str
    values: list[Number | None]
    marks: list[str]


def _calibrated(found: Any) -> Any:
    times = found["times"]
    if times != list(range(found["epochs"] + 1)):
        raise ValueError(f"times should be 0, ..., {found['epochs']}, got {_short(times)}")
    if lost := {"convergence", "curvature"} - found["measures"].keys():
        raise ValueError(f"measures lacks {min(lost)}")
    for name, measure in found["measures"].items():
        if not len(measure["values"]) == len(measure["marks"]) == len(times):
            raise ValueError(f"measures.{name} needs a value and a mark at each of the times")
    if len(found["losses"]) != len(times) or any(len(row) != found["steps"] + 1 for row in found["losses"]):
        raise ValueError(f"losses should be {len(times)} rows of {found['steps'] + 1} numbers")
    return found


class _Calibrated(TypedDict):
    checkpoint: str
    run: str
    schedule: str
    seed: int
    times: list[Number]
    epochs: Annotated[int, Field(ge=1)]
    measures: dict[str, _Measure]
    losses: list[list[Number]]
    probe: Count
    mode: Literal["eval", "train"]
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    alpha: Number
    steps: Annotated[int, Field(ge=1)]
    budget: Number
    gradients: Count
    forwards: Count
    training_gradients: Count
    seconds: Number
    training_seconds: Number
    same: bool
    warning: str | None
    environment: Environment


Calibrated = Annotated[_Calibrated, AfterValidator(_calibrated)]
