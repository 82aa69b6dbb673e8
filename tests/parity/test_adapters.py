"""Adapters and BitFit equal their published formulas, written here on bare models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import peftref
from tests.backbone.tiny import inputs, tiny
from tests.parity.peft_pairs import TASKS, gradients, logits, perturb
from tests.parity.plain_bert import Change, bottleneck, classify, tensors_under

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
# Path of one layer, and in it: the linears that write attention and FFN, the FFN's input, the
# module that ends the layer with a residual sum.
LAYERS = {
    "gpt2": ("transformer.h.{}", "attn.c_proj", "mlp.c_proj", "mlp"),
    "llama": ("model.layers.{}", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "t5": ("encoder.block.{}", "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo",
           "layer.1.DenseReluDense"),
}


def pair(family: str, expression: str) -> tuple[nn.Module, peftref.Adapted, dict[str, Tensor]]:
    """Return a bare model, an adapted one and its tensors, all off their first values."""
    bare = tiny(family, TASKS[family], dtype=torch.float64)
    ours = peftref.attach(copy.deepcopy(bare), expression)
    perturb(ours)
    return bare, ours, ours.tensors()


def compare(family: str, bare: nn.Module, ours: peftref.Adapted) -> None:
    """Logits of the adapted model equal those of the bare one, which has hooks."""
    batch = inputs(family, TASKS[family])
    batch["attention_mask"][1, -2:] = 0
    expected = logits(bare, batch)
    with ours.disabled():
        assert (logits(ours.model, batch) - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(ours.model, batch), expected, **CLOSE)
    # The formula is evaluated on our own parameters, so autograd gives its gradients too.
    theirs = gradients(bare, batch, ours.trainable)
    for name, gradient in gradients(ours.model, batch, ours.trainable).items():
        torch.testing.assert_close(gradient, theirs[name], **CLOSE, msg=name)


def after(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Add ``change(result)`` to the result of a module."""

    def hook(_: nn.Module, __: Any, result: Tensor) -> Tensor:
        return result + change(result)

    module.register_forward_hook(hook)


