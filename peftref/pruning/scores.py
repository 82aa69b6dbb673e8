"""How much the groups of each tensor matter: more is better, never compared across criteria."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from peftref.errors import TrainingError
from peftref.pruning.groups import Groups

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FROM_DATA", "OF_PRODUCTS", "Data", "score"]

Batch = Mapping[str, Any]
Tensors = Mapping[str, "Tensor"]

FROM_DATA = ("snip", "grasp", "fisher", "gradient", "importance")
OF_PRODUCTS = ("magnitude", "snip", "grasp", "importance")
"""Criteria that are zero wherever the tensor is."""


@dataclass(frozen=True, slots=True)
class Data:
    """What gradients are taken of.

    Attributes:
        batches: with labels.
        forward: gives the loss of a batch, its mean over examples.
        limit: batches at most.
        by_example: one example for each backward, where the criterion adds up over backwards.
    """

    batches: Iterable[Batch]
    forward: Callable[[Batch], Tensor]
    limit: int
    by_example: bool = True

    def __iter__(self) -> Iterator[Batch]:
        seen = False
        for batch in islice(self.batches, self.limit):
            seen = True
            yield batch
        if not seen:
            raise TrainingError("prune: a criterion of gradients needs at least one labelled batch")

    def parts(self) -> Iterator[Batch]:
        """The batches, or their examples one by one."""
        for batch in self:
            if not self.by_example:
                yield batch
                continue
            length = len(next(iter(batch.values())))
            for row in range(length):
                yield {name: value[row : row + 1] for name, value in batch.items()}


def score(criterion: str, tensors: Tensors, neutral: Mapping[str, float], groups: Groups,
          data: Data) -> dict[str, Tensor]:
    """Return the score of each group of each tensor; ``w`` is the change from ``neutral``.

    * ``magnitude``: sum |w|.
    * ``random``: uniform, the same for the same shapes.
    * ``snip``: |sum w g| with the gradient summed over batches (Lee et al. 2019).
    * ``grasp``: sum w (H g), kept where largest (Wang et al. 2020).
    * ``gradient``: sum g^2 of the summed gradient (SAM, Fu et al. 2023).
    * ``fisher``: mean over examples of g^2, with true labels (FISH mask, Sung et al. 2021).
    * ``importance``: mean over examples of |sum w g|, the gradient of a gate on the group
      (XPrompt, Ma et al. 2022).
    """
    with _differentiable(tensors):
        if criterion in FROM_DATA:
            return _of_gradients(criterion, tensors, neutral, groups, data)
    return _of_values(criterion, tensors, neutral, groups)


def _of_values(criterion: str, tensors: Tensors, neutral: Mapping[str, float],
               groups: Groups) -> dict[str, Tensor]:
    import torch

    if criterion == "magnitude":
        return {n: groups.sums((t.detach() - neutral[n]).abs()) for n, t in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shape = groups.sums(tensor.detach()).shape
        found[name] = torch.rand(shape, generator=generator).to(tensor.device) + 1e-9
    return found


def _of_gradients(criterion: str, tensors: Tensors, neutral: Mapping[str, float],
                  groups: Groups, data: Data) -> dict[str, Tensor]:
    change = {n: t.detach() - neutral[n] for n, t in tensors.items()}
    if criterion in ("fisher", "importance"):
        totals: dict[str, Tensor] = {}
        count = 0
        for batch in data.parts():
            found = _gradients(data.forward(batch), tensors)
            for name, g in found.items():
                own = g**2 if criterion == "fisher" else change[name] * g
                value = groups.sums(own).abs()
                totals[name] = totals[name] + value if name in totals else value
            count += 1
        return {name: total / count for name, total in totals.items()}
    whole = _summed(tensors, (_gradients(data.forward(batch), tensors) for batch in data))
    if criterion == "gradient":
        return {name: groups.sums(g**2) for name, g in whole.items()}
    if criterion == "snip":
        return {name: groups.sums(change[name] * g).abs() for name, g in whole.items()}
    bent = _summed(tensors, (_curved(data.forward, batch, tensors, whole) for batch in data))
    return {name: groups.sums(change[name] * h) for name, h in bent.items()}


def _gradients(value: Tensor, tensors: Tensors, *, again: bool = False) -> dict[str, Tensor]:
    import torch

    found = torch.autograd.grad(
        value, list(tensors.values()), create_graph=again, allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(tensors, found, strict=True))


def _curved(forward: Callable[[Batch], Tensor], batch: Batch, tensors: Tensors,
            direction: Tensors) -> dict[str, Tensor]:
    """``H d`` as the gradient of ``<d, g>``; fused attention and ops have no second derivative."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from peftref.ops.choice import plain_forms

    with sdpa_kernel(SDPBackend.MATH), plain_forms():
        first = _gradients(forward(batch), tensors, again=True)
        terms = [(direction[name].detach() * g).sum() for name, g in first.items()]
        return _gradients(torch.stack(terms).sum(), tensors)


def _summed(tensors: Tensors, found: Iterable[Tensors]) -> dict[str, Tensor]:
    import torch

    totals = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for gradients in found:
        for name, g in gradients.items():
            totals[name] += g
    return {name: total.detach() for name, total in totals.items()}


@contextmanager
def _differentiable(tensors: Tensors) -> Iterator[None]:
    """Let tensors that rest have gradients meanwhile."""
    before = [(tensor, tensor.requires_grad) for tensor in tensors.values()]
    for tensor, _ in before:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor, trained in before:
            tensor.requires_grad_(trained)
