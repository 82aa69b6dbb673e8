"""A loss that keeps what a factor of an edit lets through enough to make the stream again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.errors import CompositionError, unknown_name
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments, matches
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Reconstruct", "ReconstructArguments"]


class ReconstructArguments(ProcedureArguments):
    """Which matrices, and when.

    Attributes:
        encoder: ``member:tensor`` of a matrix (r, d) at an input; ``decoder``: (d, r), there too.
        weight: of the loss.
        during: phases in which it is added; none: always.
    """

    encoder: str
    decoder: str
    weight: float = Field(default=1.0, ge=0.0)
    during: tuple[str, ...] = ()


@procedures.register("reconstruct")
class Reconstruct(Procedure[ReconstructArguments]):
    """``weight * mean (B A f - f)^2`` over the real tokens ``f`` that enter a module.

    PEMA, Kim et al. 2024, https://arxiv.org/abs/2311.08590
    """

    name = "reconstruct"
    Arguments = ReconstructArguments

    def __init__(self, arguments: ReconstructArguments) -> None:
        super().__init__(arguments)
        self._phase = ""
        self._pairs: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._seen: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    @property
    def per_step(self) -> bool:
        return self.arguments.weight > 0

    def check(self, members: Sequence[str], others: Sequence[Procedure[Any]]) -> None:
        for entry in (self.arguments.encoder, self.arguments.decoder):
            if entry.partition(":")[0] not in members:
                what = unknown_name("member", entry.partition(":")[0], list(members))
                raise CompositionError(f"reconstruct: {what}")
        phases = {phase.name for other in others for phase in other.phases(10**6)}
        for name in self.arguments.during:
            if name not in phases:
                raise CompositionError(f"reconstruct: {unknown_name('phase', name, phases)}")

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        self._find(adapter)

    def _find(self, adapter: Adapter) -> None:
        first, second = (self._by_module(adapter, entry)
                         for entry in (self.arguments.encoder, self.arguments.decoder))
        fits = first.keys() == second.keys() and all(
            tuple(first[path].shape) == tuple(second[path].shape)[::-1] for path in first
        )
        if not first or not fits:
            raise CompositionError(
                f"reconstruct: {self.arguments.encoder!r} and {self.arguments.decoder!r} must be "
                "matrices (r, d) and (d, r) of the same modules"
            )
        self._pairs = [
            (adapter.model.get_submodule(path), first[path], second[path]) for path in first
        ]

    @staticmethod
    def _by_module(adapter: Adapter, entry: str) -> dict[str, Tensor]:
        held = adapter.tensors()
        return {
            tensor.owner: held[name] for name, tensor in adapter.planned.items()
            if tensor.owner and matches(name, tensor.member, [entry])
        }

    def before_phase(
        self,
        adapter: Adapter,
        phase: str,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        self._phase = phase

    @property
    def _acts(self) -> bool:
        during = self.arguments.during
        return self.arguments.weight > 0 and (not during or self._phase in during)

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        self._release()
        if not self._acts:
            return
        self._find(adapter)
        for index, (module, _, _) in enumerate(self._pairs):
            def keep(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                self._seen[index] = args[0]  # before any edit of the input

            self._hooks.append(module.register_forward_pre_hook(keep))

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        self._release()

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], {}

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        import torch

        if not self._acts:
            return None
        terms: list[Tensor] = []
        for index, (_, encoder, decoder) in enumerate(self._pairs):
            f = self._seen.pop(index).to(encoder.dtype)
            each = (f @ encoder.T @ decoder.T - f).square().mean(-1)
            mask = inputs.get("attention_mask")
            if mask is None or mask.shape != each.shape:
                terms.append(each.mean())
            else:
                terms.append((each * mask).sum() / mask.sum().clamp(min=1))
        return self.arguments.weight * torch.stack(terms).mean()

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self._phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._phase = str(state.get("phase", ""))
