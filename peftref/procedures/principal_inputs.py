"""Low-rank factors that start at the main directions of what their layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.errors import CompositionError, TrainingError
from peftref.ir.primitive import TensorSpec
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PrincipalInputs", "PrincipalInputsArguments"]

DOWN, ACTIVE = "down.weight", "active"


class PrincipalInputsArguments(ProcedureArguments):
    """``rank``: mean rank of a site; a site that has more rows may get more of them."""

    members: str = ""
    rank: int = Field(gt=0)
    batches: int = Field(default=8, gt=0)


class _Inputs:
    """Sum, second moment and number of the rows that a module has read."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.moment: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.moment = self.moment + rows.t() @ rows

    def components(self) -> tuple[Tensor, Tensor]:
        """Shares of the variance, largest first, and their directions as rows."""
        import torch

        if not isinstance(self.total, torch.Tensor) or not isinstance(self.moment, torch.Tensor):
            raise TrainingError("principal_inputs: a module with an adapter was never called")
        centre = self.total / self.count
        covariance = self.moment / self.count - torch.outer(centre, centre)
        variances, directions = torch.linalg.eigh(covariance)
        variances, directions = variances.flip(0).clamp(min=0), directions.flip(1).t()
        # An eigenvector has no sign of its own: the largest entry is made positive.
        signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
        return variances / variances.sum().clamp(min=1e-30), directions * signs


@procedures.register("principal_inputs")
class PrincipalInputs(Procedure[PrincipalInputsArguments]):
    """EVA: ``A`` is made of the principal components of the layer's inputs, padding left out.

    Ranks go to the sites whose components explain most: the largest shares of variance of all
    sites win, as many as ``rank`` a site. Paischer et al. 2024, https://arxiv.org/abs/2410.07170
    """

    name = "principal_inputs"
    Arguments = PrincipalInputsArguments

    @property
    def needs_data(self) -> bool:
        return True

    @property
    def per_step(self) -> bool:
        return False

    @property
    def batches(self) -> int:
        return self.arguments.batches

    def check_tensors(self, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        members = self.arguments.members
        for member, spec in tensors:
            own = not members or member in members.split(",")
            if own and spec.name == DOWN and spec.share is not None:
                raise CompositionError(
                    f"principal_inputs: {member}'s {DOWN} is shared by sites that read different "
                    "inputs"
                )

    def setup(
        self,
        adapter: Adapter,
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> None:
        import torch

        sites = {n: p for n, p in adapter.planned.items()
                 if p.spec.name == DOWN and self.concerns(p)}
        if not sites:
            raise CompositionError(f"principal_inputs: no member has a tensor {DOWN}")
        seen = self._watch(adapter.model, {p.owner for p in sites.values()}, batches, forward)
        parts = {name: seen[planned.owner].components() for name, planned in sites.items()}
        tensors = adapter.tensors()
        with torch.no_grad():
            for name, (_, directions) in parts.items():
                # Copies of a mix start alike: what they read is the same.
                tensors[name].copy_(directions[: tensors[name].shape[-2]])
            self._share_out(tensors, {n: shares for n, (shares, _) in parts.items()})

    def _watch(
        self,
        model: nn.Module,
        paths: set[str],
        batches: Iterable[Mapping[str, Any]],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ) -> dict[str, _Inputs]:
        import torch

        seen = {path: _Inputs() for path in paths}
        mask: list[Tensor | None] = [None]

        def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
                x, real = args[0], mask[0]
                whole = real is not None and real.shape == x.shape[:-1]
                seen[path].add(x[real.bool()] if whole and real is not None else x.flatten(0, -2))

            return keep

        handles = [model.get_submodule(path).register_forward_pre_hook(hook(path))
                   for path in paths]
        found = False
        try:
            for batch in batches:
                mask[0], found = batch.get("attention_mask"), True
                with torch.no_grad():
                    forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise TrainingError("principal_inputs: needs at least one batch")
        return seen

    def _share_out(self, tensors: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> None:
        """Open the ranks with the largest shares of variance, ``rank`` a site on average."""
        import torch

        masks = {name: tensors.get(f"{name.removesuffix(DOWN)}{ACTIVE}") for name in shares}
        if any(mask is None for mask in masks.values()):
            return  # every site keeps all of its ranks
        own = {name: shares[name][: tensors[name].shape[-2]] for name in shares}
        pooled = torch.cat(list(own.values()))
        opened = torch.zeros_like(pooled)
        opened[torch.argsort(pooled, descending=True, stable=True)[
            : self.arguments.rank * len(own)]] = 1
        for (name, _), part in zip(own.items(), opened.split([len(s) for s in own.values()]),
                                   strict=True):
            mask = masks[name]
            if mask is not None:
                mask.copy_(part)
