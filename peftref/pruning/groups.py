"""Entries that are kept or cut together, and the choice of the best of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peftref.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Granularity", "Groups", "best", "er_densities"]

Granularity = Literal["entry", "piece", "row", "tensor"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Entries of a tensor in groups.

    Attributes:
        granularity: every entry for itself; pieces of a row; whole rows (first index); the tensor.
        pieces: equal parts that a row is cut into.
    """

    granularity: Granularity = "entry"
    pieces: int = 1

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse rows that cannot be cut so.

        Raises:
            TrainingError: the pieces do not divide the rows.
        """
        width = math.prod(shape[1:])
        if self.granularity == "piece" and width % self.pieces:
            raise TrainingError(
                f"prune: {self.pieces} pieces do not divide the rows of {name!r}, which have "
                f"{width} entries"
            )

    def sums(self, tensor: Tensor) -> Tensor:
        """Return the sum over each group."""
        if self.granularity == "entry":
            return tensor
        if self.granularity == "tensor":
            return tensor.sum()[None]
        rows = tensor.reshape(tensor.shape[0], -1)
        pieces = self.pieces if self.granularity == "piece" else 1
        return rows.reshape(rows.shape[0], pieces, -1).sum(-1)

    def spread(self, groups: Tensor, like: Tensor) -> Tensor:
        """Return a tensor shaped as ``like`` whose entries have the values of their groups."""
        if self.granularity == "entry":
            return groups
        if self.granularity == "tensor":
            return groups.expand(like.numel()).reshape(like.shape)
        width = like[0].numel() // groups.shape[1]
        return groups.repeat_interleave(width, 1).reshape(like.shape)


def best(scores: Mapping[str, Tensor], alive: Mapping[str, Tensor], keep: float,
         count: int | None = None) -> dict[str, Tensor]:
    """Return 0/1 tensors that keep exactly ``count`` groups, those with the highest scores.

    Of equal scores a fixed random draw decides: by position, a tensor without scores (LoRA's
    zero factor) would lose whole rows.

    Args:
        scores: of the groups of each tensor.
        alive: nonzero where a group can be chosen at all.
        keep: share of the groups alive; at least one is kept.
        count: how many, instead of ``keep``.

    Raises:
        TrainingError: there are fewer than ``count``.
    """
    import torch

    can = torch.cat([each.flatten() != 0 for each in alive.values()])
    flat = torch.cat([score.flatten() for score in scores.values()])
    flat = torch.where(can, flat, -math.inf)
    total = int(can.sum())
    wanted = max(1, round(keep * total)) if count is None else count
    if wanted > total:
        raise TrainingError(f"prune: {wanted} are to be kept, of only {total}")
    least = flat.kthvalue(flat.numel() - wanted + 1).values
    chosen = flat > least
    equal = (flat == least).nonzero()[:, 0]
    order = torch.randperm(len(equal), generator=torch.Generator().manual_seed(0))
    chosen[equal[order[: wanted - int(chosen.sum())].to(equal.device)]] = True
    parts = chosen.to(flat.dtype).split([score.numel() for score in scores.values()])
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
