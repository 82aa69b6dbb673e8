"""The kernel against the definition."""

from __future__ import annotations

import pytest
import torch

from peftref.ops.seed import draw_seed
from peftref.ops.seeded_dropout import reference, triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17, 33), (20, 258)])
def test_equals_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=dtype)
    seed = draw_seed(x)
    y = triton.forward(x, 0.3, seed)
    # The product is rounded once here and twice there.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, reference.seeded_dropout(x, 0.3, seed), rtol=tolerance, atol=0)
