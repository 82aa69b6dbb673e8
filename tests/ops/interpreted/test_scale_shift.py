"""The kernels against the definition."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.scale_shift import cpu, reference, triton

SHAPES = [((1, 1), True), ((3, 17, 133), True), ((20, 64), False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "shift"), SHAPES)
def test_equals_the_definition(dtype: torch.dtype, shape: tuple[int, ...], shift: bool) -> None:
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    scale, move = torch.randn(shape[-1]), torch.randn(shape[-1]) if shift else None
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        triton.forward(x, scale, move), reference.scale_shift(x, scale, move),
        rtol=tolerance, atol=tolerance,
    )
    needs = [True, True, shift]
    for mine, right in zip(
        triton.backward(dy, x, scale, needs), cpu.backward(dy, x, scale, needs), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=2e-5)
