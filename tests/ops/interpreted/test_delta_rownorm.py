"""The kernel against the formed weight."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.delta_rownorm import reference, triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "known"), [((7, 130, 3), True), ((65, 64, 20), False)])
def test_equals_the_definition(
    dtype: torch.dtype, shape: tuple[int, int, int], known: bool
) -> None:
    d_out, d_in, rank = shape
    weight, scale = torch.randn(d_out, d_in).to(dtype), torch.tensor(1.5)
    down, up = torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out, rank)
    squares = weight.float().pow(2).sum(1) if known else None
    norm, crossed = triton.forward(weight, down, up, scale, squares)
    torch.testing.assert_close(norm, reference.delta_rownorm(weight, down, up, scale))
    torch.testing.assert_close(crossed, weight.float() @ down.T)
