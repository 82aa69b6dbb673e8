"""Side networks, gated changes and members for groups of layers, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

import peftref
from peftref.errors import PeftRefError
from peftref.interactions.group import group_of
from tests.backbone.tiny import tiny
from tests.catalogue.proof import assert_identity, assert_reached, attach, batch, count
from tests.parity.peft_pairs import logits

D, L = 32, 2


def _ladder(width: int, layers: int, kept: int) -> int:
    w = width
    block = 4 * w * w + 2 * 2 * w + 8 * w * w + 5 * w
    return (kept + 1) * (D * w + w) + kept * (1 + block) + w * D + D


def test_count() -> None:
    assert count("lst(reduction=4, heads=2)") == _ladder(8, L, L)
    assert count("lst(reduction=4, heads=2, skip=2)", "llama") == _ladder(8, L, 1)
    deep = count("lst(reduction=4, heads=2, skip=4)", num_hidden_layers=12)
    assert deep == _ladder(8, 12, 9)  # layers 0, 4 and 8 have no side layer, as for T5-base
    change = 2 * D * 6 + 6 + D
    large = 2 * D * 5 + 5 + D
    assert count("vl_pet(bottleneck=6, gate=5)") == L * 2 * (change + large)
    for kind, gate in (("middle_x", D + 0), ("middle_y", D), ("small", 2 * D)):
        assert count(f"vl_pet(granularity={kind}, bottleneck=6)", "llama") == (
            L * 2 * (change + gate))
    # In an encoder-decoder: both parts of the encoder's layers, values of cross-attention.
    inner = 4 * 12
    assert count("vl_pet(granularity=middle_y, bottleneck=6)", "t5") == (
        L * 2 * (change + D) + L * (D * 6 + 6 + 6 * inner + inner))


@pytest.mark.parametrize("spec", ["lst", "vl_pet", "vl_pet(granularity=small)",
                                  "vl_pet(granularity=middle_x)"])
def test_start_and_gradients(spec: str) -> None:
    assert_reached(spec)
    if spec == "lst":
        assert_identity(spec, exact=False)
        return
    adapted = attach(spec, moved=False)
    found = logits(adapted.model, batch())
    with adapted.disabled():
        torch.testing.assert_close(found, logits(adapted.model, batch()), rtol=0, atol=1e-11)
    assert not adapted.plan.properties.identity_at_init  # 2 sigmoid(0) = 1, which no algebra says


def _padded(family: str) -> tuple[dict[str, Tensor], Tensor]:
    rows = batch(family)
    mask = torch.ones_like(rows["input_ids"])
    mask[0, -2:] = 0
    return {**rows, "attention_mask": mask}, mask


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lst_climbs_a_side_network(family: str) -> None:
    adapted = attach("lst(reduction=4, heads=2)", family)
    rows, mask = _padded(family)
    model = adapted.model
    with adapted.disabled(), torch.no_grad():
        body = model.bert if family == "bert" else model.model
        seen: list[Tensor] = []
        layers = body.encoder.layer if family == "bert" else body.layers
        hooks = [next(layers.children()).register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True)]
        hooks += [layer.register_forward_hook(lambda _m, _a, out: seen.append(
            out[0] if isinstance(out, tuple) else out)) for layer in layers.children()]
        body(**rows)
        for hook in hooks:
            hook.remove()
    t = {n.split("ladder.")[-1]: v for n, v in adapted.tensors().items()}
    found = logits(model, rows)
    for row in range(2):
        real = mask[row].bool()
        n = int(real.sum())
        h = [state[row, real] for state in seen]
        s = linear(h[0], t["first"], t["first_bias"])
        for i in range(L):
            own = {k.removeprefix(f"layer_{i}."): v for k, v in t.items() if f"layer_{i}." in k}
            g = torch.sigmoid(own["gate"] / 0.1)
            s = g * s + (1 - g) * linear(h[i + 1], own["down"], own["down_bias"])
            z = layer_norm(s, (8,), own["norm_attention"], own["norm_attention_bias"])
            heads: list[Tensor] = []
            for part in (slice(0, 4), slice(4, 8)):
                q, k, v = (z @ own[p][part].t() for p in ("query", "key", "value"))
                scores = q @ k.t() / math.sqrt(4)
                if family == "llama":
                    scores = scores.masked_fill(
                        torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
                heads.append(scores.softmax(-1) @ v)
            s = s + torch.cat(heads, -1) @ own["output"].t()
            z = layer_norm(s, (8,), own["norm_ffn"], own["norm_ffn_bias"])
            z = gelu(linear(z, own["wide"], own["wide_bias"]))
            s = s + linear(z, own["narrow"], own["narrow_bias"])
        out = linear(s, t["up"], t["up_bias"])
        if family == "bert":
            expected = model.classifier(model.bert.pooler(out[None]))[0]
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-9)
        else:
            expected = model.lm_head(model.model.norm(out))
            torch.testing.assert_close(found[row, real], expected, rtol=0, atol=1e-9)


def test_no_gradient_enters_the_backbone_beside_a_ladder() -> None:
    adapted = attach("lst + bitfit(site='ffn.up')")
    found = logits(adapted.model, batch()).square().sum()
    own = {n: p for n, p in adapted.trainable.items() if "bitfit" in n}
    assert own
    gradients = torch.autograd.grad(found, list(own.values()), allow_unused=True)
    assert all(g is None for g in gradients)


def _small(x: Tensor, h: Tensor, t: dict[str, Tensor], mask: Tensor) -> Tensor:
    opened = 2 * torch.sigmoid(torch.cat((x, h), -1) @ t["linear.weight"].t())
    real = mask[..., None].to(x.dtype)
    return (opened * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)


def _gate(kind: str, x: Tensor, h: Tensor, t: dict[str, Tensor], mask: Tensor) -> Tensor:
    if kind == "large":
        inner = gelu(linear(x, t["down.weight"], t["down.bias"]))
        return 2 * torch.sigmoid(linear(inner, t["up.weight"], t["up.bias"]))
    if kind == "middle_x":
        return 2 * torch.sigmoid((x + h) @ t["linear.weight"].t())
    return t["vector"] if kind == "middle_y" else _small(x, h, t, mask)


@pytest.mark.parametrize("kind", ["large", "middle_x", "middle_y", "small"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_vl_pet_gates_what_it_changes(kind: str, family: str) -> None:
    """``G (H + dH)``; in BERT the feed-forward part is no module, and X is handed in."""
    inner = ", gate=5" if kind == "large" else ""
    adapted = attach(
        f"vl_pet(granularity={kind}, site='ffn', layers=[1], bottleneck=6{inner})", family)
    site = next(s for s in adapted.plan.table if s.role == "ffn" and s.layer == 1)
    end = adapted.model.get_submodule(site.module)
    begin = end if site.input is None else adapted.model.get_submodule(
        "bert.encoder.layer.1.intermediate.dense")
    rows, mask = _padded(family)
    x: list[Tensor] = []
    y: list[Tensor] = []
    hooks = [begin.register_forward_pre_hook(lambda _m, args: x.append(args[0])),
             end.register_forward_hook(lambda _m, _a, out: y.append(out))]
    with torch.no_grad():
        adapted.model(**rows)
        with adapted.disabled():
            adapted.model(**rows)
    for hook in hooks:
        hook.remove()
    (found, frozen), read = y, x[0]
    own = [{n.rpartition(f".{part}.")[2].removeprefix("ffn."): v
            for n, v in adapted.tensors().items() if f".{part}." in n}
           for part in ("change", "gate")]
    change, gate = own
    h = frozen + linear(gelu(linear(frozen, change["down.weight"], change["down.bias"])),
                        change["up.weight"], change["up.bias"])
    # The gate is the second edit: it sees what the first one made of H.
    expected = h * _gate(kind, read, h, gate, mask)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)


def test_groups_have_the_stated_sizes() -> None:
    assert group_of(12, 4, "spindle") == (1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4)
    assert group_of(12, 4, "bottleneck") == (1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4)
    assert group_of(20, 4, "increasing") == (*[1] * 2, *[2] * 4, *[3] * 6, *[4] * 8)
    assert group_of(20, 4, "decreasing") == (*[1] * 8, *[2] * 6, *[3] * 4, *[4] * 2)
    assert group_of(8, 4, "uniform") == (1, 1, 2, 2, 3, 3, 4, 4)
    for layers in range(4, 40):
        for pattern in ("spindle", "uniform"):
            assert set(group_of(layers, 4, pattern)) >= ({1, 2, 3, 4} if layers >= 6 else {2, 3})


def test_s4_has_other_members_in_each_group() -> None:
    plan = peftref.compile("s4(bottleneck=4, rank=2)", tiny("bert", num_hidden_layers=6))
    members = [sorted({e.write.member for m in plan.modules for e in m.edits
                       if e.write.site.layer == layer}) for layer in range(6)]
    first, second = ["adapter", "lora"], ["adapter", "prefix"]
    third, fourth = ["adapter", "bitfit", "prefix"], ["bitfit", "lora", "prefix"]
    assert members == [first, second, second, third, third, fourth]
    adapted = attach("s4(bottleneck=4, rank=2)", num_hidden_layers=6)
    own = list(adapted.trainable.values())
    total = logits(adapted.model, batch()).square().sum()
    assert all(bool(g.any()) for g in torch.autograd.grad(total, own))


@pytest.mark.parametrize(("spec", "message"), [
    ("lst(reduction=5)", "divide the width"), ("lst(skip=1)", "leaves none"),
    ("group(prompt_tuning, groups=[1])", "has no edit"), ("group(lora, groups=[5])", "groups"),
    ("group(lora, groups=[1], of=9)", "layers by group"),
])
def test_bad_values_say_what_would_be_valid(spec: str, message: str) -> None:
    with pytest.raises(PeftRefError, match=message):
        peftref.compile(spec, tiny("bert"))
