"""A prompt of virtual tokens is seen by the model and not by its caller."""

from __future__ import annotations

import pytest
import torch

import peftref
from tests.backbone.tiny import inputs, tiny
from tests.lowering.randomised import randomise

LENGTH = 3


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_is_rows_before_the_embeddings(family: str):
    model, given = tiny(family, "causal_lm", dtype=torch.float64), inputs(family, "causal_lm")
    embedded = model.get_input_embeddings()(given["input_ids"])
    adapted = randomise(peftref.attach(model, f"prompt_tuning(length={LENGTH})"))
    (rows,) = (row.detach() for row in adapted.trainable.values())
    whole = torch.cat((rows[None].expand(len(embedded), -1, -1), embedded), 1)
    with adapted.disabled():
        expected = model(inputs_embeds=whole).logits[:, LENGTH:]
    torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "task"), [("gpt2", "causal_lm"), ("bert", "features")])
def test_outputs_have_the_callers_length(family: str, task: str):
    model, given = tiny(family, task), inputs(family, task)
    randomise(peftref.attach(model, f"prompt_tuning(length={LENGTH})"))
    batch, length = given["input_ids"].shape
    result = model(**given, output_hidden_states=True)
    assert all(state.shape[:2] == (batch, length) for state in result.hidden_states)
    assert result[0].shape[:2] == (batch, length)
    assert torch.equal(model(**given, return_dict=False)[0], result[0])


def test_kept_logits_are_those_of_the_callers_tokens():
    model, given = tiny("gpt2", "causal_lm"), inputs("gpt2", "causal_lm")
    randomise(peftref.attach(model, f"prompt_tuning(length={LENGTH})"))
    whole = model(**given).logits
    for kept, rows in ((1, slice(-1, None)), (99, slice(None)), (torch.tensor([0, 4]), [0, 4])):
        found = model(**given, logits_to_keep=kept).logits
        torch.testing.assert_close(found, whole[:, rows])
