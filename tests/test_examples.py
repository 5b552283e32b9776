"""The examples: what they print, and the user's own training system on the command line."""

from __future__ import annotations

import re
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import flat, same, slow
from systems import batch, driver, smooth, trained_on
from torch import Tensor, nn

import controlat
from controlat import Ball
from controlat._util import rng
from controlat._util.files import read_json, read_json_lines
from controlat.app import cli
from controlat.attacks.losses import divergence
from controlat.control.space import Control
from controlat.data import digits
from controlat.dynamics import verify
from controlat.methods import Method, build

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MART = "own_method:Mart"
TINY = ["--train_points", "200", "--epochs", "3", "--threads", "1", "--progress", "false"]
OWN_TESTS = {"own_method.py", "own_controller.py"}  # run below, and more is asked of what they print
LONG = {"own_landscape.py", "own_loop.py"}  # `derive` and README's loop, which have tests of their own
OTHERS = sorted({path.name for path in EXAMPLES.glob("*.py")} - OWN_TESTS - LONG)
EPS, RATE = 0.1, 0.1
norms = pytest.mark.parametrize("norm", ["linf", "l2"])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the folder of the examples, whose modules are not known yet."""
    monkeypatch.chdir(EXAMPLES)
    sys.modules.pop("own_method", None)
    yield
    sys.modules.pop("own_method", None)


@pytest.fixture
def mart(here: None) -> Method:
    return build(MART)


def _script(name: str, capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[str, str]:
    """What an example prints as a script, and its errors, with its temporary files in a folder."""
    state, variables = torch.random.get_rng_state(), pytest.MonkeyPatch()
    variables.setattr(tempfile, "tempdir", str(folder))
    variables.setattr(sys, "path", list(sys.path))
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        variables.undo()
        torch.random.set_rng_state(state)
    return capsys.readouterr()


def _refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The only line that a refused command prints."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    output, error = capsys.readouterr()
    assert stopped.value.code == 2
    assert output == ""
    assert error.count("\n") == 1, error
    assert error.startswith("controlat: error: ")
    return error


# ------------------------------------------------------------------------------------- as a script, as a name


@pytest.mark.parametrize("name", [*OTHERS, *map(slow, sorted(LONG))])
def test_the_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On few of the digits: the scripts take all that there are."""
    few = digits.load().limited(400, 40)
    monkeypatch.setattr(digits, "load", lambda root=None: few)
    assert "robust" in _script(name, capsys, tmp_path)[0]


def test_the_example_of_an_own_method_verifies_its_derivative_and_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, error = _script("own_method.py", capsys, tmp_path)
    assert error == ""
    first, *epochs = output.splitlines()
    share, directions = re.fullmatch(
        r"derivative of one step: (\S+) from differences in (\d+) directions", first
    ).groups()  # type: ignore[union-attr]
    assert float(share) < 1e-8
    assert int(directions) >= 4
    pattern = r"epoch (\d+): beta=(\S+), loss=(\S+), clean (\S+)%, robust \(PGD-10\) (\S+)%, on held-out .*"
    rows = [re.fullmatch(pattern, line).groups() for line in epochs]  # type: ignore[union-attr]
    assert [int(row[0]) for row in rows] == list(range(12))
    assert [float(row[1]) for row in rows] == pytest.approx([1 + 5 * t / 12 for t in range(12)], abs=0.005)
    assert float(rows[-1][2]) < float(rows[0][2])
    assert float(rows[-1][3]) > 80
    assert float(rows[-1][4]) > 40
    assert not list(tmp_path.rglob("settings.json")), "the folder of the run is gone"


def test_the_example_of_an_own_controller_raises_k_and_its_schedule_replays_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, error = _script("own_controller.py", capsys, tmp_path)
    assert error == ""
    *epochs, last = output.splitlines()
    rows = [
        re.fullmatch(r"epoch (\d+): K = (.*); loss=(\S+), robust \(PGD-10\) (\S+)%", line) for line in epochs
    ]
    assert [int(row[1]) for row in rows if row] == list(range(12))
    runs = [re.findall(r"(\d+) from batch (\d+) on", row[2]) for row in rows if row]
    steps = [int(k) for epoch in runs for k, _ in epoch]
    assert steps == sorted(steps), "K never falls"
    assert steps[0] == 0
    assert steps[-1] >= 2
    assert any(len(epoch) > 1 for epoch in runs), "K rises within an epoch"
    assert re.fullmatch(r"schedule.json has \d+ pieces; the same losses under it: True", last)


