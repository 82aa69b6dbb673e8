"""Low-rank variants and structured matrices added to a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from scipy import stats
from torch import Tensor, nn

import peftref
from peftref.errors import PeftRefError
from tests.backbone.tiny import tiny
from tests.catalogue.proof import (
    Tensors,
    WeightForm,
    assert_follows,
    assert_identity,
    assert_known_weights,
    assert_reached,
    assert_same_as_peft,
    attach,
    batch,
    count,
    initial,
)
from tests.parity.peft_pairs import logits

Make = Callable[[Any], Any]
# Query (32 to 32) and value (32 to 32, or to 16 where keys are grouped) of two layers.
WIDTHS = {"bert": ((32, 32), (32, 32)), "llama": ((32, 32), (32, 16))}
PEFT_SITES = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "formula"), [
    ("lora_plus(rank=3)", lambda i, o: 3 * (i + o)),
    ("lora_fa(rank=3)", lambda i, o: 3 * o),
    ("miss(rank=8)", lambda i, o: 8 * o),
    ("miss(rank=8, kind=mini, mini=4)", lambda i, o: 8 * 4),
    ("miss(rank=8, kind=bat)", lambda i, o: 8 * o),
    ("moelora(rank=6, experts=3)", lambda i, o: 6 * (i + o) + 64 + 3 * 64),
    ("krona(factor=4)", lambda i, o: 16 + i // 4 * (o // 4)),
    ("gralora(rank=4, blocks=2)", lambda i, o: 4 * (i + o)),
    ("gralora(rank=4, blocks=2, hybrid=3)", lambda i, o: 7 * (i + o)),
    ("bd_lora(rank=4, blocks=2)", lambda i, o: 4 * (i + o // 2)),
    ("bd_lora(rank=4, blocks=2, side=down)", lambda i, o: 4 * (i // 2 + o)),
    ("qa_lora(rank=3, group=8)", lambda i, o: 3 * (i // 8 + o)),
])
def test_counts_identity_and_reach(family: str, expression: str,
                                  formula: Callable[[int, int], int]) -> None:
    assert count(expression, family) == 2 * sum(formula(*widths) for widths in WIDTHS[family])
    assert_identity(expression, family)
    assert_reached(expression, family)


def low_rank(w: Tensor, t: Tensors) -> Tensor:
    return w + 2.0 * t["up.weight"] @ t["down.weight"]


def miss(w: Tensor, t: Tensors) -> Tensor:
    """Every column j of the update is column ``j mod r`` of the block."""
    block = t["block.weight"]  # (d_out or mini, r)
    rows = torch.arange(w.shape[0]) % block.shape[0]
    return w + block[rows][:, torch.arange(w.shape[1]) % block.shape[1]]


def bat(w: Tensor, t: Tensors) -> Tensor:
    """Block (i, j) of the weight becomes ``W_ij + W_ij D_i + D_i``."""
    blocks, out = t["weight_blocks"], w.clone()
    for i, block in enumerate(blocks):
        for j in range(w.shape[1] // 8):
            rows, columns = slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8)
            out[rows, columns] = w[rows, columns] @ (block + torch.eye(8)) + block
    return out


def moelora(w: Tensor, t: Tensors) -> Tensor:
    """``W + s sum_e w_e B_e A_e`` with experts of rank 2."""
    gate = (t["expert_gate.gate"] @ t["expert_gate.task"]).exp()
    for e in range(3):
        part = slice(2 * e, 2 * e + 2)
        product = t["up.weight"][:, part] @ t["down.weight"][part]
        w = w + 2.0 * gate[e] / gate.sum() * product
    return w


def krona(w: Tensor, t: Tensors) -> Tensor:
    return w + 2.0 * torch.kron(t["kron.left"], t["kron.right"])


def gralora(w: Tensor, t: Tensors) -> Tensor:
    """Block (p, q) of the update is ``B_p[:, part q] A_q[part p]``."""
    down, up = t["down.weight"], t["up.weight"]  # (k, r, i / k), (k, o / k, r)
    k, part = len(down), down.shape[1] // len(down)
    rows = [torch.cat([up[p][:, q * part:(q + 1) * part] @ down[q][p * part:(p + 1) * part]
                       for q in range(k)], 1) for p in range(k)]
    low = t["whole.up.weight"] @ t["whole.down.weight"] if "whole.up.weight" in t else 0.0
    return w + 2.0 * (torch.cat(rows, 0) + low)


def bd_lora(w: Tensor, t: Tensors) -> Tensor:
    down, up = (torch.block_diag(*m) if m.dim() == 3 else m
                for m in (t["down.weight"], t["up.weight"]))
    return w + 2.0 * up @ down


def qa_lora(w: Tensor, t: Tensors) -> Tensor:
    """Within a group all columns of the update are equal."""
    return w + 2.0 * (t["up.weight"] @ t["down.weight"]).repeat_interleave(8, 1)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "plain"), [
    ("lora_plus(rank=3, alpha=6)", low_rank),
    ("lora_fa(rank=3, alpha=6)", low_rank),
    ("miss(rank=8, site='{attention.value,ffn.*}')", miss),
    ("miss(rank=5)", miss),
    ("miss(rank=8, kind=mini, mini=4)", miss),
    ("miss(rank=8, kind=bat, site='{attention,ffn}.*')", bat),
    ("moelora(rank=6, alpha=12, experts=3)", moelora),
    ("krona(factor=4, scale=2.0)", krona),
    ("gralora(rank=4, alpha=8, blocks=2)", gralora),
    ("gralora(rank=4, alpha=12, blocks=2, hybrid=2)", gralora),
    ("bd_lora(rank=4, alpha=8, blocks=2)", bd_lora),
    ("bd_lora(rank=4, alpha=8, blocks=2, side=down)", bd_lora),
    ("qa_lora(rank=3, alpha=6, group=8, site='{attention,ffn}.*')", qa_lora),
])
def test_known_weights(family: str, expression: str, plain: WeightForm) -> None:
    assert_known_weights(attach(expression, family), plain)


def _bd(up: bool) -> dict[str, object]:
    return {"target_modules_bd_b" if up else "target_modules_bd_a": ["query", "value", "proj"],
            "nblocks": 2}


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "config", "names"), [
    ("lora_fa(rank=3, alpha=6)", lambda to: peft.LoraConfig(r=3, lora_alpha=6, target_modules=to),
     lambda m: {"down.weight": (m.lora_A["default"].weight, same),
                "up.weight": (m.lora_B["default"].weight, same)}),
    ("miss(rank=8)", lambda to: peft.MissConfig(r=8, target_modules=to),
     lambda m: {"block.weight": (m.miss_block["default"], lambda t: t.T)}),
    ("miss(rank=8, kind=mini, mini=4)",
     lambda to: peft.MissConfig(r=8, mini_r=4, init_weights="mini", target_modules=to),
     lambda m: {"block.weight": (m.miss_block["default"], lambda t: t.T)}),
    ("miss(rank=8, kind=bat)",
     lambda to: peft.MissConfig(r=8, init_weights="bat", target_modules=to),
     lambda m: {"weight_blocks": (m.miss_block["default"], same)}),
    ("gralora(rank=4, alpha=12, blocks=2, hybrid=2)",
     lambda to: peft.GraloraConfig(r=4, alpha=12, gralora_k=2, hybrid_r=2, target_modules=to),
     lambda m: {"delta.down.weight": (m.gralora_A["default"], lambda t: t.mT),
                "delta.up.weight": (m.gralora_B["default"], lambda t: t.mT),
                "whole.down.weight": (m.gralora_A_general["default"].weight, same),
                "whole.up.weight": (m.gralora_B_general["default"].weight, same)}),
    *((f"bd_lora(rank=4, alpha=8, blocks=2, side={side})",
       lambda to, up=up: peft.LoraConfig(r=4, lora_alpha=8, target_modules=to,
                                         use_bdlora=BdLoraConfig(**_bd(up))),
       lambda m: {"down.weight": (m.lora_A["default"].weight, same),
                  "up.weight": (m.lora_B["default"].weight, same)})
      for side, up in (("up", True), ("down", False))),
])
def test_equal_to_peft(family: str, expression: str, config: Make, names: Make) -> None:
    assert_same_as_peft(family, expression, config(PEFT_SITES[family]), lambda m, _: names(m))


def test_pooled_inputs_are_what_a_zero_point_can_hold() -> None:
    """Of a group quantised as ``scale (code - zero)`` the update moves ``zero`` only."""
    adapted = attach("qa_lora(rank=3, alpha=6, group=8)")
    module = adapted.model.bert.encoder.layer[0].attention.self.query
    before = module.weight.detach().clone()
    adapted.merge()
    update = (module.weight.detach() - before).unflatten(1, (-1, 8))
    assert (update - update[..., :1]).abs().max() < 1e-14
    codes, scale = torch.randint(16, (32, 4, 8)).double(), torch.rand(32, 4, 1).double() + 0.5
    zero = torch.randint(16, (32, 4, 1)).double()
    moved = zero - update[..., :1] / scale
    torch.testing.assert_close(scale * (codes - moved), scale * (codes - zero) + update)


def test_krona_beside_the_feed_forward_part() -> None:
    """``y + s (A kron B) x + s_res x`` of the whole sub-layer."""
    adapted = attach("krona_b_res(factor=4, scale=2.0)")
    assert count("krona_b_res(factor=4)") == 2 * (16 + 64 + 1)
    assert count("krona(factor=4, site=ffn)") == 2 * (16 + 64)
    assert_identity("krona_b_res")
    assert_reached("krona_b_res")
    assert not adapted.plan.properties.mergeable
    found = logits(adapted.model, batch())
    model = tiny("bert", "classification", dtype=torch.float64)
    tensors = adapted.tensors()
    for index, layer in enumerate(model.bert.encoder.layer):
        own = {n.rsplit(".", 1)[1]: t for n, t in tensors.items() if f"layer.{index}." in n}
        added = 2.0 * torch.kron(own["left"], own["right"]) + own["vector"] * torch.eye(32)

        layer.output.register_forward_hook(partial(_end, layer.output.LayerNorm, added.T))
    torch.testing.assert_close(found, logits(model, batch()), rtol=0, atol=1e-10)


def _end(norm: nn.Module, added: Tensor, module: nn.Module, inputs: tuple[Tensor, Tensor],
         _: Tensor) -> Tensor:
    hidden, residual = inputs
    return norm(module.dense(hidden) + residual @ added + residual)


@pytest.mark.parametrize(("share", "expected"), [
    ("down", 2 * 4 * 32 + 4 * 4 * 32), ("up", 2 * 4 * 32 + 4 * 4 * 32), ("both", 4 * 4 * 32)])
def test_share_lora(share: str, expected: int) -> None:
    """One factor a role for both layers; the plan and every layer's weight agree."""
    expression = f"share_lora(rank=4, alpha=8, share={share})"
    assert count(expression) == expected
    assert_identity(expression)
    assert_reached(expression)
    assert_known_weights(attach(expression), low_rank)
    names = attach(expression).trainable
    shared = {n.rsplit(".", 2)[1] for n in names if n.startswith("lora.")}
    assert shared == ({"down", "up"} if share == "both" else {share})


