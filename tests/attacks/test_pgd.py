"""PGD against torchattacks, foolbox, plain loops and closed forms; and what it must leave alone."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import slow
from torch import Tensor, nn

import controlat
from controlat._util.errors import NonFiniteError
from controlat.attacks import ascend, fgsm, path, pgd
from controlat.attacks.balls import Ball
from controlat.attacks.losses import cross_entropy, margin
from controlat.control.cost import Meter
from controlat.data import digits
from controlat.models import lenet
from controlat.models.frozen.view import FrozenModel

# -------------------------------------------------------------------------------------------------- networks


def conv_net(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def batch_norm_net(**options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4, **options),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for i in range(steps):
        part = torch.arange(64 * i, 64 * (i + 1)) % len(x)
        optimiser.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimiser.step()


def digit_batch(side: int) -> tuple[Tensor, Tensor]:
    train = digits.load().train
    x, y = train.take(torch.arange(len(train)))
    if side == 8:
        return x, y
    # smooth: equal neighbours are ties in max-pooling, which rounding decides
    return F.interpolate(x, size=(side, side), mode="bilinear"), y


@pytest.fixture(scope="module", params=["conv", "lenet"])
def fitted(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A network that classifies well, a batch of its data, and a radius."""
    torch.manual_seed(0)
    model, side, steps, n = (conv_net(), 8, 100, 64) if request.param == "conv" else (lenet_28(), 28, 30, 32)
    x, y = digit_batch(side)
    fit(model, x, y, steps)
    model.eval()
    assert float((model(x[:n]).argmax(1) == y[:n]).float().mean()) > 0.7
    return model, x[:n], y[:n], 0.1


def lenet_28() -> nn.Module:
    return lenet.build((1, 28, 28), 10)


@pytest.fixture
def small() -> tuple[nn.Module, Tensor, Tensor]:
    """A conv net with BatchNorm and dropout, in float64, with statistics that are not the initial ones."""
    torch.manual_seed(1)
    model = batch_norm_net().double()
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    model(x)  # moves the running statistics
    return model, x, y


def plain_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    assert x.grad is not None
    return x.grad


def plain_pgd(
    model: nn.Module, x0: Tensor, y: Tensor, start: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    """The textbook loop, on the model in the mode in which it is."""
    x = start
    for _ in range(steps):
        x = x + alpha * plain_gradient(model, x, y).sign()
        x = torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
    return x


# --------------------------------------------------------------------------------------- independent oracles


def torchattacks_pgd(
    norm: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    import torchattacks

    attack = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    found: Tensor = attack(model, eps=eps, alpha=alpha, steps=steps)(x, y)
    return found


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports scipy.ndimage.filters
        import foolbox

        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=True)
        found: Tensor = attack(wrapped, x, y, epsilons=eps)[1]
    return found


ORACLES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "torchattacks.PGD": ("linf", partial(torchattacks_pgd, "linf")),
    "torchattacks.PGDL2": ("l2", partial(torchattacks_pgd, "l2")),
    "foolbox.LinfPGD": ("linf", foolbox_pgd),
}


def assert_agreement(
    fitted: Any, oracle: str, steps: int, dtype: torch.dtype, pixels: float, loss: float
) -> None:
    """Share of pixels equal to 1e-6 and mean loss, over seeds; in the default layout the loss to 1e-3."""
    model, x, y, eps = fitted
    model, x = copy.deepcopy(model).to(dtype), x.to(dtype)
    norm, independent = ORACLES[oracle]
    eps = eps if norm == "linf" else 10 * eps
    knobs = {"eps": eps, "alpha": 2.5 * eps / steps, "steps": steps}

    def mean_loss(x: Tensor) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(x), y))

    for seed in (0, 1) if steps == 10 else (0,):
        torch.manual_seed(seed)
        expected = independent(model, x, y, **knobs)
        torch.manual_seed(seed)
        found = pgd(model, x, y, **knobs, norm=norm, channels_last=False)
        torch.manual_seed(seed)
        default = pgd(model, x, y, **knobs, norm=norm)
        assert float(((found - expected).abs() <= 1e-6).float().mean()) >= pixels
        assert mean_loss(found) == pytest.approx(mean_loss(expected), abs=loss)
        assert mean_loss(default) == pytest.approx(mean_loss(expected), abs=1e-3)
        assert mean_loss(expected) > 2 * mean_loss(x) + 0.1  # the attack did something


