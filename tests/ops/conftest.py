"""Settings of the tests of ops."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test draws the same tensors alone as among others."""
    torch.manual_seed(0)
