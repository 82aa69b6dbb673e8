"""Tiny backbones with a tokenizer, in folders, and small labelled files."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from peftref.training.settings import RunSettings

__all__ = ["bert_folder", "llama_folder", "run_settings", "t5_folder", "vit_folder", "write_rows"]

WORDS = [f"w{number}" for number in range(60)]
USUAL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2}


def _tokenizer(*, decoder: bool) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.WordLevel(
        {word: number for number, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"
    ))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder:
        # As of Llama: no padding token of its own.
        return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]",
                                       eos_token="[SEP]", model_max_length=64)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=64,
    )


def bert_folder(
    folder: Path, *, pooler: bool = False, dropout: float = 0.1, layers: int = 2
) -> Path:
    """Write a random BERT; with dropout, so that random streams matter."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_dropout_prob=dropout,
                        attention_probs_dropout_prob=dropout,
                        **{**USUAL, "num_hidden_layers": layers})
    BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    _tokenizer(decoder=False).save_pretrained(folder)
    return folder


def llama_folder(folder: Path) -> Path:
    """Write a random Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, bos_token_id=2, eos_token_id=3,
                         pad_token_id=None, **USUAL)
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(decoder=True).save_pretrained(folder)
    return folder


def t5_folder(folder: Path) -> Path:
    """Write a random T5 that ends texts as its tokenizer does."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=3)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer(decoder=False).save_pretrained(folder)
    return folder


def vit_folder(folder: Path, size: int = 8) -> Path:
    """Write a random ViT without a preprocessor's file."""
    torch.manual_seed(0)
    config = ViTConfig(image_size=size, patch_size=2, hidden_size=32, num_hidden_layers=1,
                       num_attention_heads=4, intermediate_size=64,
                       initializer_range=0.2)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def write_rows(
    path: Path, count: int = 60, *, labels: Sequence[str] = ("a", "b", "c"), seed: int = 0
) -> Path:
    """Write rows whose label is told by a word; lengths from 3 to 12 words."""
    draw = random.Random(seed)
    with path.open("w") as stream:
        for number in range(count):
            label = labels[number % len(labels)]
            words = draw.choices(WORDS[10:], k=draw.randint(2, 11))
            words.insert(draw.randrange(len(words)), WORDS[labels.index(label)])
            stream.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


def run_settings(
    backbone: Path, data: Path | str | dict[str, str], **changes: object
) -> RunSettings:
    """Return settings for a run of a few steps on the processor."""
    return RunSettings.model_validate({
        "backbone": str(backbone), "data": data if isinstance(data, dict) else str(data),
        "steps": 6, "batch_size": 8, "max_length": 24,
        "device": "cpu", "evaluation": {"at": [0.5, 1.0]}, **changes,
    })
