"""Low-rank updates ``L diag(v) R`` of the members of a composition, by site."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftref.errors import CompositionError
from peftref.ir.plan import PlannedTensor
from peftref.ir.primitive import TensorSpec
from peftref.procedures.base import Adapter

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RIGHT", "Triplet", "check_ranks", "orthogonality", "triplets"]

RIGHT, VALUES, LEFT = "right.weight", "values", "left.weight"
"""Names that a technique gives the three tensors, so that procedures find them."""


@dataclass(frozen=True, slots=True)
class Triplet:
    """``right`` (r, d_in), ``values`` (r), ``left`` (d_out, r) of one site.

    ``others`` are the tensors that stand beside them, by their local names.
    """

    name: str
    right: Tensor
    values: Tensor
    left: Tensor
    others: dict[str, Tensor]


def triplets(adapter: Adapter, asker: str, members: str = "") -> tuple[Triplet, ...]:
    """Return the triplets of the named members (none: of all), in the order of the plan.

    Raises:
        CompositionError: there is none.
    """
    found = adapter.tensors()
    sites: dict[str, dict[str, Tensor]] = {}
    wanted = _of_members(adapter, members)
    for name, planned in wanted.items():
        prefix = name.removesuffix(planned.spec.name)
        sites.setdefault(prefix, {})[planned.spec.name] = found[name]
    result = tuple(
        Triplet(prefix, own[RIGHT], own[VALUES], own[LEFT],
                {n: t for n, t in own.items() if n not in (RIGHT, VALUES, LEFT)})
        for prefix, own in sites.items() if {RIGHT, VALUES, LEFT} <= own.keys()
    )
    if not result:
        raise CompositionError(
            f"{asker}: no member has the tensors {RIGHT}, {VALUES} and {LEFT} at one site"
        )
    return result


def check_ranks(asker: str, members: str, tensors: Iterable[tuple[str, TensorSpec]]) -> None:
    """Refuse triplets whose ranks are not their own.

    Raises:
        CompositionError: they are copies of a mix, or several sites share them.
    """
    for member, spec in tensors:
        if spec.name != VALUES or (members and member not in members.split(",")):
            continue
        if spec.stacked or spec.share is not None:
            what = "copies of a mix have" if spec.stacked else "shared tensors have"
            raise CompositionError(f"{asker}: {what} no ranks of their own (member {member})")


def _of_members(adapter: Adapter, members: str) -> dict[str, PlannedTensor]:
    names = members.split(",") if members else None
    return {n: p for n, p in adapter.planned.items() if names is None or p.member in names}


def orthogonality(parts: Iterable[Triplet]) -> Tensor | None:
    """Return the mean of ``||L^T L - I||_F`` and ``||R R^T - I||_F`` over all triplets."""
    import torch

    terms: list[Tensor] = []
    for part in parts:
        for gram in (part.right @ part.right.t(), part.left.t() @ part.left):
            eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            terms.append(torch.linalg.norm(gram - eye))
    return torch.stack(terms).mean() if terms else None
