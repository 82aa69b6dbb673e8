"""The pass that joins two blocks, against all of them in one softmax."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.prefix_attention import triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_blocks_are_one(dtype: torch.dtype) -> None:
    scores = 5 * torch.randn(2, 3, 7, 9)
    values = torch.randn(2, 3, 9, 20)
    blocks = [(scores[..., i].softmax(-1) @ values[..., i, :], scores[..., i].logsumexp(-1))
              for i in (slice(0, 5), slice(5, 9))]
    (first, total), (second, part) = ((o.to(dtype), s) for o, s in blocks)
    out, sums = triton.joined(first, total, second, part)
    # A sum of the size of a score, up to 20, is rounded before it becomes an exponent.
    tolerance = 4 * torch.finfo(dtype).eps + 40 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(sums, scores.logsumexp(-1))
    right = (scores.softmax(-1) @ values).to(dtype)
    torch.testing.assert_close(out, right, rtol=tolerance, atol=tolerance)