@pytest.mark.parametrize("steps", [slow(10), 40])  # 40 are the harder case
@pytest.mark.parametrize("oracle", list(ORACLES))
def test_agrees_with_independent_implementations_in_double_precision(
    fitted: Any, oracle: str, steps: int
) -> None:
    assert_agreement(fitted, oracle, steps, torch.float64, pixels=0.999, loss=1e-7)


@pytest.mark.parametrize("steps", [10, slow(40)])
def test_agrees_with_torchattacks_in_single_precision(fitted: Any, steps: int) -> None:
    assert_agreement(fitted, "torchattacks.PGD", steps, torch.float32, pixels=0.999, loss=1e-4)


@pytest.mark.parametrize("steps", [10, slow(40)])
@pytest.mark.parametrize("oracle", ["torchattacks.PGDL2", "foolbox.LinfPGD"])
def test_agrees_in_single_precision_where_the_references_round_otherwise(
    fitted: Any, oracle: str, steps: int
) -> None:
    # PGDL2 takes the mean loss, whose length rounds otherwise than that of the sum, and foolbox rounds the
    # start otherwise; at a kink of a ReLU or a pooling one ulp then moves a whole sample (up to 5 % of pixels
    # over ten seeds, loss to 8e-5)
    assert_agreement(fitted, oracle, steps, torch.float32, pixels=0.9, loss=1e-3)


def test_is_the_textbook_loop_in_float64() -> None:
    torch.manual_seed(0)
    model, x, y = conv_net().double(), torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5)
    start = (x + torch.empty_like(x).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(3))).clamp(
        0, 1
    )
    expected = plain_pgd(model, x, y, start, 0.1, 0.03, 7)
    for layout in (True, False):
        found = pgd(
            *(model, x, y), eps=0.1, alpha=0.03, steps=7, generator=torch.Generator().manual_seed(3),
            channels_last=layout,
        )  # fmt: skip
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("training", [False, True])
def test_mode_is_that_of_the_attack_whatever_mode_the_model_is_in(
    small: Any, mode: str, training: bool
) -> None:
    model, x, y = small
    reference = copy.deepcopy(model).train(mode == "train")
    model.train(training)
    torch.manual_seed(5)  # for dropout
    expected = plain_pgd(reference, x, y, x, 0.1, 0.03, 4)
    torch.manual_seed(5)
    found = pgd(model, x, y, eps=0.1, alpha=0.03, steps=4, random_start=False, mode=mode, channels_last=False)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.1, "8/255"])
def test_fgsm_is_one_signed_step_clamped(small: Any, eps: float | str) -> None:
    model, x, y = small
    model.eval()
    radius = 8 / 255 if eps == "8/255" else 0.1
    expected = (x + radius * plain_gradient(model, x, y).sign()).clamp(0, 1)
    found = fgsm(model, x, y, eps=eps)
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_fgsm_l2_is_one_step_of_length_eps(small: Any) -> None:
    model, x, y = small
    model.eval()
    x = 0.4 + 0.2 * x
    g = plain_gradient(model, x, y)
    expected = x + 0.2 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(fgsm(model, x, y, eps=0.2, norm="l2"), expected, rtol=0, atol=1e-8)


# ------------------------------------------------------------------------------- problems with exact answers


def linear_problem(n: int = 12) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model of two classes, a batch, and the difference of weights (wrong - right) per sample."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).double()
    x, y = torch.rand(n, 1, 3, 3, dtype=torch.float64), torch.arange(n) % 2
    weight = model[1].weight.detach()
    return model, x, y, (weight[1 - y] - weight[y]).view_as(x)