def test_poly_mixes_skills_before_they_are_multiplied() -> None:
    """``B = sum_s w_s B_s``, ``A`` likewise, ``w`` the sigmoids of the logits over their sum."""

    def poly(w: Tensor, t: Tensors) -> Tensor:
        weights = t["mix.logits"].sigmoid() / t["mix.logits"].sigmoid().sum()
        down, up = ((weights[:, None, None] * t[n]).sum(0) for n in ("down.weight", "up.weight"))
        return w + up @ down / 4

    expression = "poly(rank=4, skills=3)"
    assert count(expression) == 4 * (3 * 4 * 64 + 3)
    assert_identity(expression)
    assert_reached(expression)
    assert_known_weights(attach(expression), poly)
    assert_follows(initial("poly(skills=64)", "logits"), stats.uniform(-1e-3, 2e-3))
    adapted = attach(expression)
    adapted.model.train()
    torch.manual_seed(0)
    first, second = (logits(adapted.model, batch()) for _ in range(2))
    assert (first - second).abs().max() > 1e-6  # drawn anew in each forward of training


def test_first_values() -> None:
    limit = 1 / math.sqrt(32)
    assert_follows(initial("lora_fa(rank=16)", "down.weight"), stats.uniform(-limit, 2 * limit))
    down = initial("lora_fa(rank=4)", "down.weight").unflatten(0, (4, -1))
    assert len({tuple(site.tolist()) for site in down}) == 4  # every site has its own
    limit = 1 / math.sqrt(16)
    assert_follows(initial("gralora(rank=16)", "down.weight"), stats.uniform(-limit, 2 * limit))
    limit = math.sqrt(6 / 16)  # as published code draws it
    assert_follows(initial("bd_lora(rank=16, blocks=2, side=down)", "down.weight"),
                   stats.uniform(-limit, 2 * limit))
    assert not initial("miss(rank=8)", "block.weight").any()


def test_lora_plus_trains_the_second_factor_faster() -> None:
    adapted = attach("lora_plus(rank=3, ratio=8.0)")
    rates = {id(p): g["lr"] for g in adapted.parameter_groups(lr=1e-4) for p in g["params"]}
    for name, parameter in adapted.trainable.items():
        assert rates[id(parameter)] == pytest.approx(8e-4 if "up" in name else 1e-4)


@pytest.mark.parametrize(("expression", "words"), [
    ("miss(rank=33)", "width 33 is above the 32 entries"),
    ("miss(rank=12, kind=bat)", "block 12 does not divide width 32"),
    ("moelora(rank=6, experts=4)", "4 experts do not divide 6"),
    ("gralora(rank=3, blocks=2)", "4 must divide width 6"),
    ("bd_lora(rank=4, blocks=3)", "3 blocks do not divide width"),
    ("qa_lora(group=5)", "5 does not divide width 32"),
])
def test_what_does_not_fit_is_refused(expression: str, words: str) -> None:
    with pytest.raises(PeftRefError, match=words):
        peftref.compile(expression, tiny("bert", "classification"))
