"""A gate scales the change that any edit makes; positions are gates of ones and zeros."""

from __future__ import annotations

import pytest
import torch

import peftref
from peftref.errors import BackboneError, CompositionError
from tests.backbone.tiny import inputs, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")

OPEN = 50.0  # sigmoid(50) is 1 to the last bit of float64
GATED = ("lora", "dora", "oft(block=4)", "ia3", "ln_tuning", "loha", "vera", "pfeiffer_adapter",
         "houlsby_adapter", "prefix_tuning(length=3)")


def _randomise(adapted: peftref.Adapted) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.trainable.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(0.3 * noise)


def _set_gates(adapted: peftref.Adapted, bias: float) -> None:
    for name, parameter in adapted.trainable.items():
        if "gate." in name:
            parameter.data.fill_(bias if name.endswith("bias") else 0.0)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("technique", GATED)
def test_an_open_gate_is_no_gate_and_a_closed_one_no_edit(technique: str, family: str) -> None:
    model, batch = tiny(family, dtype=torch.float64), inputs(family)
    with torch.no_grad():
        bare = model(**batch).last_hidden_state
        gated = peftref.attach(model, f"gate({technique})")
        _randomise(gated)
        _set_gates(gated, OPEN)
        opened = model(**batch).last_hidden_state
        _set_gates(gated, -OPEN * 20)
        closed = model(**batch).last_hidden_state
        values = {name: value.clone() for name, value in gated.trainable.items()}
        gated.detach()
        plain = peftref.attach(model, technique)
        for name, parameter in plain.trainable.items():
            parameter.copy_(values[name])
        torch.testing.assert_close(opened, model(**batch).last_hidden_state,
                                   rtol=1e-10, atol=1e-10)
    if "prefix" not in technique:  # rows of zeros still take their share of attention
        torch.testing.assert_close(closed, bare, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(opened, bare)


@pytest.mark.parametrize("technique", ["lora", "oft(block=4)", "dora", "houlsby_adapter"])
def test_half_open_lies_half_way_where_one_module_is_edited(technique: str) -> None:
    """One edited site, linear model behind it: the output moves by the gate's share."""
    model = tiny("llama", dtype=torch.float64)
    site = "ffn" if "adapter" in technique else "attention.output"
    name = technique.replace(")", f", site='{site}', layers=[1])") if "(" in technique else (
        f"{technique}(site='{site}', layers=[1])")
    path = "layers.1.mlp" if site == "ffn" else "layers.1.self_attn.o_proj"
    module = model.get_submodule(path)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        before = module(x)
        adapted = peftref.attach(model, f"gate({name})")
        _randomise(adapted)
        model.peftref.context.masks = {}
        results = []
        for bias in (OPEN, 0.0):
            _set_gates(adapted, bias)
            results.append(module(x))
    torch.testing.assert_close(results[1] - before, (results[0] - before) / 2,
                               rtol=1e-10, atol=1e-10)


def test_a_prompt_takes_no_gate() -> None:
    with pytest.raises(CompositionError, match="prompt cannot be gated"):
        peftref.compile("gate(prompt_tuning)", tiny("bert"))


def test_a_member_is_gated_once() -> None:
    with pytest.raises(CompositionError, match="gated already"):
        peftref.compile("gate(gate(lora))", tiny("bert"))


SPEC = """
technique: shift
modules:
  - name: vector
    site: {{select: block, layers: [1], positions: {positions}}}
    function: bias
    interaction: {{insertion: sequential, integration: replace}}
"""
IDS = torch.tensor([[5, 6, 7, 8, 9, 0, 0], [0, 0, 5, 9, 7, 11, 12]])
REAL = (IDS != 0).long()


@pytest.mark.parametrize(("positions", "expected"), [
    ("{first: 2}", [[0, 1], [2, 3]]),
    ("{last: 1}", [[4], [6]]),
    ("{first: 1, last: 2}", [[0, 3, 4], [2, 5, 6]]),
    ("{first: 9}", [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]]),
    ("special", [[0, 4], [2, 3]]),
])
def test_positions_count_real_tokens(positions: str, expected: list[list[int]]) -> None:
    model = tiny("bert", dtype=torch.float64)
    with torch.no_grad():
        bare = model(IDS, attention_mask=REAL).last_hidden_state
        adapted = peftref.attach(model, SPEC.format(positions=positions))
        adapted.special_tokens = (5, 9)
        next(iter(adapted.trainable.values())).fill_(1.0)
        change = model(IDS, attention_mask=REAL).last_hidden_state - bare
    found = [[i for i in range(7) if row[i].abs().max() > 1e-12] for row in change]
    assert found == expected
    assert not adapted.plan.properties.mergeable


def test_positions_hold_while_the_prompt_is_read_only() -> None:
    """Cached decoding equals whole forwards: a generated token is at no position."""
    model = tiny("llama", "causal_lm", dtype=torch.float64)
    adapted = peftref.attach(model, SPEC.format(positions="{first: 2}"))
    next(iter(adapted.trainable.values())).data.fill_(1.0)
    ids = IDS[1:, 2:]
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :4], use_cache=True).past_key_values
        last = model(ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(last, whole[:, 4:], rtol=1e-10, atol=1e-10)


def test_special_tokens_must_be_known() -> None:
    model = tiny("bert")
    peftref.attach(model, SPEC.format(positions="special"))
    with pytest.raises(BackboneError, match=r"adapted\.special_tokens"):
        model(IDS)


@pytest.mark.parametrize("family", ["bert", "llama", "albert"])
def test_a_stack_reads_the_states_of_all_layers(family: str) -> None:
    model, batch = tiny(family, dtype=torch.float64), inputs(family)
    states = torch.stack(model(**batch, output_hidden_states=True).hidden_states)
    if family == "llama":  # the last of them is behind the final norm
        seen: list[torch.Tensor] = []
        hook = model.layers[-1].register_forward_hook(
            lambda _module, _args, result: seen.append(
                result[0] if isinstance(result, tuple) else result))
        model(**batch)
        hook.remove()
        states = torch.cat([states[:-1], seen[0][None]])
    adapted = peftref.attach(model, "attention_fusion")
    (query,) = adapted.trainable.values()
    query.data.normal_()
    expected = ((states @ query).softmax(0)[..., None] * states).sum(0)
    expected = model.norm(expected) if family == "llama" else expected
    torch.testing.assert_close(model(**batch).last_hidden_state, expected, rtol=1e-9, atol=1e-9)
    model.train()
    plain = torch.autograd.grad(model(**batch).last_hidden_state.square().sum(), query)[0]
    if family != "albert":  # which cannot be checkpointed
        model.gradient_checkpointing_enable()
        again = torch.autograd.grad(model(**batch).last_hidden_state.square().sum(), query)[0]
        torch.testing.assert_close(again, plain)