@pytest.mark.slow
def test_the_example_of_the_full_criterion_prints_c_controls_and_what_they_are_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, error = _script("full_criterion.py", capsys, tmp_path)
    assert error == ""
    phi, *lines = output.splitlines()
    value = float(re.fullmatch(r"Phi = 1 \* \(adv.*\) \+ 0\.1 \* \(clean .*\): (\S+)", phi)[1])  # type: ignore[index]
    horizons = [re.fullmatch(r"C = (\S+) with costates over (\d+) steps?", line) for line in lines[:3]]
    assert [int(found[2]) for found in horizons if found] == [1, 17, 102]
    pattern = r"epoch (\d): Control\(.*\), better Control\(.*\), worth (\S+) of J to first order"
    epochs = [re.fullmatch(pattern, line) for line in lines[3:9]]
    gains = [float(found[2]) for found in epochs if found]
    assert len(gains) == 6
    numbers = re.fullmatch(r"J = (\S+), G = (\S+), D = (\S+), (r\(0\.5\) = .*)", lines[9])
    assert numbers
    objective, total, decrease = (float(numbers[i]) for i in (1, 2, 3))
    assert total == pytest.approx(sum(gains), abs=1e-3)
    # C = G / (eta T)
    assert float(horizons[2][1]) == pytest.approx(total / (0.02 * 102), abs=2e-3)  # type: ignore[index]
    worth = {float(a): float(b) for a, b in re.findall(r"r\((\S+)\) = (-?[\d.]+)", numbers[4])}
    assert 0.5 in worth
    assert decrease == pytest.approx(max(0, *(part * r * total for part, r in worth.items())), abs=2e-3)
    assert value < objective
    found = re.fullmatch(r"half of the way to Control\(.*\) in epoch \d alone: J = (\S+)", lines[10])
    assert found
    assert float(found[1]) == pytest.approx(objective, abs=0.2)
    assert re.match(r"the recorded network is as it was: robust \d+", lines[11])


def test_an_own_method_is_trained_by_its_name_with_an_option_and_a_schedule_for_its_own_knob(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", MART, "--method-options.start_noise", "1/50"]
    words += ["--schedule", "pgd:steps=2,alpha=0.1,beta=1..7", *TINY]
    assert cli.main(["train", "--out", str(tmp_path / "run"), *words]) == 0
    printed = capsys.readouterr().out
    log = read_json_lines(tmp_path / "run" / "log.jsonl")
    assert [e["control"] for e in log] == [{"alpha": 0.1, "beta": b, "steps": 2} for b in (1, 3, 5)]
    assert [e["gradients"] for e in log] == [180 * 4] * 3
    assert all(f"| {e['loss']:.4f} |" in printed for e in log)
    assert read_json(tmp_path / "run" / "settings.json")["method_options"] == {"start_noise": "1/50"}


def test_the_option_and_the_knob_of_an_own_method_make_a_difference(here: None, tmp_path: Path) -> None:
    few = {"method": MART, "epochs": 1, "train_points": 200, "threads": 1, "progress": False}
    text = "pgd:steps=2,alpha=0.1"
    found = {
        name: controlat.train(tmp_path / name, schedule=schedule, method_options=options, **few)["epochs"][0]
        for name, schedule, options in (
            ("default", text, {}),
            ("beta 6", f"{text},beta=6", {"start_noise": 0.001}),
            ("beta 1", f"{text},beta=1", {}),
            ("noisy", text, {"start_noise": 0.1}),
        )
    }
    losses = {name: epoch["loss"] for name, epoch in found.items()}
    assert losses["default"] == losses["beta 6"]
    assert len(set(losses.values())) == 3


# -------------------------------------------------------------------------------------------------- mistakes

WRONG = """
from controlat.methods import build

class Still:
    controls = build("pgd_at").controls

class Unbounded:
    def updates(self, ctx, batch, u):
        yield

class Picky:
    def __init__(self, colour):
        self.colour = colour

number = 3
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nosuch:Mart", "cannot import module 'nosuch' for attribute 'Mart'"),
        ("wrong.py:Still", "give it without '.py'"),
        ("wrong:Nosuch", "module 'wrong' has no attribute 'Nosuch'; it defines: build, Still, Unbounded"),
        ("wrong:Still", "method 'wrong:Still' must have `updates` and a ControlSpace `controls`"),
        ("wrong:Unbounded", "method 'wrong:Unbounded' must have `updates` and a ControlSpace `controls`"),
        ("wrong:Picky", "method 'wrong:Picky': "),
        ("wrong:number", "method 'wrong:number' is not a class or factory"),
        ("wrong:", "must read 'package.module:attribute'"),
        (":Mart", "must read 'package.module:attribute'"),
    ],
)
def test_what_is_no_method_is_refused_in_one_line(
    name: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "wrong.py").write_text(WRONG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "wrong", raising=False)
    assert message in _refused(capsys, "train", "--out", tmp_path / "run", "--method", name, *TINY)
    assert not (tmp_path / "run").exists()
    sys.modules.pop("wrong", None)


def test_a_method_outside_the_folder_of_the_call_is_refused_in_one_line(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    error = _refused(capsys, "train", "--out", "run", "--method", MART, *TINY)
    assert "cannot import module 'own_method' for attribute 'Mart'" in error
    assert f"as seen from {tmp_path}" in error


def test_a_network_can_be_attacked_where_its_method_cannot_be_imported(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"epochs": 1, "train_points": 200, "threads": 1, "progress": False}
    controlat.train(tmp_path / "run", method=MART, schedule="pgd:steps=2,alpha=0.1", **few)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("own_method")
    assert controlat.attack("run/last.pt", attacks=["fgsm"], points=50, progress=False)["points"] == 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedule", "set:steps=2,alpha=0.1,bta=1..6"], "a control of this method has alpha, beta, steps"),
        (["--schedule", "set:alpha=0.1,beta=3"], "a control of this method has alpha, beta, steps"),
        (["--schedule", "pgd:steps=2,alpha=0.1,beta=1..-6"], "beta must be >= 0"),
        (["--schedule", "pgd:steps=2,alpha=0.1,bta=1..6"], "does not take bta"),
        (["--schedule", "pgd:steps=2,alpha=0.1,bta=1..6"], "it takes alpha, beta, steps"),
        (["--method_options.nosuch", "3"], "unexpected keyword argument 'nosuch'"),
        (["--method_options.start_noise", "-1"], "start_noise must be >= 0, got -1"),
        (["--method_options.start_noise", "much"], "start_noise must be a number such as"),
    ],
)
def test_an_own_method_refuses_unknown_controls_and_options_in_one_line(
    words: list[str], message: str, here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in _refused(capsys, "train", "--out", tmp_path / "run", "--method", MART, *words, *TINY)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ MART


def control(**knobs: float) -> Control:
    return Control(**{"alpha": 0.03, "steps": 3, "beta": 6.0, **knobs})


@norms
def test_mart_equals_the_loop_written_by_hand(mart: Method, norm: str) -> None:
    """As in the released code: the two largest probabilities are sorted, the divergence is torch's."""
    b, model, ball = batch(), smooth(), Ball(EPS, norm)
    noise = torch.empty_like(b.x).normal_(generator=rng.generator(3, 0, 0, "start"))
    x = b.x + 0.001 * noise
    for _ in range(3):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), b.y, reduction="sum"), x)
        x = ball.project((x + 0.03 * ball.direction(g)).detach(), b.x)
    logits, moved = model(b.x), model(x)
    p, q = F.softmax(logits, 1), F.softmax(moved, 1)
    top = torch.argsort(q, dim=1)[:, -2:]
    other = torch.where(top[:, -1] == b.y, top[:, -2], top[:, -1])
    boosted = F.cross_entropy(moved, b.y) + F.nll_loss(torch.log(1.0001 - q + 1e-12), other)
    right = torch.gather(p, 1, b.y.unsqueeze(1)).squeeze()
    kl = nn.KLDivLoss(reduction="none")(torch.log(q + 1e-12), p).sum(1)
    loss = boosted + 2.5 * (kl * (1.0000001 - right)).sum() / len(b.x)
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    d = driver(mart, ball=ball)
    torch.testing.assert_close(
        flat(d.field(b, control(beta=2.5), RATE).gradients), expected, rtol=1e-9, atol=1e-12
    )
    step = d.step(b, control(beta=2.5), RATE)
    assert step.loss == pytest.approx(loss.item(), rel=1e-10)
    assert (step.spent.gradients, step.spent.forwards) == (6 * (3 + 2), 0)
    assert step.spent.gradients == 6 * mart.controls.cost(control())


