"""What must hold for a technique on encoders, encoder-decoders, speech and image models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

import peftref
from peftref.adapted import Adapted
from peftref.backbone.hf import site_table
from peftref.backbone.site_table import Argument, Site
from peftref.errors import BackboneError
from tests.backbone.observe import argument
from tests.backbone.tiny import OTHERS, TWO_STACKS, Task, inputs, tiny
from tests.backbone.tiny_encoders import IMAGES, PAIRS, SPEECH, TEXTS, TOWERS
from tests.lowering.randomised import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
MERGED = 1e-10  # float64, relative to the largest output
CLOSE = 1e-9  # float64
PADDING, NEW = 3, 4
TECHNIQUES = {
    "weights": "lora(rank=2, site='{attention,cross_attention?,ffn}.*') + dora(rank=2) + ia3",
    "partial": "ln_tuning + bitfit",
    "adapters": "houlsby_adapter(bottleneck=4) + pfeiffer_adapter(bottleneck=8)",
    "parallel": "scaled_parallel_adapter(bottleneck=8, site='{attention,ffn}')",
    "prefix": "prefix_tuning(length=3)",
    "prompt": "prompt_tuning(length=3)",
}
MERGES = ("weights", "partial")
STARTS_EQUAL = (*MERGES, "parallel")
WITHOUT_PROMPT = (*IMAGES, *SPEECH, *TOWERS, "clip_text_model")
PADDED = (*TEXTS, *PAIRS)
CASES = [(f, t) for f in OTHERS for t in TECHNIQUES if t != "prompt" or f not in WITHOUT_PROMPT]


def make(family: str, dtype: torch.dtype = torch.float64) -> tuple[
        PreTrainedModel, dict[str, Tensor]]:
    """Return a model whose output every site reaches, and what it takes."""
    task: Task = "seq2seq_lm" if family in TWO_STACKS else "features"
    given = inputs(family, task)
    given |= {n: t.to(dtype) for n, t in given.items() if t.is_floating_point()}
    return tiny(family, task, dtype=dtype), given


def output(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Return the main output and the pooled one as one row a sample."""
    result = model(**given)
    pooled = result.get("pooler_output")
    first: Tensor = result[0]
    return first.flatten(1) if pooled is None else torch.cat((first.flatten(1), pooled), 1)


@contextmanager
def unchanged(model: PreTrainedModel, given: dict[str, Tensor]) -> Iterator[Tensor]:
    """Give the frozen output; afterwards, with nothing attached, all must be as it was."""
    with torch.no_grad():
        before = output(model, given)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    yield before
    assert [type(module) for module in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(output(model, given), before)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(tensor, weights[n]) for n, tensor in model.state_dict().items())


