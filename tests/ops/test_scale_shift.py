"""Scale and shift against their definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.ops.scale_shift.op import OPERATOR, scale_shift
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered, run


def arguments(shape: list[int], *, shift: bool) -> tuple[torch.Tensor | None, ...]:
    x, scale, move = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])
    tensors = [t.requires_grad_() for t in (x, scale, move)]
    return tensors[0], tensors[1], tensors[2] if shift else None


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.booleans())
def test_all_forms_agree(shape: list[int], shift: bool) -> None:
    assert_forms_agree(OPERATOR, arguments(shape, shift=shift), 1e-5)


def test_more_blocks_than_one() -> None:
    assert_forms_agree(OPERATOR, arguments([301, 1021], shift=True), 1e-5)


def test_gradients() -> None:
    assert_gradients(OPERATOR, arguments([3, 7], shift=True))


def test_registered() -> None:
    assert_registered(OPERATOR, arguments([3, 7], shift=True))


def test_a_wide_scale_on_a_narrow_stream() -> None:
    """The scale is not rounded to the stream's type, nor are the sums for its gradient."""
    x, scale, shift = arguments([4, 500, 8], shift=True)
    assert x is not None
    narrow = x.detach().bfloat16().requires_grad_()
    found = run(scale_shift, (narrow, scale, shift))
    exact = run(OPERATOR.reference, (narrow.detach().double().requires_grad_(), scale, shift))
    # dx and y are rounded to bfloat16 once; y's random weights are rounded on their way in, too.
    assert found[0].dtype is found[1].dtype is torch.bfloat16
    torch.testing.assert_close(found[0].double(), exact[0], rtol=2**-8, atol=0)
    for mine, right in zip(found[2:], exact[2:], strict=True):
        assert (mine - right).abs().max() < 2**-8 * right.abs().max()
