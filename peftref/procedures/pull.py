"""A loss that pulls tensors to a fixed value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from peftref.errors import CompositionError
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments, matches
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Pull", "PullArguments"]


class PullArguments(ProcedureArguments):
    """``tensors``: ``member:glob``; ``to``: the zero or the identity matrix; ``weight`` of it."""

    tensors: str
    to: Literal["zero", "identity"] = "zero"
    weight: float = Field(default=0.01, ge=0.0)


@procedures.register("pull")
class Pull(Procedure[PullArguments]):
    """``weight * sum over the tensors of ||T - T_0||_F^2``, ``T_0`` zero or the identity.

    AdapterFusion keeps its value matrices near the identity so, Pfeiffer et al. 2021,
    https://arxiv.org/abs/2005.00247
    """

    name = "pull"
    Arguments = PullArguments

    def __init__(self, arguments: PullArguments) -> None:
        super().__init__(arguments)
        self._tensors: list[Tensor] = []

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        self._find(adapter)

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        self._find(adapter)

    def _find(self, adapter: Adapter) -> None:
        found = adapter.tensors()
        self._tensors = [
            found[name] for name, planned in adapter.planned.items()
            if matches(name, planned.member, [self.arguments.tensors])
        ]
        if not self._tensors:
            raise CompositionError(f"pull: {self.arguments.tensors!r} names no tensor")

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        import torch

        total = None
        for tensor in self._tensors:
            if not tensor.requires_grad:
                continue
            target = torch.zeros_like(tensor)
            if self.arguments.to == "identity":
                target = torch.eye(*tensor.shape, dtype=tensor.dtype, device=tensor.device)
            term = (tensor - target).square().sum()
            total = term if total is None else total + term
        return None if total is None else self.arguments.weight * total
