"""Prefix and prompt tuning equal huggingface/peft's, or their definition where PEFT differs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftref
from tests.backbone.tiny import inputs, tiny
from tests.parity.peft_pairs import TASKS, gradients, logits, peft_model, perturb

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
PEFT_TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
LENGTH, HIDDEN = 3, 12
# PEFT gives T5 a prefix in the self-attention of the decoder only.
DECODER_PREFIX = {
    "technique": "prefix", "reference": {"paper": "Li and Liang 2021", "url": "https://arxiv.org"},
    "modules": [{
        "name": "prefix",
        "site": {"select": "attention", "port": "keys_values", "stack": "decoder"},
        "function": {"tokens": {"length": LENGTH}},
        "interaction": {"insertion": "parallel", "integration": "concat"}}]}


def backbone(family: str) -> PreTrainedModel:
    if family != "t5":
        return tiny(family, TASKS[family], dtype=torch.float64)
    # PEFT splits the stacked prefix so that T5's second layer gets the first one's rows again,
    # and assumes heads of width d / H: one layer, and such heads.
    model = tiny(family, TASKS[family], dtype=torch.float64, d_kv=8, num_layers=1)
    # PEFT's prefix stands before the text and gets its relative bias; ours has no position.
    bias = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
    nn.init.zeros_(bias.weight)
    return model


def padded(family: str) -> dict[str, Tensor]:
    """Inputs of which one row has padding on the right."""
    batch = inputs(family, TASKS[family])
    batch["attention_mask"][1, -2:] = 0
    return batch


def shifted(family: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text at positions from ``LENGTH`` on, to where PEFT's prefix moves it."""
    if family == "t5":
        return dict(batch)
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None] + LENGTH}


def theirs_by_ours(ours: peftref.Adapted, theirs: nn.Module) -> dict[str, Tensor]:
    """Return views of PEFT's tensors under our names; layers lie side by side in PEFT's."""
    encoder = theirs.prompt_encoder["default"]
    mlp = hasattr(encoder, "transform")
    stacked = encoder.transform[2].weight if mlp else encoder.embedding.weight.mT
    views: dict[str, Tensor] = {}
    for name, tensor in ours.trainable.items():
        if name.endswith("rows.tokens"):
            views[name] = encoder.embedding.weight
        elif ".down.down." in name:
            views[name] = getattr(encoder.transform[0], name.rpartition(".")[2])
        else:
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            wide = tensor.shape[0] if mlp else tensor.shape[1]
            part = slice(layer * wide, (layer + 1) * wide)
            if name.endswith("up.bias"):
                views[name] = encoder.transform[2].bias[part]
            else:
                views[name] = stacked[part] if mlp else stacked[part].mT
    return views


@pytest.mark.parametrize(("family", "mlp"), [
    ("bert", False), ("gpt2", False), ("llama", False), ("t5", False), ("bert", True),
    ("gpt2", True)])
def test_prefix_tuning_with_the_text_at_the_positions_of_peft(family: str, mlp: bool) -> None:
    model = backbone(family)
    theirs = peft_model(copy.deepcopy(model), peft.PrefixTuningConfig(
        task_type=PEFT_TASKS[family], num_virtual_tokens=LENGTH, prefix_projection=mlp,
        encoder_hidden_size=HIDDEN)).double()
    how = f"reparameterisation=mlp, hidden={HIDDEN}" if mlp else "init='normal(1.0)'"
    expression = f"prefix_tuning(length={LENGTH}, {how})"
    ours = peftref.attach(model, DECODER_PREFIX if family == "t5" else expression)
    perturb(ours, 1.0)
    own = ours.trainable
    with torch.no_grad():
        for name, view in theirs_by_ours(ours, theirs).items():
            view.copy_(own[name])
    count = sum(p.numel() for n, p in theirs.named_parameters() if "prompt_encoder" in n)
    assert ours.plan.trainable_parameters == count
    for batch in (inputs(family, TASKS[family]), padded(family)):
        torch.testing.assert_close(
            logits(model, shifted(family, batch)), logits(theirs, batch), **CLOSE)
    batch = padded(family)
    encoder = dict(theirs.prompt_encoder["default"].named_parameters())
    found = gradients(theirs, batch, encoder)
    with torch.no_grad():
        for name, parameter in encoder.items():
            parameter.copy_(found[name])  # to see the gradients under our names
    expected = theirs_by_ours(ours, theirs)
    for name, gradient in gradients(model, shifted(family, batch), own).items():
        torch.testing.assert_close(gradient, expected[name].detach(), **CLOSE, msg=name)


