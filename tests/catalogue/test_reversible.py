"""MEFT against a loop over the layers written from the formulas, and its memory-saving passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu

import peftref
from peftref.errors import PeftRefError
from peftref.lowering import streams
from tests.backbone.tiny import inputs, tiny
from tests.catalogue.proof import (
    assert_follows,
    assert_identity,
    assert_reached,
    attach,
    batch,
    count,
    initial,
)
from tests.parity.peft_pairs import logits, perturb

D, L = 32, 2
VARIANTS = ("first", "second", "halves")


@contextmanager
def _plain() -> Iterator[None]:
    """All activations are kept: ordinary autograd of the same forward."""
    before = streams._is_plain
    streams._is_plain = lambda *_: True
    try:
        yield
    finally:
        streams._is_plain = before


def _gradients(adapted: peftref.Adapted, rows: dict[str, Tensor]) -> list[Tensor]:
    y = logits(adapted.model, rows)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    own = list(adapted.trainable.values())
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), own)]


def _same(ours: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for found, wanted in zip(ours, expected, strict=True):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


def test_count() -> None:
    one = 2 * D * 4 + 4 + D
    for variant in VARIANTS:
        assert count(f"meft(variant={variant}, bottleneck=4)") == L * 2 * one
    assert count("meft(bottleneck=4)", "llama") == L * 2 * one
    assert count("meft(bottleneck=4, layers=[1])", "llama") == 2 * one


@pytest.mark.parametrize("variant", VARIANTS)
def test_start(variant: str) -> None:
    from scipy import stats

    assert_identity(f"meft(variant={variant})", exact=False)
    assert_reached(f"meft(variant={variant})")
    assert_follows(initial(f"meft(variant={variant})", "up.weight"), stats.norm(0, 0.02))


def _adapter(adapted: peftref.Adapted, member: str, layer: int) -> Callable[[Tensor], Tensor]:
    names = ("down.weight", "down.bias", "up.weight", "up.bias")
    own = {n: t for n, t in adapted.tensors().items()
           if adapted.planned[n].member == member and f".layer.{layer}." in n}
    w = [next(t for n, t in own.items() if n.endswith(name)) for name in names]
    return lambda x: linear(relu(linear(x, w[0], w[1])), w[2], w[3])


def _by_formula(adapted: peftref.Adapted, plain: nn.Module, rows: dict[str, Tensor],
                variant: str) -> Tensor:
    """The classifier's scores, from the parts of a bare BERT and the adapter's tensors."""
    bert = plain.bert
    h = bert.embeddings(rows["input_ids"])
    mask = (1.0 - rows["attention_mask"][:, None, None].to(h.dtype)) * torch.finfo(h.dtype).min
    a, b = {"first": (0.1, 1.0), "second": (1.0, 0.1), "halves": (0.1, 0.1)}[variant]

    def attention(x: Tensor, layer: int, extra: Callable[[Tensor], Tensor] | None) -> Tensor:
        part = bert.encoder.layer[layer].attention
        z = part.output.dense(part.self(x, attention_mask=mask)[0])
        return part.output.LayerNorm((z if extra is None else z + extra(z)) + x)

    def ffn(x: Tensor, layer: int) -> Tensor:
        part = bert.encoder.layer[layer]
        z = part.output.dense(gelu(part.intermediate.dense(x)))
        return part.output.LayerNorm(z + _adapter(adapted, "ffn", layer)(x) + x)

    x1 = x2 = h
    for layer in range(L):
        other = _adapter(adapted, "other", layer)
        whole = lambda x, i=layer: ffn(attention(x, i, None), i)  # noqa: E731
        if variant == "halves":
            x1 = a * x1 + attention(x2, layer, other)
            x2 = b * x2 + ffn(x1, layer)
            continue
        first, second = (whole, other) if variant == "first" else (other, whole)
        y1 = a * x1 + first(x2)
        y2 = b * x2 + second(y1)
        x1, x2 = y2, y1
    return plain.classifier(bert.pooler((x1 + x2) / 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_the_formulas(variant: str) -> None:
    adapted = attach(f"meft(variant={variant}, bottleneck=4)")
    plain = tiny("bert", "classification", dtype=torch.float64).requires_grad_(False)
    rows = batch()
    rows["attention_mask"][0, -2:] = 0
    y = _by_formula(adapted, plain, rows, variant)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    own = list(adapted.trainable.values())
    expected = [y.detach(), *torch.autograd.grad((y * weights).sum(), own)]
    _same(_gradients(adapted, rows), expected)
    with _plain():
        _same(_gradients(adapted, rows), expected)


@pytest.mark.parametrize(("family", "spec"), [
    ("llama", "meft(variant=second)"), ("gpt2", "meft"), ("t5", "meft"), ("distilbert", "meft"),
    ("bert", "meft(variant=halves) + lora(rank=2)"),
    ("bert", "reversible(mix(lora(rank=2), copies=3), residual_adapter(site='block'))"),
    ("llama", "reversible(vera(rank=4), gate(residual_adapter(site='block')), layer='second')"),
])
def test_nothing_kept_is_the_same_as_all_kept(family: str, spec: str) -> None:
    """With dropout, routes, gates, shared tensors, caches and states of an encoder."""
    changes = {} if family != "bert" else {"hidden_dropout_prob": 0.3,
                                           "attention_probs_dropout_prob": 0.3}
    adapted = attach(spec, family, **changes)
    adapted.handled = True
    adapted.model.train()
    rows = batch(family)
    found: list[list[Tensor]] = []
    for keep in (False, True):
        torch.manual_seed(5)
        if keep:
            with _plain():
                found.append(_gradients(adapted, rows))
        else:
            found.append(_gradients(adapted, rows))
    _same(*found)


def _deep(spec: str, dtype: torch.dtype, layers: int = 12) -> peftref.Adapted:
    model = tiny("bert", "classification", dtype=dtype, num_hidden_layers=layers)
    adapted = peftref.attach(model, spec, seed=0)
    perturb(adapted, 0.02)
    return adapted


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "error"), [
    (torch.float64, 1e-3), (torch.float32, 1e-2), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_rounding_stays_small_in_every_type(
    variant: str, dtype: torch.dtype, error: float
) -> None:
    """Inversion stops before rounding, ten or a hundred times as large in each layer, matters."""
    adapted = _deep(f"meft(variant={variant})", dtype)
    rows = batch()
    with _plain():
        expected = torch.cat([g.double().flatten() for g in _gradients(adapted, rows)[1:]])
    found = torch.cat([g.double().flatten() for g in _gradients(adapted, rows)[1:]])
    assert (found - expected).norm() < error * expected.norm()


def _kept(adapted: peftref.Adapted, rows: dict[str, Tensor]) -> int:
    """Elements that autograd keeps, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in adapted.model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted.model(**rows)
    return sum(seen.values())


