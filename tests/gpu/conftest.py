"""What needs a card: every test here is skipped without one.

CONTROLAT_TEST_DEVICE=cpu runs the same tests on the CPU, to see that they are right before a card is there.
"""

import os

import pytest
import torch

CHOSEN = os.environ.get("CONTROLAT_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def controlat_device() -> str:
    """The device to test on."""
    if CHOSEN == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; CONTROLAT_TEST_DEVICE=cpu runs it on the CPU")
    return CHOSEN


@pytest.fixture(autouse=True)
def _on_the_device(controlat_device: str) -> None:
    """No test of this folder runs without the device."""