def unreached(adapted: Adapted, given: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that a loss over all outputs gives no gradient."""
    out = output(adapted.model, given)
    (torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) * out).sum().backward()
    reached = {n for n, p in adapted.trainable.items() if p.grad is not None and p.grad.any()}
    return set(adapted.trainable) - reached


def irrelevant(name: str) -> bool:
    """Whether a softmax over keys takes no notice of it: a bias of keys shifts all scores."""
    return name.endswith("bias.delta") and (".key" in name or "k_proj" in name)


@pytest.mark.parametrize(("family", "technique"), CASES)
def test_identity_count_gradient_merge_and_detach(family: str, technique: str) -> None:
    model, given = make(family)
    with unchanged(model, given) as frozen:
        biased = any(site.bias for site in site_table(model))  # ModernBERT has none
        expression = TECHNIQUES[technique] if biased else TECHNIQUES[technique].split(" + b")[0]
        adapted = peftref.attach(model, expression)
        identity = adapted.plan.properties.identity_at_init
        assert identity == (technique in STARTS_EQUAL)
        if identity:
            torch.testing.assert_close(output(model, given), frozen, rtol=0, atol=1e-6)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == adapted.plan.trainable_parameters
        randomise(adapted)
        running = output(model, given).detach()
        assert not torch.allclose(running, frozen)
        assert {n for n in unreached(adapted, given) if not irrelevant(n)} == set()
        assert adapted.plan.properties.mergeable == (technique in MERGES)
        if technique in MERGES:
            adapted.merge()
            merged = output(model, given)
            assert (merged - running).abs().max() <= MERGED * running.abs().max()
            adapted.unmerge()
            assert torch.equal(output(model, given), running)
        adapted.detach()


@pytest.mark.parametrize("family", OTHERS)
def test_a_sub_layer_reads_where_it_begins(family: str) -> None:
    """Against hooks: what the table says is read is what the adapter gets."""
    model, given = make(family)
    sites = [s for s in site_table(model) if s.role in ("attention", "ffn") and s.layer == 0]
    for site in sites:
        expression = f"scaled_parallel_adapter(bottleneck=4, scale=2.0, site={site.role!r})"
        adapted = randomise(peftref.attach(model, f"{expression[:-1]}, layers=[0])"))
        with torch.no_grad():
            running = output(model, given)
            tensors = [{_short(n): t.clone() for n, t in adapted.trainable.items()
                        if n.startswith(f"{each.module}.")} for each in sites
                       if each.role == site.role]
            adapted.detach()
            with _hooked([s for s in sites if s.role == site.role], model, tensors):
                expected = output(model, given)
        torch.testing.assert_close(running, expected, rtol=1e-9, atol=1e-9)


def _short(name: str) -> str:
    """``up.bias`` of a full name."""
    return ".".join(name.split(".")[-2:])


@contextmanager
def _hooked(sites: list[Site], model: nn.Module, tensors: list[dict[str, Tensor]]
            ) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    for site, own in zip(sites, tensors, strict=True):
        held: list[Tensor] = []
        place = site.input or Argument(site.module, "")

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
                 held: list[Tensor] = held, name: str | None = place.name or None) -> None:
            held[:] = [argument(module, name, args, kwargs)]

        def add(_module: nn.Module, _args: object, result: Any,
                held: list[Tensor] = held, own: dict[str, Tensor] = own) -> Any:
            inner = (held[0] @ own["down.weight"].T + own["down.bias"]).relu()
            change = 2.0 * (inner @ own["up.weight"].T + own["up.bias"])
            return (result[0] + change, *result[1:]) if isinstance(result, tuple) else (
                result + change)

        source, target = model.get_submodule(place.module), model.get_submodule(site.module)
        handles.append(source.register_forward_pre_hook(keep, with_kwargs=True))
        handles.append(target.register_forward_hook(add))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("family", "technique"), [
    *((f, t) for f, t in CASES if f in PADDED), *((f, "gates") for f in PADDED)])
def test_a_padded_row_is_the_row_alone(family: str, technique: str) -> None:
    model, given = make(family)
    row = {name: tensor[:1] for name, tensor in given.items()}
    gates = "gate(lora(rank=2, site='attention.value'), prefix_tuning(length=2))"
    expression = TECHNIQUES.get(technique, gates)
    if family == "modernbert":
        expression = expression.split(" + b")[0]
    randomise(peftref.attach(model, expression))
    beside = dict(row)
    for name in ("input_ids", "attention_mask"):
        beside[name] = pad(row[name], (0, PADDING))
    with torch.no_grad():
        alone, padded = model(**row), model(**beside)
    for name in ("pooler_output", "last_hidden_state", "logits"):
        if alone.get(name) is not None:
            length = alone[name].shape[1]
            torch.testing.assert_close(padded[name][:, :length], alone[name], rtol=0, atol=CLOSE)


@pytest.mark.parametrize(("family", "technique"), [c for c in CASES if c[0] in TWO_STACKS])
def test_cached_decoding_equals_the_full_forward(family: str, technique: str) -> None:
    model, given = make(family)
    ids = given.pop("decoder_input_ids")
    ids[:, 0] = 2
    randomise(peftref.attach(model, TECHNIQUES[technique]))
    with torch.no_grad():
        whole = model(**given, decoder_input_ids=ids).logits
        cache, found = None, list[Tensor]()
        for i in range(ids.shape[1]):
            step = model(**given, decoder_input_ids=ids[:, i : i + 1], past_key_values=cache,
                         use_cache=True)
            cache = step.past_key_values
            found.append(step.logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=CLOSE)
        made = ids[:, :1]
        for _ in range(NEW):
            logits = model(**given, decoder_input_ids=made).logits
            made = torch.cat((made, logits[:, -1:].argmax(-1)), 1)
    tokens = model.generate(**given, max_new_tokens=NEW, do_sample=False, eos_token_id=None,
                            pad_token_id=0)
    assert torch.equal(tokens[:, -NEW:], made[:, -NEW:])


@pytest.mark.parametrize("family", [f for f in OTHERS if f not in IMAGES])
def test_a_resized_vocabulary_is_noticed(family: str) -> None:
    model, _ = make(family)
    peftref.attach(model, "lora(rank=2)")
    with pytest.raises(BackboneError, match="resize before attach"):
        model.resize_token_embeddings(120)


@pytest.mark.parametrize("family", [*PAIRS, *SPEECH])
def test_merging_a_tied_head_leaves_the_embeddings(family: str) -> None:
    model, given = make(family)
    with unchanged(model, given):
        adapted = randomise(peftref.attach(model, "lora(rank=2, site=head)"))
        running = output(model, given).detach()
        embedded = model.get_input_embeddings().weight.clone()
        adapted.merge()
        assert torch.equal(model.get_input_embeddings().weight, embedded)
        merged = output(model, given)
        assert (merged - running).abs().max() <= MERGED * running.abs().max()
        adapted.unmerge()
        adapted.detach()


@pytest.mark.parametrize("family", ["bart", "pegasus", "xlm-roberta-xl", "vit"])
def test_checkpointing_gives_the_same_gradients(family: str) -> None:
    """What a sub-layer read is there again when it is recomputed."""
    model, given = make(family)
    mam = "mam(length=2, bottleneck=4, reparameterisation='none')"
    adapted = randomise(peftref.attach(model, mam))
    found: list[list[Tensor]] = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        output(model, given).square().mean().backward()
        found.append([p.grad.clone() for p in adapted.trainable.values() if p.grad is not None])
        for parameter in adapted.trainable.values():
            parameter.grad = None
    assert len(found[0]) == len(adapted.trainable)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["albert", "mbart"])
def test_a_copy_reads_its_own_sub_layers(family: str) -> None:
    model, given = make(family)
    adapted = randomise(peftref.attach(model, "scaled_parallel_adapter(bottleneck=4)"))
    expected = output(model, given)
    twin = copy.deepcopy(model)
    adapted.detach()
    torch.testing.assert_close(output(twin, given), expected, rtol=0, atol=0)


def test_an_adapter_of_a_repeated_layer_is_counted_once_and_paid_each_time() -> None:
    """ALBERT: parameters and FLOPs against the formula and what torch counts."""
    model = tiny("albert", num_hidden_layers=3)
    model.set_attn_implementation("eager")  # of the other torch counts nothing on a CPU
    given = inputs("albert", batch=8, length=56)
    table = site_table(model)
    assert table.layers == {"encoder": 1}
    assert {s.shared_by for s in table if s.layer is not None} == {3}
    for expression, size in (("scaled_parallel_adapter(bottleneck=4)", 2 * 32 * 4 + 32 + 4),
                             ("houlsby_adapter(bottleneck=8)", 2 * (2 * 32 * 8 + 32 + 8)),
                             ("prefix_tuning(length=5)", 5 * 2 * 32),
                             ("prompt_tuning(length=5)", 5 * 16)):
        frozen = _flops(model, given)
        plan = peftref.compile(expression, model)
        assert plan.trainable_parameters == size
        adapted = peftref.attach(model, plan)
        added = _flops(model, given) - frozen
        stated = plan.cost(8 * 56, sequences=8).forward_flops
        adapted.detach()
        assert abs(stated - added) <= 0.05 * added, expression


def _flops(model: nn.Module, given: dict[str, Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given)
    return counter.get_total_flops()


def test_what_a_backbone_cannot_do_is_refused_with_the_reason() -> None:
    for family, expression, reason in (
        ("whisper", "prompt_tuning(length=2)", "encoder of this whisper backbone reads none"),
        ("clip", "prompt_tuning(length=2)", "found by its id"),
        ("clip_text_model", "prompt_tuning(length=2)", "found by its id"),
        ("vit", "prompt_tuning(length=2)", "vit backbone reads no tokens"),
        ("deberta-v2", "gate(lora(rank=2))", "runs on the table of positions too"),
    ):
        with pytest.raises(peftref.PeftRefError, match=reason):
            peftref.compile(expression, tiny(family))
    plan = peftref.compile("gate(lora(rank=2))", tiny("deberta-v2", share_att_key=False))
    assert plan.trainable_parameters


@pytest.mark.parametrize("family", ["bart", "mbart", "t5"])
def test_a_decoder_that_reads_the_encoders_ids_takes_no_prompt(family: str) -> None:
    model, given = tiny(family, "classification"), inputs(family, "classification")
    adapted = peftref.attach(model, "prompt_tuning(length=2)")
    with pytest.raises(BackboneError, match=r"needs decoder_input_ids.*use prefixes"):
        model(**given)
    adapted.detach()
    randomise(peftref.attach(model, "prefix_tuning(length=2)"))
    assert model(**given).logits.shape == (2, 3)
