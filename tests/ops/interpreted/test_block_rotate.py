"""The kernels against those of torch operations."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.block_rotate import cpu, triton

SHAPES = [((1, 1), 1), ((70, 40), 8), ((3, 22, 60), 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
@pytest.mark.parametrize("recover", [True, False])
def test_equals_the_other_form(
    dtype: torch.dtype, shape: tuple[int, ...], block: int, recover: bool
) -> None:
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    rotation = torch.linalg.qr(torch.randn(shape[-1] // block, block, block))[0]
    tolerance = 8 * torch.finfo(dtype).eps
    y = triton.forward(x, rotation, recover)
    right = cpu.forward(x, rotation, recover)
    torch.testing.assert_close(y, right, rtol=tolerance, atol=tolerance)
    arguments = (dy, y if recover else x, rotation, recover, [True, True])
    for mine, other in zip(triton.backward(*arguments), cpu.backward(*arguments), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=8 * tolerance)


@pytest.mark.parametrize("width", [33, 45])
def test_a_last_block_may_be_narrower(width: int) -> None:
    x, dy, rotation = torch.randn(9, width), torch.randn(9, width), torch.randn(3, 16, 16)
    torch.testing.assert_close(triton.rotated(x, rotation), cpu.rotated(x, rotation))
    d_x, d_rotation = triton.gradients(dy, x, rotation, recover=False, wanted=[True, True])
    torch.testing.assert_close(d_x, cpu.rotated(dy, rotation.mT))
    torch.testing.assert_close(d_rotation, cpu.crossed(x, dy, 16))
