"""Partial tuning: which entries train, exact counts, what the phases leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftref
from peftref.errors import PeftRefError, TrainingError
from peftref.procedures.prune import PruneProcedure
from peftref.pruning.groups import Groups, best
from tests.backbone.tiny import inputs, tiny
from tests.catalogue.proof import (
    assert_identity,
    assert_merges,
    attach,
    batch,
    count,
)

D, F, L = 32, 48, 2  # width, feed-forward width, layers of the tiny models
V = 97


def labelled(rows: int = 3, seed: int = 7) -> dict[str, Tensor]:
    found = inputs("bert", "classification", batch=rows, seed=seed)
    return {**found, "labels": torch.arange(rows) % 3}


def masks(made: Any) -> dict[str, Tensor]:
    return {n.removesuffix("_mask"): t for n, t in made.tensors().items() if n.endswith("_mask")}


def kept(made: Any) -> int:
    return sum(int(mask.sum()) for mask in masks(made).values())


# --- full tuning -----------------------------------------------------------------------------


def test_full_tuning_counts_every_site_of_the_backbone() -> None:
    bert = L * (4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D) + V * D + 2 * D + D * D + D
    assert count("full") == bert
    values = 2 * (D * D // 2)  # two of four heads have keys and values
    llama = L * (2 * D * D + values + 3 * D * F + 2 * D) + V * D + D
    assert count("full", "llama") == llama


def test_full_tuning_is_full_tuning() -> None:
    """One step of plain descent on the differences and on the backbone's own tensors."""
    made, bare = attach("full", moved=False), tiny("bert", "classification", dtype=torch.float64)
    assert_identity("full")
    rows = labelled()
    for tensors, model in ((list(made.trainable.values()), made.model), (None, bare)):
        model(**rows).loss.backward()
        sites = {t.owner for t in made.plan.tensors}
        for tensor in tensors or [p for n, p in bare.named_parameters()
                                  if n.rpartition(".")[0] in sites]:
            if tensor.grad is not None:
                tensor.data -= 0.1 * tensor.grad
    expected = bare(**rows).logits
    torch.testing.assert_close(made.model(**rows).logits, expected, rtol=0, atol=1e-10)
    assert_merges(made)


# --- masks chosen before training ------------------------------------------------------------


