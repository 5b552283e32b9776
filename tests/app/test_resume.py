"""Every training system: killed in the middle of an epoch and resumed, it ends with the same bits."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from forks import forked
from helpers import same
from systems import CASES, PLAIN, Case

import controlat
from controlat._util.files import read_json_lines
from controlat.app.experiment import Experiment
from controlat.app.settings import TrainSettings
from controlat.app.trainer import load_checkpoint
from controlat.attacks.pgd import ascend
from controlat.control.space import Control
from controlat.dynamics.driver import Driver
from controlat.methods import Epoch
from controlat.methods.pgd_at import PgdAT
from controlat.models.frozen.hook import first_layer
from controlat.models.frozen.view import FrozenModel

# 60 training samples in 4 batches of 16, 16, 16, 12; 20 held out.
SMALL: dict[str, Any] = {
    "model": "cnn_bn",
    "lr": 0.1,
    "epochs": 3,
    "train_points": 80,
    "held_out": 20,
    "batch_size": 16,
    "threads": 1,
    "progress": False,
}
END = 4  # in the place of a batch: the hook at the end of an epoch
STATE = ("model", "optimizer", "memory", "rows", "kept", "stopped", "controller", "schedule", "settings")
SECONDS = ("seconds", "total_seconds", "validation_seconds", "epoch_seconds")


class Kill(NamedTuple):
    """A place to kill a run at: the forward pass of the network, counted from the beginning of a step."""

    epoch: int
    batch: int
    passes: int = 1


class Curious(PgdAT):
    """A user's own method that attacks the first batch of an epoch before it begins, and keeps the result."""

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        x, y, *_ = ctx.first()
        with FrozenModel(ctx.model, self.attack_mode, meter=ctx.meter) as view:
            ctx.memory["attacked"] = ascend(view, x, y, ball=ctx.ball, alpha=0.05, steps=3)
            ctx.memory["logits"] = view(x)
            layer = first_layer(ctx.model)
            ctx.memory["layer"] = view.layer_gradient(x, layer, torch.ones(()))


class Ending(PgdAT):
    """A user's own method that says at the beginning of epoch 1 that it is the last."""

    def start_epoch(self, ctx: Epoch, u: Control) -> None:
        if ctx.epoch == 1:
            ctx.stop("enough")


def _kill_at(kill: Kill) -> None:
    """Let this process kill itself."""
    left = itertools.count(kill.passes - 1, -1)

    def count(*_: object) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(name: str, place: Callable[..., tuple[int, int]]) -> None:
        run = getattr(Driver, name)

        def watched(driver: Driver, *given: Any) -> object:
            if place(*given) == kill[:2]:
                driver.model.register_forward_pre_hook(count)
            return run(driver, *given)

        setattr(Driver, name, watched)

    watch("step", lambda batch, u, rate: (batch.epoch, batch.number))
    watch("end_epoch", lambda spec, epoch: (epoch, spec.batches_per_epoch))


def _train(out: Path, settings: dict[str, Any], kill: Kill | None, seed: int) -> None:
    os.chdir(out.parent)
    torch.manual_seed(seed)  # what else the process does with torch's generator must not matter
    if kill is not None:
        _kill_at(kill)
    controlat.train(out, resume=True, **settings)


def _process(out: Path, settings: dict[str, Any], kill: Kill | None = None, seed: int = 0) -> int | None:
    """Train in a process of its own; its exit code."""
    return forked(_train, out, settings, kill, seed)


def _killed(out: Path, settings: dict[str, Any], kill: Kill, seed: int = 0) -> dict[str, Any]:
    """The last checkpoint, of those after every batch, of a run that is killed where it was meant to be."""
    assert _process(out, settings | {"checkpoint_minutes": 1e-9}, kill, seed) == -signal.SIGKILL
    assert len(read_json_lines(out / "log.jsonl")) == kill.epoch < settings["epochs"]
    if kill[:2] == (0, 0):
        assert not (out / "last.pt").exists()
        return {}
    found = load_checkpoint(out / "last.pt")
    assert found["tally"]["epoch"] == kill.epoch
    return found


def _without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in found.items() if k not in SECONDS}


def _assert_same_end(a: Path, b: Path) -> None:
    log, other = ([*map(_without_seconds, read_json_lines(run / "log.jsonl"))] for run in (a, b))
    assert log == other
    for name in ("last.pt", "best.pt"):
        one, two = load_checkpoint(a / name), load_checkpoint(b / name)
        for part in STATE:
            assert same(one.get(part), two.get(part)), (name, part)
        assert _without_seconds(one["tally"]) == _without_seconds(two["tally"])


def _kill_and_resume(undisturbed: Path, out: Path, settings: dict[str, Any], kills: list[Kill]) -> None:
    for seed, kill in enumerate(kills, start=1):
        found = _killed(out, settings, kill, seed)
        if kill.batch > 0:
            assert min(kill.batch, END - 1) <= found["tally"]["batch"] < END, "not within the epoch"
    assert _process(out, settings, seed=len(kills) + 1) == 0
    _assert_same_end(undisturbed, out)


