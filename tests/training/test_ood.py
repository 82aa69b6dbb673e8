"""Scores of foreign rows: against definitions on drawn numbers, and on a tiny trained model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import peftref
from peftref.cli.app import main
from peftref.training.backbone import TaskHead, load_backbone
from peftref.training.encode import Collator
from peftref.training.ood import ClassGaussians, detection, energy, look, softmax_score
from peftref.training.session import TrainingSession
from tests.training.assets import bert_folder, llama_folder, run_settings, write_rows


def test_scores_are_their_definitions() -> None:
    draw = np.random.default_rng(0)
    logits = torch.tensor(draw.normal(size=(7, 4)) * 5)
    expected = -logits.softmax(-1).max(-1).values
    np.testing.assert_allclose(softmax_score(logits.numpy()), expected, rtol=1e-12)
    expected = -2 * torch.logsumexp(logits / 2, dim=-1)
    np.testing.assert_allclose(energy(logits.numpy(), 2.0), expected, rtol=1e-12)
    labels = [0, 0, 0, 2, 2, 2, 2, 5, 5]
    features, other = draw.normal(size=(9, 3)), draw.normal(size=(6, 3))
    means = {c: features[[n for n, label in enumerate(labels) if label == c]].mean(0)
             for c in set(labels)}
    spread = sum(np.outer(f - means[c], f - means[c])
                 for f, c in zip(features, labels, strict=True)) / 9
    inverse = np.linalg.inv(spread)
    nearest = [min((f - m) @ inverse @ (f - m) for m in means.values()) for f in other]
    np.testing.assert_allclose(ClassGaussians(features, labels).score(other), nearest, rtol=1e-9)


def test_a_direction_of_rounding_noise_does_not_count() -> None:
    """A norm fixes the sum of its outputs, so that features of 32 bits leave noise there."""
    draw = np.random.default_rng(2)
    features = draw.normal(size=(50, 4)).astype(np.float32)
    other = draw.normal(size=(6, 4)).astype(np.float32)
    labels = [number % 3 for number in range(50)]
    noisy, far = (np.hstack([rows, np.float32(size) * draw.normal(size=(len(rows), 1))])
                  .astype(np.float32) for rows, size in ((features, 1e-8), (other, 1e-6)))
    expected = ClassGaussians(features, labels).score(other)
    np.testing.assert_allclose(ClassGaussians(noisy, labels).score(far), expected, rtol=1e-5)


def test_detection_counts_pairs_and_rows() -> None:
    draw = np.random.default_rng(1)
    known = draw.integers(0, 40, 60).astype(float)  # with ties
    foreign = draw.integers(20, 60, 50).astype(float)
    found = detection(known, foreign)
    pairs = [(f > k) + (f == k) / 2 for f in foreign for k in known]
    assert found.auroc == pytest.approx(np.mean(pairs), abs=1e-12)
    # The lowest limit under which 95 % of the known rows pass.
    limit = next(x for x in sorted(known) if (known <= x).mean() >= 0.95)
    assert found.fpr95 == pytest.approx((foreign <= limit).mean(), abs=1e-12)
    with pytest.raises(peftref.PeftRefError, match="rows of both"):
        detection(known, foreign[:0])


@pytest.mark.parametrize("make", [bert_folder, llama_folder])
def test_features_are_what_the_logits_are_made_of(make: object, tmp_path: Path) -> None:
    """Also of a decoder, which scores every token, behind a prompt and with padded rows."""
    head = TaskHead("classification", ("a", "b", "c"))
    model = load_backbone(
        str(make(tmp_path / "model")), head, dtype="float32", device="cpu").model
    peftref.attach(model, "prompt_tuning(length=3)")
    rows = [{"input_ids": list(range(4, 4 + n)), "attention_mask": [1] * n, "labels": 0}
            for n in (5, 9, 3)]
    seen = look(model, rows, Collator(model.config.pad_token_id), 2)
    last = next(m for n, m in model.named_modules() if n in ("classifier", "score"))
    with torch.no_grad():
        again = last(torch.tensor(seen.features)).numpy()
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    np.testing.assert_allclose(again, seen.logits, atol=1e-5)
    np.testing.assert_allclose(seen.logits, torch.stack(alone), atol=1e-5)


def test_a_trained_adapter_tells_foreign_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bert_folder(tmp_path / "bert")
    write_rows(tmp_path / "rows.jsonl", 120)
    settings = run_settings(tmp_path / "bert", tmp_path / "rows.jsonl", steps=60,
                            evaluation={"at": [1.0]})
    TrainingSession(settings).fit("lora", rate=10.0, output=tmp_path / "a")
    # Two words over and over, and no label column.
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text("".join(
        json.dumps({"text": " ".join([f"w{n % 9 + 40}"] * (n % 7 + 3))}) + "\n" for n in range(40)
    ))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(tmp_path / "a"), "--ood", str(foreign), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)["ood"]
    assert set(told) == {"softmax", "energy", "mahalanobis"}
    assert told["mahalanobis"]["auroc"] > 0.9
    assert all(0 <= each["fpr95"] <= 1 for each in told.values())
