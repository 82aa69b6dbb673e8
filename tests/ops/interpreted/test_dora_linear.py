"""The passes and the unlikely kernel against the kernels of torch operations."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.dora_linear import cpu, triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_other_form(dtype: torch.dtype, bias: bool) -> None:
    rows, d_in, d_out, rank = 70, 40, 35, 3
    x, dy = torch.randn(2, rows, d_in, dtype=dtype), torch.randn(2, rows, d_out, dtype=dtype)
    weight = (torch.randn(d_out, d_in) / d_in**0.5).to(dtype)
    down, up = torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out, rank)
    ratio, scale = torch.rand(d_out) + 0.5, torch.tensor(1.5)
    ratio[3], ratio[4], ratio[20] = 0, 1e-5, -1
    arguments = (weight, torch.randn(d_out) if bias else None, down, up, scale, ratio)
    y, hidden = triton.forward(x, *arguments)
    right = cpu.forward(x, *arguments)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, right[0], rtol=tolerance, atol=tolerance)
    gradients = (dy, x, hidden, y, *arguments, [True] * 5)
    for mine, other in zip(triton.backward(*gradients), cpu.backward(*gradients), strict=True):
        # Sums of 140 rows, each rounded once more or less.
        difference = (mine - other).abs().max()
        assert difference <= 4 * tolerance * other.abs().max()
