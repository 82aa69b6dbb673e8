"""The same adapter twice: ours, and huggingface/peft's with the same tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftref
from tests.backbone.tiny import Task, inputs, tiny

__all__ = ["NAMES", "TASKS", "Pair", "attach_both", "gradients", "logits", "peft_model", "perturb"]

TASKS: Mapping[str, Task] = {
    "bert": "classification", "gpt2": "causal_lm", "llama": "causal_lm", "t5": "seq2seq_lm"}

# End of our tensor name -> end of PEFT's, below the same module.
_LOW_RANK = {"delta.down.weight": "lora_A.default.weight",
             "delta.up.weight": "lora_B.default.weight"}
NAMES: Mapping[str, Mapping[str, str]] = {
    "lora": _LOW_RANK,
    "rslora": _LOW_RANK,
    "dora": {**_LOW_RANK, "magnitude.magnitude": "lora_magnitude_vector.default.weight"},
    "ia3": {"attention.vector": "ia3_l.default", "ffn.vector": "ia3_l.default"},
    "loha": {"delta.first.up.weight": "hada_w1_a.default",
             "delta.first.down.weight": "hada_w1_b.default",
             "delta.second.up.weight": "hada_w2_a.default",
             "delta.second.down.weight": "hada_w2_b.default"},
    "lokr": {"delta.kron.left": "lokr_w1.default", "delta.kron.left_up": "lokr_w1_a.default",
             "delta.kron.left_down": "lokr_w1_b.default", "delta.kron.right": "lokr_w2.default",
             "delta.kron.right_up": "lokr_w2_a.default",
             "delta.kron.right_down": "lokr_w2_b.default"},
    "oft": {"rotation.rotation": "oft_R.default.weight"},
    "vera": {"delta.inner": "vera_lambda_d.default", "delta.outer": "vera_lambda_b.default"},
    "ln_tuning": {"weight.delta": "ln_tuning_layers.default.weight",
                  "bias.delta": "ln_tuning_layers.default.bias"},
}


@dataclass
class Pair:
    """Two adapted copies of one backbone.

    Attributes:
        ours: our handle.
        theirs: PEFT's model.
        names: our full tensor name -> PEFT's parameter name.
        batch: inputs for both.
    """

    ours: peftref.Adapted
    theirs: nn.Module
    names: Mapping[str, str]
    batch: Mapping[str, Tensor]

    def parameter(self, name: str) -> nn.Parameter:
        """PEFT's parameter for one of our names."""
        return self.theirs.get_parameter(self.names[name])


def peft_model(backbone: PreTrainedModel, config: peft.PeftConfig) -> nn.Module:
    """Return PEFT's model in evaluation mode; its remarks on transformers' API are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(backbone, config).eval()


def perturb(adapted: peftref.Adapted, size: float = 0.3, seed: int = 3) -> None:
    """Move every trained tensor off its first value, so that none is zero or the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in adapted.trainable.values():
            tensor += size * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def attach_both(family: str, expression: str, config: peft.PeftConfig) -> Pair:
    """Attach to two copies of a tiny float64 model and give PEFT our tensors."""
    backbone = tiny(family, TASKS[family], dtype=torch.float64)
    theirs = peft_model(copy.deepcopy(backbone), config).double()
    ours = peftref.attach(backbone, expression)
    perturb(ours)
    technique = expression.partition("(")[0]
    names: dict[str, str] = {}
    parameters = dict(theirs.named_parameters())
    for tensor in ours.plan.tensors:
        if not tensor.spec.trainable:
            continue
        local = tensor.name.removeprefix(f"{tensor.owner}.{technique}.")
        ending = next(end for start, end in NAMES[technique].items() if local.startswith(start)
                      and local.removeprefix(start) in ("", f".{tensor.owner}"))
        names[tensor.name] = f"base_model.model.{tensor.owner}.{ending}"
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert set(names.values()) == trained, set(names.values()) ^ trained
    pair = Pair(ours, theirs, names, inputs(family, TASKS[family]))
    with torch.no_grad():
        for name, tensor in ours.trainable.items():
            target = pair.parameter(name)
            # PEFT trains a copy of the layer norm, we train the difference from the first one.
            start = target.detach().clone() if technique == "ln_tuning" else 0.0
            target.copy_(start + tensor.view(target.shape))
        for shared, buffer in (("vera_down", "vera_A"), ("vera_up", "vera_B")):
            for name, tensor in ours.tensors().items():
                if f".{shared}." in name:
                    getattr(theirs.base_model, buffer)["default"].copy_(tensor)
    return pair


def logits(model: nn.Module | PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of a batch."""
    return model(**batch).logits


def gradients(model: nn.Module, batch: Mapping[str, Tensor],
              wanted: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gradients of a fixed random weighting of the logits."""
    out = logits(model, batch)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    found = torch.autograd.grad((out * weights).sum(), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))