def test_what_is_kept_does_not_grow_with_depth() -> None:
    rows = batch()
    tokens = rows["input_ids"].numel()
    shallow, deep = (
        _kept(_deep("reversible(parallel_adapter(site='block'), inversions=99)", torch.float64, n),
              rows) for n in (3, 12))
    assert deep == shallow < 12 * D * tokens
    every_fourth = _kept(_deep("meft", torch.float32), rows)
    assert every_fourth - shallow == 3 * 2 * D * tokens  # of layers 0, 4 and 8


@pytest.mark.parametrize(("spec", "family"), [
    *((spec, "bert") for spec in (
        "full", "lora(rank=4)", "lora(rank=4, site='{attention,ffn}.*')", "parallel_adapter",
        "lst", "lora(rank=4, layers='6:')", "meft", "meft(variant=halves)")),
    ("meft", "llama"),  # whose norms and rotary embeddings are many small operations else
])
def test_predicted_activations_are_those_that_autograd_keeps(spec: str, family: str) -> None:
    """Within a tenth, and what the head and the embeddings keep."""
    width = 96
    model = tiny(family, "features", hidden_size=width, intermediate_size=4 * width,
                 num_hidden_layers=12, max_position_embeddings=64)
    adapted = peftref.attach(model, spec)
    ids = torch.randint(3, 90, (4, 48))
    kept = _kept(adapted, {"input_ids": ids}) * 4
    stated = adapted.plan.cost(ids.numel()).activation_bytes
    assert abs(kept - stated) < 0.1 * stated + 4 * 4 * ids.numel() * width


def test_two_calls_and_a_second_backward_pass() -> None:
    adapted = attach("meft(bottleneck=4)")
    one, two = batch(), inputs("bert", "classification", seed=4)
    own = list(adapted.trainable.values())
    expected = [a + b for a, b in zip(
        _gradients(adapted, one), _gradients(adapted, two), strict=True)][1:]
    total = torch.zeros((), dtype=torch.float64)
    for rows in (one, two):
        y = logits(adapted.model, rows)
        total = total + (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()
    _same(list(torch.autograd.grad(total, own, retain_graph=True)), expected)
    _same(list(torch.autograd.grad(total, own)), expected)


def test_cached_generation_is_that_of_whole_forwards() -> None:
    adapted = attach("meft", "llama")
    ids = batch("llama")["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = adapted.model.generate(ids, **settings)
    assert cached.tolist() == adapted.model.generate(ids, use_cache=False, **settings).tolist()


def test_disabled_and_detached_it_is_the_backbone() -> None:
    adapted = attach("meft(variant=halves)")
    rows, bare = batch(), tiny("bert", "classification", dtype=torch.float64)
    expected = logits(bare, rows)
    with adapted.disabled():
        assert torch.equal(logits(adapted.model, rows), expected)
    adapted.detach()
    assert torch.equal(logits(adapted.model, rows), expected)


@pytest.mark.parametrize(("spec", "family", "message"), [
    ("reversible(lora)", "bert", "site is 'block'"),
    ("meft(variant=halves)", "llama", "layer=first"),
    ("meft", "albert", "runs as"),
    ("meft + attention_fusion", "bert", "states of all layers"),
    ("reversible(parallel_adapter(site='block', layers=[0, 2]))", "bert", "in a row"),
    ("reversible(parallel_adapter(site='block'), layer='halves')", "bert", "parts of the layer"),
])
def test_what_cannot_be_reversible_says_why(spec: str, family: str, message: str) -> None:
    with pytest.raises(PeftRefError, match=message):
        peftref.compile(spec, tiny(family, num_hidden_layers=3))


def test_states_of_layers_are_refused() -> None:
    adapted = attach("meft")
    with pytest.raises(PeftRefError, match="output_hidden_states"):
        adapted.model(**batch(), output_hidden_states=True)
