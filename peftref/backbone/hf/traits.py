"""What a configuration says of a training step; see `peftref.ir.memory.Traits`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from peftref.backbone.hf.modules import head_modules
from peftref.ir.memory import Traits

__all__ = ["read_traits"]

_ATTENTION = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout", "dropout_rate")
_HIDDEN = ("hidden_dropout_prob", "resid_pdrop", "hidden_dropout", "dropout", "dropout_rate")
_INNER = ("activation_dropout", "dropout_rate")
_ACTIVATION = ("hidden_act", "activation_function", "dense_act_fn", "activation",
               "hidden_activation")
_WIDTH = 64


def read_traits(model: PreTrainedModel, task: str = "features") -> Traits:
    """Return the traits of a model, which may be on the meta device."""
    config = model.config
    tensors = [*model.parameters(), *model.buffers()]
    heads = head_modules(model) if task not in ("causal_lm", "seq2seq_lm", "features") else ()
    head = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in heads)
    tokens, stem = _image(model)
    return Traits(
        weight_bytes=sum(each.numel() * each.element_size() for each in tensors),
        head_parameters=head,
        attention=str(getattr(config, "_attn_implementation", None) or "eager"),
        attention_dropout=_number(model, _ATTENTION),
        hidden_dropout=_number(model, _HIDDEN),
        inner_dropout=_number(model, _INNER),
        activation_tensors=_kept_by_activation(model),
        vocabulary_loss=task in ("causal_lm", "seq2seq_lm"),
        tokens=tokens,
        stem_flops=stem,
    )


def _number(model: PreTrainedModel, names: Sequence[str]) -> float:
    for name in names:
        value = getattr(model.config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return 0.0


def _kept_by_activation(model: PreTrainedModel) -> int:
    """Run the activation once and count what it keeps: some are one kernel, some are formulas."""
    name = next((value for key in _ACTIVATION
                 if isinstance(value := getattr(model.config, key, None), str)), None)
    if name not in ACT2FN:
        return 1
    kept: set[int] = set()
    held: list[Tensor] = []  # an address is used again only after its tensor is gone

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == _WIDTH:
            held.append(tensor)
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        ACT2FN[name](torch.ones(_WIDTH, requires_grad=True) * 1.0)
    return max(1, len(kept))


def _image(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens of an image with the class token, and FLOPs of cutting it; (0, 0) for text."""
    size, patch = (getattr(model.config, name, None) for name in ("image_size", "patch_size"))
    if not isinstance(size, int) or not isinstance(patch, int):
        return 0, 0
    patches = (size // patch) ** 2
    filters = [each.weight for each in model.modules() if isinstance(each, nn.Conv2d)]
    flops = sum(2 * patches * math.prod(weight.shape) for weight in filters)
    return patches + 1, flops
