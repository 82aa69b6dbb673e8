"""Property: memory and FLOPs that are predicted for a training step, against measured ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import peftref
from peftref.backbone.hf.traits import read_traits
from peftref.ir.memory import Step, step_memory
from peftref.ir.step_flops import step_flops
from tests.properties.measure_step import BACKBONES, attached, batch_of, made, saved_bytes
from tests.properties.test_cost import in_place

AGREES = 0.15  # of the memory; kernels keep small tensors that the prediction leaves out
FLOPS_AGREE = 0.05
BATCH, LENGTH = 2, 64




@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("expression", ["lora", "lora(layers='1:2')", "ia3", "houlsby_adapter"])
def test_what_is_kept_for_the_backward_pass(family: str, expression: str):
    model = made(family, layers=2)
    traits = read_traits(model, BACKBONES[family].task)
    plan = peftref.compile(expression, model, tokens=BATCH * LENGTH)
    stated = step_memory(plan, traits, Step(BATCH, LENGTH)).activations
    adapted = attached(model, plan)
    kept = saved_bytes(adapted.model, batch_of(family, BATCH, LENGTH))
    assert abs(stated - kept) <= AGREES * kept


def test_nothing_is_kept_below_the_lowest_edit():
    model = made("bert", layers=4)
    traits = read_traits(model, "classification")
    kept = [
        step_memory(peftref.compile(f"lora(layers='{low}:4')", model), traits, Step(2, 32))
        for low in range(4)
    ]
    sizes = [each.activations for each in kept]
    assert sizes == sorted(sizes, reverse=True)
    # The last of four layers keeps about a quarter of what all of them do.
    assert abs(4 * sizes[3] - sizes[0]) < 0.2 * sizes[0]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_flops_of_a_step(family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peftref.lowering.fast.FORCED", True)  # the counter sees no op inside
    model = made(family, layers=3)
    model.set_attn_implementation("eager")  # and nothing of a CPU's attention kernel
    traits = read_traits(model, BACKBONES[family].task)
    plan = peftref.compile("lora", model, tokens=BATCH * LENGTH)
    stated = sum(step_flops(plan, traits, Step(BATCH, LENGTH)))
    adapted = attached(model, plan)
    known = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        adapted.model(**batch_of(family, BATCH, LENGTH)).loss.backward()
    counted = counter.get_total_flops()
    assert abs(stated - counted) <= FLOPS_AGREE * counted
    assert plan.trainable_parameters == sum(each.numel() for each in adapted.trainable.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", list(BACKBONES))
def test_peak_of_the_process(family: str):
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.properties.measure_step", family, "2", "256"]
    done = subprocess.run(
        command, env={**os.environ, **fixed}, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])["peak"]
    model = made(family, layers=6)
    plan = peftref.compile("lora", model, tokens=512)
    stated = step_memory(plan, read_traits(model, BACKBONES[family].task), Step(2, 256)).peak
    assert abs(stated - measured) <= AGREES * measured