def beside(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Add ``change(input)`` to the result of a module."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        return result + change(args[0])

    module.register_forward_hook(hook)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_houlsby_on_bert(activation: str) -> None:
    expression = f"houlsby_adapter(bottleneck=5, activation={activation})"
    bare, ours, tensors = pair("bert", expression)
    phi = {"gelu": functional.gelu, "relu": torch.relu, "silu": functional.silu,
           "tanh": torch.tanh}[activation]
    for index, layer in enumerate(bare.bert.encoder.layer):
        for module, path, role in ((layer.attention.output.dense, "attention.output", "attention"),
                                   (layer.output.dense, "output", "ffn")):
            start = f"bert.encoder.layer.{index}.{path}.dense.houlsby_adapter.adapter.{role}."
            after(module, bottleneck(tensors_under(tensors, start), phi))
    compare("bert", bare, ours)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_houlsby_on_decoders(family: str) -> None:
    bare, ours, tensors = pair(family, "houlsby_adapter(bottleneck=5)")
    pattern, attention, ffn, _ = LAYERS[family]
    for index in range(2):
        layer = bare.get_submodule(pattern.format(index))
        for role, path in (("attention", attention), ("ffn", ffn)):
            own = {n: t for n, t in tensors.items() if f".{index}." in n and f".{role}." in n}
            start = next(iter(own)).removesuffix("down.weight")
            after(layer.get_submodule(path), bottleneck(tensors_under(own, start),
                                                        functional.gelu))
    compare(family, bare, ours)


def test_pfeiffer_on_bert_runs_the_norm_twice() -> None:
    """``u = LN(z + x)``, ``v = A(u) + z``, ``out = LN(v + x)``."""
    bare, ours, tensors = pair("bert", "pfeiffer_adapter(bottleneck=5)")
    changes = []
    for index in range(2):
        start = f"bert.encoder.layer.{index}.output.LayerNorm.pfeiffer_adapter.adapter."
        adapter = bottleneck(tensors_under(tensors, start), torch.relu)
        changes.append(Change(ffn=lambda x, z, norm, a=adapter: norm(a(norm(z + x)) + z + x)))
    batch = inputs("bert", "classification")
    batch["attention_mask"][1, -2:] = 0
    expected = classify(bare, batch, changes)
    torch.testing.assert_close(logits(ours.model, batch), expected, **CLOSE)
    assert (expected - classify(bare, batch, [Change(), Change()])).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_pfeiffer_on_pre_norm_reads_the_residual_sum(family: str) -> None:
    """Without a norm after the sum, ``u = z + x`` and ``out = A(u) + z + x``."""
    bare, ours, tensors = pair(family, "pfeiffer_adapter(bottleneck=5)")
    stacks = ["encoder.block", "decoder.block"] if family == "t5" else [LAYERS[family][0][:-3]]
    for stack in stacks:
        for index in range(2):
            own = {n: t for n, t in tensors.items() if n.startswith(f"{stack}.{index}.")}
            start = next(iter(own)).removesuffix("down.weight")
            adapter = bottleneck(tensors_under(own, start), torch.relu)
            layer = bare.get_submodule(f"{stack}.{index}")

            def hook(_: nn.Module, __: Any, result: Any, a: Any = adapter) -> Any:
                if isinstance(result, tuple):
                    return (result[0] + a(result[0]), *result[1:])
                return result + a(result)

            layer.register_forward_hook(hook)
    compare(family, bare, ours)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scaled_parallel_adapter_reads_what_the_ffn_reads(family: str) -> None:
    """``FFN(x) + s A(x)``; on pre-norm backbones x is the norm's result."""
    bare, ours, tensors = pair(family, "scaled_parallel_adapter(bottleneck=5, scale=3.0)")
    pattern, _, _, ffn = LAYERS[family]
    for index in range(2):
        own = {n: t for n, t in tensors.items() if f".{index}." in n}
        start = next(iter(own)).removesuffix("down.weight")
        adapter = bottleneck(tensors_under(own, start), torch.relu)
        beside(bare.get_submodule(f"{pattern.format(index)}.{ffn}"),
               lambda x, a=adapter: 3.0 * a(x))
    compare(family, bare, ours)


def test_scaled_parallel_adapter_on_bert() -> None:
    bare, ours, tensors = pair("bert", "scaled_parallel_adapter(bottleneck=5, scale=3.0)")
    changes = []
    for index in range(2):
        start = f"bert.encoder.layer.{index}.output.dense.scaled_parallel_adapter.adapter.ffn."
        adapter = bottleneck(tensors_under(tensors, start), torch.relu)
        changes.append(Change(ffn=lambda x, z, norm, a=adapter: norm(z + 3.0 * a(x) + x)))
    batch = inputs("bert", "classification")
    torch.testing.assert_close(
        logits(ours.model, batch), classify(bare, batch, changes), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_bitfit_trains_every_bias_of_the_backbone(family: str) -> None:
    """Its gradients are those of the bare biases, its outputs those of moved biases."""
    bare, ours, tensors = pair(family, "bitfit")
    heads = ("classifier", "score", "lm_head")
    biases = {n: p for n, p in bare.named_parameters()
              if n.endswith("bias") and not n.startswith(heads)}
    moved = {n: biases[n] + _delta(tensors, n) for n in biases}
    assert sum(p.numel() for p in biases.values()) == ours.plan.trainable_parameters
    batch = inputs(family, TASKS[family])
    expected = torch.func.functional_call(bare, moved, (), batch).logits
    torch.testing.assert_close(logits(ours.model, batch), expected, **CLOSE)
    with torch.no_grad():
        for name, parameter in biases.items():
            parameter.copy_(moved[name])
    wanted = gradients(bare, batch, biases)
    found = gradients(ours.model, batch, ours.trainable)
    for name in biases:
        torch.testing.assert_close(_delta(found, name), wanted[name], **CLOSE, msg=name)
    ours.merge()
    torch.testing.assert_close(logits(ours.model, batch), expected, **CLOSE)


def _delta(tensors: dict[str, Tensor], bias: str) -> Tensor:
    """The differences of one module's bias; the slices of a fused one side by side."""
    owner = bias.removesuffix("bias")
    parts = [t for n, t in tensors.items() if n.startswith(f"{owner}bitfit.")]
    return torch.cat(parts)
