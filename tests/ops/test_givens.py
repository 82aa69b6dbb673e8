"""Trees of 2x2 maps against their rounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.ops.givens.op import OPERATOR, givens, planes_of_angles
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered, run


def arguments(leading: list[int], width: int, *, free: bool) -> tuple[Tensor, Tensor]:
    x = torch.randn(*leading, width, requires_grad=True)
    planes = torch.randn(width - 1, 2, 2) / 2**0.5 if free else planes_of_angles(
        torch.randn(width - 1)
    )
    return x, planes.requires_grad_()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), max_size=2), st.integers(2, 150), st.booleans())
def test_all_forms_agree(leading: list[int], width: int, free: bool) -> None:
    """Any width: powers of two, one block, many, and a last one that is narrower."""
    assert_forms_agree(OPERATOR, arguments(leading, width, free=free), 2e-5)


def test_wide() -> None:
    assert_forms_agree(OPERATOR, arguments([7], 2080, free=False), 2e-5)


@pytest.mark.parametrize("width", [2, 5, 37])
def test_gradients(width: int) -> None:
    assert_gradients(OPERATOR, arguments([2], width, free=True))


def test_registered() -> None:
    assert_registered(OPERATOR, arguments([3], 37, free=True))


@pytest.mark.parametrize("width", [8, 31, 64, 100])
def test_angles_make_an_orthogonal_map(width: int) -> None:
    planes = planes_of_angles(torch.randn(width - 1, dtype=torch.float64))
    matrix = givens(torch.eye(width, dtype=torch.float64), planes)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))


def test_autocast_keeps_planes_wide() -> None:
    x, planes = arguments([64], 70, free=False)
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(givens, (x, planes))
    right = run(OPERATOR.reference, (x, planes))
    assert mine[0].dtype is torch.bfloat16
    for found, exact in zip(mine[1:], right[1:], strict=True):
        assert found.dtype is torch.float32
        assert (found - exact).abs().max() < 0.05 * exact.abs().max()
