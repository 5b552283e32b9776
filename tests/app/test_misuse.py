"""What callers get wrong, through every public call: one sentence that names the value, no silence."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import controlat
from controlat._util.checks import whole
from controlat.app.settings import AttackSettings, EvaluateSettings, TrainSettings
from controlat.attacks.balls import Ball
from controlat.control.learning_rate import Rate, parse_rate
from controlat.control.schedules import Schedule
from controlat.control.space import Control, ControlSpace, Knob
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build, names
from controlat.pmp import (
    AdversarialLoss,
    Candidates,
    Weighted,
    backward,
    build_terminal,
    examine,
    relaxed,
)
from controlat.robust_accuracy import Attack, Extras, curves, transfer
from controlat.robust_accuracy.source import Pair


def _net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, outputs))


NET, X, Y = _net(), torch.rand(8, 1, 2, 2), torch.arange(8) % 3
LAZY = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
META = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, device="meta"))
DATA, BALL, METHOD = controlat.Split(X, Y), Ball(0.1), build("pgd_at")
SCHEDULE, RATE = controlat.parse_schedule("pgd:steps=1,alpha=0.05", 2), parse_rate(0.1)
PHI, U = AdversarialLoss(X, Y, BALL, steps=1), {"alpha": 0.05, "steps": 1}


def _recording() -> Recording:
    return Recording.of(Driver(_net(), METHOD, BALL), RunSpec(DATA, 4, 1, SCHEDULE, RATE))


RECORDING = _recording()

# Kinds of arguments, and what is none: (value, what the message says of it).
OBJECT, COMPLEX = (object(), "object"), (1j, "1j")
REAL: list[tuple[Any, str]] = [(None, "None|missing"), (math.nan, "nan"), (math.inf, "inf"), ("x", "'x'")]
REAL += [(True, "True"), (b"1", "b'1'"), ([1], r"\[1\]"), OBJECT, COMPLEX, (torch.ones(2), "Tensor|tensor")]
ABOVE = [*REAL, (-1, "-1")]
COUNT = [*ABOVE, (2.5, "2.5"), (1e39, r"1e\+39")]
FROM_ONE = [*COUNT, (0, "0")]
SEED = [*REAL, (1.5, "1.5")]
FLAG = [(None, "None"), ("yes", "'yes'"), (1, "1"), (math.nan, "nan"), (torch.ones(2), "Tensor")]
NAME = [(None, "None"), ("other", "'other'"), (3, "3"), (["linf"], "linf"), OBJECT]
KIND = [(None, "None"), (3, "3"), ("x", "'x'"), OBJECT, (Ball, "the class Ball")]
FUNCTION = [(3, "3"), ("x", "'x'"), OBJECT]
LIST = [(math.nan, "nan"), (3, "3"), (OBJECT[0], "object"), ("x", "'?x'?")]
MODEL = [(None, "NoneType"), (_net, "function"), (nn.Linear, "type"), ("mlp", "str"), (META, "meta")]
MODEL += [(LAZY, "no shape yet")]
INPUT = [(None, "NoneType|None"), ([0.5], r"list|\[0.5\]"), (X.to_sparse(), "torch.sparse_coo")]
INPUT += [
    (X.to("meta"), "meta"),
    (X.bool(), "torch.bool"),
    (255 * X + 2, "lie in"),
    (X[:0], r"\(0, 1, 2, 2\)"),
]
LABELS = [(None, "NoneType|None"), (Y.float(), "torch.float32"), (nn.functional.one_hot(Y, 3), r"\(8, 3\)")]
LABELS += [
    (Y[:4], r"\(4,\)|4 labels"),
    (Y - 1, "-1"),
    (Y.to_sparse(), "torch.sparse_coo"),
    (Y.to("meta"), "meta"),
]
DEVICE = [("x", "'x'"), (-1, "-1"), (1.5, "1.5"), OBJECT]
BATCH = {"model": MODEL, "x": INPUT, "y": LABELS}

Case = tuple[Callable[..., Any], Mapping[str, Any], Mapping[str, list[tuple[Any, str]]]]
CALLS: dict[str, Case] = {
    "pgd": (
        controlat.pgd,
        {"model": NET, "x": X, "y": Y, "eps": 0.1, "alpha": 0.05, "steps": 1},
        BATCH
        | {"eps": ABOVE, "alpha": ABOVE, "steps": COUNT, "norm": NAME, "mode": NAME}
        | {"random_start": FLAG, "channels_last": FLAG, "generator": FUNCTION},
    ),
    "fgsm": (
        controlat.fgsm,
        {"model": NET, "x": X, "y": Y, "eps": 0.1},
        BATCH | {"eps": ABOVE, "norm": NAME, "mode": NAME},
    ),
    "robustness": (
        controlat.robustness,
        {"model": NET, "x": X, "y": Y, "eps": 0.1, "attacks": ["fgsm"], "checks": 0},
        BATCH
        | {"eps": ABOVE, "norm": NAME, "attacks": LIST, "batch_size": FROM_ONE, "seed": SEED}
        | {"checks": COUNT, "device": DEVICE, "progress": FUNCTION},
    ),
    "criterion": (
        controlat.criterion,
        {"model": NET, "x": X, "y": Y, "control": U, "eps": 0.1, "gamma": 0, "batches": 4, "max_steps": 1},
        BATCH
        | {"control": KIND, "eps": ABOVE, "gamma": ABOVE, "norm": NAME, "method": KIND, "form": NAME}
        | {"maximiser": NAME, "alphas": LIST, "trials": FROM_ONE, "batches": FROM_ONE, "scale": ABOVE[1:]}
        | {
            "held_out": [(3, "3"), ((X,), "tensor"), ((Y, X), "held_out")],
            "seed": SEED,
            "channels_last": FLAG,
        }
        | {"max_steps": FROM_ONE[1:]},
    ),
    "Ball": (Ball, {"eps": 0.1}, {"eps": ABOVE, "norm": NAME}),
    "Control": (Control, {}, {"alpha": REAL[1:], "steps": REAL[1:]}),
    "Knob": (Knob, {"kind": "real", "low": 0}, {"kind": NAME, "low": [("x", "'x'"), (math.nan, "nan")]}),
    "ControlSpace": (
        ControlSpace,
        {"knobs": {"a": Knob("real", 0)}, "cost": len},
        {"knobs": [*KIND, ({"a": 1}, "1")], "cost": FUNCTION},
    ),
    "SGDSettings": (
        SGDSettings,
        {},
        {"momentum": [*ABOVE, (1, "1")], "weight_decay": ABOVE, "nesterov": FLAG},
    ),
    "Driver": (
        Driver,
        {"model": NET, "method": METHOD, "ball": BALL},
        {"model": MODEL, "method": KIND, "ball": KIND, "optimizer": KIND, "seed": SEED, "meter": KIND}
        | {"channels_last": FLAG, "autocast": FUNCTION, "notice": FUNCTION},
    ),
    "RunSpec": (
        RunSpec,
        {"data": DATA, "batch_size": 4, "epochs": 1, "controller": SCHEDULE, "rate": RATE},
        {"data": KIND, "batch_size": FROM_ONE, "epochs": FROM_ONE, "controller": KIND[:-1], "rate": KIND[:-1]}
        | {"seed": SEED, "augment": FUNCTION, "held_out": FUNCTION, "world": KIND},
    ),
    "Split": (controlat.Split, {"x": X, "y": Y}, {"x": INPUT, "y": LABELS}),
    "Dataset": (
        controlat.Dataset,
        {"name": "toy", "train": DATA, "test": DATA, "num_classes": 3},
        {"train": KIND, "test": KIND, "num_classes": [*ABOVE, (2.5, "2.5")]},
    ),
    "parse_schedule": (
        controlat.parse_schedule,
        {"text": "none", "epochs": 2},
        {"text": NAME, "epochs": ABOVE, "knobs": FUNCTION},
    ),
    "Schedule": (
        Schedule,
        {"curves": SCHEDULE.curves, "epochs": 2},
        {"curves": KIND, "epochs": ABOVE, "resolution": ABOVE, "text": [(3, "3"), (None, "None")]},
    ),
    "Rate": (Rate, {"lr": 0.1}, {"lr": ABOVE, "kind": NAME, "at": LIST, "factor": ABOVE, "peak": ABOVE}),
    "build": (build, {"name": "pgd_at"}, {"name": KIND, "options": FUNCTION}),
    "Candidates.of": (
        Candidates.of,
        {"alphas": (0.1,), "max_steps": 1},
        {"alphas": LIST, "max_steps": FROM_ONE},
    ),
    "Candidates.default": (
        Candidates.default,
        {"eps": 0.1, "max_steps": 1},
        {"eps": [*ABOVE, (0, "0")], "max_steps": FROM_ONE, "count": FROM_ONE},
    ),
    "AdversarialLoss": (
        AdversarialLoss,
        {"x": X, "y": Y, "ball": BALL},
        {"x": INPUT, "y": LABELS, "ball": KIND, "steps": COUNT[:-1], "alpha": ABOVE[1:], "seed": SEED}
        | {"loss": NAME},
    ),
    "Weighted": (
        Weighted,
        {"parts": ((1, PHI),)},
        {"parts": [*LIST, ([(1,)], r"\(1,\)"), ([(1, None)], "NoneType")]},
    ),
    "build_terminal": (
        build_terminal,
        {"text": "clean", "x": X, "y": Y, "ball": BALL},
        {"x": INPUT, "y": LABELS, "ball": KIND, "seed": SEED, "text": [("other", "'other'"), (3, "int")]},
    ),
    "Recording.of": (
        Recording.of,
        {"driver": RECORDING.driver, "spec": RECORDING.spec},
        {
            "driver": KIND,
            "spec": KIND,
            "first": SEED,
            "stride": FROM_ONE[1:-2],
            "limit": [("x", "'x'"), (-1, "-1")],
        },
    ),
    "examine": (
        examine,
        {"recording": RECORDING, "terminal": PHI, "candidates": Candidates.of((0.05,), 1), "gamma": 0},
        {
            "recording": KIND,
            "terminal": [(3, "int")],
            "candidates": KIND,
            "gamma": ABOVE,
            "looks": FROM_ONE[1:],
        }
        | {"horizons": [(3, "3"), ([0], "0"), ([1.5], "1.5")]},
    ),
    "backward": (
        lambda **given: list(backward(**given)),
        {"recording": RECORDING, "terminal": PHI},
        {"recording": KIND, "horizons": [(3, "3"), ([0], "0")], "terminal": [(None, "NoneType")]},
    ),
    "relaxed": (
        relaxed,
        {"recording": RECORDING, "others": {}, "part": 0.5, "terminal": PHI},
        {"recording": KIND, "others": KIND, "part": REAL, "terminal": [(None, "NoneType")]},
    ),
    "Attack": (
        Attack,
        {"name": "a", "steps": 1},
        {"name": [(None, "None")], "steps": FROM_ONE, "restarts": FROM_ONE, "random_start": FLAG}
        | {"alpha": ABOVE[1:], "kappa": ABOVE[1:], "relative": ABOVE},
    ),
    "curves": (
        curves,
        {"model": NET, "source": Pair(X, Y), "ball": BALL},
        {
            "model": MODEL,
            "source": KIND,
            "ball": KIND,
            "points": FROM_ONE,
            "batch_size": FROM_ONE,
            "seed": SEED,
        },
    ),
    "transfer": (
        transfer,
        {"model": NET, "surrogate": _net(), "source": Pair(X, Y), "ball": BALL},
        {"model": MODEL, "surrogate": MODEL, "source": KIND, "ball": KIND, "attacks": LIST, "seed": SEED},
    ),
    "Extras": (Extras, {}, {"checks": COUNT, "autoattack": COUNT, "sweeps": FLAG}),
    "TrainSettings": (TrainSettings, {}, {"seed": SEED, "nesterov": FLAG[1:], "eps": ABOVE[1:]}),
    "EvaluateSettings": (
        EvaluateSettings,
        {},
        {"seeds": [(0, "0"), ("12", "'12'"), ([1.5], "1.5"), ([True], "True"), (None, "None")]},
    ),
    "AttackSettings": (AttackSettings, {"checkpoint": "a.pt"}, {"seed": SEED, "eps": ABOVE[1:]}),
}


@pytest.mark.parametrize("name", CALLS)
def test_misuse_is_answered_by_a_sentence_with_the_value(name: str) -> None:
    call, given, wrong = CALLS[name]
    call(**given)
    for argument, values in wrong.items():
        for value, said in values:
            with pytest.raises((ValueError, TypeError), match=said):
                call(**{**given, argument: value})


@pytest.mark.parametrize("name", names())
def test_every_option_of_every_method_is_checked(name: str) -> None:
    options = {n: v for n, v in vars(build(name)).items() if n != "layer"}
    for option, default in options.items():
        wrong = FLAG if isinstance(default, bool) else NAME if isinstance(default, str) else ABOVE
        for value, said in wrong:
            with pytest.raises(ValueError, match=f"{option} must be .*({said})"):
                build(name, {option: value})
    with pytest.raises(ValueError, match="'steep'; its options"):
        build(name, {"steep": 1})


def test_an_error_inside_a_method_s_constructor_passes_through(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "own_misused.py").write_text("def make(a=1): return len(3)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"object of type 'int' has no len\(\)"):
        build("own_misused:make")
    with pytest.raises(ValueError, match="its options: a"):
        build("own_misused:make", {"b": 1})


def test_whole_numbers_of_every_type_are_read() -> None:
    found = [whole(v, "n", 0) for v in (3, 3.0, torch.tensor(3), torch.tensor([3]).numpy()[0])]
    assert found == [3] * 4
    assert {type(v) for v in found} == {int}
    assert whole(-(10**30), "seed") == -(10**30)