@pytest.mark.parametrize("steps", [4, 5, 40])
def test_a_linear_model_of_two_classes_is_driven_to_the_worst_corner(steps: int) -> None:
    model, x, y, away = linear_problem()
    eps = 0.2
    found = pgd(model, x, y, eps=eps, alpha=2 * eps / 4, steps=steps)  # K alpha >= 2 eps
    assert torch.allclose(found, (x + eps * away.sign()).clamp(0, 1), rtol=0, atol=1e-15)


def test_a_linear_model_of_two_classes_reaches_the_worst_loss_in_closed_form() -> None:
    model, x, y, away = linear_problem()
    eps, x = 0.2, 0.2 + 0.6 * x  # the box does not cut the ball
    lead = (model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None])).squeeze(1).detach()
    found = {
        "linf": pgd(model, x, y, eps=eps, alpha=0.1, steps=4),
        "l2": pgd(model, x, y, eps=eps, alpha=0.05, steps=4, norm="l2", random_start=False),
    }
    size = {"linf": away.flatten(1).abs().sum(1), "l2": away.flatten(1).norm(dim=1)}
    for norm, x_adv in found.items():
        loss = F.cross_entropy(model(x_adv), y, reduction="none")
        assert torch.allclose(loss, F.softplus(eps * size[norm] - lead), rtol=1e-8)


