"""With the kernel for rows of logits, against torch's own cross-entropy."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.linear_cross_entropy import cpu, triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("classes", "smoothing", "mean"), [(7, 0.0, True), (4099, 0.2, False)])
def test_equals_the_other_form(
    dtype: torch.dtype, classes: int, smoothing: float, mean: bool
) -> None:
    hidden, weight = torch.randn(5, 8, dtype=dtype), torch.randn(classes, 8, dtype=dtype)
    labels = torch.tensor([0, classes - 1, -100, 3, 3])
    arguments = (hidden, weight, None, labels, -100, smoothing, mean, [True, True, False])
    tolerance = 8 * torch.finfo(dtype).eps
    for mine, right in zip(triton.forward(*arguments), cpu.forward(*arguments), strict=True):
        torch.testing.assert_close(mine, right, rtol=tolerance, atol=tolerance)
