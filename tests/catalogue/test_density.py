"""DEFT: the density of feed-forward activations, its gradient and its effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftref
from peftref.errors import PeftRefError
from peftref.procedures.density import Density
from tests.backbone.tiny import tiny
from tests.catalogue.proof import attach, batch, count
from tests.catalogue.small_training import train
from tests.parity.peft_pairs import logits


def density(made: Any) -> Density:
    (procedure,) = made.procedures
    assert isinstance(procedure, Density)
    return procedure


def activations(made: Any, rows: dict[str, Tensor], names: list[str]) -> list[Tensor]:
    """What enters the last linear of every feed-forward part."""
    seen: list[Tensor] = []
    hooks = [made.model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])) for name in names]
    made.model(**rows)
    for hook in hooks:
        hook.remove()
    return seen


BERT = [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
T5 = [f"{side}.block.{i}.layer.{k}.DenseReluDense.wo"
      for side, k in (("encoder", 1), ("decoder", 2)) for i in range(2)]


def test_it_trains_what_its_base_trains() -> None:
    for family in ("bert", "llama"):
        assert count("deft(base='lora')", family) == count("lora", family)
        assert count("deft", family) == count("pfeiffer_adapter(bottleneck=48)", family)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_loss_is_the_formula(family: str) -> None:
    made = attach("deft(base='lora', weight=0.3, epsilon=0.01)", family)
    rows = batch(family)
    rows["attention_mask"] = rows["attention_mask"].clone()
    rows["attention_mask"][0, -2:] = 0
    held = activations(made, rows, BERT if family == "bert" else T5)
    mask = rows["attention_mask"].double()

    def plain(a: Tensor, mask: Tensor) -> Tensor:
        share = (a**2 / (a**2 + 0.01)).mean(-1)
        return ((share * mask).sum(1) / mask.sum(1)).mean()

    encoder = (plain(held[0], mask) + plain(held[1], mask)) / 2
    expected = encoder
    if family == "t5":
        whole = torch.ones(held[2].shape[:2], dtype=torch.float64)
        expected = encoder + (plain(held[2], whole) + plain(held[3], whole)) / 2
    procedure = density(made)
    procedure.before_step(made, 0, 1)
    outputs = made.model(**rows)
    found = procedure.loss(made.model, rows, outputs)
    assert found is not None
    procedure.after_backward(made, 0, 1)
    torch.testing.assert_close(found, 0.3 * expected, rtol=0, atol=1e-12)
    names = list(made.trainable)
    ours = torch.autograd.grad(found, [made.trainable[n] for n in names], allow_unused=True,
                               materialize_grads=True)
    theirs = torch.autograd.grad(0.3 * expected, [made.trainable[n] for n in names],
                                 allow_unused=True, materialize_grads=True)
    assert any(bool(g.any()) for g in ours)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_nothing_of_it_stays_on_the_model() -> None:
    made = attach("deft(base='lora')")
    before = logits(made.model, batch())
    procedure = density(made)
    procedure.before_step(made, 0, 1)
    procedure.before_step(made, 1, 2)
    hooked = [m for m in made.model.modules() if m._forward_pre_hooks]
    assert len(hooked) == 2
    assert all(len(m._forward_pre_hooks) == 1 for m in hooked)
    procedure.after_backward(made, 1, 2)
    assert not any(m._forward_pre_hooks for m in made.model.modules())
    assert torch.equal(logits(made.model, batch()), before)


@pytest.mark.parametrize(("base", "factor"), [
    ("lora(site='ffn.up')", 0.95),
    # Reaches only what the second layer reads, and hands a second tensor to the watched linear.
    ("scaled_parallel_adapter(bottleneck=4)", 0.99),
])
def test_activations_become_sparse(base: str, factor: float, tmp_path: Path) -> None:
    found = []
    for weight in (0.0, 10.0):
        made = train(f'deft(base="{base}", weight={weight}, epsilon=0.01, threshold=0.05)',
                     tmp_path / str(weight), steps=12, learning_rate=0.02)
        rows = {name: value % 60 for name, value in batch().items()}
        found.append(density(made).measure(made, [rows]))
    # GELU is never exactly zero: only the thresholded share shows it.
    assert min(each["exact"] for each in found) > 0.99
    assert found[1]["thresholded"] < factor * found[0]["thresholded"]


def test_exact_zeros_are_counted_where_the_activation_has_them() -> None:
    model = tiny("bert", "classification", dtype=torch.float64, hidden_act="relu")
    made = peftref.attach(model, "deft(base='lora', threshold=0.5)")
    held = activations(made, batch(), BERT)
    found = density(made).measure(made, [batch()])
    exact = sum(float((a != 0).double().mean()) for a in held) / 2
    assert found["exact"] == pytest.approx(exact)
    assert 0.2 < exact < 0.8
    above = sum(float((a.abs() > 0.5).double().mean()) for a in held) / 2
    assert found["thresholded"] == pytest.approx(above)


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(PeftRefError, match="must be from 0 to 1000"):
        peftref.load("deft(weight=-1.0)")
