"""Sums of trained adapters: against the formula, a solved problem and the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import peftref
from tests.catalogue.small_training import adapted as attached

BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), "labels": torch.tensor([0, 2])}


def artifacts(folder: Path, spec: str, count: int, **known: Any) -> list[Path]:
    """Save adapters with drawn values; the first seed draws their frozen tensors too."""
    paths: list[Path] = []
    for number in range(count):
        made = attached(spec, **known)
        draw = torch.Generator().manual_seed(number)
        for tensor in made.trainable.values():
            tensor.data = torch.randn(tensor.shape, generator=draw) * 0.3
        paths.append(made.save(folder / f"{spec}-{number}"))
    return paths


def test_factors_are_summed_and_not_products(tmp_path: Path) -> None:
    spec = "lora(rank=2, alpha=4.0)"
    paths = artifacts(tmp_path, spec, 3)
    made = attached(spec)
    done = peftref.combine(made, paths, [BATCH], evaluations=12, penalty=0.0)
    assert done.loss < done.backbone
    assert len(done.weights) == 3
    assert all(abs(weight) <= 1.5 for weight in done.weights)
    stored = [peftref.restore(attached("lora").detach(), path).state_dict() for path in paths]
    module = made.model.bert.encoder.layer[0].attention.self.query
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(9))
    name = next(n for n in stored[0] if "layer.0" in n and "query" in n and n.endswith("up.weight"))
    other = name.replace("up.weight", "down.weight")
    total = torch.zeros(32, 32, dtype=torch.double)
    for i, wi in enumerate(done.weights):
        for j, wj in enumerate(done.weights):  # B_i A_j for every pair
            total += wi * wj * stored[i][name].double() @ stored[j][other].double()
    with torch.no_grad():
        change = module(x) - torch.nn.functional.linear(x, module.weight, module.bias)
    torch.testing.assert_close(change.double(), 2.0 * x.double() @ total.T, rtol=1e-4, atol=1e-5)
    # The loss that was reported is that of the model as it is left.
    assert made.model.eval()(**BATCH).loss.item() == pytest.approx(done.loss, rel=1e-5)


def test_weights_of_a_convex_problem_are_solved() -> None:
    """``f(w) + p mean|w|`` for a quadratic ``f``, by the sub-gradient of each coordinate."""
    from peftref.search.combine import _search

    def loss(w: Any) -> float:
        return (w[0] - 0.6) ** 2 + 2.0 * (w[1] + 0.3) ** 2 + (w[2] - 0.01) ** 2

    done = _search(loss, 3, 30, 1.5, 0.3, None)
    # 2 a (w - c) = -(p / 3) sign(w), and zero where |2 a c| is below p / 3.
    solved = (0.6 - 0.05, -(0.3 - 0.025), 0.0)
    assert done.weights == pytest.approx(solved, abs=0.05)
    assert done.backbone == loss([0.0, 0.0, 0.0])


def test_no_gain_leaves_the_backbone(tmp_path: Path) -> None:
    spec = "lora(rank=2)"
    made = attached(spec)
    done = peftref.combine(made, artifacts(tmp_path, spec, 2), [BATCH], evaluations=6, penalty=1e6)
    assert done.weights == (0.0, 0.0)
    assert done.loss == done.backbone
    with torch.no_grad():
        found = made.model.eval()(**BATCH).logits
        with made.disabled():
            torch.testing.assert_close(found, made.model(**BATCH).logits, rtol=0, atol=1e-6)


def test_what_cannot_be_summed_is_refused(tmp_path: Path) -> None:
    made, lora = attached("lora(rank=2)"), artifacts(tmp_path, "lora(rank=2)", 1)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    with pytest.raises(peftref.PeftRefError, match="another composition"):
        peftref.combine(made, artifacts(tmp_path, "bitfit", 1), [BATCH])
    with pytest.raises(peftref.PeftRefError, match="at least one each"):
        peftref.combine(made, lora, [])
    wrong = attached("lora(rank=2)")
    wrong.model.bert.embeddings.LayerNorm.weight.data += 1
    with pytest.raises(peftref.PeftRefError, match="other weights"):
        peftref.combine(wrong, lora, [BATCH])
    with pytest.raises(peftref.PeftRefError, match="not the backbone"):
        peftref.combine(attached("ia3"), artifacts(tmp_path, "ia3", 2), [BATCH])
    with pytest.raises(peftref.PeftRefError, match="drawn from seed 1"):
        peftref.combine(attached("lora_fa"), artifacts(tmp_path, "lora_fa", 1, seed=1), [BATCH])
    nan = {**BATCH, "labels": torch.tensor([-100, -100])}
    with pytest.raises(peftref.PeftRefError, match="not a number"):
        peftref.combine(made, lora, [nan], evaluations=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
