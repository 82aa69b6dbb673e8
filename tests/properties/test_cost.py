"""Property 3: FLOPs that the plan states against those that torch counts in a forward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import peftref
from tests.properties.backbones import batch, fresh

AGREES = 0.05
SEQUENCES, LENGTH = 8, 56
TOKENS = SEQUENCES * LENGTH

# Where products of matrices dominate; torch counts nothing else.
EXPRESSIONS = {
    "bert": ["lora(rank=4)", "dora(rank=4)", "loha(rank=8)", "houlsby_adapter(bottleneck=8)",
             "pfeiffer_adapter(bottleneck=8)", "prefix_tuning(length=6)",
             "prefix_tuning(length=6, reparameterisation='mlp', hidden=16)",
             "prompt_tuning(length=6)", "mam(length=4, reparameterisation='none', bottleneck=8)"],
    "gpt2": ["lora(rank=4)", "dora(rank=48)", "loha(rank=8)",
             "ia3(feedforward='attention.value')", "scaled_parallel_adapter(bottleneck=8)",
             "prefix_tuning(length=6)", "prompt_tuning(length=6)", "oft(block=4)"],
    "llama": ["lora(rank=4, site='ffn.*')", "vera(rank=64)", "oft(block=8)", "dora(rank=4)",
              "prompt_tuning(length=6)", "mix(lora(rank=4), copies=2)",
              "lora + dora(rank=48) + loha"],
    "t5": ["lora(rank=4, site='cross_attention.{query,value}')", "prefix_tuning(length=6)",
           "prompt_tuning(length=6)", "houlsby_adapter(bottleneck=8)"],
}


def in_place(_: object, a: torch.Size, b: torch.Size, **__: object) -> int:
    """Of a product that adds in place, which torch does not count."""
    return 2 * a[0] * a[1] * b[1]


def counted(backbone: torch.nn.Module, given: dict[str, torch.Tensor]) -> int:
    known = {torch.ops.aten.addmm_: in_place}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        backbone(**given)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("family", "expression"), [(f, e) for f, listed in EXPRESSIONS.items() for e in listed])
def test_stated_flops_are_those_of_a_forward(family: str, expression: str):
    backbone = fresh(family)
    backbone.set_attn_implementation("eager")  # of the other torch counts nothing on a CPU
    given = batch(family, batch=SEQUENCES, length=LENGTH)
    if family == "t5":  # the plan counts the same tokens in both stacks
        given["decoder_input_ids"] = given["input_ids"]
    frozen = counted(backbone, given)
    plan = peftref.compile(expression, backbone, tokens=TOKENS)
    peftref.attach(backbone, plan)
    added = counted(backbone, given) - frozen
    stated = plan.cost(TOKENS, sequences=SEQUENCES).forward_flops
    assert added > 0
    assert abs(stated - added) <= AGREES * added