def test_the_weight_of_mart_goes_to_zero_where_the_clean_input_is_classified_for_sure(mart: Method) -> None:
    shares = []
    for lead in (-2.0, 0.0, 2.0, 4.0, 6.0, 8.0):
        b = batch(1)
        model = smooth()
        with torch.no_grad():
            model[5].bias[int(b.y)] += lead
            right = float(model(b.x).softmax(1)[0, int(b.y)])
        d = driver(mart, model, Ball(EPS))
        seen = trained_on(model)
        losses = [d.step(b, control(beta=beta), 0.0).loss for beta in (0.0, 1.0)]
        kl = float(divergence(logits_of(model, seen[1]), logits_of(model, seen[0])))
        shares.append((losses[1] - losses[0]) / kl)
        assert shares[-1] == pytest.approx(1.0000001 - right, rel=1e-4)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5
    assert shares[-1] < 0.01


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@norms
def test_the_derivative_of_marts_step_is_whole_but_for_what_it_names(mart: Method, norm: str) -> None:
    d = driver(mart, ball=Ball(EPS, norm))
    d.step(batch(margin=0.2), control(), RATE)
    found = verify(d, batch(margin=0.2, number=1), control(), RATE, directions=4)
    assert len(found.pairs) >= 2
    if norm == "linf":
        assert found.share < 1e-8
        assert found.dropped == ()
    else:
        assert 1e-5 < found.share < 0.6
        assert found.dropped == ("the adversary's (l_2 steps)",)


def test_mart_without_steps_sees_the_clean_batch_alone(mart: Method) -> None:
    d, b = driver(mart), batch()
    seen = trained_on(d.model)
    step = d.step(b, Control(alpha=0.0, steps=0, beta=6.0), 0.0)
    assert [same(x, b.x) for x in seen] == [True, True]
    q = logits_of(smooth(), b.x).softmax(1)
    other = q.scatter(1, b.y[:, None], 0.0).amax(1)
    boosted = F.nll_loss(q.log(), b.y) - (1.0001 - other).log().mean()
    assert step.loss == pytest.approx(float(boosted), rel=1e-9)
