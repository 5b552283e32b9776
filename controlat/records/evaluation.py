"""What attacks leave: evaluation.json."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from controlat.records.fields import (
    Count,
    Number,
    Pair,
    Share,
    Unbounded,
)

__all__ = ["Evaluation"]


def _accuracy(accuracy: Any) -> Any:
    if accuracy["value"] != accuracy["correct"] / accuracy["points"]:
        raise ValueError(
            f"value is {accuracy['value']}, but {accuracy['correct']} of {accuracy['points']} are correct"
        )
    return accuracy


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
