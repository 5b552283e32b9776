"""Kernels, precision and CPU threads of a job: set inside, put back after, chosen by the network's size."""

import pytest
import torch
from torch import nn

from controlat._util.precision import tf32_state
from controlat.app import placement
from controlat.app.placement import Threads, default_threads, deterministic, threads
from controlat.models import build

CUDNN = torch.backends.cudnn
SMALL, LARGE = {"in_shape": (1, 8, 8), "batch_size": 64}, {"in_shape": (3, 32, 32), "batch_size": 16}


def flags() -> tuple[object, ...]:
    return torch.get_num_threads(), CUDNN.enabled, CUDNN.deterministic, CUDNN.benchmark, tf32_state()


@pytest.mark.parametrize("enabled", [True, False])
def test_deterministic_keeps_cudnn_and_puts_all_back_even_after_an_error(
    monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    monkeypatch.setattr(CUDNN, "enabled", enabled)
    monkeypatch.setattr(CUDNN, "benchmark", True)
    before = flags()

    def fail_inside(tf32: bool | None) -> None:
        with deterministic(threads=2, tf32=tf32):
            inside = before[-1] if tf32 is None else (tf32, tf32)
            assert flags() == (2, enabled, True, False, inside)
            assert threads() == Threads(2, "given")
            raise RuntimeError("stop")

    for tf32 in (None, True, False):
        with pytest.raises(RuntimeError, match="stop"):
            fail_inside(tf32)
        assert flags() == before
    with deterministic():
        assert threads() == Threads(torch.get_num_threads(), "as torch was set")


def test_operations_are_those_of_its_layers() -> None:
    layers = nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10)
    model = nn.Sequential(*layers)
    model[0].weight.requires_grad_(requires_grad=False)
    convolution, linear = 2 * 8 * 36 * 3 * 9, 2 * 8 * 36 * 10
    hooks = [len(m._forward_hooks) for m in model.modules()]
    assert placement._operations(model, (3, 6, 6), next(model.parameters())) == convolution + linear
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert model.training


def test_small_networks_get_one_thread_and_large_ones_their_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(placement, "available_cores", lambda: 8)
    for name in ("mlp", "cnn_bn"):
        assert default_threads(build(name, (1, 8, 8), 10), **SMALL).number == 1
    large = build("preactresnet-18", (3, 32, 32), 10)  # 1.1 10^9 operations per sample
    shares = [default_threads(large, jobs, **LARGE) for jobs in (1, 2, 3, 16)]
    assert [share.number for share in shares] == [8, 4, 2, 1]
    assert shares[1].why == "1.8e+10 operations per batch, 8 cores for 2 jobs"
    monkeypatch.setattr(placement, "available_cores", lambda: 64)
    assert default_threads(large, **LARGE).number == 17, "no more than there is work for"
    assert default_threads(large.to("meta"), **LARGE) == Threads(1, "the network is on meta")


@pytest.mark.parametrize(("word", "number"), [("3", 3), ("2,1", 2), ("many", 1), ("0", 1), ("", 1)])
def test_omp_num_threads_is_heeded(monkeypatch: pytest.MonkeyPatch, word: str, number: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", word)
    chosen = default_threads(build("mlp", (1, 8, 8), 10), **SMALL)
    assert chosen.number == number
    assert (chosen.why == "OMP_NUM_THREADS") == (number > 1)
