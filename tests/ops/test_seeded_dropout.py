"""Dropout from a seed: the mask is random, and the same in every form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from peftref.errors import TrainingError
from peftref.ops.choice import Form, choose
from peftref.ops.seed import draw_seed, keep
from peftref.ops.seeded_dropout.op import OPERATOR, seeded_dropout
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.floats(0.01, 0.99), st.booleans())
def test_all_forms_agree(shape: list[int], p: float, double: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64 if double else torch.float32, requires_grad=True)
    assert_forms_agree(OPERATOR, (x, p, draw_seed(x)), 1e-6)


def test_more_blocks_than_one() -> None:
    x = torch.randn(301, 1021)
    assert_forms_agree(OPERATOR, (x, 0.25, draw_seed(x)), 1e-6)


def test_gradients() -> None:
    x = torch.randn(3, 7, requires_grad=True)
    assert_gradients(OPERATOR, (x, 0.4, draw_seed(x)))


def test_registered() -> None:
    x = torch.randn(3, 7, requires_grad=True)
    assert_registered(OPERATOR, (x, 0.4, draw_seed(x)))


def test_checkpoint_draws_the_same_mask() -> None:
    x = torch.ones(64, 64, requires_grad=True)
    y = checkpoint(lambda x: seeded_dropout(x, 0.5), x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    y = seeded_dropout(x, 0.5).pow(2).sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(TrainingError, match="PEFTREF_OPS=reference"):
        gradient.sum().backward()


def test_transforms_of_functions_get_the_definition() -> None:
    x = torch.randn(4, 6)
    seed = draw_seed(x)
    y = torch.func.vmap(lambda x: seeded_dropout(x, 0.5, seed))(x[None])
    assert torch.equal(y[0], seeded_dropout(x, 0.5, seed))
    assert choose(x) is Form.DIRECT


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_is_random(p: float) -> None:
    """Rate, and products of neighbours: along rows, columns, and the corners of rectangles.

    The last is what a product of a row's and a column's number could give away. Each is a mean of
    nearly independent terms of mean zero; beyond 5 standard errors is one in 10^6.
    """
    torch.manual_seed(1)
    rows, columns = 1024, 768
    k = keep(draw_seed(torch.empty(0)), rows, columns, p).double() - (1 - p)
    products = [k]
    for step in (1, 2, 3, 7, 64):
        products += [k[step:] * k[:-step], k[:, step:] * k[:, :-step]]
        for across in (1, 2, 5):
            corner = k[step:, across:] * k[:-step, :-across]
            products.append(corner * k[step:, :-across] * k[:-step, across:])
    other = keep(draw_seed(torch.empty(0)), rows, columns, p).double() - (1 - p)
    products.append(k * other)
    for product in products:
        error = product.std() / product.numel() ** 0.5
        assert product.mean().abs() < 5 * error
    for sums, count in ((k.sum(0), rows), (k.sum(1), columns)):
        variance = sums.pow(2).mean() / (count * p * (1 - p))
        assert abs(variance - 1) < 5 * (2 / sums.numel()) ** 0.5


def test_rates_at_the_ends() -> None:
    seed = draw_seed(torch.empty(0))
    assert keep(seed, 64, 64, 0.0).all()
    assert keep(seed, 64, 64, 1.0).double().mean() < 0.01