def test_travel_short_of_the_ball_ends_where_it_must() -> None:
    model, x, y, away = linear_problem()
    found = pgd(model, x, y, eps=0.2, alpha=0.03, steps=5, random_start=False)
    assert torch.allclose(found, (x + 0.15 * away.sign()).clamp(0, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_steps_return_a_copy_of_the_clean_batch_and_draw_nothing(small: Any, norm: str) -> None:
    model, x, y = small
    before = torch.random.get_rng_state()
    found = pgd(model, x, y, eps=0.3, alpha=0.1, steps=0, norm=norm)
    assert torch.equal(found, x)
    assert found.data_ptr() != x.data_ptr()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_size_of_zero_stays_at_the_start(small: Any, norm: str) -> None:
    model, x, y = small
    start = Ball(0.3, norm).start(x, torch.Generator().manual_seed(0))
    found = pgd(model, x, y, eps=0.3, alpha=0, steps=5, norm=norm, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found, start, rtol=0, atol=1e-15)
    assert float((start - x).abs().max()) > 0.01
    assert torch.equal(pgd(model, x, y, eps=0.3, alpha=0, steps=5, norm=norm, random_start=False), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_radius_of_zero_returns_the_clean_batch(small: Any, norm: str) -> None:
    model, x, y = small
    assert torch.equal(pgd(model, x, y, eps=0, alpha=0.1, steps=3, norm=norm), x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_is_admissible_and_detached(small: Any, norm: str, dtype: torch.dtype) -> None:
    model, x, y = small
    model, x = model.to(dtype), x.to(dtype).round(decimals=1)  # some pixels at 0 and 1
    found = pgd(model, x, y, eps=0.1, alpha=0.07, steps=5, norm=norm)
    assert (found.shape, found.dtype, found.requires_grad) == (x.shape, dtype, False)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    size = torch.linalg.vector_norm((found - x).flatten(1), ord=math.inf if norm == "linf" else 2, dim=1)
    assert float(size.max()) <= 0.1 + 1e-7


def test_fractions_are_read_as_text(small: Any) -> None:
    model, x, y = small
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    text = pgd(model, x, y, eps="8/255", alpha="2/255", steps=3, generator=seeds[0])
    assert torch.equal(text, pgd(model, x, y, eps=8 / 255, alpha=2 / 255, steps=3, generator=seeds[1]))


def test_path_visits_the_points_that_shorter_attacks_end_at(small: Any) -> None:
    model, x, y = small
    ball, start = Ball(0.1), Ball(0.1).start(x, torch.Generator().manual_seed(4))
    with FrozenModel(model) as view:
        visited = list(path(view, x, start, y, ball=ball, alpha=0.03, steps=4, loss=cross_entropy))
    for k, point in enumerate(visited, start=1):
        g = torch.Generator().manual_seed(4)
        assert torch.equal(point, pgd(model, x, y, eps=0.1, alpha=0.03, steps=k, generator=g))


# ------------------------------------------------------------------------------------ nothing is left behind


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an attack might touch."""
    return {
        "training": [m.training for m in model.modules()],
        "values": {k: (v.data_ptr(), v.clone(), v.stride()) for k, v in model.state_dict().items()},
        "grad": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "requires_grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "objects": {k: id(p) for k, p in model.named_parameters()},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("training", "requires_grad", "objects"):
        assert found[part] == expected[part]
    assert found["values"].keys() == expected["values"].keys()
    for k, (address, value, stride) in expected["values"].items():
        assert found["values"][k][0] == address
        assert torch.equal(found["values"][k][1], value)
        assert found["values"][k][2] == stride
    for k, g in expected["grad"].items():
        assert (found["grad"][k] is None) if g is None else torch.equal(found["grad"][k], g)


def prepared(model: nn.Sequential, state: str) -> None:
    """Training flags all on, all off or mixed; some gradients set, one weight that takes none."""
    model.train(state != "eval")
    if state == "mixed":
        model[1].eval()  # frozen BatchNorm
        model[2].train()
        model[3].eval()
        model.training = False
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    model[0].bias.requires_grad_(False)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("state", ["eval", "train", "mixed"])
@pytest.mark.parametrize("layout", [True, False])
def test_the_model_is_left_as_it_was(small: Any, mode: str, state: str, layout: bool) -> None:
    model, x, y = small
    prepared(model, state)
    before = traces(model)
    x_before, y_before = x.clone(), y.clone()
    pgd(model, x, y, eps=0.1, alpha=0.03, steps=3, mode=mode, channels_last=layout)
    assert_same(traces(model), before)
    assert torch.equal(x, x_before)
    assert torch.equal(y, y_before)
    assert (x.requires_grad, x.grad) == (False, None)


class Fails(nn.Module):
    """Passes its input on, and raises at the third call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("third call")
        return x


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("state", ["eval", "train", "mixed"])
def test_the_model_is_left_as_it_was_after_an_error_inside_it(small: Any, mode: str, state: str) -> None:
    model, x, y = small
    model.append(Fails())  # after BatchNorm and dropout
    prepared(model, state)
    before = traces(model)
    with pytest.raises(RuntimeError, match="third call"):
        pgd(model, x, y, eps=0.1, alpha=0.03, steps=5, mode=mode)
    assert_same(traces(model), before)
    assert model[-1].calls == 3


def test_an_input_that_requires_a_gradient_keeps_what_it_has(small: Any) -> None:
    model, x, y = small
    expected = fgsm(model, x, y, eps=0.1)
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    for steps in (0, 1):
        found = pgd(model, x, y, eps=0.1, alpha=0.1, steps=steps, random_start=False)
        assert not found.requires_grad
        assert found.grad_fn is None
    assert torch.equal(found, expected)
    assert x.requires_grad
    assert x.is_leaf
    assert torch.equal(x.grad, torch.ones_like(x))


def test_an_input_inside_a_graph_is_attacked_as_a_value(small: Any) -> None:
    model, x, y = small
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = fgsm(model, x * scale, y, eps=0.1)
    assert not found.requires_grad
    assert torch.equal(found, fgsm(model, x, y, eps=0.1))
    assert scale.grad is None


def test_works_without_grad_mode_and_leaves_it(small: Any) -> None:
    model, x, y = small
    expected = fgsm(model, x, y, eps=0.1)
    with torch.no_grad():
        assert torch.equal(fgsm(model, x, y, eps=0.1), expected)
        assert not torch.is_grad_enabled()


def test_works_on_a_model_whose_weights_are_all_frozen(small: Any) -> None:
    model, x, y = small
    expected = fgsm(model, x, y, eps=0.1)
    model.requires_grad_(False)
    assert torch.equal(fgsm(model, x, y, eps=0.1), expected)


def test_shared_weights_are_attacked_as_one() -> None:
    torch.manual_seed(0)
    first = nn.Linear(16, 16)
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), first, nn.Linear(16, 3)).double()
    x, y = torch.rand(4, 1, 4, 4, dtype=torch.float64), torch.arange(4) % 3
    assert torch.allclose(
        pgd(model, x, y, eps=0.1, alpha=0.05, steps=3, random_start=False),
        plain_pgd(model, x, y, x, 0.1, 0.05, 3),
        rtol=0,
        atol=1e-14,
    )


# ------------------------------------------------------------------------------------------------ randomness


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_one_seed_gives_one_result_and_leaves_the_global_generator(small: Any, norm: str) -> None:
    model, x, y = small
    found = []
    for seed, history in [(0, 1), (0, 2), (1, 1)]:
        torch.manual_seed(history)
        before = torch.random.get_rng_state()
        g = torch.Generator().manual_seed(seed)
        found.append(pgd(model, x, y, eps=0.1, alpha=0.02, steps=3, norm=norm, generator=g))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_a_generator_the_start_comes_from_the_global_one(small: Any, norm: str) -> None:
    model, x, y = small
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    found = pgd(model, x, y, eps=0.1, alpha=0.02, steps=3, norm=norm)
    assert not torch.equal(torch.random.get_rng_state(), before)
    g = torch.Generator().manual_seed(11)
    assert torch.equal(found, pgd(model, x, y, eps=0.1, alpha=0.02, steps=3, norm=norm, generator=g))


def test_without_a_random_start_nothing_is_drawn(small: Any) -> None:
    model, x, y = small
    before = torch.random.get_rng_state()
    first = pgd(model, x, y, eps=0.1, alpha=0.02, steps=3, random_start=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, pgd(model, x, y, eps=0.1, alpha=0.02, steps=3, random_start=False))


# ---------------------------------------------------------------------------- parts of a batch, and counting


class Counts(nn.Module):
    """Passes its input on and notes the number of samples of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x


def big(model: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    return model.double(), torch.rand(150, 1, 8, 8, dtype=torch.float64), torch.arange(150) % 10


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_working_in_parts_changes_nothing(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = big(nn.Sequential(Counts(), *conv_net()))

    def attack() -> Tensor:
        model[0].seen.clear()
        g = torch.Generator().manual_seed(1)
        return pgd(model, x, y, eps=0.1, alpha=0.03, steps=3, norm=norm, generator=g)

    found = attack()
    assert len(set(model[0].seen)) > 1  # in parts, each taken through all its steps
    assert sum(model[0].seen) == 3 * 150
    monkeypatch.setattr("controlat.models.frozen.view.CHUNK", 10**6)
    whole = attack()
    assert model[0].seen == [150] * 3
    assert torch.allclose(found, whole, rtol=0, atol=1e-6)


def test_parts_are_independent_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, x, y = big(conv_net())
    knobs = {"eps": 0.1, "alpha": 0.03, "steps": 3, "random_start": False}
    alone = [pgd(model, x[i : i + 64], y[i : i + 64], **knobs) for i in (0, 64, 128)]  # type: ignore[arg-type]
    assert torch.equal(pgd(model, x, y, **knobs), torch.cat(alone))  # type: ignore[arg-type]


@pytest.mark.parametrize(("options", "mode"), [({"track_running_stats": False}, "eval"), ({}, "train")])
def test_a_batch_whose_samples_interact_is_not_worked_on_in_parts(options: Any, mode: str) -> None:
    torch.manual_seed(0)
    model, x, y = big(nn.Sequential(Counts(), *batch_norm_net(**options)))
    model[4].p = 0.0  # no dropout
    reference = copy.deepcopy(model).train(mode == "train")
    found = pgd(model, x, y, eps=0.1, alpha=0.03, steps=3, random_start=False, mode=mode)
    assert model[0].seen == [150] * 3
    assert torch.allclose(found, plain_pgd(reference, x, y, x, 0.1, 0.03, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("net", [conv_net, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))])
def test_the_meter_counts_the_samples_that_the_model_sees(net: Callable[[], nn.Module]) -> None:
    model, x, y = big(nn.Sequential(Counts(), net()))
    meter = Meter(gradients=5)
    with FrozenModel(model, meter=meter) as view:
        ascend(view, x, y, ball=Ball(0.1), alpha=0.03, steps=4)
        assert sum(model[0].seen) == 4 * 150
        assert meter == Meter(gradients=5 + 4 * 150, forwards=0)
        earlier = meter.copy()
        view(x[:7])
        assert meter.since(earlier) == Meter(gradients=0, forwards=7)
        ascend(view, x, y, ball=Ball(0.1), alpha=0.03, steps=0)
        assert meter.gradients + meter.forwards == 5 + sum(model[0].seen)


def test_gradients_of_samples_do_not_depend_on_the_batch(small: Any) -> None:
    model, x, y = small
    with FrozenModel(model) as view:
        whole = view.gradient(x, lambda logits: cross_entropy(logits, y))
        alone = [view.gradient(x[i : i + 1], lambda z, i=i: cross_entropy(z, y[i : i + 1])) for i in range(6)]
    assert torch.allclose(whole, torch.cat(alone), rtol=1e-12)


# ---------------------------------------------------------------------------------------------- other losses


def test_margin_by_brute_force() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(20, 5, dtype=torch.float64) - 2, torch.arange(20) % 5
    for kappa in (0.0, 1.5):
        expected = [
            -max(z[c] - max(z[j] for j in range(5) if j != c) + kappa, 0.0)
            for z, c in zip(logits.tolist(), y.tolist(), strict=True)
        ]
        assert margin(logits, y, kappa).tolist() == pytest.approx(expected, abs=1e-15)


def test_ascent_of_the_margin_stops_once_another_class_leads() -> None:
    model, x, y, _ = linear_problem()
    with FrozenModel(model) as view:
        found = ascend(view, x, y, ball=Ball(0.5), alpha=0.01, steps=50, random_start=False, loss=margin)
    before, after = (cross_entropy(model(v), y).detach() for v in (x, found))
    wrong = before > math.log(2)  # of two classes
    assert 0 < int(wrong.sum()) < len(x)
    assert torch.equal(found[wrong], x[wrong])
    assert bool((after[~wrong] > before[~wrong]).all())


def test_a_confident_network_is_broken_by_l2_steps() -> None:
    """Logits lead by 36.6, the border is 0.2 away: the gradient is 1e-14, a step is as long as any other."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x, y, w = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), 36.6 / 0.2 / 4
    with torch.no_grad():
        model[1].weight.copy_(w * torch.tensor([[-1.0] * 4, [1.0] * 4]))
        model[1].bias.copy_((2 * w + 18.3) * torch.tensor([1.0, -1.0]))
    assert float(model(x).detach().diff()) == pytest.approx(-36.6, rel=1e-5)
    found = pgd(model, x, y, eps=0.3, alpha=0.1, steps=20, norm="l2", random_start=False)
    assert torch.allclose(found, x + 0.15, rtol=0, atol=1e-6)
    assert int(model(found).argmax()) == 1
    assert torch.allclose(fgsm(model, x, y, eps=0.1, norm="l2"), x + 0.05, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- errors

GOOD: dict[str, Any] = {"eps": 0.1, "alpha": 0.02, "steps": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": None}, "eps is missing: give a number such as 8/255"),
        ({"alpha": None}, "alpha is missing"),
        ({"steps": None}, "steps is missing"),
        ({"eps": -0.1}, "eps must be >= 0, got -0.1"),
        ({"alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ({"steps": -1}, "steps must be >= 0, got -1"),
        *[({k: math.nan}, f"{k} must be finite, got nan") for k in GOOD],
        *[({k: math.inf}, f"{k} must be finite, got inf") for k in GOOD],
        *[({k: True}, f"{k} must be a number such as 0.3, 1e-3 or 8/255, got True") for k in GOOD],
        *[({k: "much"}, f"{k} must be a number .* got 'much'") for k in GOOD],
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"mode": "test"}, "mode must be one of eval, train, got 'test'"),
    ],
)
def test_wrong_knobs_are_refused(small: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd(*small, **(GOOD | change))


def test_fgsm_names_the_radius_that_is_missing(small: Any) -> None:
    with pytest.raises(ValueError, match="eps is missing"):
        fgsm(*small)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: (x * 255).to(torch.uint8), "floating point in .* got torch.uint8: divide pixels by 255"),
        (lambda x: x.numpy(), "x must be a torch.Tensor, got ndarray"),
        (lambda x: x[:0], "x must be a batch .* that is not empty, got shape"),
        (lambda x: x[:, 0, 0, 0], r"x must be a batch \(N, ...\)"),
        (lambda x: x - x.amin() - 2e-6, r"\[0, 1\], got values in \[-2e-06, .*normalisation belongs inside"),
        (lambda x: x - x.amax() + 1 + 2e-6, r"x must lie in \[0, 1\]"),
        (
            lambda x: x * 255,
            r"x must lie in \[0, 1\], got values in .*: normalisation belongs inside the model",
        ),
        (lambda x: x * math.nan, r"x must lie in \[0, 1\], got values in \[nan, nan\]"),
        (lambda x: x + math.inf, r"x must lie in \[0, 1\]"),
    ],
)
def test_a_wrong_batch_is_refused(small: Any, spoil: Callable[[Tensor], Any], message: str) -> None:
    model, x, y = small
    spoilt = spoil(x)
    with pytest.raises(ValueError, match=message):
        pgd(model, spoilt, y[: len(spoilt)], **GOOD)


