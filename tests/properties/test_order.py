"""Property 5: one order of edits, printed where it matters, the same for forward and merge."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import peftref
from tests.backbone.tiny import tiny
from tests.lowering.randomised import randomise

ORDERS = list(itertools.permutations(("lora", "oft", "dora", "ia3")))
SITE = "site='attention.key'"
USE = {
    "lora": f"lora(rank=3, alpha=3.0, {SITE})",
    "oft": f"oft(block=8, {SITE})",
    "dora": f"dora(rank=2, alpha=4.0, {SITE})",
    "ia3": f"ia3({SITE}, feedforward='ffn.up')",
}


def rotation(entries: Tensor, block: int) -> Tensor:
    """``blockdiag((I - Q)(I + Q)^-1)`` with the upper triangles of ``Q`` in rows of entries."""
    parts: list[Tensor] = []
    for row in entries:
        upper = torch.zeros(block, block, dtype=row.dtype)
        upper[tuple(torch.triu_indices(block, block, 1))] = row
        q = upper - upper.mT
        eye = torch.eye(block, dtype=row.dtype)
        parts.append((eye - q) @ torch.linalg.inv(eye + q))
    return torch.block_diag(*parts)


def folded(weight: Tensor, t: dict[str, Tensor]) -> Tensor:
    """``diag(l) (m / |V|) V``, ``V = (W + B1 A1 + 2 B2 A2) R^T``: in every member order."""
    added = weight + t["lora.up"] @ t["lora.down"] + 2 * t["dora.up"] @ t["dora.down"]
    turned = added @ rotation(t["oft"], 8).mT
    sized = t["magnitude"][:, None] * turned / turned.norm(dim=1, keepdim=True)
    return t["ia3"][:, None] * sized


def tensors_at(adapted: peftref.Adapted, path: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    ends = {"lora.delta.": "lora", "oft.rotation.": "oft", "dora.delta.": "dora",
            "dora.magnitude.": "magnitude", "ia3.attention.": "ia3"}
    for name, tensor in adapted.trainable.items():
        for end, short in ends.items():
            if name.startswith(path) and end in name:
                part = ".down" if ".down." in name else ".up" if ".up." in name else ""
                found[short + part] = tensor.detach()
    return found


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_every_order_has_the_one_meaning(family: str):
    """Stages come before member order, so all 24 orders agree, with the formula and merged."""
    backbone = tiny(family, dtype=torch.float64)
    path = {"llama": "layers.1.self_attn.k_proj", "gpt2": "h.1.attn.c_attn",
            "bert": "encoder.layer.1.attention.self.key"}[family]
    module = backbone.get_submodule(path)
    rows = slice(32, 64) if family == "gpt2" else slice(None)
    weight = (module.weight.mT if family == "gpt2" else module.weight).detach().clone()
    held = dict(module.named_parameters()).get("bias")
    bias = None if held is None else held.detach().clone()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for order in ORDERS:
        adapted = randomise(peftref.attach(backbone, " + ".join(USE[name] for name in order)))
        t = tensors_at(adapted, path)
        expected = linear(x, weight, bias)
        own = folded(weight[rows], t)
        own_bias = None if bias is None else bias[rows] * t["ia3"]
        expected[..., rows] = linear(x, own, own_bias)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-11)
        adapted.merge()
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-11)
        adapted.detach()


TIES = {
    "oft(block=8) + oft(block=4)": "oft.rotation before oft_2.rotation",
    "oft(block=4) + oft(block=8)": "oft.rotation before oft_2.rotation",
    "houlsby_adapter + houlsby_adapter": "houlsby_adapter.adapter before houlsby_adapter_2.adapter",
    "prompt_tuning + prompt_tuning": "prompt_tuning.prompt before prompt_tuning_2.prompt",
}


@pytest.mark.parametrize("expression", TIES)
def test_ties_that_do_not_commute_are_printed(expression: str):
    plan = peftref.compile(expression, tiny("gpt2"))
    assert all(TIES[expression] in note for note in plan.properties.order_notes)
    assert plan.properties.order_notes
    assert "do not commute" in str(plan)


@pytest.mark.parametrize("expression", [
    "lora + lora", "ia3 + ia3", "lora + oft(block=8) + ia3", "prefix_tuning + prefix_tuning",
    "bitfit + ln_tuning", "loha + lokr + vera(rank=2)",
])
def test_what_commutes_has_no_note_and_does(expression: str):
    backbone = tiny("gpt2", dtype=torch.float64)
    ids = torch.arange(3, 12)[None]
    members = expression.split(" + ")
    outputs: list[Tensor] = []
    for order in (members, members[::-1]):
        plan = peftref.compile(" + ".join(order), backbone)
        assert not plan.properties.order_notes
        adapted = peftref.attach(backbone, plan)
        _fill_by_shape(adapted, reverse=order is not members)
        outputs.append(backbone(ids).last_hidden_state)
        adapted.detach()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-10)


def _fill_by_shape(adapted: peftref.Adapted, *, reverse: bool) -> None:
    """The same values for the same technique, wherever it stands among the members."""
    members = [m.name for m in adapted.plan.composition.members]
    for place, member in enumerate(reversed(members) if reverse else members):
        generator = torch.Generator().manual_seed(place)
        with torch.no_grad():
            for _, tensor in sorted(adapted.tensors((member,)).items()):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                if tensor.requires_grad:
                    tensor.copy_(0.2 * noise)
