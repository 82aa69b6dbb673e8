"""Layers that accelerate keeps on the disk and brings for each call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import peftref
from peftref.errors import MergeError
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
          "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
EXPRESSIONS = ("lora(rank=2)", "dora(rank=2)", "ia3 + ln_tuning", "oft(block=8)",
               "houlsby_adapter(bottleneck=4)", "prefix_tuning(length=3)",
               "prompt_tuning(length=3) + lora(rank=2, site='head')")


def offloaded(path: Path) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Tensor]]:
    """Return a model half on the disk, and the same one in memory."""
    plain = tiny("llama", "causal_lm")
    plain.save_pretrained(path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        path / "model", device_map=PLACES, offload_folder=path / "disk").eval()
    assert model.get_submodule("model.layers.1.mlp.up_proj").weight.is_meta
    return model, plain, inputs("llama", "causal_lm")


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_adapter_on_offloaded_layers_is_the_one_in_memory(
    tmp_path: Path, expression: str
) -> None:
    model, plain, given = offloaded(tmp_path)
    frozen = logits(model, given)
    adapted = randomise(peftref.attach(model, expression))
    other = randomise(peftref.attach(plain, expression))
    assert not any(p.is_meta for p in adapted.trainable.values())
    for each in (adapted, other):
        each.model(**given).logits.square().mean().backward()
    torch.testing.assert_close(logits(model, given), logits(plain, given), rtol=0, atol=1e-6)
    for name, parameter in adapted.trainable.items():
        torch.testing.assert_close(parameter.grad, other.trainable[name].grad, rtol=1e-4, atol=1e-7)
    adapted.save(tmp_path / "adapter")
    running = logits(model, given)
    adapted.detach()
    assert torch.equal(logits(model, given), frozen)
    peftref.restore(model, tmp_path / "adapter")
    assert torch.equal(logits(model, given), running)


def test_merging_into_what_is_brought_anew_each_call_is_refused(tmp_path: Path) -> None:
    model, _, given = offloaded(tmp_path)
    adapted = randomise(peftref.attach(model, "lora(rank=2)"))
    running = logits(model, given)
    with pytest.raises(MergeError, match=r"layers\.1.*offloaded"):
        adapted.merge()
    assert torch.equal(logits(model, given), running)
