"""What a trained adapter does not know: a Gaussian over its tensors, fitted after training.

    posterior = peftref.laplace(adapted, training_batches)
    probabilities = posterior.predict(batch)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from peftref.adapted import Adapted
from peftref.errors import TrainingError

__all__ = ["Block", "Posterior", "calibration_error", "laplace"]

Batch = Mapping[str, Any]
Read = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Block:
    """Curvature of one tensor, seen as a matrix (m, n): ``sum_ij l_i r_j vec(u_i v_j^T)^(x2)``.

    Attributes:
        left: (m, a) orthonormal columns ``u``; ``right``: (n, b), those of the wide side ``v``.
        values: (a, b), the products ``l_i r_j``; all other directions have none.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    def products(self, gradients: Tensor, precision: float) -> Tensor:
        """Return ``G_c . (F + precision I)^-1 G_d`` (C, C) for gradients (C, m, n)."""
        flat = gradients.flatten(1)
        inside = (self.left.T @ gradients @ self.right).flatten(1)
        less = (self.values / (precision * (self.values + precision))).flatten()
        return flat @ flat.T / precision - (inside * less) @ inside.T


class Posterior:
    """A Gaussian around trained values, ``N(theta, (F + precision I)^-1)``, ``F`` in blocks.

    Args:
        adapted: as trained.
        blocks: curvature of each tensor.
        log_likelihood: of the rows that it was fitted on.
        read: takes logits (B, C) out of a result.
        precision: of the prior ``N(0, I / precision)``; None: where `evidence` is highest.
    """

    def __init__(
        self, adapted: Adapted, blocks: Mapping[str, Block], log_likelihood: float, read: Read,
        precision: float | None,
    ) -> None:
        self.adapted, self.blocks, self.log_likelihood = adapted, blocks, log_likelihood
        self._read = read
        self._values = torch.cat([block.values.flatten() for block in blocks.values()])
        held = adapted.trainable
        self._size = sum(float(held[name].detach().double().square().sum()) for name in blocks)
        self.precision = self._best() if precision is None else precision

    def evidence(self, precision: float) -> float:
        """Return the log marginal likelihood of the rows under a prior.

        ``log p(D | theta) - precision |theta|^2 / 2 - sum_k log(1 + e_k / precision) / 2`` with
        the eigenvalues ``e`` of the curvature.
        """
        volume = float(torch.log1p(self._values / precision).sum())
        return self.log_likelihood - precision * self._size / 2 - volume / 2

    def _best(self) -> float:
        found: Any = minimize_scalar(
            lambda log: -self.evidence(math.exp(log)), bounds=(-14.0, 14.0), method="bounded"
        )
        return math.exp(found.x)

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean (B, C) and covariance (B, C, C) of the model's linearisation."""
        means: list[Tensor] = []
        covariances: list[Tensor] = []
        with _still(self.adapted):
            for row in _rows(batch):
                logits, gradients = _jacobian(self.adapted, row, self._read)
                means.append(logits)
                covariances.append(sum((
                    self.blocks[name].products(gradients[name], self.precision)
                    for name in self.blocks
                ), torch.zeros(len(logits), len(logits)).to(logits)))
        return torch.stack(means), torch.stack(covariances)

    def predict(self, batch: Batch, *, samples: int = 1000, seed: int = 0) -> Tensor:
        """Return the mean of ``softmax`` (B, C) over ``samples`` draws of the logits."""
        mean, covariance = self.logits(batch)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp_min(0.0).sqrt().unsqueeze(1)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(samples, *mean.shape, generator=generator).to(mean)
        return (mean + torch.einsum("bcd,sbd->sbc", root, noise)).softmax(-1).mean(0)


