"""Prefixes in attention, whatever computes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftref
from peftref.errors import BackboneError
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise
from tests.lowering.test_class_swap import TASK, logits

PADDING = 2


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", list(TASK))
def test_eager_equals_sdpa(family: str, padded: bool):
    given = inputs(family, TASK[family])
    left = family in ("gpt2", "llama")
    if not padded:
        del given["attention_mask"]
    else:
        rows = slice(None, PADDING) if left else slice(-PADDING, None)
        given["attention_mask"][0, rows] = 0
    found: list[Tensor] = []
    for implementation in ("eager", "sdpa"):
        model = tiny(family, TASK[family], dtype=torch.float64)
        model.set_attn_implementation(implementation)
        frozen = logits(model, given)
        adapted = randomise(peftref.attach(model, "prefix_tuning(length=3)"))
        found.append(logits(model, given))
        assert not torch.allclose(found[-1][-1], frozen[-1])
        adapted.detach()
        assert model.config._attn_implementation == implementation
        # A bare eager Llama gives NaN where a query sees padding only.
        torch.testing.assert_close(logits(model, given), frozen, rtol=0, atol=0, equal_nan=True)
    eager, sdpa = (value[:, PADDING:] if left and padded else value for value in found)
    torch.testing.assert_close(eager, sdpa, rtol=0, atol=1e-6)  # Llama's own softmax is float32


def by_hand(model: torch.nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """BERT's self-attention with learned rows before its keys and values, written out."""
    batch, _, width = x.shape
    heads = 4
    own = rows[None].expand(batch, -1, -1)

    def split(value: Tensor) -> Tensor:
        return value.unflatten(-1, (heads, width // heads)).transpose(1, 2)

    query = split(model.query(x))
    key = split(torch.cat((own[..., :width], model.key(x)), 1))
    value = split(torch.cat((own[..., width:], model.value(x)), 1))
    scores = (query @ key.mT) / (width // heads) ** 0.5
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)


def test_a_prefix_is_rows_of_keys_and_values():
    model = tiny("bert", dtype=torch.float64)
    adapted = randomise(peftref.attach(model, "prefix_tuning(length=3, layers=[1])"))
    (rows,) = adapted.trainable.values()
    attention = model.encoder.layer[1].attention.self
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = by_hand(attention, x, rows.detach())
    torch.testing.assert_close(attention(x)[0], expected, rtol=0, atol=1e-12)


def test_another_implementation_after_attaching_is_noticed():
    """Else the prefix would be lost without a word."""
    model, given = tiny("bert"), inputs("bert")
    frozen = model(**given).last_hidden_state
    adapted = peftref.attach(model, "prefix_tuning(length=3)")
    model.set_attn_implementation("eager")
    with pytest.raises(BackboneError, match="attention implementation was changed"):
        model(**given)
    adapted.detach()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**given).last_hidden_state, frozen)
