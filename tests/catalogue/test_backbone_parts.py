"""Techniques that start at parts of the backbone's weight, multiply it, or quantise it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
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
    assert_merges,
    assert_reached,
    assert_same_as_peft,
    attach,
    batch,
    count,
    initial,
)
from tests.parity.peft_pairs import logits

Names = Callable[[Any], Mapping[str, Any]]
WIDTHS = {"bert": ((32, 32), (32, 32)), "llama": ((32, 32), (32, 16))}
PEFT_SITES = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
LINEAR = "attention.{query,value}"


def same(tensor: Tensor) -> Tensor:
    return tensor


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "formula", "exact"), [
    ("pissa(rank=3)", lambda i, o: 3 * (i + o), True),
    ("olora(rank=3)", lambda i, o: 3 * (i + o), True),
    ("lora_xs(rank=5)", lambda i, o: 25, False),
    ("lora_xs(rank=5, init=zeros)", lambda i, o: 25, True),
    ("hira(rank=3)", lambda i, o: 3 * (i + o), True),
    ("delora(rank=3)", lambda i, o: 3 * (i + o) + 1, True),
    (f"qlora(rank=3, site='{LINEAR}')", lambda i, o: 3 * (i + o), False),
    (f"loftq(rank=3, site='{LINEAR}')", lambda i, o: 3 * (i + o), False),
])
def test_counts_start_and_reach(family: str, expression: str,
                                formula: Callable[[int, int], int], exact: bool) -> None:
    assert count(expression, family) == 2 * sum(formula(*widths) for widths in WIDTHS[family])
    assert_identity(expression, family, exact=exact)
    assert_reached(expression, family)


def since_start(w: Tensor, t: Tensors) -> Tensor:
    return w + 2.0 * (t["up.weight"] @ t["down.weight"]
                      - t["start.up.weight"] @ t["start.down.weight"])


def lora_xs(w: Tensor, t: Tensors) -> Tensor:
    """``U_r R S_r V_r^T`` with the singular vectors taken here."""
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    frozen_up, frozen_down = t["up.weight"], t["down.weight"]
    signs = (u[:, :5] * frozen_up).sum(0).sign()
    torch.testing.assert_close(frozen_up, u[:, :5] * signs, rtol=0, atol=1e-6)
    torch.testing.assert_close(frozen_down, signs[:, None] * (s[:, None] * vt)[:5], rtol=0,
                               atol=1e-5)
    return w + 2.0 * frozen_up @ t["latent.weight"] @ frozen_down


def hira(w: Tensor, t: Tensors) -> Tensor:
    return w + w * (t["up.weight"] @ t["down.weight"])


def delora(w: Tensor, t: Tensors) -> Tensor:
    a, b = t["down.direction"], t["up.direction"]
    scale = t["boundary"] / 3 / (a.norm(dim=1) * b.norm(dim=0))
    return w + b @ torch.diag(scale) @ a @ torch.diag(w.norm(dim=0))


def nf4(w: Tensor, block: int = 64) -> Tensor:
    """Nearest of 16 quantiles of the normal distribution, block by block (QLoRA, appendix E)."""
    end = 0.9677083  # the outermost quantile of bitsandbytes, half of 1 - (1/32 + 1/30) / 2 apart
    upper = [stats.norm.ppf(p).item() for p in torch.linspace(end, 0.5, 9).double()[:-1]]
    lower = [-stats.norm.ppf(p).item() for p in torch.linspace(end, 0.5, 8).double()[:-1]]
    codes = torch.tensor(sorted([*upper, 0.0, *lower]), dtype=torch.float64)
    codes = codes / codes.max()
    out = w.detach().flatten().clone()
    for start in range(0, len(out), block):
        part = out[start:start + block]
        scale = part.abs().max()
        index = (part[:, None] / scale - codes).abs().argmin(1)
        out[start:start + block] = codes[index] * scale
    return out.view_as(w)


def steps(w: Tensor, bits: int, block: int) -> Tensor:
    """``2^bits`` equal steps between the smallest and the largest of a block."""
    out = w.detach().clone()
    for row in out:
        for start in range(0, len(row), block):
            part = row[start:start + block]
            low, high = part.min(), part.max()
            step = (high - low) / (2**bits - 1)
            row[start:start + block] = low + step * torch.round((part - low) / step)
    return out


def loftq_base(w: Tensor, rank: int, rounds: int) -> Tensor:
    low, base = torch.zeros_like(w), w
    for _ in range(rounds):
        base = nf4(w - low)
        u, s, vt = torch.linalg.svd(w - base)
        low = u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank]
    return base


def added(base: Callable[[Tensor], Tensor], scale: float) -> WeightForm:
    return lambda w, t: base(w) + scale * t["up.weight"] @ t["down.weight"]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "plain", "tolerance"), [
    ("pissa(rank=3, alpha=6)", since_start, 1e-10),
    ("olora(rank=3, alpha=6, site='{attention,ffn}.*')", since_start, 1e-10),
    ("lora_xs(rank=5, alpha=10)", lora_xs, 1e-10),
    ("hira(rank=3)", hira, 1e-10),
    ("delora(rank=3)", delora, 1e-10),
    # bitsandbytes keeps its codes in float32, hence not closer to the quantiles.
    ("qlora(rank=3, alpha=6)", added(nf4, 2.0), 1e-6),
    ("qlora(rank=3, alpha=6, kind=int, bits=3, block=16)",
     added(lambda w: steps(w, 3, 16), 2.0), 1e-10),
    ("loftq(rank=3, rounds=2)", added(lambda w: loftq_base(w, 3, 2), 1.0), 1e-6),
])
def test_known_weights(family: str, expression: str, plain: WeightForm, tolerance: float) -> None:
    assert_known_weights(attach(expression, family), plain, tolerance=tolerance)
    assert_merges(attach(expression, family), family)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("expression", "config", "names", "tolerance"), [
    # PEFT decomposes in float32.
    ("pissa(rank=3, alpha=6)", lambda to: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=to, init_lora_weights="pissa"),
     lambda m: {"delta.down.weight": (m.lora_A["default"].weight, same),
                "delta.up.weight": (m.lora_B["default"].weight, same)}, 2e-5),
    ("olora(rank=3, alpha=6)", lambda to: peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=to, init_lora_weights="olora"),
     lambda m: {"delta.down.weight": (m.lora_A["default"].weight, same),
                "delta.up.weight": (m.lora_B["default"].weight, same)}, 2e-5),
    ("hira(rank=3)", lambda to: peft.HiraConfig(r=3, target_modules=to),
     lambda m: {"down.weight": (m.hira_A["default"], same),
                "up.weight": (m.hira_B["default"], same)}, 1e-10),
    ("delora(rank=3)", lambda to: peft.DeloraConfig(r=3, target_modules=to),
     lambda m: {"down.direction": (m.delora_A["default"], same),
                "up.direction": (m.delora_B["default"], same),
                "boundary": (m.delora_lambda["default"], same)}, 1e-9),
])
def test_equal_to_peft(family: str, expression: str, config: Callable[[Any], Any], names: Names,
                       tolerance: float) -> None:
    assert_same_as_peft(family, expression, config(PEFT_SITES[family]), lambda m, _: names(m),
                        tolerance=tolerance,
                        dtype=torch.float32 if tolerance > 1e-6 else torch.float64)


@pytest.mark.parametrize(("expression", "scale"), [("pissa(rank=3, alpha=6)", 2.0),
                                                   ("pissa(rank=3, alpha=1)", 1 / 3)])
def test_pissa_starts_at_the_largest_part_of_the_weight(expression: str, scale: float) -> None:
    adapted = attach(expression, moved=False)
    module = adapted.model.bert.encoder.layer[1].attention.self.value
    u, s, vt = torch.linalg.svd(module.weight)
    own = {n.rsplit(".", 2)[1]: t for n, t in adapted.trainable.items()
           if "layer.1.attention.self.value" in n}
    part = u[:, :3] @ torch.diag(s[:3]) @ vt[:3]
    torch.testing.assert_close(scale * own["up"] @ own["down"], part, rtol=0, atol=1e-5)
    # The singular values are split evenly.
    torch.testing.assert_close(own["up"].norm(dim=0), (s[:3] / scale).sqrt(), rtol=0, atol=1e-5)


def test_olora_starts_at_the_first_columns_of_the_orthogonal_factor() -> None:
    adapted = attach("olora(rank=3)", moved=False)
    weight = adapted.model.bert.encoder.layer[0].attention.self.query.weight
    own = {n.rsplit(".", 2)[1]: t for n, t in adapted.trainable.items()
           if "layer.0.attention.self.query" in n}
    torch.testing.assert_close(own["up"].mT @ own["up"], torch.eye(3).double(), rtol=0, atol=1e-6)
    # Q R of the first columns alone is those columns.
    torch.testing.assert_close(own["up"] @ own["down"][:, :3], weight[:, :3], rtol=0, atol=1e-5)
    assert (own["down"].diagonal() > 0).all()


def test_what_is_large_is_decomposed_by_sampling() -> None:
    """A spectrum that falls: the leading part is that of the whole decomposition."""
    from peftref.ops.matrix_parts import leading_svd

    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(1100, 60, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(1040, 60, generator=generator, dtype=torch.float64))
    values = 4.0 * 0.7 ** torch.arange(60, dtype=torch.float64)
    u, s, vt = leading_svd(left @ torch.diag(values) @ right.T, 8)
    torch.testing.assert_close(s, values[:8])
    part = left[:, :8] @ torch.diag(values[:8]) @ right.T[:8]
    torch.testing.assert_close(u @ torch.diag(s) @ vt, part, rtol=0, atol=1e-8)
    assert (u[u.abs().argmax(0), torch.arange(8)] > 0).all()


def test_first_values() -> None:
    assert_follows(initial("lora_xs(rank=16)", "latent.weight"), stats.norm(0, 1e-5))
    assert (initial("delora(rank=3)", "boundary") == 15.0).all()


def test_loftq_starts_nearer_to_the_backbone_than_qlora() -> None:
    model = tiny("bert", "classification", dtype=torch.float64)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach().clone()
    far = []
    for expression in ("qlora", "loftq(rank=8, rounds=1)", "loftq(rank=8, rounds=5)"):
        adapted = peftref.attach(copy.deepcopy(model), expression)
        adapted.merge()
        start = adapted.model.bert.encoder.layer[0].intermediate.dense.weight
        far.append((start - weight).norm().item())
    assert far[2] < far[1] < far[0]


def test_couplings_keep_what_cancels_at_the_start() -> None:
    """Masks, copies and owners act on the frozen start as they do on the trained tensors."""
    for expression in ("prune(pissa(rank=4), criterion=random, keep=0.5)",
                       "mix(pissa(rank=4), copies=2)"):
        model = tiny("bert", "classification", dtype=torch.float64)
        frozen = logits(model, batch())
        adapted = peftref.attach(model, expression)
        adapted.setup_without_data()
        adapted.model.train()
        assert adapted.plan.properties.identity_at_init
        torch.testing.assert_close(logits(adapted.model, batch()), frozen, rtol=0, atol=1e-11)


def test_any_member_can_stand_on_a_quantised_base() -> None:
    """``quantize`` is the base of the fold, whatever the member does to the weight."""
    coupled = attach("quantize(lora(rank=3, alpha=6), kind=int, bits=4, block=8)")
    assert not coupled.plan.properties.identity_at_init
    assert_known_weights(coupled, added(lambda w: steps(w, 4, 8), 2.0))

    def dora(w: Tensor, t: Tensors) -> Tensor:
        inner = nf4(w) + 2.0 * t["up.weight"] @ t["down.weight"]
        return t["magnitude"][:, None] * inner / inner.detach().norm(dim=1, keepdim=True)

    # bitsandbytes' codes are kept in float32.
    assert_known_weights(attach("quantize(dora(rank=3, alpha=6))"), dora, tolerance=1e-5)
    slices = attach("quantize(lora(rank=3), block=16)", "gpt2")
    assert_merges(slices, "gpt2")
    fused = slices.model.transformer.h[0].attn.c_attn
    x, weight = torch.randn(2, 5, 32).double(), fused.weight.T
    keys = (fused(x) - fused.bias)[..., 32:64]
    torch.testing.assert_close(keys, x @ weight[32:64].T)  # only query and value are selected


def test_quantised_groups_keep_their_codes_under_pooled_inputs() -> None:
    """QA-LoRA merges into the zero points: the steps between the values of a group stay."""
    adapted = attach("quantize(qa_lora(rank=3, group=8), kind=int, bits=4, block=8)")
    module = adapted.model.bert.encoder.layer[0].attention.self.query
    base = steps(module.weight, 4, 8).unflatten(1, (-1, 8))
    adapted.merge()
    merged = module.weight.unflatten(1, (-1, 8))
    torch.testing.assert_close(merged - merged[..., :1], base - base[..., :1], rtol=0, atol=1e-12)
    assert (merged - base).abs().max() > 1e-3


def test_a_changed_backbone_is_quantised_anew() -> None:
    adapted = attach("qlora(rank=3)")
    module = adapted.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    first = module(x)
    with torch.no_grad():
        module.weight.mul_(2.0)
    assert (module(x) - first).abs().max() > 1e-3


class Packed(nn.Linear):
    """A linear that computes from codes of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear names it
        return super().forward(input.round())


