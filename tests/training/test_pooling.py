"""What a head reads, on every encoder family that has its own head class."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from peftref.backbone.hf import site_table
from peftref.errors import BackboneError
from peftref.training.backbone import TaskHead, load_backbone
from peftref.training.pooling import masked_mean, set_pooling
from tests.training.assets import bert_folder

FAMILIES = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet"]
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "embedding_size": 16, "dim": 16, "n_layers": 2, "n_heads": 2,
         "hidden_dim": 32, "pad_token_id": 0, "num_labels": 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_is_pooled_as_if_alone(family: str) -> None:
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(
        family, **{name: value for name, value in SIZES.items() if hasattr(known, name)}
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    ids = torch.randint(5, 60, (2, 9))
    mask = torch.ones_like(ids)
    ids[0, 4:], mask[0, 4:] = 0, 0
    with torch.no_grad():
        plain = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        set_pooling(model, "mean")
        pooled = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        together = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        alone = model(input_ids=ids[:1, :4], attention_mask=mask[:1, :4])
        copied = copy.deepcopy(model)(input_ids=ids, attention_mask=mask)
    expected = torch.stack([plain[0, :4].mean(0), plain[1].mean(0)])
    assert torch.allclose(pooled[:, 0], expected, rtol=1e-12)
    assert torch.allclose(together.logits[0], alone.logits[0], rtol=1e-9)
    assert torch.equal(together.logits, copied.logits)
    assert len(together.hidden_states) == 3
    # The head reads the pooled vector and nothing else: its gradient reaches every token.
    model.zero_grad()
    model(input_ids=ids, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    head = [p for n, p in model.named_parameters() if not n.startswith(model.base_model_prefix)]
    assert all(p.grad is not None and p.grad.any() for p in head)


def test_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"\(2, 5\).*not \(2, 4\)"):
        masked_mean(torch.zeros(2, 5, 3), torch.ones(2, 4))


def test_the_choice_follows_the_checkpoint(tmp_path: Path) -> None:
    head = TaskHead("classification", ("a", "b"))

    def chosen(folder: Path, head: TaskHead = head) -> str:
        return load_backbone(str(folder), head, dtype="float32", device="cpu").head.pooling

    assert chosen(bert_folder(tmp_path / "bare")) == "mean"
    pooled = bert_folder(tmp_path / "pooled", pooler=True)
    assert chosen(pooled) == "model"
    assert chosen(pooled, TaskHead("classification", ("a", "b"), "cls")) == "cls"
    (pooled / "modules.json").write_text("[]")
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert chosen(pooled) == "mean"


def test_sites_are_found_as_before(tmp_path: Path) -> None:
    folder = str(bert_folder(tmp_path / "bert"))
    loaded = [
        load_backbone(folder, TaskHead("classification", ("a", "b"), pooling), dtype="float32",
                      device="cpu").model
        for pooling in ("model", "mean")
    ]
    plain, mean = ([site.label for site in site_table(model)] for model in loaded)
    assert mean == [label for label in plain if not label.endswith("pooler")]
