"""Differences at some places of a weight: all forms against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftref.errors import PeftRefError
from peftref.ops.masked_delta_linear.op import OPERATOR, masked_delta_linear
from peftref.ops.masked_delta_linear.reference import STRUCTURES, difference
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered


def arguments(
    structure: str, rows: tuple[int, ...] = (3, 5), grid: tuple[int, int] = (3, 2), count: int = 2
) -> tuple[Any, ...]:
    """Random ones, on a weight of ``grid`` blocks of 2 x 2."""
    k, d = grid[0] * 2, grid[1] * 2
    shapes = {"entries": (count,), "rows": (count, d), "columns": (k, count),
              "blocks": (count, 2, 2)}  # fmt: skip
    places = {"entries": k * d, "rows": k, "columns": d, "blocks": grid[0] * grid[1]}[structure]
    index = torch.randperm(places)[:count]
    values = torch.randn(shapes[structure])
    if structure == "columns":
        values = values[:, : len(index)].contiguous()
    else:
        values = values[: len(index)].contiguous()
    if structure == "blocks":
        index = torch.stack([index // grid[1], index % grid[1]], 1)
    x = torch.randn(*rows, d, requires_grad=True)
    bias = torch.randn(k, requires_grad=True)
    return x, torch.randn(k, d), bias, values.requires_grad_(), index, structure


@settings(max_examples=25)
@given(
    st.sampled_from(STRUCTURES),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 6),
)
def test_all_forms_agree(
    structure: str, rows: list[int], grid: tuple[int, int], count: int
) -> None:
    assert_forms_agree(OPERATOR, arguments(structure, tuple(rows), grid, count), 1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_and_registration(structure: str) -> None:
    assert_gradients(OPERATOR, arguments(structure))
    assert_registered(OPERATOR, arguments(structure))


def test_structures_are_where_they_say() -> None:
    shape, index = (4, 6), torch.tensor([1, 3])
    entries = difference(torch.tensor([1.0, 2.0]), torch.tensor([7, 23]), shape, "entries")
    assert entries.nonzero().tolist() == [[1, 1], [3, 5]]
    rows = difference(torch.ones(2, 6), index, shape, "rows")
    assert rows.sum(1).tolist() == [0, 6, 0, 6]
    columns = difference(torch.ones(4, 2), index, shape, "columns")
    assert columns.sum(0).tolist() == [0, 4, 0, 4, 0, 0]
    blocks = difference(torch.ones(1, 2, 2), torch.tensor([[1, 2]]), shape, "blocks")
    assert blocks.nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


def test_small_differences_of_a_narrow_weight_are_kept() -> None:
    """In bfloat16 1 + 0.001 is 1; a stream that cancels the weight shows the difference."""
    x = torch.tensor([[1.0, -1.0]]).bfloat16()
    values, index = torch.full((1,), 0.001), torch.tensor([0])
    y = masked_delta_linear(x, torch.ones(2, 2).bfloat16(), None, values, index)
    assert y[0, 0].item() == pytest.approx(0.001, rel=0.01)


def test_what_cannot_be_is_refused() -> None:
    x, weight, bias, values, index, _ = arguments("blocks")
    with pytest.raises(PeftRefError, match="Did you mean 'blocks'"):
        masked_delta_linear(x, weight, bias, values, index, "block")
    with pytest.raises(PeftRefError, match="blocks of 2 do not divide a weight of 5 x 4"):
        masked_delta_linear(x, weight[:5], bias[:5], values, index, "blocks")