@pytest.mark.parametrize("shift", [-3e-8, 3e-8, 1.2e-7, -9e-7])
def test_rounding_beyond_the_box_is_accepted(small: Any, shift: float) -> None:
    model, x, y = small
    x[0, 0, 0, 0] = shift + (shift > 0)
    found = pgd(model, x, y, **GOOD)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda y: y[:-1], r"one integer label per sample, shape \(6,\).* got torch.int64 \(5,\)"),
        (lambda y: y[:, None], r"got torch.int64 \(6, 1\)"),
        (lambda y: F.one_hot(y, 10), r"got torch.int64 \(6, 10\)"),
        (lambda y: y.double(), "got torch.float64"),
        (lambda y: y.int(), r"torch.int64 \(y.long\(\)\), got torch.int32"),
        (lambda y: y.tolist(), "y must be a torch.Tensor, got list"),
        (lambda y: y - 1, "labels must be >= 0, got -1"),
        (lambda y: torch.where(y == 3, -100, y), "labels must be >= 0, got -100"),
        (lambda y: y + 5, r"labels must be in \[0, 9\], the model's logits; got 10"),
    ],
)
def test_wrong_labels_are_refused(small: Any, spoil: Callable[[Tensor], Any], message: str) -> None:
    model, x, y = small
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        pgd(model, x, spoil(y), **GOOD)
    assert_same(traces(model), before)


