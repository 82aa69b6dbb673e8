"""Block-diagonal maps against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.ops.block_rotate.op import OPERATOR, block_rotate
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered


def arguments(
    leading: list[int], blocks: int, block: int, *, orthogonal: bool
) -> tuple[Tensor, Tensor, bool]:
    x = torch.randn(*leading, blocks * block, requires_grad=True)
    rotation = torch.randn(blocks, block, block)
    if orthogonal:
        rotation = torch.linalg.qr(rotation.double())[0].float()
    return x, rotation.requires_grad_(), orthogonal


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 20), max_size=2), st.integers(1, 5), st.integers(1, 9), st.booleans()
)
def test_all_forms_agree(leading: list[int], blocks: int, block: int, orthogonal: bool) -> None:
    """Orthogonal ones recover their input."""
    drawn = arguments(leading, blocks, block, orthogonal=orthogonal)
    assert_forms_agree(OPERATOR, drawn, 1e-5)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_gradients(orthogonal: bool) -> None:
    x, rotation, recover = arguments([4], 2, 3, orthogonal=orthogonal)
    if orthogonal:
        rotation = torch.linalg.qr(rotation.detach().double())[0].requires_grad_()
    assert_gradients(OPERATOR, (x, rotation, recover))


def test_registered() -> None:
    assert_registered(OPERATOR, arguments([2, 4], 2, 3, orthogonal=True))


@pytest.mark.parametrize("recover", [True, False])
def test_it_keeps_one_stream(recover: bool) -> None:
    x, rotation, _ = arguments([4], 2, 3, orthogonal=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: x):
        y = block_rotate(x, rotation, recover=recover)
    assert kept == [(y if recover else x).data_ptr(), rotation.data_ptr()]
