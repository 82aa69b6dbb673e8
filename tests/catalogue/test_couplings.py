"""Every coupling over every kind of technique: it trains, or is refused with its reason."""

from __future__ import annotations

import pytest
import torch

import peftref
from peftref.errors import PeftRefError
from tests.backbone.tiny import inputs, tiny
from tests.parity.peft_pairs import logits

BASES = (
    "lora(rank=4)", "houlsby_adapter(bottleneck=8)", "prefix_tuning(length=3)", "ia3",
    "oft(block=4)", "dora(rank=4)", "bitfit", "ln_tuning", "vera(rank=8)", "loha(rank=2)",
    "prompt_tuning(length=3)", "pfeiffer_adapter(bottleneck=8)", "hra(rank=2)", "shira(rank=2)",
    "mam(bottleneck=8, length=3, reparameterisation='none')",
    "lora(rank=2) + prefix_tuning(length=2)", "loreft(rank=2)", "compacter(bottleneck=8)",
)
COUPLINGS = {
    "mix": "mix({}, copies=2)",
    "prune": "prune({}, criterion='random', keep=0.5)",
    "prune_vectors": "prune({}, criterion='random', keep=0.5, vectors=True)",
    "gate": "gate({})",
    "share": "share({}, by='role')",
    "quantize": "quantize({}, bits=4)",
    "mask": "mask({}, keep=0.5)",
    "drop_layers": "drop_layers({})",
    "fusion": "fusion({0}, {0}, kind='scale')",
    "reversible": "reversible({}, residual_adapter(site='block'))",
    "group": "group({}, groups=[2, 3])",
}
NO_MATRIX = ("ia3", "bitfit", "ln_tuning", "vera")
NO_WEIGHT = ("houlsby_adapter", "prefix_tuning", "ln_tuning", "prompt_tuning", "mam",
             "pfeiffer_adapter", "loreft", "compacter")
REFUSED = {
    "prune": dict.fromkeys((*NO_MATRIX, "shira"), "no matrix to prune"),
    "mask": dict.fromkeys((*NO_MATRIX, "shira"), "no tensor to mask"),
    "gate": {"prompt_tuning": "a prompt cannot be gated"},
    "share": {"dora": "starts at values of the backbone",
              "prompt_tuning": "starts at values of the backbone"},
    "quantize": dict.fromkeys(NO_WEIGHT, "edits no linear module"),
    "drop_layers": {"prompt_tuning": "no edit inside a layer"},
    "group": {"prompt_tuning": "has no edit"},
    "fusion": dict.fromkeys(
        ("prefix_tuning", "ia3", "oft", "dora", "prompt_tuning", "mam", "lora(rank=2) +", "hra",
         "loreft"), "members must add"),
}


def _reason(coupling: str, base: str) -> str | None:
    found = (why for start, why in REFUSED.get(coupling, {}).items() if base.startswith(start))
    return next(found, None)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_coupling_takes_any_technique(coupling: str, base: str) -> None:
    model = tiny("bert", "classification", dtype=torch.float64)
    text, why = COUPLINGS[coupling].format(base), _reason(coupling, base)
    if why is not None:
        with pytest.raises(PeftRefError, match=why):
            peftref.compile(text, model)
        return
    rows = {**inputs("bert", "classification"), "labels": torch.tensor([0, 1])}
    plain = logits(model, rows)
    adapted = peftref.attach(model, text)
    adapted.handled = True
    if adapted.plan.properties.needs_data:
        adapted.prepare([rows])
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.trainable.values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(0.1 * noise)
    model.train()
    for procedure in adapted.procedures:
        procedure.before_step(adapted, 0, 10)
    model(**rows).loss.backward()
    reached = [n for n, p in adapted.trainable.items() if p.grad is not None]
    assert len(reached) == len(adapted.trainable)
    assert any(bool(p.grad.abs().max() > 0) for p in adapted.trainable.values()
               if p.grad is not None)
    model.eval()
    changed = logits(model, rows)
    assert not torch.allclose(changed, plain)
    if adapted.plan.properties.mergeable:
        adapted.merge()
        torch.testing.assert_close(logits(model, rows), changed, rtol=0, atol=1e-9)
        adapted.unmerge()
    adapted.detach()
    assert torch.equal(logits(model, rows), plain)
