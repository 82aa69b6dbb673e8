"""What must hold for a technique on any decoder: identity, counts, merging, padding, caches."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

import peftref
from peftref.adapted import Adapted
from peftref.backbone.hf import site_table
from peftref.backbone.site_table import SiteKind
from peftref.errors import BackboneError
from tests.backbone.tiny import ALL_DECODERS, inputs, tiny
from tests.lowering.randomised import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
MERGED = 1e-10  # float64, relative to the largest logit
CLOSE = 1e-4  # float32; in float64 some families give NaN for padding without any adapter
PADDING, NEW = 3, 3
TECHNIQUES = {
    "weights": "lora(rank=2, site='{attention,ffn?}.*') + dora(rank=2) + "
               "ia3(feedforward='ffn?.down') + ln_tuning",
    "adapters": "houlsby_adapter(bottleneck=4) + scaled_parallel_adapter(bottleneck=8)",
    "prefix": "prefix_tuning(length=3)",
    "prompt": "prompt_tuning(length=3)",
}
MIXERS = {  # what has no attention takes adapters of its mixer, and no prefix
    "weights": "lora(rank=2, site='mixer.*') + dora(rank=2, site='mixer.output') + ln_tuning",
    "adapters": "houlsby_adapter(bottleneck=4, site='mixer') + "
                "scaled_parallel_adapter(bottleneck=8, site='mixer')",
    "prompt": "prompt_tuning(length=3)",
}
VARIANTS = {
    **{family: (family, {}) for family in ALL_DECODERS},
    "falcon-7b": ("falcon", {"new_decoder_architecture": False}),
    "falcon-rw": ("falcon", {"new_decoder_architecture": False, "multi_query": False,
                             "num_kv_heads": 4, "parallel_attn": False, "alibi": True}),
    "opt-350m": ("opt", {"do_layer_norm_before": False}),
}


def make(
    variant: str, dtype: torch.dtype = torch.float64
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    family, changes = VARIANTS[variant]
    return tiny(family, "causal_lm", dtype=dtype, **changes), inputs(family, "causal_lm")


def attached(model: PreTrainedModel, technique: str) -> Adapted:
    if model.config.model_type in ("mamba", "mamba2"):
        if technique not in MIXERS:
            with pytest.raises(BackboneError, match=r"mixer\.input"):
                peftref.attach(model, TECHNIQUES[technique])
            pytest.skip("there is no attention")
        return peftref.attach(model, MIXERS[technique])
    return peftref.attach(model, TECHNIQUES[technique])


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@contextmanager
def unchanged(model: PreTrainedModel, given: dict[str, Tensor]) -> Iterator[Tensor]:
    """Give the frozen output; afterwards, with nothing attached, all must be as it was."""
    before = logits(model, given)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield before
    assert torch.equal(logits(model, given), before)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())


def reached(adapted: Adapted, given: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that a loss over all outputs gives a gradient."""
    out = adapted.model(**given).logits
    (torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) * out).sum().backward()
    found = {n for n, p in adapted.trainable.items() if p.grad is not None and p.grad.any()}
    for parameter in adapted.trainable.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_identity_count_gradient_merge_and_detach(variant: str, technique: str) -> None:
    model, given = make(variant)
    with unchanged(model, given) as frozen:
        adapted = attached(model, technique)
        identity = adapted.plan.properties.identity_at_init
        assert identity == (technique == "weights")
        if identity:
            torch.testing.assert_close(logits(model, given), frozen, rtol=0, atol=1e-6)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == adapted.plan.trainable_parameters
        randomise(adapted)
        running = logits(model, given)
        assert not torch.allclose(running, frozen)
        assert reached(adapted, given) == set(adapted.trainable)
        if technique == "weights":
            adapted.merge()
            merged = logits(model, given)
            assert (merged - running).abs().max() <= MERGED * running.abs().max()
        adapted.detach()


@pytest.mark.parametrize("variant", VARIANTS)
def test_lora_counts_what_its_formula_says(variant: str) -> None:
    model, _ = make(variant)
    roles = ("attention.", "ffn.", "mixer.", "experts.")
    sites = [s for s in site_table(model) if s.role.startswith(roles)]
    assert {site.kind for site in sites} <= {SiteKind.LINEAR, SiteKind.MATRIX}
    plan = peftref.compile("lora(rank=3, site='{attention?,ffn?,mixer?,experts?}.*')", model)
    assert plan.trainable_parameters == sum(3 * (site.d_in + site.d_out) for site in sites)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_padded_on_the_left_is_the_row_alone_and_caches_see_the_same(
    variant: str, technique: str
) -> None:
    model, given = make(variant, torch.float32)
    alone = {name: value[:1] for name, value in given.items()}
    padded = {name: pad(value, (PADDING, 0)) for name, value in alone.items()}
    # Learned positions need them without any adapter; `generate` gives them.
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        del padded["position_ids"]
    randomise(attached(model, technique))
    whole = logits(model, alone)
    size = float(whole.abs().max())
    assert (logits(model, padded)[:, PADDING:] - whole).abs().max() <= CLOSE * size
    found = torch.cat(list(_steps(model, padded)), 1)
    assert (found - whole[:, -NEW - 1 :]).abs().max() <= CLOSE * size


def _steps(model: PreTrainedModel, given: dict[str, Tensor]) -> Iterator[Tensor]:
    """The logits of the last tokens, each from the cache of those before."""
    length = given["input_ids"].shape[1]
    cache, start = None, 0
    states = "cache_params" in inspect.signature(type(model).forward).parameters
    name = "cache_params" if states else "past_key_values"
    for end in range(length - NEW, length + 1):
        call = {name: value[:, start:end] for name, value in given.items()}
        call["attention_mask"] = given["attention_mask"][:, :end]
        if states and start:
            del call["attention_mask"]  # a state holds no tokens that a mask could hide
        with torch.no_grad():
            out = model(**call, **{name: cache}, use_cache=True)
        cache, start = out[name], end
        yield out.logits[:, -1:]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpointed_prefix_has_the_same_gradients(variant: str) -> None:
    model, given = make(variant)
    expression = "prefix_tuning(length=3) + lora"
    if model.config.model_type in ("mamba", "mamba2"):
        expression = MIXERS["weights"]
    adapted = randomise(peftref.attach(model, expression))
    found: list[list[Tensor]] = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**given).logits.square().mean().backward()
        found.append([p.grad.clone() for p in adapted.trainable.values() if p.grad is not None])
        for parameter in adapted.trainable.values():
            parameter.grad = None
    assert len(found[0]) == len(adapted.trainable)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ALL_DECODERS)
def test_a_resized_vocabulary_is_noticed(family: str) -> None:
    model, _ = make(family)
    peftref.attach(model, "lora(rank=2, site='{attention?,mixer?}.*')")
    with pytest.raises(BackboneError, match="resize before attach"):
        model.resize_token_embeddings(120)
