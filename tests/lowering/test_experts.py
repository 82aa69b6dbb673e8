"""Edits of experts and routers, against the same model with its tensors changed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import peftref
from peftref.adapted import Adapted
from peftref.backbone.hf import site_table
from peftref.backbone.site_table import Site, SiteKind
from peftref.errors import ArtifactError, CompositionError
from tests.backbone.observe import read_ports, rows_of
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
EXPERTS = "{experts.*,router}"
EXACT = 1e-12  # float64; sums in another order


def make(
    family: str, implementation: str = "eager"
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Grouped products know no float64, so that they are compared in float32."""
    dtype = torch.float64 if implementation == "eager" else torch.float32
    model = tiny(family, "causal_lm", dtype=dtype)
    model.config._experts_implementation = implementation
    return model, inputs(family, "causal_lm")


def logits(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def matrix(model: PreTrainedModel, site: Site) -> Tensor:
    """The rows of a site in the model's own tensor, as (rows, d_in); assign to change them."""
    tensor = model.get_submodule(site.module)._parameters[site.tensor]
    assert tensor is not None
    part = tensor if site.expert is None else tensor[site.expert]
    return part.mT if site.transposed else part


def add_by_hand(model: PreTrainedModel, adapted: Adapted, scale: float) -> None:
    """``W + s B A`` for every expert, from the names that the plan gives."""
    for site in site_table(model):
        if site.kind is not SiteKind.MATRIX:
            continue
        part = site.role.replace(".", "_") + ("" if site.expert is None else f"_{site.expert}")
        own = [t for n, t in adapted.trainable.items() if f"{site.module}.lora.delta.{part}." in n
               or (site.role == "router" and n.startswith(f"{site.module}.lora.delta."))]
        down, up = own
        target = matrix(model, site)
        rows = torch.arange(len(target)) if site.rows is None else rows_of(site.rows)
        target[rows] += scale * up @ down


def scaled_ffn(
    model: PreTrainedModel, given: dict[str, Tensor], role: str, factor: float
) -> Tensor:
    """What the feed-forward part of the last layer gives while a role's rows are scaled."""
    sites = [s for s in site_table(model) if s.layer == 1]
    ffn = next(s for s in sites if s.role == "ffn")
    with torch.no_grad():
        for site in sites:
            if site.role == role:
                target = matrix(model, site)
                rows = torch.arange(len(target)) if site.rows is None else rows_of(site.rows)
                target[rows] *= factor
                assert (len(rows), target.shape[1]) == (site.d_out, site.d_in)
    return read_ports(model, [ffn], given)[ffn.label][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_up_is_the_branch_in_which_the_output_is_affine(family: str) -> None:
    """Gate and up stand in one tensor: one curves the output, the other does not."""
    for role, affine in (("experts.up", True), ("experts.gate", False), ("experts.down", True)):
        once, twice, thrice = (
            scaled_ffn(*make(family), role, factor) for factor in (1, 2, 3))
        curve = (thrice - 2 * twice + once).abs().max()
        assert (twice - once).abs().max() > 1e-3
        assert bool(curve < 1e-9) == affine, role


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_experts_is_an_addition_to_each_of_them(family: str, implementation: str) -> None:
    model, given = make(family, implementation)
    before = logits(model, given)
    adapted = peftref.attach(model, f"lora(rank=2, alpha=3, site='{EXPERTS}')")
    assert torch.equal(logits(model, given), before)
    randomise(adapted)
    running = logits(model, given)
    assert not torch.allclose(running, before)
    by_hand, _ = make(family, implementation)
    with torch.no_grad():
        add_by_hand(by_hand, adapted, 3 / 2)
    close = EXACT if implementation == "eager" else 1e-4
    torch.testing.assert_close(logits(by_hand, given), running, rtol=0, atol=close)
    adapted.detach()
    assert torch.equal(logits(model, given), before)


@pytest.mark.parametrize("expression", [
    f"lora(rank=2, site='{EXPERTS}')", f"dora(rank=2, site='{EXPERTS}')",
    "oft(block=8, site='experts.{gate,up}')", "loha(rank=2, site='experts.down')",
    "lora(rank=2, site='experts.gate') + dora(rank=2, site='experts.*') + bitfit(site='router?')",
])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_merge_and_come_back(family: str, expression: str) -> None:
    model, given = make(family)
    if family != "gpt_oss":  # the others' routers have no bias
        expression = expression.replace(" + bitfit(site='router?')", "")
    before = logits(model, given)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = peftref.attach(model, expression)
    torch.testing.assert_close(logits(model, given), before, rtol=0, atol=EXACT)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == adapted.plan.trainable_parameters
    randomise(adapted)
    running = logits(model, given)
    assert not torch.allclose(running, before)
    adapted.merge()
    torch.testing.assert_close(logits(model, given), running, rtol=0, atol=EXACT)
    adapted.unmerge()
    assert torch.equal(logits(model, given), running)
    adapted.detach()
    assert torch.equal(logits(model, given), before)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_that_runs_is_reached(family: str) -> None:
    model, _ = make(family)
    adapted = randomise(peftref.attach(model, f"lora(rank=2, site='{EXPERTS}')"))
    seen: set[str] = set()
    for seed in range(4):
        batch = inputs(family, "causal_lm", batch=4, length=16, seed=seed)
        model(**batch).logits.square().mean().backward()
        seen |= {n for n, p in adapted.trainable.items() if p.grad is not None and p.grad.any()}
    assert seen == set(adapted.trainable)


def test_experts_are_saved_and_no_format_that_lacks_them_is_written(tmp_path: Path) -> None:
    model, given = make("mixtral")
    adapted = randomise(peftref.attach(model, f"lora(rank=2, site='{EXPERTS}')"))
    running = logits(model, given)
    with pytest.raises(ArtifactError, match="PEFT's LoRA format cannot"):
        adapted.to_peft(tmp_path / "peft")
    adapted.save(tmp_path / "own")
    assert not (tmp_path / "own" / "peft").exists()
    adapted.detach()
    peftref.restore(model, tmp_path / "own")
    assert torch.equal(logits(model, given), running)


@pytest.mark.parametrize(("expression", "match"), [
    ("lora(rank=2, dropout=0.1, site='experts.*')", "only what folds into a weight"),
    ("ia3(site='experts.up', feedforward='ffn?.down')", "only what folds into a weight"),
    ("houlsby_adapter(site='experts.down')", "only what folds into a weight"),
    ("gate(lora(site='experts.*'))", "only what folds into a weight"),
])
def test_edits_of_streams_of_experts_are_refused(expression: str, match: str) -> None:
    model, _ = make("mixtral")
    with pytest.raises(CompositionError, match=match):
        peftref.attach(model, expression)
    assert not any("peftref" in name for name, _ in model.named_modules())
