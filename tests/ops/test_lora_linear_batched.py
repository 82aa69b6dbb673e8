"""An adapter for each sample: all forms against the definition, and against one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.errors import PeftRefError
from peftref.ops.lora_linear.op import lora_linear
from peftref.ops.lora_linear_batched.op import OPERATOR, lora_linear_batched
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered


def arguments(
    samples: int,
    rows: tuple[int, ...] = (5,),
    columns: int = 7,
    rank: int = 3,
    adapters: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, ...]:
    """Random ones; with ``adapters`` an index, that may leave some out and repeat others."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype).requires_grad_()

    count = samples if adapters is None else adapters
    return (
        leaf(samples, *rows, columns), leaf(6, columns).detach(), leaf(6),
        leaf(count, rank, columns), leaf(count, 6, rank), leaf(count),
        None if adapters is None else torch.randint(adapters, (samples,)),
    )


@settings(max_examples=20)
@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 9), min_size=0, max_size=2),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([None, 1, 3]),
)
def test_all_forms_agree(
    samples: int, rows: list[int], columns: int, rank: int, adapters: int | None
) -> None:
    given_arguments = arguments(samples, tuple(rows), columns, rank, adapters)
    assert_forms_agree(OPERATOR, given_arguments, 1e-4)


@pytest.mark.parametrize("adapters", [None, 3])
def test_gradients_and_registration(adapters: int | None) -> None:
    assert_gradients(OPERATOR, arguments(2, adapters=adapters))
    assert_registered(OPERATOR, arguments(2, adapters=adapters))


def test_equals_one_adapter_at_a_time() -> None:
    x, weight, bias, down, up, scale, index = arguments(4, adapters=3)
    y = lora_linear_batched(x, weight, bias, down, up, scale, index)
    for n, i in enumerate(index.tolist()):
        alone = lora_linear(x[n], weight, bias, down[i], up[i], scale[i])
        torch.testing.assert_close(y[n], alone)


def test_as_many_adapters_as_samples() -> None:
    x, weight, bias, down, up, scale, _ = arguments(4)
    with pytest.raises(PeftRefError, match="3 samples, but 4 adapters"):
        lora_linear_batched(x[:3], weight, bias, down, up, scale)