def laplace(
    adapted: Adapted, batches: Iterable[Batch], *, rank: int = 32,
    precision: float | None = None, read: Read | None = None,
) -> Posterior:
    """Fit a Gaussian over the adapter's tensors; training and the tensors stay as they are.

    The curvature of a tensor is ``L x R / tr(L)`` (a Kronecker product) with ``L = sum G G^T``
    and ``R = sum G^T G`` over rows and classes, where the ``G`` are the gradients that the
    Gauss-Newton matrix is made of, ``sqrt(p_c) d log p_c``. So it needs gradients of tensors
    alone and is defined for any technique; of a vector it is the whole matrix. Of the wide side,
    the ``rank`` largest directions are kept. Laplace-LoRA, Yang et al. 2024,
    https://arxiv.org/abs/2308.13111

    Args:
        adapted: trained, not merged.
        batches: training rows with ``labels`` (B,), on the model's device.
        rank: directions of the wide side.
        precision: of the prior; None: the one of the highest marginal likelihood.
        read: takes the logits (B, C) of the classes out of a result; None: its ``logits``. For a
            language model, ``lambda out, batch: out.logits[:, -1, answers]``.

    Raises:
        TrainingError: nothing is trained, there are no rows, or the adapter is merged.
    """
    if adapted.merged:
        raise TrainingError("laplace needs the adapter's own tensors; unmerge it first")
    take = _logits if read is None else read
    sums = {name: _Sums(_matrix(tensor).shape, rank) for name, tensor in _trained(adapted).items()}
    likelihood, rows = 0.0, 0
    with _still(adapted):
        for batch in batches:
            for row in _rows(batch):
                logits, gradients = _jacobian(adapted, row, take)
                log_p = logits.log_softmax(-1)
                likelihood += float(log_p[int(row["labels"])])
                rows += 1
                p = log_p.exp()
                root = (torch.eye(len(p)).to(p) - p.unsqueeze(1)) * p.sqrt()
                for name, each in sums.items():
                    each.add(torch.einsum("ck,cmn->kmn", root, gradients[name]))
    if not rows or not sums:
        raise TrainingError("laplace needs trained tensors and rows to fit them on")
    blocks = {name: each.block() for name, each in sums.items()}
    return Posterior(adapted, blocks, likelihood, take, precision)


class _Sums:
    """``sum G G^T`` of the narrow side, and of the wide side a root of ``sum G^T G``."""

    def __init__(self, shape: Sequence[int], rank: int) -> None:
        self.turned = shape[0] > shape[1]
        self.rank = rank
        self.narrow: Tensor | None = None
        self.wide: Tensor | None = None  # (k, n); wide^T wide is the sum
        self.total = 0.0

    def add(self, gradients: Tensor) -> None:
        """Add gradients (C, m, n)."""
        each = gradients.mT if self.turned else gradients
        square = torch.einsum("cmn,ckn->mk", each, each)
        self.narrow = square if self.narrow is None else self.narrow + square
        self.total += float(square.trace())
        rows = each.flatten(0, 1)
        _, values, directions = _decomposed(
            rows if self.wide is None else torch.cat([self.wide, rows])
        )
        self.wide = (values.unsqueeze(1) * directions)[: self.rank]

    def block(self) -> Block:
        assert self.narrow is not None
        assert self.wide is not None
        values, left = torch.linalg.eigh(self.narrow)
        _, roots, right = _decomposed(self.wide)
        # Both factors have this trace; the curvature has it once.
        products = torch.outer(values.clamp_min(0.0), roots.square()) / (self.total or 1.0)
        if self.turned:
            return Block(right.T, left, products.T)
        return Block(left, right.T, products)


def _decomposed(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(rows, full_matrices=False)


def _trained(adapted: Adapted) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in adapted.trainable.items() if tensor.requires_grad}


def _matrix(tensor: Tensor) -> Tensor:
    """See a vector as one row, and more axes than two as the first and the rest."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def _logits(result: Any, _: Batch) -> Tensor:  # noqa: ANN401 - a model's output
    return result.logits


def _rows(batch: Batch) -> Iterator[Batch]:
    count = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    for number in range(count):
        yield {name: value[number:number + 1] if isinstance(value, Tensor) else value
               for name, value in batch.items()}


def _jacobian(adapted: Adapted, row: Batch, read: Read) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits (C,) of one row and their gradients (C, m, n) by tensor, in float64."""
    held = _trained(adapted)
    inputs = {name: value for name, value in row.items() if name != "labels"}
    with torch.enable_grad():
        logits = read(adapted.model(**inputs), row)[0]
        found: list[tuple[Tensor, ...]] = [
            torch.autograd.grad(
                value, tuple(held.values()), retain_graph=True, materialize_grads=True
            ) for value in logits
        ]
    gradients = {
        name: torch.stack([_matrix(each[index]) for each in found]).double()
        for index, name in enumerate(held)
    }
    return logits.detach().double(), gradients


@contextmanager
def _still(adapted: Adapted) -> Iterator[None]:
    """Without dropout and random routes."""
    training = adapted.model.training
    adapted.model.eval()
    try:
        yield
    finally:
        adapted.model.train(training)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return ``sum_b |B_b| / N |accuracy(B_b) - confidence(B_b)|`` over equal bins of confidence.

    Args:
        probabilities: (N, C).
        labels: (N,).
        bins: number of bins of (0, 1].
    """
    confidence, chosen = probabilities.double().max(-1)
    right = (chosen == labels).double()
    place = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins, dtype=torch.double, device=right.device)
    return float(gaps.index_add(0, place, right - confidence).abs().sum() / len(labels))
