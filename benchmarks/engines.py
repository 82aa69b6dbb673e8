"""What is compared: backbones, techniques, and how each engine puts one on the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedModel

import peftref

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


@dataclass
class Contestant:
    """A model, what trains in it, and the optimiser of that."""

    model: nn.Module
    inputs: Tensor
    optimiser: torch.optim.Optimizer | None

    def forward(self) -> Tensor:
        """Return the loss of one step: the mean square of the last hidden state."""
        hidden = self.model(input_ids=self.inputs).last_hidden_state
        return hidden.square().mean()

    def step(self) -> None:
        """Forward, backward, AdamW."""
        self.forward().backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)


def backbone(name: str) -> tuple[PreTrainedModel, Tensor]:
    """Return a random backbone without dropout, and the token ids of its step."""
    torch.manual_seed(0)
    if name == "llama":
        config = LlamaConfig(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            intermediate_size=1408, vocab_size=1000,
        )
        return LlamaModel(config), torch.randint(5, 1000, (2, 256))
    width = {"minilm": 384, "d1024": 1024}[name]
    heads = {"minilm": 12, "d1024": 16}[name]
    config = BertConfig(
        hidden_size=width, num_hidden_layers=12, num_attention_heads=heads,
        intermediate_size=4 * width, vocab_size=1000, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config), torch.randint(5, 1000, (8 if width == 384 else 4, 128))


def frozen(name: str) -> Contestant:
    """Forward and activation gradients of the whole backbone, nothing trained."""
    model, inputs = backbone(name)
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.requires_grad_()
    )
    return Contestant(model, inputs, None)


def full(name: str) -> Contestant:
    """Full fine-tuning."""
    model, inputs = backbone(name)
    return Contestant(model, inputs, torch.optim.AdamW(model.parameters(), lr=1e-5))


def ours(name: str, technique: str) -> Contestant:
    """The technique attached by peftref."""
    model, inputs = backbone(name)
    adapted = peftref.attach(model.train(), OURS[technique])
    adapted.handled = True
    parameters = list(adapted.trainable.values())
    return Contestant(model, inputs, torch.optim.AdamW(parameters, lr=1e-5))


def by_peft(name: str, technique: str) -> Contestant | None:
    """The technique by huggingface/peft; None where it has none."""
    family = "llama" if name == "llama" else "bert"
    build = _PEFT.get(technique)
    if build is None:
        return None
    model, inputs = backbone(name)
    adapted = peft.get_peft_model(model.train(), build(family))
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    return Contestant(adapted, inputs, torch.optim.AdamW(parameters, lr=1e-5))


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
}
