"""What scoring leaves: objective.json, criterion.jsonl and full.json."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Discriminator, Field, Tag
from typing_extensions import TypedDict

from controlat.records.fields import (
    Controls,
    Count,
    Number,
    Pair,
    Unbounded,
    numbered,
)

__all__ = ["Calibration", "CriterionLine", "Failed", "Full", "Objective", "outcome"]


def _surface(surface: Any) -> Any:
    v, m = len(surface["controls"]), surface["batches"]
    rows = {"evaluations": surface["evaluations"], "gram": surface["gram"], "costate": surface["costate"]}
    for name, values in rows.items():
        if values is not None and len(values) != v:
            raise ValueError(f"{v} controls, but {name} has {len(values)} rows")
    if any(len(row) != m * (m + 1) // 2 for row in surface["gram"]):
        raise ValueError(f"{m} batches: every row of gram has {m * (m + 1) // 2} numbers")
    if any(len(row) != m for row in surface["costate"] or ()):
        raise ValueError(f"{m} batches: every row of costate has {m} numbers")
    return surface


class _Surface(TypedDict):
    controls: Annotated[list[Controls], Field(min_length=1)]
    evaluations: list[Number]
    gram: list[list[Number]]
    costate: list[list[Number]] | None
    batches: Annotated[int, Field(ge=1, lt=2**16)]
    scale: Number
    spent: Count


class Objective(TypedDict):
    """J = Phi + price * evaluations of one run, and what it cost to know it."""

    J: Number
    phi: Number
    evaluations: Number
    price: Number
    gradients: dict[str, Count]
    seconds: Number


class CriterionLine(TypedDict):
    """The surface of one epoch."""

    epoch: Count
    control: Controls
    surface: Annotated[_Surface, AfterValidator(_surface)]
    seconds: Number


def _gains(gains: Any) -> Any:
    v = len(gains["controls"])
    rows = {"evaluations": gains["evaluations"], "sizes": gains["sizes"], **gains["rewards"]}
    for name, values in rows.items():
        if len(values) != v:
            raise ValueError(f"{v} controls, but {name} has {len(values)} numbers")
    if not all(h.isdecimal() and int(h) > 0 for h in gains["rewards"]):
        raise ValueError(f"horizons are whole numbers of steps, got {', '.join(gains['rewards'])}")
    if gains["rewards"].keys() != gains["norms"].keys() or not gains["rewards"]:
        raise ValueError("rewards and norms need the same horizons, one at least")
    return gains


class _Gains(TypedDict):
    number: Count
    epoch: Count
    controls: Annotated[list[Controls], Field(min_length=1)]
    evaluations: list[Number]
    rewards: dict[str, list[Number]]
    sizes: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    norms: dict[str, Number]


def _criterion(criterion: Any) -> Any:
    blocks, first = criterion["blocks"], criterion["first"]
    steps = [g["number"] - first for g in criterion["looked"]]
    if any(b <= a for a, b in zip((-1, *steps), (*steps, len(blocks)), strict=True)):
        raise ValueError(f"the steps looked at must rise within the {len(blocks)} steps from {first} on")
    if lost := set(blocks) - {blocks[step] for step in steps}:
        raise ValueError(f"no step of block {min(lost)} was looked at")
    if any(g["rewards"].keys() != criterion["looked"][0]["rewards"].keys() for g in criterion["looked"]):
        raise ValueError("every step that was looked at needs the same horizons")
    return criterion


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


class Calibration(TypedDict):
    """What relaxed controls reached of the gain that the full criterion promises."""

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
    outcomes: Annotated[dict[str, Number | None], AfterValidator(numbered)]
    reliability: Annotated[dict[str, Number | None], AfterValidator(numbered)]


class Failed(TypedDict):
    """A full criterion whose costates are not finite: where it failed."""

    failed: str


class _Full(TypedDict):
    criterion: Annotated[_Criterion, AfterValidator(_criterion)]
    calibration: Calibration
    terminal: NotRequired[str]
    same: bool | None
    stride: Count
    gradients: dict[str, Count]
    seconds: Number


def outcome(full: Any) -> str:
    """Which of two kinds a full criterion is: `Failed`, or one of finite numbers."""
    return "failed" if isinstance(full, dict) and "failed" in full else "finite"


Full = Annotated[Annotated[Failed, Tag("failed")] | Annotated[_Full, Tag("finite")], Discriminator(outcome)]
