"""Techniques on weights, biases and activations equal huggingface/peft's, in float64."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from tests.parity.peft_pairs import attach_both, gradients, logits

# The same modules, in our roles and as PEFT matches paths.
SITES = {
    "bert": [("attention.{query,value}", ["query", "value"]),
             ("{attention,ffn}.*", r".*encoder.*(query|key|value|dense)")],
    "llama": [("attention.{query,value}", ["q_proj", "v_proj"]),
              ("{attention,ffn}.*", r".*(q|k|v|o|gate|up|down)_proj")],
    "t5": [("attention.{query,value}", r".*SelfAttention\.(q|v)"),
           ("{attention,cross_attention,ffn}.*", r".*(\.(q|k|v|o)|wi|wo)")],
}
# PEFT adapts the fused projection of GPT-2 as one linear.
FUSED = [("module:.*c_attn", ["c_attn"]),
         ("module:.*(c_attn|c_proj|c_fc)", ["c_attn", "c_proj", "c_fc"])]

LOW_RANK = {
    "lora": ("rank=4, alpha=6", lambda to, **kw: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=to, **kw)),
    "rslora": ("rank=4, alpha=6", lambda to, **kw: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=to, use_rslora=True, **kw)),
    "dora": ("rank=4, alpha=6", lambda to, **kw: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=to, use_dora=True, **kw)),
    "vera": ("rank=6", lambda to, **kw: peft.VeraConfig(r=6, target_modules=to, **kw)),
}
OTHERS = {
    "loha": ("rank=4, alpha=6", lambda to: peft.LoHaConfig(r=4, alpha=6, target_modules=to)),
    "lokr": ("rank=2, alpha=5", lambda to: peft.LoKrConfig(r=2, alpha=5, target_modules=to)),
    "oft": ("block=8", lambda to: peft.OFTConfig(
        r=0, oft_block_size=8, use_cayley_neumann=False, target_modules=to)),
}
LOKR = [
    ("rank=1, alpha=1, factor=4, decompose_both=True", {"r": 1, "alpha": 1, "decompose_factor": 4,
                                                        "decompose_both": True}),
    ("rank=1, alpha=3, decompose_both=True", {"r": 1, "alpha": 3, "decompose_both": True}),
    ("rank=2, alpha=5, factor=2", {"r": 2, "alpha": 5, "decompose_factor": 2}),
    ("rank=2, alpha=5, factor=8", {"r": 2, "alpha": 5, "decompose_factor": 8}),
    ("rank=2, alpha=5, factor=12", {"r": 2, "alpha": 5, "decompose_factor": 12}),
    ("rank=8, alpha=5, factor=16", {"r": 8, "alpha": 5, "decompose_factor": 16}),
]
IA3 = {
    "bert": ("", r".*(key|value|layer\.\d+\.output\.dense)", r".*layer\.\d+\.output\.dense"),
    "llama": ("", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": ("", ["k", "v", "wo"], ["wo"]),
    "gpt2": ("site='module:.*c_attn', feedforward='module:.*mlp.c_proj'",
             r".*(c_attn|mlp\.c_proj)", r".*mlp\.c_proj"),
}
NORMS = {"bert": ["LayerNorm"], "llama": r".*(layernorm|norm)", "t5": r".*layer_norm",
         "gpt2": r".*ln_(1|2|f)"}


def _cases():
    for technique, (arguments, config) in {**LOW_RANK, **OTHERS}.items():
        for family, sites in SITES.items():
            for site, to in sites:
                yield pytest.param(family, f"{technique}({arguments}, site='{site}')", config(to),
                                   id=f"{technique}-{family}-{site}")
    for technique, (arguments, config) in LOW_RANK.items():
        for site, to in FUSED:
            yield pytest.param("gpt2", f"{technique}({arguments}, site='{site}')",
                               config(to, fan_in_fan_out=True), id=f"{technique}-gpt2-{site}")
    for arguments, own in LOKR:
        config = peft.LoKrConfig(target_modules=["query", "intermediate.dense"], **own)
        site = "{attention,ffn}.{query?,up?}"
        yield pytest.param("bert", f"lokr({arguments}, site='{site}')", config,
                           id=f"lokr-{arguments}")
    for family, (arguments, to, feedforward) in IA3.items():
        config = peft.IA3Config(target_modules=to, feedforward_modules=feedforward,
                                fan_in_fan_out=family == "gpt2")
        yield pytest.param(family, f"ia3({arguments})", config, id=f"ia3-{family}")
    for family, to in NORMS.items():
        yield pytest.param(family, "ln_tuning", peft.LNTuningConfig(target_modules=to),
                           id=f"ln_tuning-{family}")


@pytest.mark.parametrize(("family", "expression", "config"), list(_cases()))
def test_equals_peft(family: str, expression: str, config: peft.PeftConfig) -> None:
    """Same logits, same gradient of every trained tensor, same logits after merging."""
    pair = attach_both(family, expression, config)
    model = pair.ours.model
    expected = logits(pair.theirs, pair.batch)
    with pair.ours.disabled():
        assert (logits(model, pair.batch) - expected).abs().max() > 1e-3
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(logits(model, pair.batch), expected, **close)
    theirs = gradients(pair.theirs, pair.batch, {n: pair.parameter(n) for n in pair.names})
    for name, gradient in gradients(model, pair.batch, pair.ours.trainable).items():
        torch.testing.assert_close(gradient, theirs[name].view(gradient.shape), **close, msg=name)
    pair.ours.merge()
    pair.theirs.merge_adapter()
    torch.testing.assert_close(logits(model, pair.batch), expected, **close)
    torch.testing.assert_close(logits(pair.theirs, pair.batch), expected, **close)


def test_the_default_of_peft_for_oft_rotates_the_other_way() -> None:
    """Its truncated series approximates the inverse of the exact branch, which we compute."""
    errors = []
    for sign in (1, -1):
        config = peft.OFTConfig(r=0, oft_block_size=8, target_modules=["query", "value"])
        pair = attach_both("bert", "oft(block=8)", config)
        with torch.no_grad():
            for name, tensor in pair.ours.trainable.items():
                tensor.mul_(0.1)  # the series is good for small angles only
                pair.parameter(name).copy_(sign * tensor)
        errors.append((logits(pair.ours.model, pair.batch) - logits(pair.theirs, pair.batch))
                      .abs().max().item())
    same_sign, negated = errors
    assert negated < 1e-2 * same_sign
