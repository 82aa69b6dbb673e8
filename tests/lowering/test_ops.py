"""Edits that run as ops against the plain program, in outputs and every gradient, in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import peftref
import peftref.compiler
from peftref.ir.plan import Plan
from peftref.ir.types import Form
from peftref.lowering.swap import is_swapped, state_of
from peftref.passes.base import Pass
from peftref.passes.choose_lowering import ChooseLowering
from peftref.passes.fuse import Fuse
from peftref.passes.pipelines import default_passes
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise

ALL = "site='{attention,ffn}.*'"
# Name of the op -> compositions that must use it, on families with plain and fused projections.
COMPOSITIONS = {
    "lora_linear": [
        f"lora(rank=2, {ALL})",
        f"lora(rank=2, {ALL}) + lora(rank=3, alpha=5)",
        "vera(rank=4)",
        "lora(rank=2) + bitfit",
        "lora(rank=2) + ia3 + lora(rank=2, dropout=0.5)",
        "prune(lora(rank=2), criterion='random', keep=0.5)",
        "lora(rank=2, site='attention.output') + oft(block=4, site='attention.output')",
        "lora(rank=2) + loha(rank=2)",
    ],
    "dora_linear": [f"dora(rank=2, {ALL})", "lora(rank=3) + dora(rank=2)"],
    "rotated_linear": [
        f"oft(block=8, {ALL})",
        "oft(block=4, site='ffn.*') + oft(block=8, site='ffn.*') + bitfit",
    ],
    "bottleneck": [
        "houlsby_adapter(bottleneck=4)",
        "scaled_parallel_adapter(bottleneck=4, activation='tanh')",
        "mix(houlsby_adapter(bottleneck=4, site='ffn'), copies=3)",
        "mam(length=3, bottleneck=4, reparameterisation='none') + lora(rank=2)",
    ],
    "scale_shift": ["ia3", "ia3 + lora(rank=2, site='ffn.*')"],
}
FAMILIES = ("bert", "gpt2", "llama")
# Float64; Llama computes its norms in float32.
CLOSE = {"bert": 1e-9, "gpt2": 1e-9, "llama": 1e-4}


def cases() -> Iterator[Any]:
    for op, expressions in COMPOSITIONS.items():
        for expression in expressions:
            for family in FAMILIES:
                if family == "llama" and "bitfit" in expression:
                    continue  # it has no bias
                yield pytest.param(family, expression, op, id=f"{family}: {expression}")


def planned(model: Any, expression: str, *, ops: bool) -> Plan:
    def passes(*arguments: Any) -> tuple[Pass, ...]:
        return tuple(
            replace(s, ops=ops) if isinstance(s, Fuse)
            else replace(s, force=Form.FACTORED) if isinstance(s, ChooseLowering) else s
            for s in default_passes(*arguments)
        )

    with patch.object(peftref.compiler, "default_passes", passes):
        return peftref.compile(expression, model)


def run(family: str, expression: str, *, ops: bool, train: bool = False) -> dict[str, Tensor]:
    """Output of the model, and gradients of its input and of every trained tensor."""
    model = tiny(family, dtype=torch.float64).train(train)
    given = inputs(family)
    adapted = peftref.attach(model, planned(model, expression, ops=ops))
    randomise(adapted)
    given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    given["inputs_embeds"].requires_grad_()
    torch.manual_seed(3)
    y = model(**given).last_hidden_state
    (torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) * y).sum().backward()
    found = {"output": y.detach(), "input": given["inputs_embeds"].grad}
    found.update({n: p.grad for n, p in adapted.trainable.items()})
    return {n: g for n, g in found.items() if g is not None}


@pytest.mark.parametrize(("family", "expression", "op"), list(cases()))
def test_an_op_equals_the_plain_program(family: str, expression: str, op: str):
    model = tiny(family)
    used = {e.write.op for m in planned(model, expression, ops=True).modules for e in m.edits}
    if family != "gpt2" or op in ("lora_linear", "bottleneck"):  # others not on slices
        assert op in used
    fast, plain = run(family, expression, ops=True), run(family, expression, ops=False)
    assert fast.keys() == plain.keys()
    largest = max(float(value.abs().max()) for value in plain.values())
    for name, value in plain.items():
        # Where a gradient is zero (a bias of all keys), both sides are rounding.
        size = max(float(value.abs().max()), 1e-5 * largest)
        assert (fast[name] - value).abs().max() <= CLOSE[family] * size, name


def test_the_fast_form_really_runs():
    """That the comparison above compares two things."""
    model = tiny("bert", dtype=torch.float64)
    for ops in (True, False):
        adapted = peftref.attach(model, planned(model, f"lora(rank=2, {ALL})", ops=ops))
        folds = [state_of(m).fold(m) for m in model.modules() if is_swapped(m) and m is not model]
        fast = [f.on_weight.fast is not None for f in folds if f is not None]
        assert fast == [ops] * 12
        adapted.detach()


def test_dropout_keeps_the_mean_and_no_mask():
    """In training mode: outputs over many draws average to the output without dropout."""
    torch.manual_seed(0)
    model = tiny("bert", dtype=torch.float64)
    adapted = randomise(peftref.attach(model, "lora(rank=2, dropout=0.5)"))
    query = model.encoder.layer[0].attention.self.query
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    expected = query.eval()(x)
    query.train()
    draws = torch.stack([query(x).detach() for _ in range(2000)])
    assert draws.std(0).min() > 0
    error = (draws.mean(0) - expected).abs()
    assert (error <= 5 * draws.std(0) / 2000**0.5).all()
    adapted.detach()


def test_linears_that_read_one_stream_are_one_op():
    """Query, key and value: one node of the graph; nothing waits after a call, nor in a copy."""
    model = tiny("bert", dtype=torch.float64).eval()
    adapted = randomise(peftref.attach(model, planned(model, f"lora(rank=2, {ALL})", ops=True)))
    attention = model.encoder.layer[0].attention.self
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    nodes = {y._base.grad_fn if y._base is not None else y.grad_fn for y in (query, key, value)}
    assert len(nodes) == 1
    group = state_of(attention.query).group
    assert state_of(attention.value).group is group
    assert group._held is None
    copied = copy.deepcopy(model).encoder.layer[0].attention.self
    assert state_of(copied.query).group.modules == [copied.query, copied.key, copied.value]
    torch.testing.assert_close(copied.key(x.clone()), key)
    adapted.detach()


def test_a_group_computes_nothing_ahead_where_the_streams_differ():
    """Each linear sees its own input, whatever was computed for it before."""
    model = tiny("bert", dtype=torch.float64).eval()
    randomise(peftref.attach(model, planned(model, f"lora(rank=2, {ALL})", ops=True)))
    attention = model.encoder.layer[0].attention.self
    x, other = torch.randn(2, 2, 5, 32, dtype=torch.float64).unbind(0)
    expected = attention.key(other)
    attention.query(x)
    torch.testing.assert_close(attention.key(other), expected, rtol=0, atol=1e-12)
    assert not state_of(attention.query).group.works
