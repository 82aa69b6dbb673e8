"""What is compared: techniques, and how each engine puts one on a backbone."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import Tensor
from transformers import PreTrainedModel

import peftref
from benchmarks.measure import Contestant

__all__ = ["OURS", "by_peft", "frozen", "full", "ours"]

RANK = 16
ALL = "{attention,ffn}.*"
LINEARS = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense",
             "output.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
QUERY_VALUE = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
IA3 = {"bert": (["key", "value", "output.dense"], ["output.dense"]),
       "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"])}

OURS = {
    "lora q,v": f"lora(rank={RANK}, alpha={RANK})",
    "lora all": f"lora(rank={RANK}, alpha={RANK}, site='{ALL}')",
    "lora all, dropout 0.1": f"lora(rank={RANK}, alpha={RANK}, site='{ALL}', dropout=0.1)",
    "dora all": f"dora(rank={RANK}, alpha={RANK}, site='{ALL}')",
    "ia3": "ia3",
    "oft 32 all": f"oft(block=32, site='{ALL}')",
    "prefix 20": "prefix_tuning(length=20)",
    "bottleneck 48": "houlsby_adapter(bottleneck=48)",
    "parallel adapter 48": "scaled_parallel_adapter(bottleneck=48)",
    "mam": "mam(length=20, bottleneck=48, reparameterisation=none)",
    "adamix, one forward": "adamix(bottleneck=16)",
}


def frozen(model: PreTrainedModel, inputs: Tensor) -> Contestant:
    """Forward and activation gradients of the whole backbone, nothing trained."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.requires_grad_()
    )
    return Contestant(model, inputs, None)


def full(model: PreTrainedModel, inputs: Tensor) -> Contestant:
    """Full fine-tuning; the model's weights change."""
    model.requires_grad_(True)
    return Contestant(model, inputs, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))


def ours(model: PreTrainedModel, inputs: Tensor, technique: str) -> Contestant:
    """The technique attached by peftref."""
    plan = peftref.compile(OURS[technique], model.train(), tokens=inputs.numel())
    adapted = peftref.attach(model, plan)
    adapted.handled = True
    parameters = list(adapted.trainable.values())
    return Contestant(model, inputs, torch.optim.AdamW(parameters, lr=1e-5, fused=True))


def by_peft(
    model: PreTrainedModel, inputs: Tensor, technique: str, family: str
) -> Contestant | None:
    """The technique by huggingface/peft; None where it has none."""
    make = _PEFT.get(technique)
    if make is None:
        return None
    adapted = peft.get_peft_model(model.train(), make(family))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    return Contestant(adapted, inputs, torch.optim.AdamW(parameters, lr=1e-5, fused=True))


def _lora(targets: list[str], *, dropout: float = 0.0, dora: bool = False) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=targets, lora_dropout=dropout, use_dora=dora
    )


def _ia3(family: str) -> peft.IA3Config:
    targets, feedforward = IA3[family]
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


_PEFT: dict[str, Callable[[str], peft.PeftConfig]] = {
    "lora q,v": lambda family: _lora(QUERY_VALUE[family]),
    "lora all": lambda family: _lora(LINEARS[family]),
    "lora all, dropout 0.1": lambda family: _lora(LINEARS[family], dropout=0.1),
    "dora all": lambda family: _lora(LINEARS[family], dora=True),
    "ia3": _ia3,
    "oft 32 all": lambda family: peft.OFTConfig(
        oft_block_size=32, target_modules=LINEARS[family]
    ),
    "prefix 20": lambda family: peft.PrefixTuningConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=20
    ),
}
