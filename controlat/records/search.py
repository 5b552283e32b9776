"""What a search for a schedule leaves: result.json."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from controlat.records.fields import Count, Number, ScheduleRecord, Share
from controlat.records.training import Environment

__all__ = ["SearchResult"]

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Settings(TypedDict):
    data: str
    model: str
    method: str
    norm: str
    eps: str | Number | None
    epochs: Annotated[int, Field(ge=1)]
    proposer: str
    budget: str
    judge_seeds: Annotated[list[int], Field(min_length=1)]


class _TrialRun(TypedDict):
    seed: Count
    phi: Number | None
    mean_cost: Number
    gradients: Number
    seconds: Number
    surface: NotRequired[bool]
    error: NotRequired[str]


class _Unit(TypedDict):
    schedule: str
    mean_cost: _Positive
    gradients: _Positive


class _Parameter(TypedDict):
    name: str
    low: Number
    high: Number
    scale: str


class _Space(TypedDict):
    name: str
    text: str
    parameters: list[_Parameter]


class _Trial(TypedDict):
    stage: Literal["explore", "promote", "race"]
    space: str
    schedule: str
    point: dict[str, Number]
    epochs: Count
    points: Count | None
    until: Count | None
    runs: Annotated[list[_TrialRun], Field(min_length=1)]


class _Spent(TypedDict):
    gradients: Number
    trainings: Count
    seconds: Number


class _Contender(TypedDict):
    name: str
    schedule: str
    method: NotRequired[str]
    errors: list[str]
    J: NotRequired[list[Number]]
    phi: NotRequired[list[Number]]
    clean: NotRequired[list[Share]]
    robust: NotRequired[list[Share]]
    mean_cost: NotRequired[list[Number]]
    gradients: NotRequired[Number]
    seconds: NotRequired[Number]


class _Certificate(TypedDict):
    seeds: list[int]
    C: NotRequired[Number]
    D: NotRequired[Number]
    trusted: NotRequired[bool]
    failed: NotRequired[str]


class SearchResult(TypedDict):
    """The result file of a search."""

    format: Literal["controlat search"]
    version: Literal[1]
    settings: _Settings
    environment: Environment
    price: _Positive
    found: str
    spent: _Spent
    unit: _Unit
    spaces: Annotated[list[_Space], Field(min_length=1)]
    trials: Annotated[list[_Trial], Field(min_length=1)]
    schedules: dict[str, ScheduleRecord]
    rows: Annotated[list[_Contender], Field(min_length=1)]
    certificate: NotRequired[_Certificate]
