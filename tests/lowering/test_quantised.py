"""Adapters on weights of 8 and 4 bits: frozen as they are, and never merged into by accident."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import peftref
from peftref.errors import MergeError
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of kernels that it finds no library for
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")

BITS = (8, 4)
EXPRESSIONS = ("lora(rank=2)", "dora(rank=2)", "ia3", "oft(block=8)",
               "houlsby_adapter(bottleneck=4)", "prefix_tuning(length=3) + ln_tuning")


def quantised(bits: int, family: str = "llama") -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model = tiny(family, "causal_lm")
    config = quantization.Int8WeightOnlyConfig() if bits == 8 else (
        quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=granularity.PerGroup(16)))
    quantization.quantize_(model, config)
    return model, inputs(family, "causal_lm")


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with ordinary weights of the same values."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = nn.Parameter(module.weight.dequantize())
    return twin


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("bits", BITS)
def test_an_adapter_is_what_it_is_on_the_dequantised_weights(
    bits: int, expression: str, tmp_path: Path
) -> None:
    model, given = quantised(bits)
    plain = dequantised(model)
    frozen = logits(model, given)
    adapted = randomise(peftref.attach(model, expression))
    other = randomise(peftref.attach(plain, expression))
    for each in (adapted, other):
        each.model(**given).logits.square().mean().backward()
    torch.testing.assert_close(logits(model, given), logits(plain, given), rtol=1e-3, atol=1e-3)
    for name, parameter in adapted.trainable.items():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad, other.trainable[name].grad, rtol=1e-2, atol=1e-4)
    running = logits(model, given)
    adapted.save(tmp_path / "adapter")
    adapted.detach()
    assert torch.equal(logits(model, given), frozen)
    peftref.restore(model, tmp_path / "adapter")
    assert torch.equal(logits(model, given), running)


@pytest.mark.parametrize("expression", ["lora(rank=2)", "dora(rank=2) + ia3"])
@pytest.mark.parametrize("bits", BITS)
def test_merging_takes_a_request_and_is_undone(bits: int, expression: str) -> None:
    model, given = quantised(bits)
    frozen = logits(model, given)
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    kept = query.weight
    adapted = randomise(peftref.attach(model, expression))
    running = logits(model, given)
    with pytest.raises(MergeError, match=r"merge\(dequantize=True\)"):
        adapted.merge()
    assert torch.equal(logits(model, given), running)
    adapted.merge(dequantize=True)
    assert type(query.weight.data) is Tensor
    torch.testing.assert_close(logits(model, given), running, rtol=1e-3, atol=1e-3)
    adapted.unmerge()
    assert query.weight is kept
    adapted.detach()
    assert torch.equal(logits(model, given), frozen)
