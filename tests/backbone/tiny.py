"""Tiny random backbones: width 32, 2 layers, 4 heads; nothing is downloaded."""

from __future__ import annotations

from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.backbone.tiny_decoders import CONFIGS as _MORE_DECODERS
from tests.backbone.tiny_encoders import CONFIGS as _MORE_ENCODERS
from tests.backbone.tiny_encoders import IMAGES, PAIRS, SPEECH, TOWERS

__all__ = ["ALL", "ALL_DECODERS", "DECODERS", "ENCODERS", "FAMILIES", "OTHERS", "TWO_STACKS",
           "Task", "inputs", "tiny", "tiny_config"]

Task = Literal["features", "classification", "causal_lm", "seq2seq_lm"]
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("gpt2", "gpt_neox", "llama", "qwen3")
FAMILIES = (*ENCODERS, *DECODERS, "t5")
"""A family of each kind, for what takes long; ``ALL`` is for what is quick."""
ALL_DECODERS = (*DECODERS, *_MORE_DECODERS)
OTHERS = tuple(_MORE_ENCODERS)
ALL = (*FAMILIES, *_MORE_DECODERS, *OTHERS)
TWO_STACKS = ("t5", *PAIRS, *SPEECH)

VOCABULARY = 97
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop",
             "attn_pdrop", "dropout", "attention_dropout", "dropout_rate", "hidden_dropout",
             "activation_dropout", "classifier_dropout_prob", "embedding_dropout", "mlp_dropout")
_USUAL: dict[str, object] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48, "max_position_embeddings": 64}
_GROUPED: dict[str, object] = {**_USUAL, "num_key_value_heads": 2}
_OWN: dict[str, dict[str, object]] = {
    "bert": _USUAL,
    "roberta": _USUAL,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
                   "max_position_embeddings": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64,
             "bos_token_id": 1, "eos_token_id": 1},
    "gpt_neox": _USUAL,
    "llama": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 12, "d_ff": 48,
           "decoder_start_token_id": 0},
    **_MORE_DECODERS,
    **_MORE_ENCODERS,
}
_TASKS = {
    "features": AutoModel,
    "classification": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    """Return a small configuration without dropout; Qwen3 and T5 have heads wider than d / H."""
    known = AutoConfig.for_model(family)
    dropout = {key: 0.0 for key in _DROPOUTS if hasattr(known, key)}
    own = {"vocab_size": VOCABULARY, "pad_token_id": 0, **dropout, **_OWN[family], **changes}
    return AutoConfig.for_model(family, **own)


def tiny(family: str, task: Task = "features", *, num_labels: int = 3, seed: int = 0,
         dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """Return a random model of ``family`` in evaluation mode.

    Biases and norms are made random too (they start at 0 and 1), so that no part is without
    effect.
    """
    config = tiny_config(family, num_labels=num_labels, **changes)
    if task == "causal_lm" and family in ("bert", "roberta"):
        config.is_decoder = True
    torch.manual_seed(seed)
    own = {"classification": AutoModelForImageClassification} if family in IMAGES else {}
    own |= {"seq2seq_lm": AutoModelForSpeechSeq2Seq} if family in SPEECH else {}
    model = (_TASKS | own)[task].from_config(config)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped products know no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3.0)  # the initial 0.02 hides effects below rounding
    return model.to(dtype=dtype).eval()


def inputs(family: str, task: Task = "features", *, batch: int = 2, length: int = 7,
           seed: int = 1) -> dict[str, torch.Tensor]:
    """Return what ``tiny(family, task)`` takes, without padding; ids for the decoder too."""
    generator = torch.Generator().manual_seed(seed)
    if family in IMAGES:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    batch_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in TOWERS:
        pixels = torch.randn(batch, 3, 16, 16, generator=generator)
        batch_inputs["pixel_values"] = pixels
    if family in SPEECH:
        batch_inputs = {"input_features": torch.randn(batch, 8, 14, generator=generator)}
    if family in TWO_STACKS and task in ("features", "seq2seq_lm"):
        batch_inputs["decoder_input_ids"] = torch.randint(
            3, VOCABULARY, (batch, length - 2), generator=generator)
    if family in TWO_STACKS and task == "classification":
        ids[:, -1] = 1 if family == "t5" else 2  # classified at the end-of-sequence token
    return batch_inputs
