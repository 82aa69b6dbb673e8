"""Members that begin where an earlier training ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftref.errors import CompositionError, unknown_name
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StartFrom", "StartFromArguments"]


class StartFromArguments(ProcedureArguments):
    """``member`` starts at the values in ``artifact``, a folder; empty: at its own first ones."""

    member: str
    artifact: str = ""


@procedures.register("start_from")
class StartFrom(Procedure[StartFromArguments]):
    """A member starts at the values of a saved adapter of the same technique and sizes.

    They are read when the composition is attached, and are part of what is saved then, so that
    the folder is needed once.
    """

    name = "start_from"
    Arguments = StartFromArguments

    @property
    def per_step(self) -> bool:
        return False

    def check(self, members: Sequence[str], others: Sequence[Procedure[Any]]) -> None:
        if self.arguments.member not in members:
            what = unknown_name("member", self.arguments.member, list(members))
            raise CompositionError(f"start_from: {what}")

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        import torch

        if not self.arguments.artifact:
            return
        stored = adapter.stored(self.arguments.artifact, self.arguments.member)
        own = adapter.tensors((self.arguments.member,))
        with torch.no_grad():
            for name, value in stored.items():
                own[name].copy_(value)
