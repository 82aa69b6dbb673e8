"""With the kernels of ``block_rotate`` against those of torch operations."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.givens import cpu, triton
from peftref.ops.givens.reference import planes_of_angles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [20, 70])
def test_equals_the_other_form(dtype: torch.dtype, width: int) -> None:
    x, dy = torch.randn(2, 9, width, dtype=dtype), torch.randn(2, 9, width, dtype=dtype)
    planes = planes_of_angles(torch.randn(width - 1))
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        triton.forward(x, planes), cpu.forward(x, planes), rtol=tolerance, atol=tolerance
    )
    arguments = (dy, x, planes, [True, True])
    for mine, other in zip(triton.backward(*arguments), cpu.backward(*arguments), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=8 * tolerance)
