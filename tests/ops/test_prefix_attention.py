"""Attention beside a prefix against the rows laid side by side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftref.ops.prefix_attention import op
from peftref.ops.prefix_attention.op import OPERATOR, prefix_attention
from tests.ops.agreement import assert_forms_agree, assert_gradients, assert_registered, run


def _arguments(
    batch: int, heads: int, groups: int, tokens: int, rows: int, *, shared: bool
) -> list[object]:
    own, width = 1 if shared else batch, 8
    query = torch.randn(batch, heads * groups, tokens, width)
    prefix = [torch.randn(own, heads, rows, width) for _ in range(2)]
    # Laid out as models have it: heads next to each other, seen from the side.
    key, value = (torch.randn(batch, tokens, heads, width).transpose(1, 2) for _ in range(2))
    tensors = [t.requires_grad_() for t in (query, prefix[0], key, prefix[1], value)]
    return [*tensors, 0.3]


@settings(max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 40), st.integers(1, 9),
    st.booleans(),
)  # fmt: skip
def test_all_forms_agree(
    batch: int, heads: int, groups: int, tokens: int, rows: int, shared: bool
) -> None:
    arguments = _arguments(batch, heads, groups, tokens, rows, shared=shared)
    assert_forms_agree(OPERATOR, arguments, 2e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared: bool) -> None:
    assert_gradients(OPERATOR, _arguments(2, 1, 2, 3, 2, shared=shared))


def test_registered() -> None:
    assert_registered(OPERATOR, _arguments(2, 2, 2, 5, 3, shared=True))


@pytest.mark.parametrize("boolean", [True, False])
def test_a_mask_hides_tokens_and_not_the_prefix(boolean: bool) -> None:
    """Against the causal form without the hidden tokens."""
    query, prefix_key, key, prefix_value, value, scale = _arguments(2, 2, 2, 6, 3, shared=True)
    seen = torch.ones(6, 8, dtype=torch.bool).tril()
    seen[:, 6:] = False
    mask = seen if boolean else torch.zeros(6, 8).masked_fill(~seen, -torch.inf)

    def padded(q: Tensor, pk: Tensor, k: Tensor, pv: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, 2), value=9.0) for t in (k, v))
        assert isinstance(scale, float)
        return prefix_attention(q, (pk, k), (pv, v), mask, scale=scale)

    def causal(*tensors: Tensor) -> Tensor:
        return OPERATOR.reference(*tensors, scale)

    tensors = [query, prefix_key, key, prefix_value, value]
    for mine, right in zip(run(padded, tensors), run(causal, tensors), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("groups", [1, 2])
def test_flash_kernels_on_a_gpu(groups: int) -> None:
    arguments = _arguments(2, 3, groups, 70, 5, shared=True)
    tensors = [
        a.detach().to("cuda", torch.float16).requires_grad_()
        for a in arguments
        if isinstance(a, Tensor)
    ]
    exact = [t.detach().double().cpu().requires_grad_() for t in tensors]
    found = run(OPERATOR, [*tensors, 0.3])
    right = run(OPERATOR.reference, [*exact, 0.3])
    for mine, other in zip(found, right, strict=True):
        assert (mine.cpu() - other).abs().max() < 5e-3 * other.abs().max()


def test_beside_a_prefix_on_other_devices() -> None:
    """Where there is no kernel for two blocks, the causal mask is made."""
    query, prefix_key, key, prefix_value, value, scale = _arguments(2, 2, 2, 6, 3, shared=True)
    tensors = [query, prefix_key, key, prefix_value, value]

    def one_block(q: Tensor, pk: Tensor, k: Tensor, pv: Tensor, v: Tensor) -> Tensor:
        assert isinstance(scale, float)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "_has_kernel", lambda _: False)
            return prefix_attention(q, (pk, k), (pv, v), scale=scale, causal=True)

    right = run(lambda *t: OPERATOR.reference(*t, scale), tensors)
    for mine, other in zip(run(one_block, tensors), right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_without_a_mask_all_see_all() -> None:
    query, prefix_key, key, prefix_value, value, _ = _arguments(2, 2, 1, 5, 3, shared=False)
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    assert isinstance(value, Tensor)
    assert isinstance(prefix_key, Tensor)
    assert isinstance(prefix_value, Tensor)
    scores = query @ torch.cat((prefix_key, key), 2).mT / 8**0.5
    right = scores.softmax(-1) @ torch.cat((prefix_value, value), 2)
    mine = prefix_attention(query, (prefix_key, key), (prefix_value, value))
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
