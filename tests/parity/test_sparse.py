"""SparseAdapter: masks from an independent score, held in forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import peftref
from peftref.backbone.hf import meta_model
from peftref.pruning.groups import er_densities
from tests.backbone.tiny import inputs, tiny, tiny_config
from tests.parity.peft_pairs import gradients, logits
from tests.parity.plain_bert import Change, bottleneck, classify, tensors_under

CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
BASE = "houlsby_adapter(bottleneck=6, site=ffn, init='normal(0.1)')"


def sparse(criterion: str, keep: float = 0.3, scope: str = "global", base: str = BASE
           ) -> tuple[torch.nn.Module, peftref.Adapted]:
    """Return a bare BERT and the pruned adapter on a copy, its masks computed."""
    bare = tiny("bert", "classification", dtype=torch.float64)
    spec = peftref.load("sparse_adapter", base=base, criterion=criterion, keep=keep, scope=scope)
    ours = peftref.attach(copy.deepcopy(bare), spec)
    if criterion == "snip":
        ours.prepare(batches())
    return bare, ours


def batches() -> list[dict[str, Tensor]]:
    labels = torch.tensor([0, 2])
    return [{**inputs("bert", "classification", seed=seed), "labels": labels} for seed in (7, 8)]


def masked_names(ours: peftref.Adapted) -> list[str]:
    return [n.removesuffix("_mask") for n in ours.tensors() if n.endswith("_mask")]


def kept(ours: peftref.Adapted) -> dict[str, Tensor]:
    return {n: ours.tensors()[f"{n}_mask"] for n in masked_names(ours)}


def classified(bare: torch.nn.Module, tensors: Mapping[str, Tensor],
               batch: Mapping[str, Tensor]) -> Tensor:
    """Logits with the adapters of ``BASE`` as given, from the formula."""
    changes = []
    for index in range(2):
        own = tensors_under(
            tensors, f"bert.encoder.layer.{index}.output.dense.base.adapter.ffn.")
        adapter = bottleneck(own, functional.gelu)
        changes.append(Change(ffn=lambda x, z, norm, a=adapter: norm(z + a(z) + x)))
    return classify(bare, batch, changes)


def top(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the ``count`` largest scores together; scores must differ."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    assert len(flat.unique()) == len(flat)
    least = flat.sort(descending=True).values[count - 1]
    return {name: (score >= least).double() for name, score in scores.items()}


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", ["magnitude", "snip"])
def test_masks_are_those_of_the_largest_scores(criterion: str, scope: str) -> None:
    """``|w|``, and ``|w dL/dw|`` with the gradient of the mean loss summed over batches."""
    bare, ours = sparse(criterion, 0.3, scope)
    tensors = {n: t.detach().clone().requires_grad_() for n, t in ours.trainable.items()}
    names = masked_names(ours)
    scores = {n: tensors[n].detach().abs() for n in names}
    if criterion == "snip":
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches():
            loss = loss + functional.cross_entropy(
                classified(bare, tensors, batch), batch["labels"])
        found = torch.autograd.grad(loss, [tensors[n] for n in names])
        scores = {n: scores[n] * g.abs() for n, g in zip(names, found, strict=True)}
    if scope == "global":
        expected = top(scores, round(0.3 * sum(s.numel() for s in scores.values())))
    else:
        expected = {n: top({n: s}, round(0.3 * s.numel()))[n] for n, s in scores.items()}
    assert {n.rpartition(".")[2] for n in names} == {"weight"}
    assert len(names) == 4
    torch.testing.assert_close(kept(ours), expected, rtol=0, atol=0)


@pytest.mark.parametrize("criterion", ["magnitude", "snip", "random"])
@pytest.mark.parametrize("keep", [0.01, 0.37, 1.0])
def test_the_share_kept_is_exact(criterion: str, keep: float) -> None:
    _, ours = sparse(criterion, keep)
    masks = kept(ours)
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == round(keep * total)
    assert all(set(m.unique().tolist()) <= {0.0, 1.0} for m in masks.values())


def test_masked_entries_have_neither_effect_nor_gradient() -> None:
    bare, ours = sparse("magnitude")
    tensors, masks = ours.tensors(), kept(ours)
    batch = inputs("bert", "classification")
    plain = {n: t * masks[n] if n in masks else t for n, t in ours.trainable.items()}
    expected = classified(bare, plain, batch)
    torch.testing.assert_close(logits(ours.model, batch), expected, **CLOSE)
    found = gradients(ours.model, batch, ours.trainable)
    for name, mask in masks.items():
        assert torch.equal(found[name] != 0, mask.bool()), name
        assert tensors[f"{name}_mask"].requires_grad is False
    for name, gradient in found.items():
        if name.endswith("bias"):
            assert bool((gradient != 0).all()), name


def test_masks_hold_while_an_optimiser_with_momentum_and_decay_moves() -> None:
    """Pruned entries may move in storage, never in the function."""
    bare, ours = sparse("magnitude")
    before = {n: m.clone() for n, m in kept(ours).items()}
    optimiser = torch.optim.AdamW(ours.trainable.values(), lr=0.1, weight_decay=0.5)
    for batch in batches():
        optimiser.zero_grad()
        ours.model(**batch).loss.backward()
        optimiser.step()
    torch.testing.assert_close(kept(ours), before, rtol=0, atol=0)
    plain = {n: t * before[n] if n in before else t for n, t in ours.trainable.items()}
    batch = inputs("bert", "classification")
    torch.testing.assert_close(
        logits(ours.model, batch), classified(bare, plain, batch), **CLOSE)


def test_random_masks_do_not_follow_the_weights() -> None:
    _, ours = sparse("random", 0.5, base="houlsby_adapter(bottleneck=64, init='normal(0.1)')")
    for name, mask in kept(ours).items():
        size = ours.tensors()[name].detach().abs()
        # Means of two halves of 2,048 half-normal entries: their gap has a deviation of 0.0027.
        assert abs(size[mask == 1].mean() - size[mask == 0].mean()) < 0.015
        assert abs(mask.mean() - 0.5) < 0.06  # five deviations of a fair share


def test_a_factor_without_scores_is_cut_evenly() -> None:
    """LoRA's second factor is zero at first: its magnitudes say nothing, rows must not go."""
    _, ours = sparse("magnitude", 0.5, "local", base="lora(rank=8)")
    zero = {n: m for n, m in kept(ours).items() if ".up." in n}
    assert len(zero) == 4
    for name, mask in zero.items():
        assert not ours.tensors()[name].any()
        assert int(mask.sum()) == mask.numel() // 2
        assert bool((mask.sum(0) > 6).all()), name  # of 32: a fair cut leaves 16, deviation 2
        assert int((mask.sum(1) == 0).sum()) < 4, name  # of 32 rows of 8; by position: 16


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.9])
def test_er_densities_follow_the_shapes(keep: float) -> None:
    """``min(1, e (n + m) / (n m))`` with e from bisection; dense where that exceeds one."""
    shapes = [(4, 32), (32, 4), (2, 32), (32, 2), (64, 48), (1, 32)]
    sizes = [n * m for n, m in shapes]

    def densities(epsilon: float) -> list[float]:
        return [min(1.0, epsilon * (n + m) / (n * m)) for n, m in shapes]

    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(d * s for d, s in zip(densities(middle), sizes, strict=True))
        low, high = (middle, high) if total < keep * sum(sizes) else (low, middle)
    assert er_densities(shapes, keep) == pytest.approx(densities(low), abs=1e-9)


def test_er_masks_have_those_densities() -> None:
    _, ours = sparse("er", 0.2, base="houlsby_adapter(bottleneck=8, init='normal(0.1)')")
    masks = kept(ours)
    wanted = er_densities([tuple(m.shape) for m in masks.values()], 0.2)
    for mask, density in zip(masks.values(), wanted, strict=True):
        assert int(mask.sum()) == round(density * mask.numel())


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_large_sparse_keeps_as_many_weights_as_the_dense_adapter_has(factor: int) -> None:
    spec = peftref.load("large_sparse", bottleneck=12, factor=factor, criterion="magnitude")
    ours = peftref.attach(tiny("bert", "classification"), spec)
    dense = peftref.compile(
        "houlsby_adapter(bottleneck=12)", meta_model(tiny_config("bert"), "classification", 3))
    weights = sum(t.spec.size for t in dense.tensors if t.name.endswith("weight"))
    assert sum(int(m.sum()) for m in kept(ours).values()) == weights
