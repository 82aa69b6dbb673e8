"""Several edits of one linear against the left fold, written out with plain matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

import peftref
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise

ABSOLUTE = 1e-12  # float64; the two sides differ in the order of their sums

LINEAR_EDITS = """
technique: linear_edits
reference: {paper: "made up", url: "https://example.org"}
modules:
  - name: first
    site: {select: ffn.up, port: input}
    function: [{linear: {out: 3, name: a}}, {linear: {name: b, init: "normal(0.3)"}}]
    interaction: {insertion: sequential, integration: add}
  - name: second
    site: {select: ffn.up, port: input}
    function: [{linear: {out: 5, name: a}}, {linear: {name: b, init: "normal(0.3)"}}]
    interaction: {insertion: sequential, integration: add}
  - name: third
    site: {select: ffn.up}
    function: [{linear: {out: 4, name: a}}, {linear: {name: b, init: "normal(0.3)"}}]
    interaction: {insertion: sequential, integration: {kind: scaled_add, scale: 0.5}}
"""


def test_input_edits_of_one_slice_follow_each_other():
    """Two scales of the value's input multiply; they do not add."""
    model = tiny("gpt2", dtype=torch.float64)
    module = model.h[0].attn.c_attn
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    frozen = linear(x, module.weight.mT, module.bias)
    ia3 = "ia3(site='ffn.down', feedforward='attention.value', layers=[0])"
    adapted = randomise(peftref.attach(model, f"{ia3} + {ia3}"))
    scale = torch.stack([t for n, t in adapted.trainable.items() if "c_attn" in n]).prod(0)
    expected = frozen.clone()
    expected[..., 64:] = linear(x * scale, module.weight.mT[64:], module.bias[64:])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=ABSOLUTE)


def test_linear_edits_of_the_streams_are_merged_as_they_run(tmp_path: Path):
    """Sequential additions of linear maps: identity and map, in member order, also the bias."""
    path = tmp_path / "linear_edits.yaml"
    path.write_text(LINEAR_EDITS)
    model = tiny("gpt2", dtype=torch.float64)
    module = model.h[1].mlp.c_fc
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    weight, bias = module.weight.mT.clone(), module.bias.clone()
    adapted = randomise(peftref.attach(model, str(path)))
    trained = adapted.trainable.items()
    t = {n.rpartition("c_fc.linear_edits.")[2]: v for n, v in trained if "h.1" in n}
    x1 = x + x @ t["first.a.weight"].mT @ t["first.b.weight"].mT
    x2 = x1 + x1 @ t["second.a.weight"].mT @ t["second.b.weight"].mT
    y = linear(x2, weight, bias)
    expected = y + 0.5 * y @ t["third.a.weight"].mT @ t["third.b.weight"].mT
    torch.testing.assert_close(module(x), expected, rtol=0, atol=ABSOLUTE)
    adapted.merge()
    torch.testing.assert_close(module(x), expected, rtol=0, atol=ABSOLUTE)


def test_a_gate_on_cross_attention_averages_over_what_it_reads():
    """Keys and values come from the encoder: its padding mask holds, so padding is unseen."""
    model = tiny("t5", "seq2seq_lm", dtype=torch.float64)
    batch = inputs("t5", "seq2seq_lm", batch=1)
    adapted = peftref.attach(model, "gate(lora(rank=2, site='cross_attention.{key,value}'))")
    randomise(adapted)
    padded = dict(batch)
    padded["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 3))
    padded["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 3))
    alone, with_padding = model(**batch).logits, model(**padded).logits
    torch.testing.assert_close(with_padding, alone, rtol=0, atol=1e-10)


def test_disabled_is_the_backbone_also_while_merged():
    model, batch = tiny("bert"), inputs("bert")
    before = model(**batch).last_hidden_state
    adapted = randomise(peftref.attach(model, "lora(rank=2)"))
    adapted.merge()
    merged = model(**batch).last_hidden_state
    with adapted.disabled():
        assert torch.equal(model(**batch).last_hidden_state, before)
    assert torch.equal(model(**batch).last_hidden_state, merged)


@pytest.mark.parametrize("expression", ["prune(lora, criterion='magnitude', keep=0.5)"])
def test_a_failed_set_up_leaves_the_model_as_it_was(expression: str):
    model = tiny("gpt2")
    keys, kind = list(model.state_dict()), type(model)
    with pytest.raises(peftref.PeftRefError, match=r"score .* is zero"):
        peftref.attach(model, expression)
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert all(parameter.requires_grad for parameter in model.parameters())
