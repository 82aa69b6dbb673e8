"""Property 8: what matches nothing, has no effect or cannot be honoured is refused with a hint."""

from __future__ import annotations

import pytest

import peftref
from peftref.backbone.hf import site_table
from peftref.compiler import compile_table
from tests.backbone.tiny import tiny

REFUSED = {
    # The expression, and what the message must say.
    "lora(site='attention.qurey')": "Did you mean 'attention.query'",
    "lora(site='attention.{query,qurey}')": "Did you mean 'attention.query'",
    "lora(rnak=4)": "rank",
    "loraa": "Did you mean 'lora'",
    "lora(rank=0)": "from 1 to 1024",
    "lora(layers=[0, 7])": "layer 7 does not exist",
    "lora(layers='5:')": "layer 5 does not exist|no layer",
    "lora(site='head', layers=[0])": "outside the layers",
    "lora(site='cross_attention?.query')": "inserted nowhere",
    "lora(site='module:.*no_such')": "matches no whole module path",
    "lora(site='embedding.tokens')": "no input stream to read; write its output sequentially",
    "prefix_tuning(hidden=32)": "hidden",
    "prefix_tuning(reparameterisation='mlp', init='normal(0.1)')": "init",
    "share(lora, tensors=['donw.*'])": "'donw.*' matches no tensor",
    "share(dora)": "starts at values of the backbone",
    "share(prompt_tuning)": "starts at values of the backbone",
    "mix(lora, share=['donw.*'])": "'donw.*', which is no tensor",
    "mix(lora, copies=1)": "greater than 1",
    "mix(lora, copeis=2)": "copies",
    "mix(mix(lora, copies=2), copies=3)": "already|mixed or pruned",
    "mix(prune(lora, criterion='er'), copies=2)": "mixed or pruned",
    "prune(ia3, criterion='er')": "no matrix to prune",
    "prune(lora, keep=0.0)": "greater than 0",
    "prune(lora, kepe=0.5)": "keep",
    "gate(gate(lora))": "gated already",
    "gate(prompt_tuning(length=2), lora)": "reads token ids",
    "loha(site='norm.final')": "product of matrices has no activation form",
    "loha(site='ffn')": "product of matrices has no activation form",
    "dora + dora": "both normalise",
    "oft(block=5)": "valid blocks: 2, 4, 8, 16, 32",
    "oft(block=8) + lora(dropout=0.1)": "leave out dropout",
    "oft(block=8, site='norm.final')": "only the weight of a linear site",
    "dora(site='ffn')": "weight",
    "lokr(site='embedding.tokens')": "no input stream",
    "lokr(factor=0)": "at least 1",
    "bitfit(site='attention')": "none has port 'bias'",
    "prefix_tuning(site='ffn')": "none has port 'keys_values'",
}


@pytest.fixture(scope="module")
def table():
    return site_table(tiny("gpt2", "causal_lm"))


@pytest.mark.parametrize("expression", REFUSED)
def test_refused_with_a_hint(expression: str, table: object):
    with pytest.raises(peftref.PeftRefError, match=REFUSED[expression]):
        compile_table(peftref.load(expression), table)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("expression", ["bitfit", "bitfit(site='attention.query')"])
def test_no_bias_to_train(expression: str):
    """Llama's linears have none."""
    with pytest.raises(peftref.PeftRefError, match="port 'bias'"):
        peftref.compile(expression, tiny("llama"))
