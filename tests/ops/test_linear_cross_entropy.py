"""Chunked cross-entropy against torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from peftref.ops.linear_cross_entropy import cpu
from peftref.ops.linear_cross_entropy.op import OPERATOR, linear_cross_entropy
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered


def arguments(
    rows: int, classes: int, *, bias: bool = True, smoothing: float = 0.1, mean: bool = True
) -> list[object]:
    hidden, weight = torch.randn(rows, 6), torch.randn(classes, 6)
    shift = torch.randn(classes).requires_grad_() if bias else None
    labels = torch.randint(0, classes, (rows,))
    labels[1::3] = -100
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    return [hidden, weight, shift, labels, -100, smoothing, mean, (True, True, bias)]


@settings(max_examples=20)
@given(
    st.integers(1, 200), st.integers(1, 30), st.booleans(), st.sampled_from([0.0, 0.2]),
    st.booleans(),
)
def test_all_forms_agree(
    rows: int, classes: int, bias: bool, smoothing: float, mean: bool
) -> None:
    drawn = arguments(rows, classes, bias=bias, smoothing=smoothing, mean=mean)
    assert_forms_agree(OPERATOR, drawn, 2e-5)


def test_more_chunks_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_FEWEST", 7)
    monkeypatch.setattr(cpu, "_ENTRIES", 1)
    assert_forms_agree(OPERATOR, arguments(40, 9), 2e-5)


def test_gradients() -> None:
    assert_gradients(OPERATOR, arguments(5, 4))


def test_registered() -> None:
    assert_registered(OPERATOR, arguments(5, 4))


def test_only_what_is_wanted_is_computed_and_kept() -> None:
    hidden, weight, _, labels, *_ = arguments(12, 5)
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    assert isinstance(labels, Tensor)
    kept: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: kept.append(t.numel()), lambda _: hidden):
        linear_cross_entropy(hidden.view(3, 4, 6), weight.detach(), None, labels.view(3, 4))
    assert sum(kept) == hidden.numel()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, None, labels)
    torch.testing.assert_close(loss, cross_entropy(linear(hidden, weight), labels))


def test_no_label_counts() -> None:
    """As torch: not a number, and no gradient."""
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6)
    loss = linear_cross_entropy(hidden, weight, None, torch.full((4,), -100))
    assert loss.isnan()
    assert not torch.autograd.grad(loss, hidden)[0].any()


def test_large_logits_in_16_bits() -> None:
    hidden, weight = torch.randn(40, 6).bfloat16().requires_grad_(), 30 * torch.randn(500, 6)
    weight = weight.bfloat16()
    labels = torch.randint(0, 500, (40,))
    loss = linear_cross_entropy(hidden, weight, None, labels)
    right = cross_entropy(linear(hidden, weight).float(), labels)
    torch.testing.assert_close(loss, right)
    mine, exact = (torch.autograd.grad(each, hidden)[0].float() for each in (loss, right))
    # The gradient of the logits and the product are rounded to bfloat16.
    assert (mine - exact).abs().max() < 2**-6 * exact.abs().max()
