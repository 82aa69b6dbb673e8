"""MAM, UniPELT and AdaMix equal their published formulas."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import peftref
from peftref.procedures.consistency import Consistency, ConsistencyArguments, divergence
from tests.backbone.tiny import inputs, tiny
from tests.parity.peft_pairs import gradients, logits, perturb
from tests.parity.plain_bert import Change, bottleneck, classify, tensors_under

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
LAYERS = range(2)


def pair(expression: str, size: float = 0.3) -> tuple[torch.nn.Module, peftref.Adapted]:
    """Return a bare BERT and an adapted one with moved tensors."""
    bare = tiny("bert", "classification", dtype=torch.float64)
    ours = peftref.attach(copy.deepcopy(bare), expression)
    perturb(ours, size)
    return bare, ours


def padded() -> dict[str, Tensor]:
    batch = inputs("bert", "classification", length=9)
    batch["attention_mask"][1, -3:] = 0
    return batch


def prefix_rows(tensors: dict[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """Return ``tanh(E W1^T + b1) W2^T + b2`` of one layer, keys first, then values."""
    shared = tensors_under(tensors, "prefix.prefix.")
    own = tensors_under(tensors, f"bert.encoder.layer.{index}.attention.self.prefix.prefix."
                                 "attention.up.")
    hidden = torch.tanh(shared["rows.tokens"] @ shared["down.down.weight"].T
                        + shared["down.down.bias"])
    keys, values = (hidden @ own["weight"].T + own["bias"]).chunk(2, -1)
    return keys, values


def test_mam() -> None:
    """Prefixes from one MLP in every attention, beside every FFN a scaled parallel adapter."""
    bare, ours = pair("mam(length=3, bottleneck=5, scale=3.0)")
    tensors = ours.tensors()
    assert tensors["prefix.prefix.down.down.weight"].shape == (800, 32)
    changes = []
    for index in LAYERS:
        adapter = bottleneck(tensors_under(
            tensors, f"bert.encoder.layer.{index}.output.dense.ffn.adapter.ffn."), torch.relu)
        keys, values = (r.expand(2, -1, -1) for r in prefix_rows(tensors, index))
        changes.append(Change(
            rows=lambda _, k=keys, v=values: (k, v),
            ffn=lambda x, z, norm, a=adapter: norm(z + 3.0 * a(x) + x)))
    expected = classify(bare, padded(), changes)
    torch.testing.assert_close(logits(ours.model, padded()), expected, **CLOSE)
    _same_gradients(ours, expected)


def test_unipelt_gates_are_means_over_real_tokens() -> None:
    """Each part is scaled by ``G(x) = mean over tokens of sigmoid(x w + b)``, one a sample."""
    bare, ours = pair("unipelt(bottleneck=5, length=3, hidden=8, rank=2)")
    tensors, batch = ours.tensors(), padded()
    real = batch["attention_mask"].double()[..., None]

    def gate(own: dict[str, Tensor], x: Tensor) -> Tensor:
        opened = torch.sigmoid(x @ own["sample_gate.weight"].T + own["sample_gate.bias"])
        return (opened * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)

    changes = []
    for index in LAYERS:
        start = f"bert.encoder.layer.{index}"
        adapter = tensors_under(tensors, f"{start}.output.LayerNorm.adapter.adapter.")
        prefix = tensors_under(tensors, f"{start}.attention.self.prefix.prefix.attention.")
        query, value = (tensors_under(tensors, f"{start}.attention.self.{role}.lora.delta.")
                        for role in ("query", "value"))
        rows = prefix_rows(tensors, index)

        def low_rank(x: Tensor, own: dict[str, Tensor]) -> Tensor:
            return gate(own, x) * (x @ own["down.weight"].T @ own["up.weight"].T)

        def ffn(x: Tensor, z: Tensor, norm: torch.nn.Module, own: dict[str, Tensor] = adapter
                ) -> Tensor:
            u = norm(z + x)
            return norm(gate(own, u) * bottleneck(own, torch.relu)(u) + z + x)

        changes.append(Change(
            query=lambda x, own=query: low_rank(x, own),
            value=lambda x, own=value: low_rank(x, own),
            rows=lambda x, own=prefix, kv=rows: (gate(own, x) * kv[0], gate(own, x) * kv[1]),
            ffn=ffn))
    expected = classify(bare, batch, changes)
    torch.testing.assert_close(logits(ours.model, batch), expected, **CLOSE)
    _same_gradients(ours, expected)


def _same_gradients(ours: peftref.Adapted, expected: Tensor) -> None:
    """Autograd through the formula, on our own parameters, gives the same gradients."""
    wanted = ours.trainable
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(expected.shape, generator=generator, dtype=expected.dtype)
    theirs = torch.autograd.grad((expected * weights).sum(), list(wanted.values()))
    found = gradients(ours.model, padded(), wanted)
    for name, gradient in zip(wanted, theirs, strict=True):
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=name)


def _adapter(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return tensors_under(tensors, f"bert.encoder.layer.{index}.output.dense.adapter.adapter.ffn.")


def _experts(ours: peftref.Adapted, bare: torch.nn.Module, shared: str
             ) -> dict[tuple[tuple[int, int], ...], Tensor]:
    """Return the logits of every choice of (down, up) copies in the two layers."""
    copies = range(3)
    ups = (0,) if shared == "up" else copies
    downs = (0,) if shared == "down" else copies
    found: dict[tuple[tuple[int, int], ...], Tensor] = {}
    for choice in itertools.product(itertools.product(downs, ups), repeat=2):
        changes = []
        for index, (down, up) in enumerate(choice):
            own = _adapter(ours.tensors(), index)
            picked = {n: t if n.startswith(shared) else t[down if n.startswith("down") else up]
                      for n, t in own.items()}
            adapter = bottleneck(picked, functional.gelu)
            changes.append(Change(ffn=lambda x, z, norm, a=adapter: norm(z + a(z) + x)))
        found[choice] = classify(bare, padded(), changes)
    return found


@pytest.mark.parametrize("shared", ["up", "down", "none"])
def test_adamix_runs_one_expert_in_training_and_the_mean_after(shared: str) -> None:
    bare, ours = pair(f"adamix(bottleneck=4, copies=3, share={shared})", 1.0)
    ours.handled = True  # this test calls no procedure
    ours.model.train()
    experts = _experts(ours, bare, shared)
    stacked = torch.stack(list(experts.values()))
    torch.manual_seed(0)
    seen: list[int] = []
    draws = 12 * len(experts) if len(experts) < 20 else 60
    for _ in range(draws):
        difference = (stacked - logits(ours.model, padded())).abs().amax((1, 2))
        best = int(difference.argmin())
        assert difference[best] < 1e-10
        seen.append(best)
    # Every layer draws apart, and so do down and up: all pairs of choices turn up.
    assert len(set(seen)) == len(experts) if len(experts) < 20 else len(set(seen)) > 30
    ours.model.eval()
    changes = []
    for index in LAYERS:
        own = _adapter(ours.tensors(), index)
        mean = {n: t if n.startswith(shared) else t.mean(0) for n, t in own.items()}
        adapter = bottleneck(mean, functional.gelu)
        changes.append(Change(ffn=lambda x, z, norm, a=adapter: norm(z + a(z) + x)))
    expected = classify(bare, padded(), changes)
    torch.testing.assert_close(logits(ours.model, padded()), expected, **CLOSE)


def test_adamix_lora_averages_the_factors_apart() -> None:
    bare, ours = pair("adamix_lora(rank=2, alpha=3, copies=3, share=none)")
    tensors = ours.tensors()
    with torch.no_grad():
        for index in LAYERS:
            for role in ("query", "value"):
                path = f"bert.encoder.layer.{index}.attention.self.{role}"
                own = tensors_under(tensors, f"{path}.lora.delta.")
                product = own["up.weight"].mean(0) @ own["down.weight"].mean(0)
                bare.get_submodule(path).weight += 1.5 * product
    expected = logits(bare, padded())
    torch.testing.assert_close(logits(ours.model, padded()), expected, **CLOSE)
    ours.merge()
    torch.testing.assert_close(logits(ours.model, padded()), expected, **CLOSE)


def test_the_targets_of_the_consistency_loss_are_detached() -> None:
    """``(KL(sg p2 | p1) + KL(sg p1 | p2)) / 2``: at the first logits ``(p1 - p2) / 2``."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(5, 4, generator=generator, dtype=torch.float64,
                                 requires_grad=True) for _ in range(2))
    p, q = first.softmax(-1), second.softmax(-1)
    value = divergence(first, second)
    expected = ((q * (q / p).log()).sum(-1) + (p * (p / q).log()).sum(-1)).mean() / 2
    torch.testing.assert_close(value, expected, **CLOSE)
    one, other = torch.autograd.grad(value, [first, second])
    torch.testing.assert_close(one, (p - q) / (2 * 5), **CLOSE)
    torch.testing.assert_close(other, (q - p) / (2 * 5), **CLOSE)


def test_the_consistency_loss_of_tokens_counts_labelled_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    kept = labels != -100
    torch.testing.assert_close(
        divergence(first, second, labels), divergence(first[kept], second[kept]))


def test_the_procedure_runs_a_second_forward_with_other_routes() -> None:
    _, ours = pair("adamix(bottleneck=4, copies=3, weight=2.5)", 1.0)
    (procedure,) = ours.procedures
    assert isinstance(procedure, Consistency)
    ours.handled = True
    ours.model.train()
    torch.manual_seed(1)
    first = ours.model(**padded())
    state = torch.get_rng_state()
    loss = procedure.loss(ours.model, padded(), first)
    torch.set_rng_state(state)
    second = ours.model(**padded()).logits
    assert (first.logits - second).abs().max() > 1e-3
    torch.testing.assert_close(loss, 2.5 * divergence(first.logits, second), **CLOSE)
    assert Consistency(ConsistencyArguments(weight=0.0)).loss(ours.model, padded(), first) is None
