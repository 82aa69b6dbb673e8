"""Prefixes where attention is computed in other ways, against keys and values put in the cache."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import peftref
from peftref.backbone.family import read_family
from peftref.backbone.hf import site_table
from peftref.compiler import compile_table
from peftref.errors import BackboneError
from tests.backbone.test_decoders import logits, make
from tests.backbone.tiny import ALL_DECODERS
from tests.lowering.randomised import randomise

ROWS, TOKENS = 2, 2  # together within the narrowest window
WITHOUT = ("mamba", "mamba2")
# Bloom's bias counts rows of the cache as tokens, and a prefix as none; DeepSeek stores latents.
OTHER_CACHES = ("bloom", "deepseek_v3")


@pytest.mark.parametrize(
    "variant", [*(f for f in ALL_DECODERS if f not in (*WITHOUT, *OTHER_CACHES)), "falcon-7b"])
def test_a_prefix_is_what_the_cache_holds_of_no_token(variant: str) -> None:
    model, given = make(variant)
    model.config.use_cache = True
    ids = given["input_ids"][:, :TOKENS]
    adapted = randomise(peftref.attach(model, f"prefix_tuning(length={ROWS})"))
    found = logits(model, {"input_ids": ids})
    cache = DynamicCache(config=model.config)
    spans = [s for s in adapted.plan.table if s.role == "attention"]
    for layer, (span, rows) in enumerate(zip(spans, adapted.trainable.values(), strict=True)):
        shape = span.attention
        assert shape is not None
        key, value = rows.detach().split(
            (shape.key_value_heads * shape.head_width,
             shape.row_width - shape.key_value_heads * shape.head_width), -1)
        own = [part.unflatten(-1, (shape.key_value_heads, -1)).transpose(0, 1)[None]
               .expand(len(ids), -1, -1, -1) for part in (key, value)]
        if variant == "falcon":  # it stores a key and value for each query head
            own = [part.repeat_interleave(shape.heads // shape.key_value_heads, 1) for part in own]
        cache.update(*own, layer)
    call = {"attention_mask": torch.ones(len(ids), ROWS + TOKENS, dtype=torch.long)}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        call["position_ids"] = torch.arange(TOKENS).expand(len(ids), -1)
    with adapted.disabled(), torch.no_grad():
        expected = model(input_ids=ids, past_key_values=cache, use_cache=True, **call).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", [f for f in ALL_DECODERS if f not in WITHOUT])
def test_every_token_sees_the_prefix_whatever_its_window(family: str) -> None:
    model, given = make(family)
    frozen = logits(model, given)
    adapted = randomise(peftref.attach(model, "prefix_tuning(length=3)"))
    for chosen in (0, 1):
        with torch.no_grad():
            for layer, rows in enumerate(adapted.trainable.values()):
                rows.mul_(float(layer == chosen)).add_(float(layer == chosen))
        changed = (logits(model, given) - frozen).abs().amax(-1)
        assert bool((changed > 1e-4).all()), chosen
        randomise(adapted)


def test_attention_that_never_takes_the_prefix_is_refused(tmp_path: Path) -> None:
    """A row that promises too much must not lose a prefix without a word."""
    source = """
families: [gptj]
norms: pre
stacks:
  decoder:
    layers: h
    layer: {attention: {module: attn, input: {argument: hidden_states}}}
"""
    (tmp_path / "row.yaml").write_text(source)
    model, given = make("gptj")
    table = site_table(model, read_family(tmp_path / "row.yaml"))
    plan = compile_table(peftref.load("prefix_tuning(length=3)"), table)
    adapted = peftref.attach(model, plan)
    with pytest.raises(BackboneError, match="the prefix had no effect"):
        model(**given)
    adapted.detach()
