"""Adapters, prompts and reads of whole stacks against plain definitions and PEFT."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, relu

import peftref
from peftref.errors import CompositionError
from peftref.procedures.drop_layers import dropped_layers
from tests.backbone.tiny import inputs, tiny
from tests.catalogue.proof import (
    assert_follows,
    assert_identity,
    assert_merges,
    assert_reached,
    attach,
    batch,
    count,
    initial,
)
from tests.parity.peft_pairs import logits, perturb

D, F, L, V = 32, 48, 2, 97  # widths, layers and vocabulary of the tiny backbones

COUNTS = {
    ("parallel_adapter(bottleneck=6)", "bert"): L * (2 * D * 6 + 6 + D),
    ("residual_adapter(bottleneck=6)", "llama"): L * (2 * D * 6 + 6 + D + 2 * D),
    ("compacter(bottleneck=8)", "bert"): 2 * L * (2 * (D + 8) + 8 + D) + 4 ** 3,
    ("compacter(bottleneck=8, site='ffn', shared=False, rank=0)", "llama"):
        L * (2 * 4 ** 3 + 2 * D * 8 // 4 + 8 + D),
    ("list_adapter(rank=5)", "bert"): 2 * L * 2 * D * 5,
    ("hadamard", "bert"): 2 * D * L,
    ("tiny_attention(heads=3, width=2)", "llama"): L * 4 * D * 6,
    ("loreft(rank=2)", "bert"): L * (2 * 2 * D + 2),
    ("p_tuning(length=5, hidden=7)", "llama"):
        5 * D + (D * 7 + 7) + (7 * 7 + 7) + (7 * D + D),
    ("p_tuning(length=5, hidden=6, encoder='lstm')", "bert"):
        5 * D + sum(2 * (24 * d + 24 * 6 + 48) for d in (D, 12)) + (144 + 12) + (12 * D + D),
    ("invertible_adapter", "bert"): D * D // 2 + 3 * D // 2,
    ("attention_fusion", "llama"): D,
    ("pasta", "bert"): L * D,
    ("adapter_fusion(first='houlsby_adapter(bottleneck=4)', "
     "second='houlsby_adapter(bottleneck=4)')", "bert"):
        4 * L * (2 * D * 4 + 4 + D) + 2 * L * (3 * D * D + 2 * D),
    ("scalearn(first='houlsby_adapter(site=\"ffn\")', second='houlsby_adapter(site=\"ffn\")')",
     "bert"): 2 * L * (2 * D * 64 + 64 + D) + 2 * L * D,
    ("scalearn(first='lora(rank=2)', second='lora(rank=2)', per='member', shared=True)", "bert"):
        2 * (2 * L * 2 * 2 * D) + 2 * 2,
}


@pytest.mark.parametrize(("spec", "family"), COUNTS)
def test_count(spec: str, family: str) -> None:
    assert count(spec, family) == COUNTS[spec, family]


@pytest.mark.parametrize(("spec", "exact"), [
    ("parallel_adapter", False), ("parallel_adapter(init='zeros')", True),
    ("residual_adapter", True), ("compacter", False), ("list_adapter", False),
    ("hadamard", True), ("tiny_attention", True), ("loreft", False), ("p_tuning", False),
    ("invertible_adapter", False), ("attention_fusion", False),
    ("adapter_drop(base='residual_adapter')", True),
])
def test_identity(spec: str, exact: bool) -> None:
    assert_identity(spec, exact=exact)


@pytest.mark.parametrize("spec", [
    "parallel_adapter", "residual_adapter", "compacter", "list_adapter", "hadamard",
    "tiny_attention", "loreft", "p_tuning", "p_tuning(encoder='lstm')", "invertible_adapter",
    "attention_fusion",
])
def test_every_tensor_is_reached(spec: str) -> None:
    assert_reached(spec)


def test_initial_values() -> None:
    assert_follows(initial("parallel_adapter", "down.weight"), stats.norm(0, 0.02))
    assert_follows(initial("compacter(bottleneck=24)", "rule"), stats.norm(0, 1e-4))
    assert_follows(initial("list_adapter", "up.weight"), stats.norm(0, 0.02))
    bound = 1 / math.sqrt(128)
    assert_follows(initial("p_tuning(encoder='lstm')", "weight_hh_l0"),
                   stats.uniform(-bound, 2 * bound))
    value = initial("adapter_fusion", "value.weight").view(-1, D, D)
    off = torch.full((D, D), 1e-6).fill_diagonal_(1.0)
    assert all(torch.allclose(v.float(), off, rtol=0, atol=1e-9) for v in value)
    assert_follows(initial("scalearn", "fusion.weight"), stats.norm(0.5, 1e-3))


def _span(spec: str, family: str = "llama") -> tuple[peftref.Adapted, nn.Module, Tensor, Tensor,
                                                     dict[str, Tensor]]:
    """Attach at the second feed-forward part; return it, an input, its frozen output, tensors."""
    adapted = attach(spec, family)
    module = adapted.model.get_submodule("model.layers.1.mlp")
    x = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with adapted.disabled():
        y = module(x)
    path = next(m.path for m in adapted.plan.modules)
    tensors = {n.split(".", 6)[-1]: t for n, t in adapted.tensors().items() if path in n}
    return adapted, module, x, y, tensors


def _named(adapted: peftref.Adapted, ending: str) -> Tensor:
    (found,) = [t for n, t in adapted.tensors().items() if n.endswith(ending)]
    return found


def test_parallel_and_residual_adapters_are_their_formulas() -> None:
    adapted, module, x, y, _ = _span("parallel_adapter(site='ffn', layers=[1], bottleneck=6)")
    w = [_named(adapted, n) for n in ("down.weight", "down.bias", "up.weight", "up.bias")]
    expected = y + linear(relu(linear(x, w[0], w[1])), w[2], w[3])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)
    adapted, module, x, y, _ = _span("residual_adapter(site='ffn', layers=[1], bottleneck=6)")
    w = [_named(adapted, n) for n in ("down.weight", "down.bias", "up.weight", "up.bias")]
    h = layer_norm(y, (D,), _named(adapted, "norm.weight"), _named(adapted, "norm.bias"))
    expected = y + linear(relu(linear(h, w[0], w[1])), w[2], w[3])
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 0])
def test_compacter_is_a_sum_of_kronecker_products(rank: int) -> None:
    adapted, module, x, y, _ = _span(
        f"compacter(site='ffn', layers=[1], bottleneck=8, rank={rank})")
    rule = _named(adapted, "rule")

    def matrix(part: str) -> Tensor:
        if rank:
            second = _named(adapted, f"{part}.left") @ _named(adapted, f"{part}.right")
        else:
            second = _named(adapted, f"{part}.weight")
        return sum((torch.kron(a, b) for a, b in zip(rule, second, strict=True)),
                   torch.zeros(1, dtype=torch.float64))

    hidden = nn.functional.gelu(y @ matrix("down") + _named(adapted, "down.bias"))
    expected = y + hidden @ matrix("up") + _named(adapted, "up.bias")
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_list_and_hadamard_fold_into_the_layer_before(family: str) -> None:
    assert_merges(attach("list_adapter(rank=4)", family), family)
    if family == "bert":  # T5 has no biases to fold the shift into
        assert_merges(attach("hadamard", family), family)
    else:
        assert not attach("hadamard", family).plan.properties.mergeable


def test_hadamard_is_its_formula() -> None:
    adapted = attach("hadamard(layers=[1])")
    module = adapted.model.get_submodule("bert.encoder.layer.1.attention.output.dense")
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with adapted.disabled():
        y = module(x)
    expected = _named(adapted, "vector") * y + _named(adapted, "bias")
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_tiny_attention_is_its_formula(family: str) -> None:
    """On the whole model, so that padding and causality are those of the stack."""
    adapted = attach("tiny_attention(heads=2, width=3, layers=[1])", family)
    site = next(s for s in adapted.plan.table if s.role == "attention" and s.layer == 1)
    module = adapted.model.get_submodule(site.module)
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _m, _a, out: seen.append(
        out[0] if isinstance(out, tuple) else out))
    rows = batch(family)
    mask = torch.ones_like(rows["input_ids"])
    mask[0, -2:] = 0
    with torch.no_grad():
        adapted.model(**{**rows, "attention_mask": mask})
        with adapted.disabled():
            adapted.model(**{**rows, "attention_mask": mask})
    hook.remove()
    after, before = seen
    parts = {n: _named(adapted, f"self_attention.{n}") for n in ("query", "key", "value", "output")}
    n = before.shape[1]
    for row in range(2):
        h, total = before[row], torch.zeros_like(before[row])
        for head in range(2):
            own = slice(3 * head, 3 * head + 3)
            q, k, v = (h @ parts[p][own].t() for p in ("query", "key", "value"))
            scores = q @ k.t() / math.sqrt(3)
            hidden = (mask[row] == 0)[None, :].expand(n, n).clone()
            if family == "llama":
                hidden |= torch.ones(n, n, dtype=torch.bool).triu(1)
            shares = scores.masked_fill(hidden, -math.inf).softmax(-1)
            total = total + (shares @ v) @ parts["output"][:, own].t()
        real = mask[row].bool()
        torch.testing.assert_close(after[row][real], (h + total)[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_loreft_edits_a_subspace_at_its_positions(orthogonal: bool) -> None:
    adapted = attach(f"loreft(rank=2, first=2, last=1, layers=[1], orthogonal={orthogonal})",
                     "llama")
    module = adapted.model.model.layers[1]
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _m, _a, out: seen.append(
        out[0] if isinstance(out, tuple) else out))
    rows = batch("llama")
    with torch.no_grad():
        adapted.model(**rows)
        with adapted.disabled():
            adapted.model(**rows)
    hook.remove()
    after, h = seen
    rotation, weight, bias = (_named(adapted, f"subspace.{n}")
                              for n in ("rotation", "weight", "bias"))
    r = rotation
    if orthogonal:  # Gram-Schmidt, row by row
        built: list[Tensor] = []
        for row in rotation:
            rest = row - sum(((row @ b) * b for b in built), torch.zeros_like(row))
            built.append(rest / rest.norm())
        r = torch.stack(built)
        torch.testing.assert_close(r @ r.t(), torch.eye(2, dtype=r.dtype))
    edited = h + (h @ weight.t() + bias - h @ r.t()) @ r
    chosen = torch.zeros(h.shape[1], dtype=torch.bool)
    chosen[[0, 1, -1]] = True
    expected = torch.where(chosen[None, :, None], edited, h)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_is_pefts_prompt_encoder(encoder: str) -> None:
    adapted = attach(f"p_tuning(length=5, hidden=6, encoder='{encoder}')", "llama")
    config = peft.PromptEncoderConfig(
        peft_type="P_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=D,
        num_transformer_submodules=1, encoder_hidden_size=6, num_layers=L,
        encoder_reparameterization_type=encoder.upper(), encoder_num_layers=2, encoder_dropout=0.0)
    theirs = peft.tuners.p_tuning.PromptEncoder(config).double()
    rows = _named(adapted, "prompt.tokens")
    with torch.no_grad():
        theirs.embedding.weight.copy_(rows)
        if encoder == "lstm":
            for name, value in theirs.lstm_head.named_parameters():
                value.copy_(_named(adapted, f"lstm.{name}"))
        linears = [m for m in theirs.mlp_head if isinstance(m, nn.Linear)]
        for name, module in zip(("first", "second", "third"), linears, strict=False):
            module.weight.copy_(_named(adapted, f"{name}.weight"))
            module.bias.copy_(_named(adapted, f"{name}.bias"))
        expected = theirs(torch.arange(5)[None])[0]
    embedding = adapted.model.model.embed_tokens
    found = embedding(torch.arange(5) + V)  # virtual ids follow the vocabulary
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_an_invertible_adapter_undoes_itself_before_a_tied_head() -> None:
    """NICE is inverted exactly whatever its weights: e -> f(e) -> e."""
    adapted = attach("invertible_adapter(inverse=True)", "gpt2")
    model = adapted.model
    ids = batch("gpt2")["input_ids"]
    with adapted.disabled():
        plain = model.transformer.wte(ids)
        scores = model.lm_head(plain)
    torch.testing.assert_close(model.lm_head(model.transformer.wte(ids)), scores,
                               rtol=0, atol=1e-10)
    w = [_named(adapted, f"first.{n}") for n in
         ("down.weight", "down.bias", "up.weight", "up.bias")]
    v = [_named(adapted, f"second.{n}") for n in
         ("down.weight", "down.bias", "up.weight", "up.bias")]
    e1, e2 = plain.chunk(2, -1)
    o1 = e1 + linear(relu(linear(e2, w[0], w[1])), w[2], w[3])
    o2 = e2 + linear(relu(linear(o1, v[0], v[1])), v[2], v[3])
    torch.testing.assert_close(model.transformer.wte(ids), torch.cat((o1, o2), -1),
                               rtol=0, atol=1e-12)


def _members(adapted: peftref.Adapted, module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What each of two bottlenecks after a feed-forward part would add."""
    with adapted.disabled():
        y = module(x)
    found: list[Tensor] = []
    for member in ("first", "second"):
        own = {n: t for n, t in adapted.tensors().items()
               if adapted.planned[n].member == member and ".1." in n}
        part = {k: next(t for n, t in own.items() if n.endswith(k))
                for k in ("down.weight", "down.bias", "up.weight", "up.bias")}
        hidden = nn.functional.gelu(linear(y, part["down.weight"], part["down.bias"]))
        found.append(linear(hidden, part["up.weight"], part["up.bias"]))
    return (y, *found)


