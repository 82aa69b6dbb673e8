"""Task heads: what a checkpoint of the bare backbone does not hold, whatever the task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import peftref
from peftref.backbone.hf import site_table
from peftref.backbone.hf.modules import base_prefix
from tests.backbone.tiny import tiny_config
from tests.backbone.tiny_encoders import CONFIGS

TASKS: dict[str, Any] = {
    "audio": AutoModelForAudioClassification,
    "choice": AutoModelForMultipleChoice,
    "image": AutoModelForImageClassification,
    "question": AutoModelForQuestionAnswering,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
POOLED = "pooler."  # some heads bring a pooler, others leave the backbone's out


def built(auto: Any, family: str) -> PreTrainedModel | None:
    """Return the model of a task on the meta device; None where there is none."""
    config = tiny_config(family, num_labels=3)
    if type(config) not in auto._model_mapping:
        return None
    with torch.device("meta"):
        return auto.from_config(config)


@pytest.mark.parametrize("family", CONFIGS)
def test_heads_are_what_the_bare_backbone_lacks(family: str) -> None:
    bare = built(AutoModel, family)
    assert bare is not None
    own = {name for name, _ in bare.named_parameters()}
    roles = [site.label for site in site_table(bare)]
    met = 0
    for task, auto in TASKS.items():
        model = built(auto, family)
        if model is None:
            continue
        met += 1
        table, prefix = site_table(model), base_prefix(model)
        inside = {name for name, _ in model.named_parameters()
                  if name.split(".")[0] in table.head_modules}
        new = {name for name, _ in model.named_parameters()
               if name.removeprefix(prefix) not in own}
        assert inside == new, task
        assert table.frozen_parameters == sum(
            p.numel() for name, p in model.named_parameters() if name not in new)
        lost = {label for label in roles if label not in {s.label for s in table}}
        assert all(label.endswith("pooler") for label in lost) or task in ("audio", "image"), lost
    assert met or family in ("clip_text_model", "clip_vision_model", "marian", "pegasus")


@pytest.mark.parametrize("family", [f for f in CONFIGS if type(
    tiny_config(f)) in AutoModelForMaskedLM._model_mapping])
def test_what_predicts_tokens_is_pretrained_and_no_task_head(family: str) -> None:
    model = built(AutoModelForMaskedLM, family)
    assert model is not None
    table = site_table(model)
    assert table.head_modules == ()
    assert [s.module for s in table if s.role == "head"]
    assert table.frozen_parameters == sum(p.numel() for p in model.parameters())


def test_a_head_is_trained_beside_the_adapter() -> None:
    """Gradients reach it and no other tensor of the model."""
    config = tiny_config("vit", num_labels=3)
    model = AutoModelForImageClassification.from_config(config)
    adapted = peftref.attach(model, "lora(rank=2)")
    model(pixel_values=torch.randn(2, 3, 16, 16)).logits.square().sum().backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n in reached if ".peftref." not in n} == {"classifier.weight", "classifier.bias"}
    assert set(adapted.head) == {"classifier.weight", "classifier.bias"}
