"""Damage to the files that runs leave, at random: nothing may raise more than one clear sentence.

`test_records` does a little of it. For more, with a summary of what came out:

    python tests/mutations.py 1000
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import controlat
from controlat._util.errors import NonFiniteError
from controlat.app import checkpoints
from controlat.app import derive as derived
from controlat.app.checkpoints import load_checkpoint
from controlat.app.estimate import estimate
from controlat.app.settings import DeriveSettings
from controlat.control.schedules import load_schedule

TINY: dict[str, Any] = {"epochs": 2, "train_points": 80, "threads": 1, "progress": False}
TRAIN = TINY | {"schedule": "pgd:steps=1,alpha=0.1"}
ATTA = TINY | {"method": "cat", "schedule": "set:steps=2", "method_options": {"mixing": False}}
EVALUATE = TINY | {
    "schedules": ["none", "amata:min=1,max=2,tau=0.2"],
    "seeds": [0],
    "attacks": ["fgsm"],
    "test_points": 20,
    "held_out": 20,
    "probe": 32,
    "checks": 0,
    "sweeps": True,
}
DERIVE: dict[str, Any] = {"checks": False, "progress": False, "epochs": 4}
ATTACK: dict[str, Any] = {"attacks": ["fgsm"], "points": 20, "checks": 0, "progress": False, "threads": 1}


class Target(NamedTuple):
    """A file, what is deleted before it is read, and what reads it."""

    file: str
    without: tuple[str, ...]
    read: Callable[[Path], object]


def _train(folder: Path) -> object:
    return controlat.train(folder / "train", resume=True, **TRAIN)["epochs"]


def _cat(folder: Path) -> object:
    return controlat.train(folder / "cat", resume=True, **ATTA)["epochs"]


def _again(folder: Path) -> object:
    given = {"attacks": ["fgsm"], "probe": 32, "checks": 0, "threads": 1, "progress": False, "full": False}
    return estimate(run=str(folder / "train"), **given)["gradients"]


def _evaluate(folder: Path) -> object:
    return {k: v for k, v in controlat.evaluate(folder / "eval", **EVALUATE).items() if k != "environment"}


def _attack(folder: Path) -> object:
    return controlat.attack(folder / "train" / "best.pt", **ATTACK)["robust"]


def _transfer(folder: Path) -> object:
    surrogate = str(folder / "train" / "best.pt")
    return controlat.attack(folder / "cat" / "best.pt", surrogate=surrogate, **ATTACK)["transfer"]["robust"]


def _derive(folder: Path) -> object:
    return derived.derive(out=folder / "derive", **DERIVE).schedule.to_json()


def _measured(folder: Path) -> object:
    chosen = DeriveSettings(calibrate=str(folder / "train"), threads=1, progress=False)
    return derived._measured(chosen)


def _schedule(folder: Path) -> object:
    return load_schedule(folder / "derive" / "schedule.json").to_json()


_RUN = "eval/runs/02-amata-min=1-max=2-tau=0.2-seed0/"
_RESULT = ("eval/result.json",)
FIGURES = tuple(f"eval/{name}.png" for name in ("schedules", "criterion", "tradeoff", "sweeps"))
FULL = tuple(f"eval/{name}.png" for name in ("horizons", "costates", "surfaces"))
TARGETS = [
    Target("train/settings.json", (), _train),
    Target("train/settings.json", (), _again),
    Target("train/schedule.json", (), _again),
    Target("train/log.jsonl", (), _again),
    Target("train/log.jsonl", (), _train),
    Target("train/last.pt", (), _train),
    Target("train/best.pt", (), _attack),
    Target("train/best.pt", (), _transfer),
    Target("train/calibration.json", (), _measured),
    Target("cat/last.pt", (), _cat),
    Target("eval/settings.json", (), _evaluate),
    Target("eval/result.json", (), _evaluate),
    Target("eval/result.json", ("eval/summary.md", *FIGURES, *FULL), _evaluate),
    Target(_RUN + "criterion.jsonl", _RESULT, _evaluate),
    Target(_RUN + "log.jsonl", _RESULT, _evaluate),
    Target(_RUN + "evaluation.json", _RESULT, _evaluate),
    Target(_RUN + "full.json", _RESULT, _evaluate),
    Target(_RUN + "last.pt", _RESULT, _evaluate),
    Target("derive/settings.json", (), _derive),
    Target("derive/schedule.json", (), _schedule),
]


def make(folder: Path) -> None:
    """One run of each kind."""
    controlat.train(folder / "train", **TRAIN)
    controlat.train(folder / "cat", **ATTA)
    controlat.evaluate(folder / "eval", **EVALUATE)
    derived.derive(out=folder / "derive", **DERIVE)
    _measured(folder)


# ---- damage

_VALUES = (None, [], {}, "x", "1", True, -1, 0, 1.5, 1e308, 10**400, float("nan"), "\ud800", [[1]])
_TEXTS = (b"", b"null", b"[]", b"[" * 100_000, b"1" * 5000, b'{"a": 1, "a": 2}', b"\xff\xfe", b"1e999")


def _place(found: Any, draw: random.Random) -> tuple[Any, Any]:
    """A container within `found`, and a key or index of it."""
    inner = found
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = draw.choice(keys)
        child = inner[key]
        if not isinstance(child, (dict, list)) or not child or draw.random() < 0.2:
            return inner, key
        inner = child


def _changed(found: Any, values: tuple[Any, ...], draw: random.Random) -> str:
    """Change one thing within `found`; says what."""
    inner, key = _place(found, draw)
    if draw.random() < 0.3:
        del inner[key]
        return f"without {key}"
    inner[key] = value = draw.choice(values)
    return f"{key} = {value!r:.30}"


def _bytes(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    kind = draw.choice(("flip", "cut", "lines", "text"))
    i = draw.randrange(len(content))
    if kind == "flip":
        bit = 1 << draw.randrange(8)
        return content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :], f"bit {bit} of byte {i} flipped"
    if kind == "cut":
        return content[:i], f"cut to {i} bytes"
    if kind == "lines":
        lines = content.splitlines(True)
        j = draw.randrange(len(lines))
        kept = [*lines[:j], *draw.choice(([], [lines[j], lines[j]])), *lines[j + 1 :]]
        return b"".join(kept), f"line {j + 1} of {len(lines)} gone or twice"
    text = draw.choice(_TEXTS)
    return text, f"all of it {text[:20]!r}"


def _checkpoint(content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A wrong value inside, under a right checksum."""
    found = load_checkpoint("memory", content=content)
    weight: Tensor = next(iter(found["model"].values()))
    broken = weight.clone()
    broken.view(-1)[0] = float("nan")
    tensors = (broken, weight[:1], weight.double(), weight.to_sparse(), torch.zeros(()), torch.zeros(3) / 0)
    told = _changed(found, (*_VALUES[:-2], *tensors), draw)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(Path(folder) / "a.pt", {k: v for k, v in found.items() if k != "version"})
        return (Path(folder) / "a.pt").read_bytes(), told


