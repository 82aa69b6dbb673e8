"""The kernels, joined by the op's rule, against the definition."""

from __future__ import annotations

import functools

import pytest
import torch

from peftref.ops.lora_linear.triton import Tile
from peftref.ops.lora_linear_batched import triton
from peftref.ops.lora_linear_batched.op import OPERATOR
from peftref.ops.operator import Kernels
from tests.ops.agreement import assert_kernels_agree
from tests.ops.test_lora_linear_batched import arguments

SMALL = Tile(16, 16, 16, 1, 1)
KERNELS = Kernels(
    functools.partial(triton.forward, tile=SMALL), functools.partial(triton.backward, tile=SMALL)
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2)])
@pytest.mark.parametrize("adapters", [None, 3])
def test_equals_the_definition(
    dtype: torch.dtype, tolerance: float, adapters: int | None
) -> None:
    given = arguments(2, (17,), 19, 3, adapters, dtype)
    assert_kernels_agree(OPERATOR, KERNELS, given, tolerance)