TWO = ("first='houlsby_adapter(site=\"ffn\", bottleneck=4)', "
       "second='houlsby_adapter(site=\"ffn\", bottleneck=6)'")


def test_adapter_fusion_attends_over_its_members() -> None:
    adapted = attach(f"adapter_fusion({TWO})", "llama")
    module = adapted.model.get_submodule("model.layers.1.mlp")
    x = torch.randn(2, 5, D, dtype=torch.float64)
    u, *z = _members(adapted, module, x)
    own = {k: v for k, v in adapted.tensors().items() if ".1." in k}
    names = ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    t = {n: next(v for k, v in own.items() if k.endswith(f"fusion.{n}")) for n in names}
    q = u @ t["query.weight"].t() + t["query.bias"]
    scores = torch.stack([(q * (v @ t["key.weight"].t() + t["key.bias"])).sum(-1) for v in z])
    shares = scores.exp() / scores.exp().sum(0)
    expected = u + sum((s[..., None] * (v @ t["value.weight"].t())
                        for s, v in zip(shares, z, strict=True)), torch.zeros_like(u))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("per", ["element", "member"])
def test_scalearn_weighs_its_members(per: str) -> None:
    adapted = attach(f"scalearn({TWO}, per='{per}')", "llama")
    module = adapted.model.get_submodule("model.layers.1.mlp")
    x = torch.randn(2, 5, D, dtype=torch.float64)
    u, first, second = _members(adapted, module, x)
    (weight,) = [v for k, v in adapted.tensors().items()
                 if k.endswith("fusion.weight") and ".1." in k]
    torch.testing.assert_close(module(x), u + weight[0] * first + weight[1] * second,
                               rtol=0, atol=1e-10)


