"""Parameter counts: published numbers, and formulas over random shapes."""

from __future__ import annotations

import math
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedModel, RobertaConfig

import peftref
from peftref.backbone.hf import meta_model

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096}


@cache
def published(name: str) -> PreTrainedModel:
    """Return BERT-base, RoBERTa-base or RoBERTa-large without weights."""
    config = {"bert-base": BertConfig,
              "roberta-base": lambda: RobertaConfig(vocab_size=50265),
              "roberta-large": lambda: RobertaConfig(vocab_size=50265, **LARGE)}[name]()
    return meta_model(config, "classification", 2)


def count(spec: str, model: PreTrainedModel) -> int:
    return peftref.compile(spec, model).trainable_parameters


@pytest.mark.parametrize("model", ["bert-base", "roberta-base"])
@pytest.mark.parametrize(("expression", "expected"), [
    ("pfeiffer_adapter(bottleneck=48)", 894_528),  # printed by UniPELT as 895K
    ("lora(rank=8)", 294_912),  # 295K
    ("prefix_tuning(length=10)", 184_320),  # 184K
    ("houlsby_adapter(bottleneck=64)", 2_379_264),
    ("ia3", 55_296),
    ("rslora(rank=8)", 294_912),
    ("dora(rank=8)", 294_912 + 12 * 2 * 768),
    ("loha(rank=8)", 2 * 294_912),
    ("prompt_tuning(length=20)", 20 * 768),
    ("vera(rank=256)", 12 * 2 * (256 + 768)),
    ("scaled_parallel_adapter(bottleneck=64)", 2_379_264 // 2),
])
def test_published_counts(model: str, expression: str, expected: int) -> None:
    assert count(expression, published(model)) == expected


def test_adamix_prints_the_count_after_averaging() -> None:
    """0.8M for RoBERTa-large and width 16: one adapter a layer."""
    large = published("roberta-large")
    assert count("houlsby_adapter(bottleneck=16, site=ffn)", large) == 811_392
    down, up = 24 * (16 * 1024 + 16), 24 * (16 * 1024 + 1024)
    assert down + up == 811_392
    assert count("adamix(bottleneck=16, copies=4, share=up)", large) == 4 * down + up
    assert count("adamix(bottleneck=16, copies=4, share=down)", large) == down + 4 * up
    assert count("adamix(bottleneck=16, copies=4, share=none)", large) == 4 * 811_392


@pytest.mark.parametrize("model", ["bert-base", "roberta-base"])
def test_bitfit_counts_the_biases_of_the_backbone(model: str) -> None:
    """About 0.103M; the head is trained too but counted apart."""
    loaded = published(model)
    biases = sum(p.numel() for n, p in loaded.named_parameters()
                 if n.endswith("bias") and not n.startswith("classifier"))
    assert count("bitfit", loaded) == biases
    assert round(biases / 1e6, 3) in (0.102, 0.103)


def test_layer_norms_of_bert_base() -> None:
    assert count("ln_tuning", published("bert-base")) == (2 * 12 + 1) * 2 * 768


@pytest.mark.parametrize("hidden", [64, 512])
def test_prefix_mlp_while_training(hidden: int) -> None:
    """``l d + d m + m + m 2 L d + 2 L d``; deployed ``2 L l d``."""
    length, d, layers = 10, 768, 12
    expected = length * d + d * hidden + hidden + hidden * 2 * layers * d + 2 * layers * d
    expression = f"prefix_tuning(length={length}, reparameterisation=mlp, hidden={hidden})"
    assert count(expression, published("bert-base")) == expected


def test_unipelt_is_its_parts_and_their_gates() -> None:
    bert, gates = published("bert-base"), 12 * 4 * (768 + 1)  # adapter, prefix, query, value
    prefix = "prefix_tuning(length=10, reparameterisation=mlp, hidden=512)"
    parts = count("pfeiffer_adapter(bottleneck=48)", bert) + count("lora(rank=8)", bert)
    assert count("unipelt", bert) == parts + count(prefix, bert) + gates


@st.composite
def shapes(draw: st.DrawFn) -> tuple[PreTrainedModel, int, int, int]:
    """Return a Llama without weights, its width, width of keys and number of layers."""
    head = draw(st.sampled_from([4, 6, 10, 16]))
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    d = heads * head
    layers = draw(st.integers(1, 3))
    config = LlamaConfig(
        vocab_size=11, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, head_dim=head, intermediate_size=draw(st.integers(3, 70)))
    return meta_model(config, "features"), d, groups * head, layers


@settings(max_examples=12)
@given(shapes(), st.integers(1, 12))
def test_low_rank_counts(shape: tuple[PreTrainedModel, int, int, int], rank: int) -> None:
    """On query (d to d) and value (d to kv)."""
    model, d, kv, layers = shape
    pairs = layers * rank * ((d + d) + (d + kv))
    assert count(f"lora(rank={rank})", model) == pairs
    assert count(f"dora(rank={rank})", model) == pairs + layers * (d + kv)
    assert count(f"loha(rank={rank})", model) == 2 * pairs
    assert count(f"vera(rank={rank})", model) == layers * (2 * rank + d + kv)
    assert count(f"prefix_tuning(length={rank})", model) == layers * 2 * rank * kv


@settings(max_examples=12)
@given(shapes(), st.integers(1, 12), st.sampled_from([-1, 1, 2, 3, 4, 8]), st.booleans())
def test_kronecker_counts(shape: tuple[PreTrainedModel, int, int, int], rank: int, factor: int,
                          both: bool) -> None:
    """``C (a, c)``, ``D (b, e)`` with ``a b = d_out``, ``c e = d_in``; long ones in two factors."""
    model, d, kv, layers = shape

    def split(width: int) -> tuple[int, int]:
        if factor > 0 and width % factor == 0:
            return factor, width // factor
        fitting = [(a, width // a) for a in range(1, width + 1)
                   if width % a == 0 and a <= width // a and (factor < 0 or a <= factor)]
        return max(fitting)

    total = 0
    for d_out in (d, kv):
        (a, b), (c, e) = split(d_out), split(d)
        total += rank * (a + c) if both and rank < max(a, c) / 2 else a * c
        total += rank * (b + e) if rank < max(b, e) / 2 else b * e
    expression = f"lokr(rank={rank}, factor={factor}, decompose_both={both})"
    assert count(expression, model) == layers * total


@settings(max_examples=12)
@given(shapes(), st.data())
def test_rotation_counts(shape: tuple[PreTrainedModel, int, int, int], data: st.DataObject
                         ) -> None:
    """``d / b`` blocks of ``b (b - 1) / 2`` entries on the input of query and of value."""
    model, d, _, layers = shape
    block = data.draw(st.sampled_from([b for b in range(2, d + 1) if d % b == 0]))
    assert count(f"oft(block={block})", model) == 2 * layers * (d // block) * math.comb(block, 2)


def test_slices_of_a_fused_projection_are_counted_apart() -> None:
    """GPT-2: query and value are thirds of one linear (d to 3 d)."""
    model = meta_model(GPT2Config(n_embd=768, n_layer=12, n_head=12), "causal_lm")
    assert count("lora(rank=8)", model) == 294_912
    assert count("lora(rank=8, site='module:.*c_attn')", model) == 12 * 8 * (768 + 3 * 768)
