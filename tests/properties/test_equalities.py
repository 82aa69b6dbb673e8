"""Properties 1 and 4: identity at the start; merged, unmerged, disabled and detached outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import event, given

from peftref.errors import MergeError
from tests.lowering.randomised import randomise
from tests.properties.backbones import (
    Case,
    attached,
    batch,
    cases,
    examples,
    model,
    output,
    snapshot,
)

# float64: what a formed weight rounds differently.
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
MERGED = 1e-10  # float64, relative to the largest output


@examples(40)
@given(cases())
def test_identity_at_the_start_is_what_the_plan_says(case: Case):
    given_batch = batch(case.family)
    before = output(model(case.family, torch.float64), given_batch)
    with attached(case, torch.float64) as adapted:
        event(f"identity: {adapted.plan.properties.identity_at_init}")
        if adapted.plan.properties.identity_at_init:
            torch.testing.assert_close(output(adapted.model, given_batch), before, **EXACT)


@examples(50)
@given(cases())
def test_merged_equals_running(case: Case):
    """Also a partial merge, where not everything folds; unmerging is bit-exact."""
    given_batch = batch(case.family)
    backbone = model(case.family, torch.float64)
    weights, before = snapshot(backbone), output(backbone, given_batch)
    with attached(case, torch.float64) as adapted:
        randomise(adapted)
        running = output(adapted.model, given_batch)
        event(f"mergeable: {adapted.plan.properties.mergeable}")
        if not adapted.plan.properties.mergeable:
            with pytest.raises(MergeError):
                adapted.merge()
        left = adapted.merge(partial=True)
        assert bool(left) != adapted.plan.properties.mergeable
        merged = output(adapted.model, given_batch)
        assert (merged - running).abs().max() <= MERGED * running.abs().max()
        with adapted.disabled():
            assert torch.equal(output(adapted.model, given_batch), before)
        adapted.unmerge()
        assert torch.equal(output(adapted.model, given_batch), running)
    assert torch.equal(output(backbone, given_batch), before)
    after = backbone.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("expression", ["lora(rank=3, site='head')", "dora(rank=2, site='head')"])
def test_a_tied_head_is_untied_by_merging_only(expression: str, tmp_path: str):
    """The embedding, which is the same tensor, must not change; nor after save and load."""
    import peftref
    from tests.backbone.tiny import tiny

    backbone = tiny("gpt2", "causal_lm", dtype=torch.float64)
    given_batch = batch("gpt2")
    before = output(backbone, given_batch)
    adapted = randomise(peftref.attach(backbone, expression))
    running = output(backbone, given_batch)
    assert not torch.allclose(running, before)
    adapted.merge()
    assert (output(backbone, given_batch) - running).abs().max() <= MERGED * running.abs().max()
    backbone.save_pretrained(tmp_path)
    loaded = type(backbone).peftref_base.from_pretrained(tmp_path, dtype=torch.float64)
    assert (output(loaded, given_batch) - running).abs().max() <= MERGED * running.abs().max()
    adapted.detach()
    assert torch.equal(output(backbone, given_batch), before)
    assert backbone.lm_head.weight is backbone.transformer.wte.weight
    assert backbone.config.tie_word_embeddings
