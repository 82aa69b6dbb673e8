"""A loss that keeps vectors of adapter tensors orthogonal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Orthogonality", "OrthogonalityArguments"]


class OrthogonalityArguments(ProcedureArguments):
    """``tensors``: ending (glob) of the names; ``of``: which of their vectors; ``weight``."""

    members: str = ""
    tensors: str
    of: Literal["rows", "columns"]
    weight: float = Field(default=0.01, ge=0.0)


@procedures.register("orthogonality")
class Orthogonality(Procedure[OrthogonalityArguments]):
    """``weight`` times a penalty, added up over the tensors.

    * ``rows`` of a matrix: ``||T T^T - I||_F^2``, orthonormal rows (HRA, Yuan et al. 2024).
    * ``columns`` of (n, 2, 2): ``sum_i <a_i, b_i>^2``, lengths free (qGOFT, Ma et al. 2024).
    """

    name = "orthogonality"
    Arguments = OrthogonalityArguments

    def __init__(self, arguments: OrthogonalityArguments) -> None:
        super().__init__(arguments)
        self._held: list[Tensor] = []

    @property
    def per_step(self) -> bool:
        return self.arguments.weight > 0

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        self.before_step(adapter, 0, 0)

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        pattern = f"*{self.arguments.tensors}"
        names = [n for n in adapter.trainable
                 if fnmatchcase(n, pattern) and self.concerns(adapter.planned[n])]
        if not names:
            raise CompositionError(
                f"orthogonality: {self.arguments.tensors!r} is the end of no tensor's name; "
                f"tensors: {', '.join(list(adapter.trainable)[:5])}"
            )
        self._held = [adapter.trainable[name] for name in names]

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        if self.arguments.weight == 0.0:
            return None
        import torch

        parts = [penalty(tensor, self.arguments.of) for tensor in self._held]
        return self.arguments.weight * torch.stack(parts).sum()


def penalty(tensor: Tensor, of: str) -> Tensor:
    """Return how far the vectors of one tensor are from orthogonal."""
    import torch

    if of == "columns":
        first, second = tensor.unbind(-1)
        return ((first * second).sum(-1) ** 2).sum()
    eye = torch.eye(tensor.shape[0], dtype=tensor.dtype, device=tensor.device)
    return ((tensor @ tensor.mT - eye) ** 2).sum()