def test_what_is_quantised_already_is_refused() -> None:
    model = tiny("bert", "classification")
    old = model.bert.encoder.layer[0].attention.self.query
    new = Packed(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.bert.encoder.layer[0].attention.self.query = new
    with pytest.raises(PeftRefError, match="quantised already"):
        peftref.attach(model, "qlora(rank=3)")


@pytest.mark.parametrize(("expression", "words"), [
    ("pissa(rank=33)", "33 parts of the weight .* which has 32; lower the rank"),
    ("lora_xs(rank=40)", "which has 32; lower the rank"),
    ("qlora(kind=int, block=5)", "blocks of 5 do not divide the 32 inputs"),
    ("qlora(bits=3)", "nf4 has 4 bits"),
    ("qlora(rank=2) + loftq(rank=2)", "both quantise the weight"),
    ("share(pissa, tensors=['up.*'])", "starts at values of the backbone"),
    ("hira(site=ffn)", "reads the weight of a linear module, and this is a span"),
    ("quantize(prefix_tuning)", "edits no linear module"),
    ("quantize(qlora(rank=2))", "both quantise the weight"),
])
def test_what_does_not_fit_is_refused(expression: str, words: str) -> None:
    with pytest.raises(PeftRefError, match=words):
        peftref.compile(expression, tiny("bert", "classification"))
