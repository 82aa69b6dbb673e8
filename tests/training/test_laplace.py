"""The posterior over an adapter: against the whole matrix in float64, and what it is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import peftref
from peftref.training.laplace import calibration_error
from tests.catalogue.small_training import adapted as attached

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 14, 15], [8, 6, 4, 20]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
    "labels": torch.tensor([0, 2, 1, 0]),
}
VECTOR = {
    "technique": "one_vector", "reference": {"paper": "none", "url": "https://example.org"},
    "modules": [{
        "name": "scale", "site": {"select": "ffn.down", "layers": [1]},
        "function": {"vector": {"init": "ones"}},
        "interaction": {"insertion": "sequential", "integration": "rescale"},
    }],
}
LORA = "lora(rank=2, site='attention.value', layers=[1])"


def double(spec: Any) -> Any:
    """Attach in float64 with drawn values."""
    made = attached(spec)
    made.model.double()
    draw = torch.Generator().manual_seed(3)
    for tensor in made.trainable.values():
        tensor.data = torch.randn(tensor.shape, generator=draw, dtype=torch.double)
    made.model.eval()
    return made


def jacobian(made: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, C), and their gradients (B, C, ...) by tensor."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = made.model(**inputs).logits
    found = {
        name: torch.stack([
            torch.stack([torch.autograd.grad(value, tensor, retain_graph=True)[0] for value in row])
            for row in logits
        ]) for name, tensor in made.trainable.items()
    }
    return logits.detach(), found


def hessians(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def test_of_a_vector_it_is_the_exact_laplace_posterior() -> None:
    made = double(VECTOR)
    ((_, theta),) = made.trainable.items()
    posterior = peftref.laplace(made, [BATCH], rank=64)
    logits, gradients = jacobian(made, BATCH)
    (j,) = gradients.values()
    whole = torch.einsum("bci,bcd,bdj->ij", j, hessians(logits), j)
    eye = torch.eye(len(whole), dtype=torch.double)
    likelihood = float(logits.log_softmax(-1)[range(4), BATCH["labels"]].sum())

    def evidence(precision: float) -> float:
        volume = torch.logdet(whole + precision * eye) - len(eye) * math.log(precision)
        return likelihood - precision * theta.square().sum().item() / 2 - volume.item() / 2

    for precision in (0.01, 1.0, 30.0):
        assert posterior.evidence(precision) == pytest.approx(evidence(precision), rel=1e-9)
    best = posterior.precision
    assert evidence(best) > max(evidence(best * 1.01), evidence(best / 1.01))
    mean, covariance = posterior.logits(BATCH)
    inverse = torch.linalg.inv(whole + best * eye)
    expected = torch.einsum("bci,ij,bdj->bcd", j, inverse, j)
    torch.testing.assert_close(mean, logits)
    torch.testing.assert_close(covariance, expected, rtol=1e-9, atol=1e-10)


def test_of_matrices_it_is_the_kronecker_product_of_its_definition() -> None:
    made = double(LORA)
    posterior = peftref.laplace(made, [BATCH], rank=64, precision=0.7)
    logits, gradients = jacobian(made, BATCH)
    p = logits.softmax(-1)
    root = (torch.eye(3, dtype=torch.double) - p.unsqueeze(-1)) * p.sqrt().unsqueeze(1)
    torch.testing.assert_close(root @ root.mT, hessians(logits))
    expected = torch.zeros(4, 3, 3, dtype=torch.double)
    assert len(gradients) == 2
    for j in gradients.values():
        g = torch.einsum("bck,bcmn->bkmn", root, j).flatten(0, 1)
        left, right = (g @ g.mT).sum(0), (g.mT @ g).sum(0)
        whole = torch.kron(left, right) / left.trace()
        inverse = torch.linalg.inv(whole + 0.7 * torch.eye(len(whole), dtype=torch.double))
        flat = j.flatten(2)
        expected += torch.einsum("bci,ij,bdj->bcd", flat, inverse, flat)
    torch.testing.assert_close(posterior.logits(BATCH)[1], expected, rtol=1e-8, atol=1e-9)
    # Fewer directions of the wide side leave more of the prior: never less variance.
    less = peftref.laplace(made, [BATCH], rank=2, precision=0.7).logits(BATCH)[1]
    assert torch.linalg.eigvalsh(less - expected).min() > -1e-6
    # The rows may come in any batches, and a narrow prior is the model itself.
    halves = [{name: value[rows] for name, value in BATCH.items()}
              for rows in (slice(0, 1), slice(1, 4))]
    split = peftref.laplace(made, halves, rank=64, precision=0.7).logits(BATCH)[1]
    torch.testing.assert_close(split, expected, rtol=1e-8, atol=1e-9)
    posterior.precision = 1e12
    torch.testing.assert_close(posterior.predict(BATCH), p, rtol=0, atol=1e-5)


def test_predictions_average_over_the_posterior() -> None:
    made = double(LORA)
    posterior = peftref.laplace(made, [BATCH], precision=3.0)
    mean, covariance = posterior.logits(BATCH)
    draw = torch.distributions.MultivariateNormal(
        mean, covariance + 1e-9 * torch.eye(3, dtype=torch.double))
    torch.manual_seed(0)
    expected = draw.sample((40_000,)).softmax(-1).mean(0)
    found = posterior.predict(BATCH, samples=40_000)
    # Both are means of 40,000 numbers in 0..1: 0.01 is four of their deviations at least.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, dtype=torch.double))


def test_an_overconfident_adapter_is_better_calibrated() -> None:
    """Labels that are drawn anew for half of the rows, learnt by heart."""
    made = attached("lora(rank=4)")
    draw = torch.Generator().manual_seed(0)

    def rows(count: int) -> dict[str, Tensor]:
        ids = torch.randint(10, 60, (count, 6), generator=draw)
        truth = torch.randint(0, 3, (count,), generator=draw)
        ids[:, 2] = truth + 5
        drawn = torch.randint(0, 3, (count,), generator=draw)
        noisy = torch.rand(count, generator=draw) < 0.5
        return {"input_ids": ids, "labels": torch.where(noisy, drawn, truth)}

    train, test = rows(60), rows(200)
    tensors = [*made.trainable.values(), *made.head.values()]
    optimiser = torch.optim.Adam(tensors, lr=0.005)
    for _ in range(80):
        optimiser.zero_grad()
        made.model(**train).loss.backward()
        optimiser.step()
    made.model.eval()
    with torch.no_grad():
        plain = made.model(input_ids=test["input_ids"]).logits.softmax(-1)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    found = peftref.laplace(made, [train]).predict(test)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    labels = test["labels"]
    errors = calibration_error(plain, labels), calibration_error(found, labels)
    assert errors[0] > 0.2, "not overconfident"
    assert errors[1] < 0.7 * errors[0]
    losses = [-p.log()[range(200), labels].mean().item() for p in (plain, found)]
    assert losses[1] < losses[0]
    right = [(p.argmax(-1) == labels).double().mean().item() for p in (plain, found)]
    assert right[1] > right[0] - 0.05


def test_calibration_error_is_its_definition() -> None:
    draw = torch.Generator().manual_seed(1)
    probabilities = torch.randn(200, 3, generator=draw, dtype=torch.double).mul(2).softmax(-1)
    labels = torch.randint(0, 3, (200,), generator=draw)
    expected = 0.0
    for low in range(10):
        held = [(p.max().item(), p.argmax() == label) for p, label in zip(
            probabilities, labels, strict=True) if low / 10 < p.max() <= (low + 1) / 10]
        if held:
            confidence = sum(c for c, _ in held) / len(held)
            accuracy = sum(bool(r) for _, r in held) / len(held)
            expected += len(held) / 200 * abs(confidence - accuracy)
    assert calibration_error(probabilities, labels, 10) == pytest.approx(expected, abs=1e-12)


def test_what_has_no_posterior_is_refused() -> None:
    made = attached("lora")
    with pytest.raises(peftref.PeftRefError, match="rows to fit"):
        peftref.laplace(made, [])
    made.merge()
    with pytest.raises(peftref.PeftRefError, match="unmerge it first"):
        peftref.laplace(made, [BATCH])