def test_what_is_no_module_is_refused(small: Any) -> None:
    model, x, y = small
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function: wrap it in one"):
        pgd(lambda v: model(v), x, y, **GOOD)  # type: ignore[arg-type]


class Spoils(nn.Module):
    """Multiplies the logits of the last sample by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z[:-1], z[-1:] * self.factor])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_network_that_is_not_finite_is_an_error(small: Any, norm: str, factor: float) -> None:
    model, x, y = small
    model.append(Spoils(factor))
    before = traces(model)
    with pytest.raises(NonFiniteError, match=r"gradient of the loss .* is not finite"):
        pgd(model, x, y, norm=norm, **GOOD)
    assert_same(traces(model), before)
    with pytest.raises(NonFiniteError, match="logits that are not finite"), FrozenModel(model) as view:
        view(x)


def test_a_call_inside_inference_mode_says_what_to_use_instead() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="no_grad"):
        pgd(model, x, y, eps=0.1, alpha=0.1, steps=1)


def test_labels_beyond_the_logits_are_refused_everywhere() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.rand(8, 1, 2, 2), torch.full((8,), 3)
    with pytest.raises(ValueError, match=r"\[0, 2\].* got 3"):
        pgd(model, x, y, eps=0.1, alpha=0.1, steps=1)
    with pytest.raises(ValueError, match=r"\[0, 2\].* got 3"):
        controlat.robustness(model, x, y, eps=0.1)
    with pytest.raises(ValueError, match=r"\[0, 2\].* got 3"):
        controlat.criterion(model, x, y, {"alpha": 0.1, "steps": 1}, eps=0.1, gamma=0.1)