def damaged(name: str, content: bytes, draw: random.Random) -> tuple[bytes, str]:
    """The content of a file with one thing wrong, and what that is."""
    if draw.random() < 0.3:
        return _bytes(content, draw)
    if name.endswith(".pt"):
        return _checkpoint(content, draw)
    lines = content.splitlines() if name.endswith(".jsonl") else [content]
    i = draw.randrange(len(lines))
    found = json.loads(lines[i])
    told = _changed(found, _VALUES, draw)
    lines[i] = json.dumps(found).encode()
    return b"\n".join(lines) + b"\n", f"line {i + 1}: {told}"


def _without_seconds(found: Any) -> Any:
    if isinstance(found, dict):
        return {k: _without_seconds(v) for k, v in found.items() if "seconds" not in k}
    return [_without_seconds(v) for v in found] if isinstance(found, list) else found


class Attempts:
    """Runs to damage, a copy at a time."""

    def __init__(self, folder: Path) -> None:
        self.made, self.copy, self.sound = folder / "made", folder / "copy", {}
        make(self.made)

    def _read(self, target: Target) -> Any:
        for name in target.without:
            (self.copy / name).unlink()
        with contextlib.redirect_stderr(io.StringIO()):
            return _without_seconds(target.read(self.copy))

    def _fresh(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.made, self.copy)

    def __call__(self, target: Target, draw: random.Random) -> tuple[str, str]:
        """What came out, and what was damaged; any exception but the tool's own passes through.

        Returns:
            "refused" by one sentence that names the file or its folder, "unclear" by another one, "same"
            result, or "other" result.
        """
        if target not in self.sound:
            self._fresh()
            self.sound[target] = self._read(target)
        self._fresh()
        path = self.copy / target.file
        content, told = damaged(path.name, path.read_bytes(), draw)
        path.write_bytes(content)
        try:
            found = self._read(target)
        except (ValueError, NonFiniteError) as error:
            text = str(error)
            named = any(part in text for part in (path.name, str(path.parent)))
            return ("refused" if named and "\n" not in text else "unclear: " + text), told
        return ("same" if found == self.sound[target] else "other"), told


def main(count: int, seed: int = 0) -> None:
    """Damage as many files as `count`, and print what came out for each kind of file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        attempts = Attempts(Path(folder))
        found: dict[str, Counter[str]] = {t.file: Counter() for t in TARGETS}
        for i in range(count):
            draw, target = random.Random(seed * 1_000_003 + i), TARGETS[i % len(TARGETS)]
            try:
                outcome, told = attempts(target, draw)
            except Exception as error:
                outcome, told = f"TRACEBACK {type(error).__name__}: {error}"[:200], f"seed {seed}, {i}"
            found[target.file][outcome.partition(":")[0].partition(" ")[0]] += 1
            if outcome not in ("refused", "same"):
                print(f"{i}: {target.file} ({target.read.__name__}), {told}: {outcome}", flush=True)
    for name, outcomes in found.items():
        print(f"{name:60} {dict(outcomes)}")
    print(dict(sum(found.values(), Counter())))


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(int, sys.argv[2:]))
