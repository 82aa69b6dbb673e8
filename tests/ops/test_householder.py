"""Chains of reflections against one after another."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.ops.householder import reference
from peftref.ops.householder.op import householder
from tests.ops.agreement import run


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), max_size=2), st.integers(1, 40), st.integers(1, 9))
def test_equals_one_after_another(leading: list[int], width: int, rank: int) -> None:
    x = torch.randn(*leading, width, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(rank, width, dtype=torch.float64, requires_grad=True)
    found, right = (run(f, (x, vectors)) for f in (householder, reference.householder))
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other)


def test_equal_vectors_cancel() -> None:
    """As HRA starts: pairs of equal reflections are the identity, also under autocast."""
    x, half = torch.randn(30, 16), torch.randn(4, 16)
    vectors = half.repeat_interleave(2, 0)
    torch.testing.assert_close(householder(x, vectors), x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(householder(x, vectors), x)
