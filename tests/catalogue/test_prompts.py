"""Prompts that are products, pruned, mixed for a sample, or gated inside attention."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

import peftref
from peftref.errors import ArtifactError, CompositionError, PeftRefError
from peftref.training.encode import Collator
from tests.backbone.tiny import tiny
from tests.catalogue.proof import (
    TASKS,
    assert_follows,
    assert_identity,
    assert_reached,
    attach,
    batch,
    count,
    initial,
)
from tests.catalogue.small_training import adapted, train
from tests.parity.peft_pairs import peft_model, perturb
from tests.training.test_trainer import ROWS

D, L, V = 32, 2, 97  # width, layers and vocabulary of the tiny backbones
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}

COUNTS = {
    ("mpt(length=5)", "bert"): 5 * D + 5 + D,
    ("mpt(length=5, rank=3)", "llama"): 5 * D + 3 * (5 + D),
    ("xprompt(length=5)", "bert"): 5 * D,
    ("xprompt(length=5)", "llama"): 5 * D,
    ("llama_adapter(length=5)", "bert"): L * (5 * D + 4),
    ("llama_adapter(length=5)", "llama"): L * (5 * D + 2),  # two key-value heads
    ("llama_adapter(length=5, gate=layer, layers='1:')", "llama"): 5 * D + 1,
    ("trainable_tokens(tokens='3, 5:9')", "bert"): 5 * D,
    ("trainable_tokens(tokens='3, 3:6')", "llama"): 3 * D,
    ("panda(length=5)", "bert"): 5 * D,
    ("panda(length=5)", "llama"): 5 * D,
    ("attempt(length=5)", "bert"): 5 * D + 200 * D + 2 * D,
    ("attempt(length=5, width=7)", "llama"): 5 * D + 2 * 7 * D + 2 * D,
}


@pytest.mark.parametrize(("spec", "family"), COUNTS)
def test_count(spec: str, family: str) -> None:
    assert count(spec, family) == COUNTS[spec, family]


@pytest.mark.parametrize(("spec", "exact"), [
    ("mpt", False), ("xprompt", False), ("attempt", False),
    ("llama_adapter", True), ("trainable_tokens", True),
])
def test_identity(spec: str, exact: bool) -> None:
    assert_identity(spec, exact=exact)


@pytest.mark.parametrize("spec", ["mpt", "mpt(rank=3)", "attempt", "llama_adapter"])
def test_every_tensor_is_reached(spec: str) -> None:
    assert_reached(spec)


def named(adapted: peftref.Adapted, ending: str) -> Tensor:
    (found,) = [t for n, t in adapted.tensors().items() if n.endswith(ending)]
    return found


def test_initial_values() -> None:
    assert torch.equal(initial("mpt", ".u"), torch.ones(20, dtype=torch.float64))
    assert_follows(initial("mpt(rank=4)", "v.weight"), stats.norm(0.25, 1e-3))
    assert_follows(initial("llama_adapter", ".tokens"), stats.norm(0, 1))
    assert not initial("llama_adapter", "gate").any()
    bound = 1 / math.sqrt(D)
    assert_follows(initial("attempt", "attention.down.weight"), stats.uniform(-bound, 2 * bound))
    assert_follows(initial("attempt", "attention.up.weight"), stats.uniform(-0.1, 0.2))
    assert torch.equal(initial("attempt", "norm.weight"), torch.ones(D, dtype=torch.float64))
    backbone = tiny("bert", "classification", dtype=torch.float64)
    table = backbone.get_input_embeddings().weight.detach()
    rows = initial("mpt(length=5)", "prompt.shared").view(5, D)
    assert all(bool((row == table).all(1).any()) for row in rows)


@pytest.mark.parametrize("rank", [1, 2])
def test_mpt_is_pefts(rank: int) -> None:
    model = tiny("llama", "causal_lm", dtype=torch.float64)
    theirs = peft_model(copy.deepcopy(model), peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=1, num_ranks=rank,
        num_transformer_submodules=1)).double()
    ours = peftref.attach(model, f"mpt(length=3, rank={rank})")
    perturb(ours, 1.0)
    encoder = theirs.prompt_encoder["default"]
    pairs = {"shared": encoder.embedding.weight, "u": encoder.prefix_task_cols,
             "v.weight": encoder.prefix_task_rows}
    with torch.no_grad():
        for name, parameter in pairs.items():
            value = named(ours, f"prompt.{name}")
            parameter.copy_(value.t() if name == "v.weight" else value)
    rows = {**batch("llama"), "labels": batch("llama")["input_ids"]}
    mine = model(**rows)
    other = theirs(**rows, task_ids=torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(mine.logits, other.logits[:, 3:], **CLOSE)
    found = torch.autograd.grad(mine.loss, [named(ours, f"prompt.{n}") for n in pairs])
    expected = torch.autograd.grad(other.loss, list(pairs.values()))
    for name, gradient, reference in zip(pairs, found, expected, strict=True):
        gradient = gradient.t() if name == "v.weight" else gradient
        torch.testing.assert_close(gradient, reference.view(gradient.shape), **CLOSE)


# --- XPrompt ---------------------------------------------------------------------------------


class Held(TrainerCallback):
    """Prompt and head when the second phase begins."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.values: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            trained = {**self.made.trainable, **self.made.head}
            self.values = {n: t.detach().clone() for n, t in trained.items()}


