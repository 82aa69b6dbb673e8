"""Property 7: each way to run an edit equals the plain one, in outputs and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, event, given
from torch import Tensor

import peftref
import peftref.compiler
from peftref.compiler import compile_table
from peftref.ir.plan import Plan
from peftref.ir.types import Form
from peftref.passes.base import Pass
from peftref.passes.choose_lowering import ChooseLowering
from peftref.passes.fuse import Fuse
from peftref.passes.pipelines import default_passes
from tests.lowering.randomised import randomise
from tests.properties.backbones import Case, batch, cases, examples, model, table

# Relative to the largest entry, in float64. Llama and T5 compute norms in float32 all the same.
CLOSE = {"bert": 1e-9, "gpt2": 1e-9, "llama": 1e-3, "t5": 1e-3}


def plan_as(case: Case, *, factored: bool, fused: bool) -> Plan:
    """Plan with one form for every edit that has the choice."""
    form = Form.FACTORED if factored else Form.FORMED

    def forced(step: Pass) -> Pass:
        if isinstance(step, ChooseLowering):
            return replace(step, force=form)
        return replace(step, ops=fused, accumulate=fused) if isinstance(step, Fuse) else step

    def passes(*arguments: Any) -> tuple[Pass, ...]:
        return tuple(forced(step) for step in default_passes(*arguments))

    with patch.object(peftref.compiler, "default_passes", passes):
        return compile_table(case.composed.spec, table(case.family))


def run(case: Case, plan: Plan) -> dict[str, Tensor]:
    """Output, and gradients of adapter and head, of one weighted sum of the outputs."""
    backbone = model(case.family, torch.float64)
    adapted = peftref.attach(backbone, plan)
    try:
        randomise(adapted)
        logits = backbone(**batch(case.family)).logits
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        (weights * logits).sum().backward()
        found = {"output": logits.detach()}
        for name, parameter in (*adapted.trainable.items(), *adapted.head.items()):
            assert parameter.grad is not None, name
            found[name] = parameter.grad.clone()
            parameter.grad = None
        return found
    finally:
        adapted.detach()


def forms(plan: Plan) -> list[Form | None]:
    return [edit.write.form for module in plan.modules for edit in module.edits]


@examples(50)
@given(cases())
def test_factored_formed_and_unfused_are_equal(case: Case):
    factored = plan_as(case, factored=True, fused=True)
    formed = plan_as(case, factored=False, fused=False)
    unfused = plan_as(case, factored=True, fused=False)
    assume(not factored.properties.needs_data)  # masks of other tensors would be compared
    event(f"forms differ: {forms(factored) != forms(formed)}")
    plain = run(case, formed)
    for plan in (factored, unfused):
        found = run(case, plan)
        assert found.keys() == plain.keys()
        largest = max(float(value.abs().max()) for value in plain.values())
        for name, value in found.items():
            # Where a gradient is zero (a bias of all keys), both sides are rounding.
            size = max(float(plain[name].abs().max()), 1e-5 * largest)
            allowed = CLOSE[case.family] * size
            assert (value - plain[name]).abs().max() <= allowed, name


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_forms_are_forced(family: str):
    """That the comparison above compares two things."""
    drawn = Case(family, None)  # pyright: ignore[reportArgumentType]
    spec = peftref.load("lora(rank=2)")
    object.__setattr__(drawn, "composed", type("Drawn", (), {"spec": spec}))
    assert set(forms(plan_as(drawn, factored=True, fused=True))) == {Form.FACTORED}
    assert set(forms(plan_as(drawn, factored=False, fused=True))) == {Form.FORMED}
