"""What an evaluation of schedules leaves: result.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Discriminator, Field, Tag
from typing_extensions import TypedDict

from controlat.records.criterion import Calibration, Failed, Objective, outcome
from controlat.records.evaluation import Evaluation
from controlat.records.fields import (
    Controls,
    Count,
    Number,
    Pair,
    ScheduleRecord,
    numbered,
)
from controlat.records.training import Environment, LogLine

__all__ = ["Result"]


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


class _Epoch(TypedDict):
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


class _Block(TypedDict):
    t: Number
    control: Controls
    maximiser: Controls
    gain: Number


class _Candidate(TypedDict):
    control: Controls
    gain: Number


class _BlockSurface(_Block):
    candidates: Annotated[list[_Candidate], Field(min_length=1)]


class _AtPrice(TypedDict):
    gamma: Number
    value: Number


class _FullOfRun(TypedDict):
    horizons: Annotated[list[_Horizon], Field(min_length=1)]
    blocks: list[_Block]
    surfaces: list[_BlockSurface]
    C_rho: Number | None
    cosine: Number | None
    growth: Number | None
    prices: list[_AtPrice]
    steps: Annotated[int, Field(ge=1)]
    norms: Annotated[list[Pair], Field(min_length=1)]
    dropped: list[str]
    calibration: Calibration
    same: bool | None
    gradients: dict[str, Count]
    seconds: Number


class _Run(TypedDict):
    seed: int
    directory: str
    objective: NotRequired[Objective]
    epochs: Annotated[list[LogLine], Field(min_length=1)]
    criterion: Annotated[list[_Epoch], Field(min_length=1)]
    evaluation: Evaluation
    full: NotRequired[
        Annotated[
            Annotated[Failed, Tag("failed")] | Annotated[_FullOfRun, Tag("finite")], Discriminator(outcome)
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


class _FullOfSchedule(TypedDict):
    horizons: Annotated[list[_ByHorizon], Field(min_length=1)]
    objective: _Spread
    certificate: _Spread
    kappa: _Spread | None
    reliability: Annotated[dict[str, _Spread | None], AfterValidator(numbered)]
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
    objective: NotRequired[_Spread]
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
            Annotated[Failed, Tag("failed")] | Annotated[_FullOfSchedule, Tag("finite")],
            Discriminator(outcome),
        ]
    ]
    criterion_gradients: Count
    dropped: list[str]


class _Schedule(TypedDict):
    text: str
    schedule: ScheduleRecord
    closed_loop: NotRequired[bool]
    runs: Annotated[list[_Run], Field(min_length=1)]
    summary: _Summary


class _Settings(TypedDict):
    data: str
    model: str
    method: str
    norm: str
    eps: str | Number
    epochs: Count
    seeds: Annotated[list[int], Field(min_length=1)]
    gamma: str | Number | None
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
    validation: NotRequired[Count]
    phi: NotRequired[Count]
    test: Count


class _AdmissibleSet(TypedDict):
    alphas: list[Number]
    max_steps: Count
    least: NotRequired[Count]
    others: NotRequired[list[str]]
    more: NotRequired[dict[str, Annotated[list[Number], Field(min_length=1)]]]


class _PriceByWeight(TypedDict):
    gamma: Number
    weight: Number
    schedule: str
    greedy: Number


class Result(TypedDict):
    """The result file of an evaluation."""

    format: Literal["controlat evaluation"]
    version: Literal[1]
    settings: _Settings
    environment: Environment
    sizes: _Sizes
    grid: _AdmissibleSet
    terminal: NotRequired[str]
    reproduced: NotRequired[bool | None]
    price: NotRequired[_PriceByWeight]
    schedules: Annotated[list[_Schedule], Field(min_length=1)]
