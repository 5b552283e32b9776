"""What single fields are: numbers, counts, controls, tensors, schedules, settings."""

from __future__ import annotations

import functools
from dataclasses import fields
from itertools import pairwise
from typing import Annotated, Any, Literal, NotRequired, get_type_hints

import torch
from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from controlat.control.schedules import Schedule
from controlat.records.reading import short

Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, le=1)]
Pair = Annotated[list[Number], Field(min_length=2, max_length=2)]
Unbounded = Number | Literal["nan", "inf", "-inf"]  # as `controlat._util.files` writes them
Controls = dict[str, Number]
Settings = dict[str, Any]


def _runs(entries: Any) -> Any:
    if not all(isinstance(first, int) and isinstance(u, dict) for first, u in entries):
        raise ValueError("each entry should be a batch and the control from there on")
    starts = [first for first, _ in entries]
    if starts[:1] not in ([], [0]) or any(b <= a for a, b in pairwise(starts)):
        raise ValueError(f"batches at which the control changes should rise from 0, got {short(starts)}")
    return entries


# The controls of an epoch, as `controlat.control.controller.run_lengths` writes them.
Runs = Annotated[
    list[Annotated[list[Count | Controls], Field(min_length=2, max_length=2)]], AfterValidator(_runs)
]


def _schedule(record: dict[str, Any]) -> dict[str, Any]:
    try:
        Schedule.from_json(record)
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"not a schedule ({error})") from None
    return record


def numbered(values: dict[str, Any]) -> dict[str, Any]:
    """Check that the names are numbers: JSON knows no others."""
    for name in values:
        float(name)  # raises ValueError, which names it
    return values


def _tensor(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"should be a dense tensor, got {type(value).__name__}")
    return value


ScheduleRecord = Annotated[dict[str, Any], AfterValidator(_schedule)]
Tensor = Annotated[Any, AfterValidator(_tensor)]


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    for name, value in state.items():
        if isinstance(value, torch.Tensor):  # a module's extra state may be anything
            try:
                _tensor(value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
    return state


State = Annotated[dict[str, Any], AfterValidator(_tensors)]


def settings_of(kind: type) -> Any:
    """The shape of the stored settings of a class: each may be missing, and the schedule is in full."""
    return _fields_of(kind)


@functools.cache
def _fields_of(kind: type) -> Any:
    hints = get_type_hints(kind)
    sized = {int: Whole, int | None: Whole | None}
    names = {f.name: NotRequired[sized.get(hints[f.name], hints[f.name])] for f in fields(kind)}
    names |= {"epochs": Annotated[int, Field(ge=1, lt=2**63)], "schedule": NotRequired[ScheduleRecord]}
    return TypedDict(kind.__name__, names | {"command": NotRequired[str]})  # type: ignore[operator]
