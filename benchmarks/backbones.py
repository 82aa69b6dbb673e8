"""Backbones of random weights and the token ids of a step; needs torch and transformers only."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

__all__ = ["FAMILY", "build", "of_shared_weights"]

FAMILY = {"minilm": "bert", "d1024": "bert", "llama": "llama", "llama8b": "llama"}


def build(name: str, device: str, dtype: torch.dtype) -> tuple[PreTrainedModel, Tensor]:
    """Return a backbone without dropout, and the ids of one step.

    ``minilm``: 12 layers, 384 wide, 8 x 128 tokens. ``d1024``: 12 layers, 1,024 wide, 4 x 128.
    ``llama``: 8 layers, 512 wide, 8 heads for 4 of keys, 2 x 256. ``llama8b``: 4 layers of the
    shape of an 8B Llama, 4 x 2,048.
    """
    torch.manual_seed(0)
    with torch.device(device):
        if FAMILY[name] == "llama":
            small = name == "llama"
            config = LlamaConfig(
                hidden_size=512 if small else 4096,
                num_hidden_layers=8 if small else 4,
                num_attention_heads=8 if small else 32,
                num_key_value_heads=4 if small else 8,
                intermediate_size=1408 if small else 14336,
                vocab_size=1000,
            )
            ids = torch.randint(5, 1000, (2, 256) if small else (4, 2048))
            return LlamaModel(config).to(dtype), ids
        width = {"minilm": 384, "d1024": 1024}[name]
        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=12,
            num_attention_heads=12 if width == 384 else 16,
            intermediate_size=4 * width,
            vocab_size=1000,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return BertModel(config).to(dtype), torch.randint(5, 1000, (8 if width == 384 else 4, 128))


def of_shared_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy whose parameters are its own, and their memory the original's."""
    memo: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
