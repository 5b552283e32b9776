"""What training leaves: log.jsonl, checkpoints, and the calibration of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict

from controlat.records.fields import (
    Controls,
    Count,
    Number,
    Runs,
    ScheduleRecord,
    Share,
    State,
    Tensor,
    Unbounded,
)
from controlat.records.reading import short

__all__ = ["Calibrated", "Checkpoint", "Environment", "LogLine"]


class LogLine(TypedDict):
    """One epoch of training."""

    epoch: Count
    control: Controls
    controls: NotRequired[Runs]
    lr: Number
    loss: Number
    gradients: Count
    layers: Count
    carried: dict[str, Unbounded]
    seconds: Number
    total_gradients: Count
    total_evaluations: NotRequired[Number | None]
    total_seconds: Number
    dropped: list[str]
    stopped: str
    clean: Share | None
    robust: Share | None
    validation_points: NotRequired[Count]
    validation_gradients: Count
    validation_seconds: Number


class Tally(TypedDict):
    """`controlat.app.tally.Tally`."""

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
    evaluations: NotRequired[Number | None]
    controls: NotRequired[Runs]


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
    threads_chosen: NotRequired[str]
    cudnn: NotRequired[dict[str, bool]]
    tf32: NotRequired[dict[str, bool]]
    cuda_graphs: NotRequired[str]
    processes: NotRequired[Annotated[int, Field(ge=1)]]
    jobs: NotRequired[Annotated[int, Field(ge=1)]]


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
    controller: NotRequired[dict[str, Any]]
    schedule: NotRequired[ScheduleRecord]
    tally: Tally
    settings: _Stored
    environment: Environment
    log: NotRequired[list[LogLine]]
    data: NotRequired[dict[str, str | None]]


class _Measure(TypedDict):
    what: str
    values: list[Number | None]
    marks: list[str]


def _calibrated(calibrated: Any) -> Any:
    times = calibrated["times"]
    if times != list(range(calibrated["epochs"] + 1)):
        raise ValueError(f"times should be 0, ..., {calibrated['epochs']}, got {short(times)}")
    if lost := {"convergence", "curvature"} - calibrated["measures"].keys():
        raise ValueError(f"measures lacks {min(lost)}")
    for name, measure in calibrated["measures"].items():
        if not len(measure["values"]) == len(measure["marks"]) == len(times):
            raise ValueError(f"measures.{name} needs a value and a mark at each of the times")
    if len(calibrated["losses"]) != len(times) or any(
        len(row) != calibrated["steps"] + 1 for row in calibrated["losses"]
    ):
        raise ValueError(f"losses should be {len(times)} rows of {calibrated['steps'] + 1} numbers")
    return calibrated


class _Calibrated(TypedDict):
    key: dict[str, Any]
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
