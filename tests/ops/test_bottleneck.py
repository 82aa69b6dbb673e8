"""Bottlenecks: all forms against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.errors import PeftRefError
from peftref.ops.bottleneck.op import OPERATOR, bottleneck
from peftref.ops.bottleneck.reference import ACTIVATIONS
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered


def arguments(
    activation: str = "gelu",
    rows: tuple[int, ...] = (3, 5),
    columns: int = 7,
    width: int = 4,
    parts: str = "into biases gate",
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Random ones; ``parts`` says which of the optional ones are there."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    residual = "residual" in parts
    out = columns if residual else columns + 2
    gate = leaf(rows[0], *(1 for _ in rows)) if "gate" in parts else None
    return (
        leaf(*rows, columns), leaf(*rows, out) if "into" in parts else None,
        leaf(width, columns), leaf(width) if "biases" in parts else None,
        leaf(out, width), leaf(out) if "biases" in parts else None,
        leaf(), gate, activation, residual,
    )


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(1, 8),
    st.sets(st.sampled_from(["into", "biases", "gate", "residual"])),
)
def test_all_forms_agree(
    activation: str, rows: list[int], columns: int, width: int, parts: set[str]
) -> None:
    given_arguments = arguments(activation, tuple(rows), columns, width, " ".join(parts))
    assert_forms_agree(OPERATOR, given_arguments, 1e-4)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gradients(activation: str) -> None:
    assert_gradients(OPERATOR, arguments(activation))
    assert_gradients(OPERATOR, arguments(activation, parts="residual"))


@pytest.mark.parametrize("parts", ["into biases gate", "residual"])
def test_registered(parts: str) -> None:
    assert_registered(OPERATOR, arguments(parts=parts))


def test_unknown_activation() -> None:
    x, _, down, _, up, _, scale, *_ = arguments()
    with pytest.raises(PeftRefError, match="Did you mean 'gelu'"):
        bottleneck(x, down, None, up, None, "gleu", scale)


def test_autocast() -> None:
    x, into, down, down_bias, up, up_bias, scale, gate, kind, _ = arguments(rows=(8, 9), columns=64)
    with torch.autocast("cpu", torch.bfloat16):
        y = bottleneck(x, down, down_bias, up, up_bias, kind, scale, into=into, gate=gate)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), [x, into, down, up, gate])
    assert {g.dtype for g in gradients} == {torch.float32}
