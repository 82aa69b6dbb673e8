"""Property 11: a padded row equals the row alone; cached decoding equals the full forward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given
from torch import Tensor
from torch.nn.functional import pad

import peftref
from peftref.errors import BackboneError
from tests.lowering.randomised import randomise
from tests.properties.backbones import Case, attached, batch, cases, examples, fresh, output

CLOSE = 1e-9  # float64, relative to the largest logit
PADDING, NEW = 3, 4


def padded(given_batch: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    """Add padding to ids and mask of one row, and the positions that go with it."""
    edges = (PADDING, 0) if side == "left" else (0, PADDING)
    found = dict(given_batch)
    found["input_ids"] = pad(given_batch["input_ids"], edges)
    found["attention_mask"] = pad(given_batch["attention_mask"], edges)
    if side == "left":
        # What `generate` and careful callers pass; learned positions need it without any adapter.
        found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return found


def real(logits: Tensor, family: str, side: str) -> Tensor:
    """The logits of the tokens that are no padding."""
    if family in ("bert", "t5"):  # one row of classes; the decoder's tokens are not padded
        return logits
    return logits[:, PADDING:] if side == "left" else logits[:, :-PADDING]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_row_equals_the_row_alone(side: str):
    families = ("gpt2", "llama") if side == "left" else ("bert", "gpt2", "llama", "t5")

    @examples(30)
    @given(cases(*families))
    def check(case: Case) -> None:
        row = batch(case.family, batch=1)
        with attached(case, torch.float64) as adapted:
            randomise(adapted)
            alone = output(adapted.model, row)
            beside = real(output(adapted.model, padded(row, side)), case.family, side)
            assert (beside - alone).abs().max() <= CLOSE * alone.abs().max()

    check()


def full_forward(adapted: object, row: dict[str, Tensor], family: str) -> Tensor:
    """Greedy tokens, each from a forward over everything before it."""
    backbone = adapted.model  # pyright: ignore[reportAttributeAccessIssue]
    name = "decoder_input_ids" if family == "t5" else "input_ids"
    ids = torch.zeros(len(row["input_ids"]), 1, dtype=torch.long) if family == "t5" else row[name]
    for _ in range(NEW):
        mask = {} if family == "t5" else {"attention_mask": torch.ones_like(ids)}
        logits = output(backbone, {**row, **mask, name: ids})
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids


@examples(30)
@given(cases("gpt2", "llama", "t5"))
def test_cached_decoding_equals_the_full_forward(case: Case):
    """Also a left-padded row; what looks at all tokens of a row is refused."""
    row = batch(case.family, batch=2)
    row.pop("decoder_input_ids", None)
    # No token ends early, else the comparison would be of nothing.
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with attached(case, torch.float64) as adapted:
        randomise(adapted)
        refused = adapted.plan.properties.mixes_tokens
        event(f"refused: {refused}")
        if refused:
            with pytest.raises(BackboneError, match="generate"):
                adapted.model.generate(**row, **options)
            return
        full = full_forward(adapted, row, case.family)
        for cached in (True, False):
            tokens = adapted.model.generate(**row, use_cache=cached, **options)
            assert torch.equal(tokens, full)
        if case.family != "t5":
            left = {n: pad(t, (PADDING, 0)) for n, t in row.items()}
            tokens = adapted.model.generate(**left, **options)
            assert torch.equal(tokens[:, PADDING:], full)


ROWS = ["prompt_tuning(length=3)", "prefix_tuning(length=3)",
        "prefix_tuning(length=2) + prompt_tuning(length=3) + lora(rank=2)"]


@pytest.mark.parametrize("expression", ROWS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_cache_that_the_caller_holds(family: str, expression: str):
    """The rows are in the cache once, and stay visible, with and without a mask."""
    backbone = fresh(family, torch.float64)
    randomise(peftref.attach(backbone, expression))
    row = batch(family)
    whole = output(backbone, row)
    for with_mask in (True, False):
        first = {n: t[:, :4] for n, t in row.items()}
        rest = {n: t[:, 4:] for n, t in row.items()}
        if with_mask:
            rest["attention_mask"] = row["attention_mask"]
        else:
            del first["attention_mask"], rest["attention_mask"]
        start = backbone(**first, use_cache=True)
        end = backbone(**rest, past_key_values=start.past_key_values)
        logits = torch.cat((start.logits, end.logits), 1)
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("expression", ROWS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_left_padding_without_positions(family: str, expression: str):
    """Rows have fixed positions, so the tokens' are counted from the first real one."""
    backbone = fresh(family, torch.float64)
    randomise(peftref.attach(backbone, expression))
    row = batch(family)
    left = {n: t for n, t in padded(row, "left").items() if n != "position_ids"}
    torch.testing.assert_close(output(backbone, left)[:, PADDING:], output(backbone, row),
                               rtol=0, atol=1e-9)


def test_gates_refuse_a_cache():
    backbone, row = fresh("gpt2"), batch("gpt2")
    peftref.attach(backbone, "gate(lora(rank=2))")
    start = backbone(**row, use_cache=True)
    with pytest.raises(BackboneError, match="goes on from a cache"):
        backbone(input_ids=row["input_ids"][:, :1], past_key_values=start.past_key_values)


def test_a_prompt_in_the_encoders_output():
    """A decoder that goes on from given encoder states still masks them right."""
    backbone, row = fresh("t5", torch.float64), padded(batch("t5"), "right")
    randomise(peftref.attach(backbone, "prompt_tuning(length=3)"))
    whole = backbone(**row)
    again = backbone(encoder_outputs=(whole.encoder_last_hidden_state,),
                     attention_mask=row["attention_mask"],
                     decoder_input_ids=row["decoder_input_ids"])
    torch.testing.assert_close(again.logits, whole.logits, rtol=0, atol=1e-12)