def _settings(case: Case) -> dict[str, Any]:
    """A run of a case in which the step size and the number of steps grow, this one real on average."""
    knobs = {name: str(value) for name, value in case.control().items()}
    for name, last in (("alpha", 0.06), ("steps", case.control()["steps"] + 1)):
        if name in knobs:
            knobs[name] += f"..{min(last, case.method().controls[name].high)}"
    schedule = "set:rounding=dither," + ",".join(f"{name}={value}" for name, value in knobs.items())
    return SMALL | {"method": case.name, "method_options": dict(case.options), "schedule": schedule}


# -------------------------------------------------------------------------------------------- all systems


# Of the variants, those that keep something from step to step, which no other case keeps.
KEEP = (*PLAIN, "cat curriculum", "fast previous", "awp warm-up")


@pytest.mark.parametrize(
    "name", [name if name in KEEP else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_killed_within_epochs_and_resumed_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    settings, i = _settings(CASES[name]), list(CASES).index(name)
    assert _process(tmp_path / "undisturbed", settings) == 0
    kills = [Kill(0, i % 3), Kill(1, 1 + i % 3, 1 + i % 2), Kill(1, END)]
    _kill_and_resume(tmp_path / "undisturbed", tmp_path / "killed", settings, kills)


@pytest.mark.parametrize("name", ["atta reset", "cat curriculum", "fast early stop", "yopo"])
def test_killed_under_a_closed_loop_and_resumed_it_takes_the_same_controls(tmp_path: Path, name: str) -> None:
    settings = _settings(CASES[name]) | {"schedule": None, "controller": "rules:following"}
    assert _process(tmp_path / "undisturbed", settings) == 0
    taken = {
        str(u) for line in read_json_lines(tmp_path / "undisturbed" / "log.jsonl") for u in line["controls"]
    }
    assert len(taken) > 3
    _kill_and_resume(
        tmp_path / "undisturbed", tmp_path / "killed", settings, [Kill(0, 2), Kill(1, 1, 2), Kill(1, END)]
    )
    ends = [(tmp_path / run / "schedule.json").read_text() for run in ("undisturbed", "killed")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_users_method_with_a_hook_before_epochs_resumes_with_the_same_bits(
    tmp_path: Path, mode: str
) -> None:
    method = {"method": "test_resume:Curious", "method_options": {"attack_mode": mode}}
    settings = SMALL | method | {"schedule": "pgd:steps=1,alpha=0.05"}
    assert _process(tmp_path / "undisturbed", settings) == 0
    kills = [Kill(0, 2), Kill(2, 0), Kill(2, 1, 2)]
    _kill_and_resume(tmp_path / "undisturbed", tmp_path / "killed", settings, kills)


def test_an_epoch_that_a_hook_made_the_last_is_finished_after_a_kill(tmp_path: Path) -> None:
    settings = SMALL | {"method": "test_resume:Ending", "schedule": "pgd:steps=1,alpha=0.05"}
    assert _process(tmp_path / "undisturbed", settings) == 0
    log = read_json_lines(tmp_path / "undisturbed" / "log.jsonl")
    assert [line["stopped"] for line in log] == ["", "enough"]
    _kill_and_resume(tmp_path / "undisturbed", tmp_path / "killed", settings, [Kill(1, 2)])


def test_what_a_hook_spends_counts_as_training(tmp_path: Path) -> None:
    settings = SMALL | {"method": "test_resume:Curious", "schedule": "pgd:steps=1,alpha=0.05"}
    found = controlat.train(tmp_path / "run", **settings)
    assert [line["gradients"] for line in found["epochs"]] == 3 * [2 * 60 + 3 * 16]
    tally = load_checkpoint(tmp_path / "run" / "last.pt")["tally"]
    assert (tally["gradients"], tally["forwards"], tally["layers"]) == (3 * (2 * 60 + 3 * 16), 3 * 16, 3 * 16)


# ------------------------------------------------------------------------ Fast ends before it is too late

# The learning rate of epoch 4 destroys the network.
FALL = SMALL | {
    "method": "fast",
    "method_options": {"early_stop": True},
    "eps": 0.1,
    "schedule": "set:alpha=0.1",
    "lr": "multistep:lr=0.1,at=4,factor=60",
    "epochs": 6,
    "train_points": 276,
    "batch_size": 64,
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Fast that ended early."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert _process(out, FALL) == 0
    return out


def test_fast_ends_a_run_whose_accuracy_falls_and_the_log_says_why(stopped: Path) -> None:
    log = read_json_lines(stopped / "log.jsonl")
    assert [line["epoch"] for line in log] == [0, 1, 2, 3, 4]
    assert [line["stopped"] for line in log[:-1]] == 4 * [""]
    assert log[-1]["stopped"].startswith("catastrophic overfitting: PGD-5 accuracy fell from ")
    assert [line["gradients"] for line in log] == 5 * [2 * 256 + 5 * 64]
    found = load_checkpoint(stopped / "last.pt")
    assert found["stopped"] == log[-1]["stopped"]
    assert found["tally"]["forwards"] == 5 * 64


def test_fast_puts_the_network_of_the_epoch_before_back(stopped: Path, tmp_path: Path) -> None:
    before = _killed(tmp_path / "run", FALL, Kill(4, 0))
    found = load_checkpoint(stopped / "last.pt")
    assert before["tally"]["batch"] == 0
    assert same(found["model"], before["model"])
    assert same(found["optimizer"], before["optimizer"])
    log = read_json_lines(stopped / "log.jsonl")
    assert (log[4]["clean"], log[4]["robust"]) == (log[3]["clean"], log[3]["robust"])


def test_fast_killed_in_the_hook_that_stops_it_ends_with_the_same_bits(stopped: Path, tmp_path: Path) -> None:
    kills = [Kill(1, END, 3), Kill(2, 2), Kill(4, 1, 2), Kill(4, END, 4)]
    _kill_and_resume(stopped, tmp_path / "run", FALL, kills)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_its_method_ended_is_finished_and_stays_as_it_is(stopped: Path, resume: bool) -> None:
    def files() -> dict[str, tuple[bytes, int]]:
        kept = [file for file in stopped.iterdir() if file.name != ".lock"]
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in kept}

    before = files()
    found = controlat.train(stopped, resume=resume, **FALL)
    assert found["finished_before"]
    assert len(found["epochs"]) == 5
    assert files() == before


def test_hooks_that_draw_leave_torchs_generator_as_it_was(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    controlat.train(tmp_path / "run", **FALL | {"epochs": 1})
    assert torch.equal(torch.random.get_rng_state(), before)


# --------------------------------------------------------------------------------- CAT grows, ATTA carries

CAT = SMALL | {
    "model": "mlp",
    "lr": 0.3,
    "method": "cat",
    "method_options": {"mixing": False, "patience": 1, "ready": 0.0, "expected": 0.0},
    "schedule": "set:steps=3",
    "epochs": 12,
}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CAT whose attacks grew stronger."""
    out = tmp_path_factory.mktemp("grown") / "run"
    assert _process(out, CAT) == 0
    return out


def test_cat_grows_stronger_over_epochs_and_its_validation_is_counted(grown: Path) -> None:
    log = read_json_lines(grown / "log.jsonl")
    assert len(log) == 12
    k = 0
    for line in log:
        # k steps and an update for 60 samples, k steps for 10 of validation, and a look at strength k + 1.
        grows = line["gradients"] > 60 * (k + 1) + 10 * k
        assert line["gradients"] == 60 * (k + 1) + 10 * k + grows * 10 * (k + 1)
        k += grows
    assert 2 <= k <= 3
    found = load_checkpoint(grown / "last.pt")
    assert found["memory"]["strength"] == k
    assert list(found["kept"]) == ["best"]
    assert found["tally"]["gradients"] == sum(line["gradients"] for line in log)
    assert found["tally"]["forwards"] == (12 + k) * 10


def test_cat_killed_while_it_grows_ends_with_the_same_bits(grown: Path, tmp_path: Path) -> None:
    kills = [Kill(1, END, 1), Kill(6, 1, 2), Kill(8, END, 2)]
    _kill_and_resume(grown, tmp_path / "run", CAT, kills)
    assert _killed(tmp_path / "grown", CAT, kills[1])["memory"]["strength"] >= 1


def _atta(folder: Path, reset: int) -> tuple[dict[str, Any], dict[str, Any], torch.Tensor]:
    """What samples carry before epoch 1, and after its first two batches; the samples of these."""
    settings = SMALL | {"method": "atta", "schedule": f"set:alpha=0.03,steps=2,reset={reset}"}
    before, after = (
        _killed(folder / "run", settings, kill)["rows"]["delta"] for kill in (Kill(1, 0), Kill(1, 2))
    )
    chosen = TrainSettings(**settings)
    spec = Experiment.of(chosen).spec(chosen.schedule_of(chosen.schedule), chosen.seed)
    moved = torch.zeros(len(before["seen"]), dtype=torch.bool)
    moved[torch.cat(spec.order(1)[:2])] = True
    assert before["seen"].sum() == 60
    assert 0 < before["values"].abs().max() <= 0.15 + 1e-6
    return before, after, moved


def test_attas_perturbations_survive_a_kill(tmp_path: Path) -> None:
    before, after, moved = _atta(tmp_path, reset=10)
    assert torch.equal(after["seen"], before["seen"])
    assert torch.equal(after["values"][~moved], before["values"][~moved])
    assert not torch.equal(after["values"][moved], before["values"][moved])


def test_attas_perturbations_are_forgotten_when_an_epoch_says_so(tmp_path: Path) -> None:
    before, after, moved = _atta(tmp_path, reset=2)
    seen = after["seen"].nonzero().flatten()
    assert torch.equal(seen, moved.nonzero().flatten())
    assert not after["values"][~after["seen"]].any()
    assert not torch.equal(after["values"][seen], before["values"][seen])
