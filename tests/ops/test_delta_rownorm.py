"""Row norms against those of the formed weight."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.ops.delta_rownorm.op import OPERATOR, delta_rownorm
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered


def arguments(d_out: int, d_in: int, rank: int, *, known: bool) -> tuple[Tensor | None, ...]:
    weight, scale = torch.randn(d_out, d_in), torch.tensor(1.5)
    down, up = torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out, rank)
    squares = weight.pow(2).sum(1) if known else None
    return weight, down.requires_grad_(), up.requires_grad_(), scale, squares


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(8, 40), st.integers(1, 8), st.booleans())
def test_all_forms_agree(d_out: int, d_in: int, rank: int, known: bool) -> None:
    assert_forms_agree(OPERATOR, arguments(d_out, d_in, rank, known=known), 1e-5)


def test_more_blocks_than_one() -> None:
    assert_forms_agree(OPERATOR, arguments(301, 1021, 16, known=False), 1e-5)


def test_gradients() -> None:
    assert_gradients(OPERATOR, arguments(5, 7, 2, known=False))


def test_registered() -> None:
    assert_registered(OPERATOR, arguments(5, 7, 2, known=True))


def test_sums_stay_wide() -> None:
    """A weight in 16 bits, under autocast: the result is that of float64 to float32's precision."""
    weight, down, up, scale, _ = arguments(96, 2048, 4, known=False)
    assert weight is not None
    weight = weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = delta_rownorm(weight, down, up, scale)  # pyright: ignore[reportArgumentType]
    exact = OPERATOR.reference(*(t.double() for t in (weight, down, up, scale)))  # pyright: ignore[reportOptionalMemberAccess]
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_a_cancelled_row_is_zero() -> None:
    up, down = torch.randn(6, 2), torch.randn(2, 9)
    norm = delta_rownorm(-up @ down, down, up.requires_grad_(), torch.tensor(1.0))
    assert norm.isfinite().all()
    assert norm.max() < 1e-2
    (gradient,) = torch.autograd.grad(norm.sum(), up)
    assert gradient.isfinite().all()
