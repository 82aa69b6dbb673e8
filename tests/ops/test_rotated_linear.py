"""Linear maps of a rotated input against their definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.ops.rotated_linear.op import OPERATOR, rotated_linear
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered, run


def arguments(
    leading: list[int], blocks: int, block: int, d_out: int, *, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    x = torch.randn(*leading, blocks * block, requires_grad=True)
    rotation = torch.linalg.qr(torch.randn(blocks, block, block).double())[0].float()
    weight = torch.randn(d_out, blocks * block)
    return x, rotation.requires_grad_(), weight, torch.randn(d_out) if bias else None


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 12), max_size=2),
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 40),
    st.booleans(),
)
def test_all_forms_agree(
    leading: list[int], blocks: int, block: int, d_out: int, bias: bool
) -> None:
    """Few outputs have the weight rotated, few rows the stream."""
    assert_forms_agree(OPERATOR, arguments(leading, blocks, block, d_out, bias=bias), 2e-5)


def test_gradients() -> None:
    for d_out in (3, 30):
        x, rotation, *frozen = arguments([4], 2, 3, d_out)
        exact = torch.linalg.qr(rotation.detach().double())[0].requires_grad_()
        assert_gradients(OPERATOR, (x, exact, *frozen))


def test_registered() -> None:
    assert_registered(OPERATOR, arguments([2, 4], 2, 3, 5))


def test_autocast_keeps_blocks_wide() -> None:
    drawn = arguments([3, 9], 2, 8, 10)
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(rotated_linear, drawn)
    right = run(OPERATOR.reference, drawn)
    assert mine[0].dtype is torch.bfloat16
    for found, exact in zip(mine[1:], right[1:], strict=True):
        assert found.dtype is torch.float32
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()
