"""The kernels, joined by the op's rule, against the definition."""

from __future__ import annotations

import functools

import pytest
import torch

from peftref.ops.lora_linear import triton
from peftref.ops.lora_linear.op import OPERATOR
from peftref.ops.operator import Kernels
from tests.ops.agreement import assert_kernels_agree
from tests.ops.test_lora_linear import arguments

SMALL = triton.Tile(16, 16, 16, 1, 1)
KERNELS = Kernels(
    functools.partial(triton.forward, tile=SMALL), functools.partial(triton.backward, tile=SMALL)
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2)])
@pytest.mark.parametrize(
    ("targets", "rows", "columns", "p", "bias"),
    [(1, (3,), 5, 0.0, True), (1, (19,), 33, 0.3, False), (2, (2, 17), 20, 0.3, True)],
)
def test_equals_the_definition(
    dtype: torch.dtype,
    tolerance: float,
    targets: int,
    rows: tuple[int, ...],
    columns: int,
    p: float,
    bias: bool,
) -> None:
    given = arguments(targets, rows, columns, p, bias, dtype)
    assert_kernels_agree(OPERATOR, KERNELS, given, tolerance)


def test_rank_beyond_one_block() -> None:
    """Ranks above 64 take several blocks."""
    torch.manual_seed(0)
    x, weights, biases, _, _, scales, p, seed = arguments(1, (17,), 16, 0.3)
    down, up = torch.randn(70, 16, requires_grad=True), torch.randn(4, 70, requires_grad=True)
    given = (x, weights, biases, [down], [up], scales, p, seed)
    assert_kernels_agree(OPERATOR, KERNELS, given, 1e-4)