def test_a_prefix_is_a_gated_addition() -> None:
    """``(1 - g) Attn(q, K, V) + g softmax(q P_K^T / sqrt(d)) P_V``, He et al. 2022.

    One layer of Llama by hand, with grouped keys and values and rotary positions.
    """
    model = tiny("llama", "features", dtype=torch.float64, num_hidden_layers=1)
    ours = peftref.attach(model, f"prefix_tuning(length={LENGTH}, init='normal(1.0)')")
    (rows,) = ours.trainable.values()
    seen: dict[str, Tensor] = {}
    attention = model.layers[0].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=kwargs["hidden_states"],
                                            cos=kwargs["position_embeddings"][0],
                                            sin=kwargs["position_embeddings"][1]),
        with_kwargs=True)
    model(input_ids=inputs("llama")["input_ids"])
    x, heads, groups, width = seen["x"], 4, 2, 8

    def split(linear: nn.Module, count: int) -> Tensor:
        return (x @ linear.weight.T).unflatten(-1, (count, width)).transpose(1, 2)

    def rotate(value: Tensor) -> Tensor:
        half = torch.cat((-value[..., width // 2:], value[..., : width // 2]), -1)
        return value * seen["cos"][:, None] + half * seen["sin"][:, None]

    def repeat(value: Tensor) -> Tensor:
        return value.repeat_interleave(heads // groups, 1)

    query = rotate(split(attention.q_proj, heads)) / width**0.5
    scores = query @ repeat(rotate(split(attention.k_proj, groups))).mT
    scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -torch.inf)
    values = repeat(split(attention.v_proj, groups))
    keys, learned = rows.view(1, LENGTH, 2, groups, width).permute(2, 0, 3, 1, 4)
    extra = query @ repeat(keys).mT
    own, other = scores.exp().sum(-1, keepdim=True), extra.exp().sum(-1, keepdim=True)
    gate = other / (own + other)
    mixed = (1 - gate) * (scores.softmax(-1) @ values) + gate * (
        extra.softmax(-1) @ repeat(learned))
    torch.testing.assert_close(seen["mixed"], mixed.transpose(1, 2).flatten(2), **CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_prompt_tuning(family: str) -> None:
    """PEFT gives logits for the prompt too; those of real tokens are compared, and the loss."""
    model = backbone(family)
    theirs = peft_model(copy.deepcopy(model), peft.PromptTuningConfig(
        task_type=PEFT_TASKS[family], num_virtual_tokens=LENGTH,
        num_transformer_submodules=1)).double()
    ours = peftref.attach(model, f"prompt_tuning(length={LENGTH})")
    perturb(ours, 1.0)
    (rows,) = ours.trainable.values()
    their_rows = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        their_rows.copy_(rows)
    batch = padded(family)
    target = "decoder_input_ids" if family == "t5" else "input_ids"
    real = torch.ones_like(batch[target]) if family == "t5" else batch["attention_mask"]
    batch["labels"] = batch[target].masked_fill(real == 0, -100)
    if family == "t5":
        del batch[target]
    mine, other = model(**batch), theirs(**batch)
    skipped = 0 if family == "t5" else LENGTH
    kept = real.bool()
    torch.testing.assert_close(mine.logits[kept], other.logits[:, skipped:][kept], **CLOSE)
    torch.testing.assert_close(mine.loss, other.loss, **CLOSE)
    (gradient,) = torch.autograd.grad(mine.loss, [rows])
    (expected,) = torch.autograd.grad(other.loss, [their_rows])
    torch.testing.assert_close(gradient, expected, **CLOSE)


def test_a_prompt_of_an_encoder_stands_behind_its_first_token() -> None:
    """PEFT puts it before, and BERT's pooler then reads a learned row instead of the text."""
    bare = tiny("bert", "classification", dtype=torch.float64)
    model = copy.deepcopy(bare)
    ours = peftref.attach(model, f"prompt_tuning(length={LENGTH})")
    perturb(ours, 1.0)
    (rows,) = ours.trainable.values()
    batch = padded("bert")
    batch["token_type_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    words = bare.bert.embeddings.word_embeddings(batch["input_ids"])

    def front(value: Tensor, new: Tensor) -> Tensor:
        return torch.cat((value[:, :1], new.expand(2, *new.shape[-(value.dim() - 1):]),
                          value[:, 1:]), 1)

    expected = bare(
        inputs_embeds=front(words, rows),
        attention_mask=front(batch["attention_mask"], torch.ones(LENGTH, dtype=torch.long)),
        token_type_ids=front(batch["token_type_ids"], torch.zeros(LENGTH, dtype=torch.long)))
    torch.testing.assert_close(logits(model, batch), expected.logits, **CLOSE)
