"""Copies to a GPU are queued from pinned memory; no GPU is needed to see that they are asked for so."""

from unittest.mock import MagicMock

import pytest
import torch

from controlat._util import transfer
from controlat._util.transfer import free_memory, to_device


def test_a_copy_to_a_gpu_is_pinned_and_not_waited_for() -> None:
    t = MagicMock(spec=torch.Tensor, device=torch.device("cpu"))
    to_device(t, "cuda:1")
    t.pin_memory.return_value.to.assert_called_once_with("cuda:1", non_blocking=True)


def test_elsewhere_it_is_torchs_own() -> None:
    t = torch.arange(3)
    assert to_device(t, "cpu") is t
    assert to_device(t, "meta").device.type == "meta"


def test_free_memory_is_that_of_the_gpu_and_unlimited_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert free_memory("cuda") == 7
    assert free_memory("cpu") == float("inf")