def test_scaled_linear_members_merge() -> None:
    assert_merges(attach("scalearn(first='lora(rank=2)', second='lora(rank=3, alpha=1)')"))
    assert not attach(f"scalearn({TWO})").plan.properties.mergeable


def test_fusion_needs_members_at_the_same_places() -> None:
    with pytest.raises(CompositionError, match="must write every place"):
        peftref.compile("fusion(lora, houlsby_adapter)", tiny("bert"))
    with pytest.raises(CompositionError, match="at least two"):
        peftref.compile("fusion(lora)", tiny("bert"))


def test_dropped_layers_go_without_in_training_only() -> None:
    adapted = attach("adapter_drop(base='houlsby_adapter')")
    model, rows = adapted.model, batch()
    (procedure,) = adapted.procedures
    whole = logits(model, rows)
    adapted.handled = True  # the loop below calls the procedure
    model.train()
    seen: set[int] = set()
    for step in range(8):
        procedure.before_step(adapted, step, 8)
        first = dropped_layers(step, L - 1)
        seen.add(first)
        found = logits(model, rows)
        if first == 0:
            torch.testing.assert_close(found, whole)
        else:
            upper = attach("houlsby_adapter(layers='1:')", moved=False)
            for name, tensor in upper.tensors().items():
                (twin,) = [t for n, t in adapted.tensors().items()
                           if n.replace(".base.", ".houlsby_adapter.") == name]
                tensor.data.copy_(twin)
            torch.testing.assert_close(found, logits(upper.model, rows), rtol=0, atol=1e-10)
    assert seen == {0, 1}
    model.eval()
    torch.testing.assert_close(logits(model, rows), whole)


def test_how_many_layers_drop_is_uniform() -> None:
    draws = [dropped_layers(step, 5) for step in range(6000)]
    found = [draws.count(k) for k in range(6)]
    assert stats.chisquare(found).pvalue > 1e-4


@pytest.mark.parametrize("spec", [
    "compacter(bottleneck=6)", "invertible_adapter(reduction=64)", "loreft(rank=64)",
    "loreft(first=0, last=0)", "drop_layers(lora, most=9)",
])
def test_bad_sizes_say_what_would_be_valid(spec: str) -> None:
    with pytest.raises(peftref.errors.PeftRefError, match=r"factor|reduction|rank|positions|most"):
        peftref.compile(spec, tiny("bert"))


def test_pasta_changes_what_special_tokens_say() -> None:
    adapted = attach("pasta")
    adapted.special_tokens = (int(inputs("bert")["input_ids"][0, 0]),)
    perturb(adapted, 1.0)
    rows = inputs("bert", "classification")
    with adapted.disabled():
        plain = logits(adapted.model, rows)
    assert not torch.allclose(logits(adapted.model, rows), plain)
