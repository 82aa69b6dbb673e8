"""Linear maps with direction and magnitude apart against their definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.ops.delta_rownorm.op import delta_rownorm
from peftref.ops.dora_linear.op import OPERATOR, dora_linear
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered, run


def arguments(
    shape: tuple[int, ...], d_out: int = 5, rank: int = 3, *, bias: bool = True
) -> list[Tensor | None]:
    d_in = shape[-1]
    down, up = torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out, rank)
    down, up, ratio = (t.requires_grad_() for t in (down, up, torch.rand(d_out) + 0.5))
    x, shift = torch.randn(shape, requires_grad=True), torch.randn(d_out, requires_grad=True)
    weight, scale = torch.randn(d_out, d_in) / d_in**0.5, torch.tensor(1.5)
    return [x, weight, shift if bias else None, down, up, scale, ratio]


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 8),
    st.booleans(),
)
def test_all_forms_agree(shape: list[int], d_out: int, rank: int, bias: bool) -> None:
    """Wide streams take the weight scaled, short ones the stream."""
    assert_forms_agree(OPERATOR, arguments(tuple(shape), d_out, rank, bias=bias), 2e-5)


def test_gradients() -> None:
    assert_gradients(OPERATOR, arguments((4, 7)))
    assert_gradients(OPERATOR, arguments((2, 7)))


def test_registered() -> None:
    assert_registered(OPERATOR, arguments((4, 7)))


@pytest.mark.parametrize("rows", [2, 40])
def test_a_ratio_near_zero(rows: int) -> None:
    """What was scaled by nothing cannot be divided out, and still has its gradient."""
    drawn = arguments((rows, 7))
    ratio = torch.tensor([1.0, 0.0, 1e-6, -1.0, -1e-9], requires_grad=True)
    assert_forms_agree(OPERATOR, [*drawn[:-1], ratio], 2e-5)


def test_a_ratio_is_not_rounded_to_the_stream() -> None:
    """A step of the magnitude far below bfloat16's is seen in the output."""
    x, weight, _, down, up, scale, _ = arguments((64, 32), 2000)
    assert x is not None
    assert weight is not None
    ratio = torch.full((2000,), 1.3)
    found = [
        dora_linear(x.bfloat16(), weight.bfloat16(), None, down, up, scale, r).double()  # pyright: ignore[reportArgumentType]
        for r in (ratio, ratio * (1 + 2**-12))
    ]
    # The roundings of the outputs hide it in one of them, not in all 128,000.
    step = ((found[1] - found[0]) * found[0]).sum() / found[0].pow(2).sum()
    assert 2**-13 < step < 2**-11


def test_autocast_keeps_trained_tensors_wide() -> None:
    x, weight, bias, down, up, scale, ratio = arguments((3, 9, 8))
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(dora_linear, [x, weight, bias, down, up, scale, ratio])
        plain = run(OPERATOR.reference, [x, weight, bias, down, up, scale, ratio])
    assert mine[0].dtype is torch.bfloat16
    for found, right in zip(mine[1:], plain[1:], strict=True):
        assert found.dtype is torch.float32
        assert (found - right).abs().max() < 0.05 * right.abs().max()


def test_equals_the_formed_weight() -> None:
    """DoRA as its paper writes it: ``m (W + s B A) / ||W + s B A||``, the norm detached."""
    x, weight, bias, down, up, scale, magnitude = (
        None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for t in arguments((11, 8))
    )
    given_tensors = [x, weight, bias, down, up, scale, magnitude]

    def mine(*tensors: Tensor) -> Tensor:
        _, w, b, a, u, s, m = tensors
        norm = delta_rownorm(w, a.detach(), u.detach(), s)
        return dora_linear(tensors[0], w, b, a, u, s, m / norm)

    def formed(*tensors: Tensor) -> Tensor:
        x, w, b, a, u, s, m = tensors
        v = w + s * u @ a
        return torch.nn.functional.linear(x, m[:, None] * v / v.detach().norm(dim=1)[:, None], b)

    for found, right in zip(run(mine, given_tensors), run(formed, given_tensors), strict=True):
        torch.testing.assert_close(found, right)
