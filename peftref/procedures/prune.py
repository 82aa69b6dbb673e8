"""Masks are computed once, before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftref.errors import TrainingError
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PruneProcedure", "PruneProcedureArguments", "er_densities"]

_MASK = "_mask"


class PruneProcedureArguments(ProcedureArguments):
    """As the coupling ``prune``; ``members``: comma-separated."""

    members: str
    criterion: Literal["magnitude", "snip", "random", "er"]
    keep: float = Field(gt=0.0, le=1.0)
    scope: Literal["global", "local"] = "global"
    batches: int = Field(default=4, gt=0)


@procedures.register("prune")
class PruneProcedure(Procedure[PruneProcedureArguments]):
    """Keep the ``keep`` share of entries with the highest score; exactly, ties by a fixed draw.

    Scores: ``magnitude`` |w|; ``snip`` |w * dL/dw| over batches; ``random`` uniform; ``er``
    random with a density per tensor proportional to (n + m) / (n m). SparseAdapter, He et al.
    2022, https://arxiv.org/abs/2210.04284
    """

    name = "prune"
    Arguments = PruneProcedureArguments

    @property
    def needs_data(self) -> bool:
        return self.arguments.criterion == "snip"

    @property
    def per_step(self) -> bool:
        return False

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        import torch

        tensors = adapter.tensors(tuple(self.arguments.members.split(",")))
        masked = {n: t for n, t in tensors.items() if f"{n}{_MASK}" in tensors}
        scores = self._scores(masked, batches, forward)
        dead = [name for name, score in scores.items() if not bool((score != 0).any())]
        if dead and self.arguments.scope == "global":
            raise TrainingError(
                f"prune: every {self.arguments.criterion} score of {dead[0]!r} is zero (its "
                "tensor or its partner is zero at first), so the whole tensor would be cut; "
                "use criterion random or er, scope local, or an initialiser without zeros"
            )
        if self.arguments.criterion == "er":
            groups = [{name: scores[name]} for name in scores]
            keeps = er_densities([t.shape for t in masked.values()], self.arguments.keep)
        elif self.arguments.scope == "local":
            groups = [{name: scores[name]} for name in scores]
            keeps = [self.arguments.keep] * len(groups)
        else:
            groups, keeps = [scores], [self.arguments.keep]
        with torch.no_grad():
            for group, keep in zip(groups, keeps, strict=True):
                for name, mask in top_entries(group, keep).items():
                    tensors[f"{name}{_MASK}"].copy_(mask)

    def _scores(
        self,
        masked: Mapping[str, Tensor],
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> dict[str, Tensor]:
        import torch

        if self.arguments.criterion == "magnitude":
            return {name: tensor.detach().abs() for name, tensor in masked.items()}
        if self.arguments.criterion == "snip":
            return self._sensitivity(masked, batches, forward)
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.rand(tensor.shape, generator=generator).to(tensor.device) + 1e-9
            for name, tensor in masked.items()
        }

    def _sensitivity(
        self,
        masked: Mapping[str, Tensor],
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> dict[str, Tensor]:
        import torch

        names, tensors = list(masked), list(masked.values())
        totals = [torch.zeros_like(tensor) for tensor in tensors]
        seen = 0
        for batch in islice(batches, self.arguments.batches):
            gradients = torch.autograd.grad(
                forward(batch), tensors, allow_unused=True, materialize_grads=True
            )
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
            seen += 1
        if not seen:
            raise TrainingError("prune: criterion snip needs at least one labelled batch")
        return {
            name: (tensor.detach() * total).abs()
            for name, tensor, total in zip(names, tensors, totals, strict=True)
        }


def top_entries(scores: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """Return 0/1 masks that keep exactly ``round(keep * N)`` of all N entries together."""
    import torch

    flat = torch.cat([score.flatten() for score in scores.values()])
    count = max(1, round(keep * flat.numel()))
    chosen = torch.zeros_like(flat)
    # Of equal scores a fixed random choice stays: by position, a tensor without scores (LoRA's
    # zero factor) would lose whole rows.
    order = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(0))
    order = order.to(flat.device)
    best = torch.sort(flat[order], descending=True, stable=True).indices[:count]
    chosen[order[best]] = 1
    parts = chosen.split([score.numel() for score in scores.values()])
    return {n: p.view_as(s) for (n, s), p in zip(scores.items(), parts, strict=True)}


def er_densities(shapes: list[tuple[int, ...]], keep: float) -> list[float]:
    """Return Erdos-Renyi densities: min(1, e (n + m) / (n m)), with the total equal to ``keep``."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape[-2:]) / math.prod(shape[-2:]) for shape in shapes]
    dense: set[int] = set()
    while True:
        wanted = keep * sum(sizes) - sum(sizes[i] for i in dense)
        free = [i for i in range(len(shapes)) if i not in dense]
        if not free:
            return [1.0] * len(shapes)
        epsilon = wanted / sum(raw[i] * sizes[i] for i in free)
        over = {i for i in free if epsilon * raw[i] > 1}
        if not over:
            return [1.0 if i in dense else max(0.0, epsilon * raw[i]) for i in range(len(shapes))]
        dense |= over
