"""What a training step holds: kept tensors in this process, or the peak of a process of its own."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import peftref
from peftref.adapted import Adapted
from peftref.backbone.hf.load import AUTO

__all__ = ["BACKBONES", "attached", "batch_of", "made", "saved_bytes"]


@dataclass(frozen=True, slots=True)
class Backbone:
    task: Any
    layers: str
    config: dict[str, Any] = field(default_factory=dict)


_WIDE = {"hidden_size": 384, "num_attention_heads": 6}
BACKBONES = {
    "bert": Backbone("classification", "num_hidden_layers", {**_WIDE, "intermediate_size": 1536}),
    "gpt2": Backbone("causal_lm", "n_layer", {"n_embd": 384, "n_head": 6}),
    "llama": Backbone("causal_lm", "num_hidden_layers",
                      {**_WIDE, "num_key_value_heads": 2, "intermediate_size": 1024}),
    "t5": Backbone("seq2seq_lm", "num_layers",
                   {"d_model": 384, "num_heads": 6, "d_kv": 64, "d_ff": 1536,
                    "decoder_start_token_id": 0}),
    "vit": Backbone("image_classification", "num_hidden_layers",
                    {**_WIDE, "intermediate_size": 1536}),
}


def made(family: str, layers: int) -> PreTrainedModel:
    """A random model with the dropouts of its family, in training mode."""
    torch.manual_seed(0)
    kind = BACKBONES[family]
    config = AutoConfig.for_model(family, **kind.config, **{kind.layers: layers})
    return AUTO[kind.task].from_config(config).train()


def attached(model: PreTrainedModel, plan: Any) -> Adapted:
    adapted = peftref.attach(model, plan)
    model.train()
    return adapted


def batch_of(family: str, batch: int, length: int) -> dict[str, Tensor]:
    labels = torch.zeros(batch, dtype=torch.long)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": labels}
    ids = torch.randint(5, 1000, (batch, length))
    if family == "bert":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {"input_ids": ids, "labels": ids}


def saved_bytes(model: Any, given: dict[str, Tensor]) -> int:
    """Bytes of all tensors that autograd keeps, each storage once, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        loss = model(**given).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _peak(family: str, batch: int, length: int) -> int:
    """Parameters and moments, and what a step adds to the process at most."""
    model = made(family, layers=6)
    adapted = attached(model, "lora")
    trained = [each for each in model.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(given: dict[str, Tensor]) -> None:
        loss = model(**given).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    for _ in range(2):  # imports and moments
        step(batch_of(family, 1, 8))
    held = [*model.parameters(), *model.buffers()]
    held += [t for state in optimiser.state.values() for t in state.values()]
    given = batch_of(family, batch, length)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts here
    step(given)
    step(given)
    del adapted
    return _resident("VmHWM") - before + sum(t.numel() * t.element_size() for t in held)


if __name__ == "__main__":
    told = {"peak": _peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))}
    sys.stdout.write(json.dumps(told) + "\n")