def importance(model: nn.Module, path: str, rows: Tensor, gates: Tensor, wide: int) -> Tensor:
    """``mean over examples of |dL/dg|`` with ``P' = g P``, by differentiation of the gates."""
    total = torch.zeros_like(gates)
    for row in ROWS[:24] + ROWS[:8]:  # the four batches that are shown
        free = gates.clone().requires_grad_()
        values = {path: rows * free.repeat_interleave(wide, 1)}
        loss = functional_call(model, values, kwargs=Collator(0)([row])).loss
        total += torch.autograd.grad(loss, free)[0].abs() / 32
    return total


def test_xprompt_prunes_tokens_then_pieces_of_those_left(tmp_path: Path) -> None:
    spec = "xprompt(length=6, tokens=0.5, pieces=4, keep=0.5)"
    made = adapted(spec)
    held = Held(made)
    train(spec, tmp_path, made=made, steps=6, learning_rate=0.1, callbacks=(held,))
    ((name, end),) = made.trainable.items()
    end, start = end.detach().clone(), held.values[name]
    first, second = (named(made, f"tokens_mask{n}").clone() for n in ("", "_2"))
    with torch.no_grad():
        for each in ("", "_2"):
            named(made, f"tokens_mask{each}").fill_(1)
        for key, parameter in made.head.items():
            parameter.copy_(held.values[key])
    made.model.eval()
    (path,) = [n for n, p in made.model.named_parameters() if p is made.trainable[name]]
    scores = importance(made.model, path, start, torch.ones(6, 1), D)
    kept = scores[:, 0].topk(3).indices
    assert torch.equal(first.mean(1).nonzero()[:, 0], kept.sort().values)
    scores = importance(made.model, path, start, first[:, :: D // 4].clone(), D // 4)[kept]
    found = second.view(6, 4, D // 4)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    chosen = found.mean(-1)[kept]
    assert int(chosen.sum()) == 6
    assert scores[chosen == 1].min() > scores[chosen == 0].max()
    cut = first * second == 0
    assert torch.equal(start[cut], end[cut])  # retraining goes on from the end of the first phase
    assert bool((start[~cut] != end[~cut]).all())


def test_xprompt_resumes_the_same(tmp_path: Path) -> None:
    spec = "xprompt(length=6, pieces=4)"
    usual: dict[str, Any] = {"steps": 6, "learning_rate": 1e-2}
    through = train(spec, tmp_path / "a", **usual)
    train(spec, tmp_path / "b", save_strategy="steps", save_steps=2, **usual)
    for late in (4, 6):
        (tmp_path / "b" / f"checkpoint-{late}" / "trainer_state.json").unlink()
    resumed = train(spec, tmp_path / "b", resume=True, **usual)
    for name, tensor in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_pieces_must_divide_the_rows(tmp_path: Path) -> None:
    with pytest.raises(PeftRefError, match="5 pieces do not divide"):
        train("xprompt(length=4, pieces=5)", tmp_path, steps=4)


# --- ATTEMPT ---------------------------------------------------------------------------------


def instance_prompts(made: peftref.Adapted, words: Tensor, temperature: float) -> Tensor:
    """The prompt of every row, written from the formula; ``words``: embeddings by row."""
    t = {n.rpartition("embed_tokens.")[2]: v for n, v in made.tensors().items()}
    rows = [t[f"{name}.prompt.tokens"] for name in ("first", "second", "target")]
    generator = {n.removeprefix("instance_attention."): v for n, v in t.items()}
    found: list[Tensor] = []
    for text in words:
        h = generator["down.weight"] @ text.max(0).values
        h = generator["up.weight"] @ (h * torch.sigmoid(h))
        u = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
        u = u * generator["norm.weight"] + generator["norm.bias"]
        scores = torch.stack([p.max(0).values @ u / temperature for p in rows])
        shares = scores.exp() / scores.exp().sum()
        found.append(rows[-1] + sum((a * p for a, p in zip(shares, rows, strict=True)),
                                    torch.zeros_like(rows[0])))
    return torch.stack(found)


def test_attempt_makes_a_prompt_for_every_sample() -> None:
    made = attach("attempt(length=3, width=6, temperature=0.5)", "llama", size=0.7)
    model, rows = made.model, batch("llama")
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    found = model(**rows).logits
    table = model.get_input_embeddings().weight
    words = table[rows["input_ids"]].detach()
    prompts = instance_prompts(made, words, 0.5)
    assert (prompts[0] - prompts[1]).abs().max() > 1e-3
    bare = tiny("llama", "causal_lm", dtype=torch.float64)
    expected = bare(inputs_embeds=torch.cat((prompts, words), 1)).logits[:, 3:]
    torch.testing.assert_close(found, expected, **CLOSE)
    trained = list(made.trainable.values())
    for ours, plain in zip(torch.autograd.grad(found.sin().sum(), trained),
                           torch.autograd.grad(expected.sin().sum(), trained), strict=True):
        torch.testing.assert_close(ours, plain, **CLOSE)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_padding_does_not_enter_the_maximum(family: str) -> None:
    made = attach("attempt(length=3, width=6, temperature=0.5)", family, size=0.7)
    rows = batch(family)
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    rows["attention_mask"][1, -2:] = 0
    alone = {n: v[1:, :-2] if n in ("input_ids", "attention_mask") else v[1:]
             for n, v in rows.items()}
    whole = made.model(**rows).logits[1:]
    plain = made.model(**alone).logits
    torch.testing.assert_close(whole[:, : plain.shape[1]], plain, **CLOSE)


def test_sources_come_from_artifacts_and_stay(tmp_path: Path) -> None:
    source = train("prompt_tuning(length=3)", tmp_path / "a", steps=2, learning_rate=0.1)
    source.save(tmp_path / "source")
    (rows,) = source.trainable.values()
    spec = f"attempt(length=3, first='{tmp_path / 'source'}')"
    made = train(spec, tmp_path / "b", steps=2, learning_rate=0.1)
    assert torch.equal(named(made, "first.prompt.tokens"), rows)
    made.save(tmp_path / "made")
    shutil.rmtree(tmp_path / "source")
    again = peftref.restore(adapted("bitfit").detach(), tmp_path / "made", check_backbone=False)
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_source_must_fit(tmp_path: Path) -> None:
    attach("prompt_tuning(length=4)").save(tmp_path / "four")
    with pytest.raises(ArtifactError, match=r"of shape \(3, 32\); found shape \(4, 32\)"):
        attach(f"attempt(length=3, first='{tmp_path / 'four'}')")
    with pytest.raises(CompositionError, match="unequal lengths"):
        attach("instance_attention(prompt_tuning(length=3), prompt_tuning(length=4))")
    with pytest.raises(CompositionError, match="at least two members"):
        attach("instance_attention(lora, lora)")


# --- LLaMA-Adapter ---------------------------------------------------------------------------


def test_llama_adapter_is_pefts() -> None:
    """PEFT's gate is a number for each layer, without tanh."""
    model = tiny("llama", "causal_lm", dtype=torch.float64, num_key_value_heads=4)
    theirs = peft_model(copy.deepcopy(model), peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=3, adapter_layers=L)).double()
    ours = peftref.attach(model, "llama_adapter(length=3, gate=layer, squash=False)")
    perturb(ours, 1.0)
    pairs: list[tuple[Tensor, Tensor]] = []
    for layer in range(L):
        other = theirs.get_submodule(f"model.model.layers.{layer}.self_attn")
        own = {n: t for n, t in ours.trainable.items() if f".{layer}." in n}
        pairs += [(next(t for n, t in own.items() if n.endswith(end)), getattr(other, name))
                  for end, name in (("tokens", "adaption_prompt"), ("gate", "adaption_gate"))]
    with torch.no_grad():
        for own, other in pairs:
            other.copy_(own.view(other.shape))
    rows = batch("llama")
    rows["attention_mask"] = torch.ones_like(rows["input_ids"])
    rows["attention_mask"][1, -2:] = 0
    rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    mine, other = model(**rows), theirs(**rows)
    # PEFT takes this softmax in float32.
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
    real = rows["attention_mask"].bool()  # padding has other positions here
    torch.testing.assert_close(mine.logits[real], other.logits[real], **close)
    found = torch.autograd.grad(mine.loss, [own for own, _ in pairs])
    expected = torch.autograd.grad(other.loss, [parameter for _, parameter in pairs])
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference.view(gradient.shape), **close)


def attention_result(made: peftref.Adapted, rows: dict[str, Tensor]) -> Tensor:
    """What the first layer's attention hands to its output projection."""
    site = next(s for s in made.plan.table if s.role == "attention.output")
    seen: list[Tensor] = []
    module = made.model.get_submodule(site.module)
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made.model(**rows)
    hook.remove()
    return seen[0].unflatten(-1, (4, -1))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_llama_adapter_is_attention_beside(family: str, implementation: str) -> None:
    """``Attn(q, K, V) + tanh(g) softmax(q K_p^T / sqrt(w)) V_p``, beside a prefix too."""
    model = tiny(family, TASKS[family], dtype=torch.float64)
    model.set_attn_implementation(implementation)
    rows = batch(family)
    made = peftref.attach(model, "llama_adapter(length=3)", name="apart")
    perturb(made, 0.7)
    module = [model.get_submodule(s.module) for s in made.plan.table if s.layer == 0 and s.role in (
        "attention.query", "attention.key", "attention.value")]
    seen: list[Tensor] = []
    hook = module[0].register_forward_hook(lambda _, args, y: seen.append(y))
    found = attention_result(made, rows)
    hook.remove()
    prompt, gate = (next(t for n, t in made.tensors().items() if n.endswith(end))
                    for end in ("tokens", "gate"))
    if family == "gpt2":
        query = seen[0][..., :D]
        key, value = (prompt @ module[0].weight + module[0].bias).split(D, -1)[1:]
    else:
        query, key, value = seen[0], module[1](prompt), module[2](prompt)
    query, key, value = (t.unflatten(-1, (4, -1)) for t in (query, key, value))
    scores = torch.einsum("bnhw,lhw->bhnl", query, key) / math.sqrt(D // 4)
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    beside = torch.einsum("bhnl,lhw,h->bnhw", shares, value, gate.tanh())
    with made.disabled():
        plain = attention_result(made, rows)
        prefix = peftref.attach(model, "prefix_tuning(length=2)")
        perturb(prefix, 0.7)
        with_prefix = attention_result(prefix, rows)
    torch.testing.assert_close(found, plain + beside, **CLOSE)
    torch.testing.assert_close(attention_result(made, rows), with_prefix + beside, **CLOSE)


def test_attention_beside_needs_the_interface() -> None:
    with pytest.raises(CompositionError, match="needs a backbone that calls"):
        peftref.compile("llama_adapter", tiny("bloom", "causal_lm"))
    with pytest.raises(CompositionError, match="as wide as the residual stream"):
        peftref.compile({
            "technique": "x", "modules": [{
                "name": "x", "site": {"select": "attention", "port": "keys_values"},
                "function": [{"tokens": {"width": 7}}, "own_keys_values"],
                "interaction": {"insertion": "parallel", "integration": "add"}}]}, tiny("bert"))


# --- Trainable tokens ------------------------------------------------------------------------


def test_trainable_tokens_are_pefts() -> None:
    model = tiny("llama", "causal_lm", dtype=torch.float64)
    theirs = peft_model(copy.deepcopy(model), peft.TrainableTokensConfig(
        task_type="CAUSAL_LM", token_indices=[3, 5, 6, 7, 8],
        target_modules=["embed_tokens"])).double()
    rows = batch("llama")
    rows["input_ids"] = rows["input_ids"] % 9  # so that chosen ones are among them
    with torch.no_grad():
        start = theirs(**rows).logits
    made = peftref.attach(model, "trainable_tokens(tokens='3, 5:9')")
    perturb(made, 0.7)
    (own,) = made.trainable.values()
    (other,) = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        other += own.view(other.shape)  # PEFT trains the rows, we train their difference
    found, expected = model(**rows).logits, theirs(**rows).logits
    assert (found - start).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, **CLOSE)
    (gradient,) = torch.autograd.grad(found.sin().sum(), [own])
    (reference,) = torch.autograd.grad(expected.sin().sum(), [other])
    torch.testing.assert_close(gradient, reference.view(gradient.shape), **CLOSE)


def test_tokens_must_exist() -> None:
    with pytest.raises(CompositionError, match="some of the rows 0 to 96"):
        attach("trainable_tokens(tokens='90:98')")
    with pytest.raises(CompositionError, match="'x' is no row"):
        attach("trainable_tokens(tokens='1, x')")