def per_example(made: Any, rows: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Gradients of every example alone, of the trained tensors."""
    found = []
    for row in range(len(rows["labels"])):
        loss = made.model(**{n: v[row:row + 1] for n, v in rows.items()}).loss
        names = list(made.trainable)
        grads = torch.autograd.grad(loss, [made.trainable[n] for n in names], allow_unused=True,
                                    materialize_grads=True)
        found.append(dict(zip(names, grads, strict=True)))
    return found


def top_masks(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    flat = torch.cat([s.flatten() for s in scores.values()])
    order = flat.argsort(descending=True)
    assert flat[order[keep - 1]] > flat[order[keep]]  # no tie at the border
    chosen = torch.zeros_like(flat)
    chosen[order[:keep]] = 1
    return {n: part.view_as(s) for (n, s), part in zip(
        scores.items(), chosen.split([s.numel() for s in scores.values()]), strict=True)}


@pytest.mark.parametrize("technique", ["fish_mask", "child_tuning_d", "sam_mask"])
def test_scores_of_gradients(technique: str) -> None:
    """FISH: mean of squares of single examples; Child-Tuning D: of batches; SAM: of the sum."""
    made = attach(f"{technique}(keep=0.02)", moved=False)
    data = [labelled(seed=7), labelled(seed=8)]
    assert made.plan.properties.needs_data
    names = list(made.trainable)
    sums = {n: torch.zeros_like(made.trainable[n]) for n in names}
    whole = {n: torch.zeros_like(made.trainable[n]) for n in names}
    for rows in data:
        singles = per_example(made, rows)
        mean = {n: torch.stack([g[n] for g in singles]).mean(0) for n in names}
        for n in names:
            own = [g[n] for g in singles] if technique == "fish_mask" else [mean[n]]
            sums[n] += torch.stack([g**2 for g in own]).sum(0)
            whole[n] += mean[n]
    scores = {n: whole[n]**2 for n in names} if technique == "sam_mask" else sums
    made.prepare(data)
    total = sum(s.numel() for s in scores.values())
    expected = top_masks(scores, round(0.02 * total))
    torch.testing.assert_close(masks(made), expected, rtol=0, atol=0)


def test_grasp_scores_by_the_hessian() -> None:
    base = "houlsby_adapter(bottleneck=3, site=ffn, init='normal(0.1)', layers=[0])"
    spec = peftref.load("sparse_adapter", base=base, criterion="grasp", keep=0.3)
    made = peftref.attach(tiny("bert", "classification", dtype=torch.float64,
                               attn_implementation="eager"), spec)
    rows = labelled()
    names = list(masks(made))
    tensors = [made.trainable[n] for n in names]

    def gradient() -> Tensor:
        found = torch.autograd.grad(made.model(**rows).loss, tensors)
        return torch.cat([g.flatten() for g in found])

    start = torch.cat([t.detach().flatten() for t in tensors])
    g, step = gradient(), 1e-5
    sides = []
    for sign in (1, -1):
        moved = (start + sign * step * g).split([t.numel() for t in tensors])
        for t, value in zip(tensors, moved, strict=True):
            t.data.copy_(value.view_as(t))
        sides.append(gradient())
    for t, value in zip(tensors, start.split([t.numel() for t in tensors]), strict=True):
        t.data.copy_(value.view_as(t))
    scores = start * (sides[0] - sides[1]) / (2 * step)
    parts = scores.split([t.numel() for t in tensors])
    expected = top_masks(
        {n: p.view_as(t) for n, p, t in zip(names, parts, tensors, strict=True)},
        round(0.3 * len(scores)))
    made.prepare([rows])
    torch.testing.assert_close(masks(made), expected, rtol=0, atol=0)


def test_importance_is_the_gradient_of_a_gate_for_each_example() -> None:
    """E_x |dL/d gamma| with a gate on every row of a prompt, as XPrompt."""
    spec = {"composition": "pruned", "members": [
        {"name": "prompt", "use": "prompt_tuning(length=6, init='normal(1.0)')"}],
        "couplings": [{"prune": {"criterion": "importance", "granularity": "row", "count": 4}},
                      {"prune": {"criterion": "importance", "granularity": "piece", "pieces": 4,
                                 "keep": 0.5}}]}
    made = peftref.attach(tiny("bert", "classification", dtype=torch.float64), spec)
    rows = labelled()
    (name, prompt), = made.trainable.items()
    start = prompt.detach().clone()
    scores = torch.zeros(6, dtype=torch.float64)
    for found in per_example(made, rows):
        scores += (found[name] * start).sum(1).abs()
    made.prepare([rows])
    first, second = (made.tensors()[f"{name}_mask{end}"] for end in ("", "_2"))
    assert set(first.sum(1).tolist()) == {0.0, 32.0}
    assert first[:, 0].nonzero()[:, 0].tolist() == sorted(scores.argsort()[-4:].tolist())
    pieces = second.view(6, 4, 8)
    assert int(pieces[:, :, 0].sum()) == 8  # half of the 16 pieces of the rows that are left
    assert bool((pieces == pieces[:, :, :1]).all())
    assert not bool((second * (1 - first)).any())


@pytest.mark.parametrize(("expression", "wanted"), [
    ("apet(count=321)", 321), ("prune(full, criterion='random', count=17, vectors=True)", 17),
    ("prune(ia3, criterion='random', keep=0.25, vectors=True)", None),
    ("prune(prefix_tuning(length=4), criterion='random', keep=0.25)", None),
    ("prune(oft(block=8), criterion='random', keep=0.25)", None),
    ("prune(lora + prefix_tuning, criterion='er', keep=0.25)", None),
    ("prune(unipelt, criterion='random', keep=0.25)", None),
])
def test_exactly_so_many_stay_of_any_technique(expression: str, wanted: int | None) -> None:
    made = attach(expression)
    total = sum(mask.numel() for mask in masks(made).values())
    found = kept(made)
    slack = len(masks(made)) if "'er'" in expression else 0  # rounded for each tensor
    assert abs(found - (wanted or round(0.25 * total))) <= slack
    assert attach(expression, moved=False).model(**batch()).logits.isfinite().all()


def test_what_is_cut_of_a_scale_is_one() -> None:
    made = attach("prune(ia3, criterion='random', keep=0.5, vectors=True)")
    plain = attach("ia3")
    with torch.no_grad():
        for name, tensor in plain.trainable.items():
            own = next(t for n, t in made.trainable.items() if n == name)
            tensor.copy_(torch.where(masks(made)[name] == 1, own, torch.ones_like(own)))
    torch.testing.assert_close(made.model(**batch()).logits, plain.model(**batch()).logits)


def test_ties_are_broken_by_a_fixed_draw_and_dead_groups_never_chosen() -> None:
    scores = {"a": torch.zeros(50, 4), "b": torch.zeros(30)}
    alive = {"a": torch.ones(50, 4), "b": torch.zeros(30)}
    first, again = (best(scores, alive, 0.5) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in scores)
    assert (int(first["a"].sum()), int(first["b"].sum())) == (100, 0)
    assert int((first["a"].sum(1) == 0).sum()) < 12  # of 50: a fair draw leaves about 3
    with pytest.raises(TrainingError, match="201 are to be kept, of only 200"):
        best(scores, alive, 0.5, count=201)


@pytest.mark.parametrize("granularity", ["entry", "piece", "row", "tensor"])
def test_groups_cover_the_tensor(granularity: Any) -> None:
    groups = Groups(granularity, 3)
    tensor = torch.arange(24.0).view(4, 6)
    sums = groups.sums(tensor)
    assert sums.sum() == tensor.sum()
    assert sums.numel() == {"entry": 24, "piece": 12, "row": 4, "tensor": 1}[granularity]
    spread = groups.spread(torch.rand_like(sums), tensor)
    assert torch.equal(groups.sums(spread) * 0 + 1, torch.ones_like(sums))
    assert len(spread.unique()) == sums.numel()


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(("expression", "message"), [
    ("shira(rank=40)", "the highest rank is 16"),
    ("prune(ia3)", "no matrix to prune; vectors: true"),
    ("prune(qgoft, criterion='random')", "starts at identity matrices"),
    ("prune(lora, criterion='first_order')", "give 'when' a phase"),
    ("prune(lora, when='later')", "when: Unknown phase 'later'"),
    ("prune(lora, criterion='er', count=4)", "density for entries"),
    ("mask(lora, kind='top_k', penalty=0.1)", "penalty and fold go with kind hard_concrete"),
    ("mask(lora, kind='hard_concrete', fold='later')", "fold: Unknown phase 'later'"),
    ("mask(mask(lora))", "masked by scores already"),
    ("mask(mix(lora))", "copies of a mix cannot be masked"),
    ("lt_sft + diff_pruning", "write one 'phases'"),
])
def test_what_has_no_meaning_is_refused(expression: str, message: str) -> None:
    with pytest.raises(PeftRefError, match=message):
        peftref.compile(expression, tiny("bert", "classification"))


def test_bias_techniques_need_biases() -> None:
    with pytest.raises(PeftRefError, match="none has port 'bias'"):
        peftref.compile("u_bitfit", tiny("llama"))


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(TrainingError, match="5 pieces do not divide the rows"):
        attach("prune(lora, criterion='random', granularity='piece', pieces=5)")


def test_members_of_a_prune_are_those_of_its_procedure() -> None:
    made = attach("prune(lora, criterion='random') + ia3")
    (procedure,) = [p for p in made.procedures if isinstance(p, PruneProcedure)]
    assert procedure.arguments.members == "lora"
    assert all(".lora." in name for name in masks(made))
