"""Ranks that are given to the sites that need them while training runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.errors import CompositionError
from peftref.ir.primitive import TensorSpec
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.procedures.triplets import Triplet, check_ranks, orthogonality, triplets
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["GrowRanks", "GrowRanksArguments"]

RESERVE = 1e-5
"""Value of the ranks that train ahead of being given."""


class GrowRanksArguments(ProcedureArguments):
    """When and how fast ranks are given.

    ``target``: mean rank at the end. ``warmup``: share of the steps before the first are given;
    ``every``: steps between; ``sites``: that gain at a time; ``gain``: ranks that each gains.
    """

    members: str = ""
    target: float = Field(gt=0.0)
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    every: int = Field(default=10, gt=0)
    sites: int = Field(default=2, gt=0)
    gain: int = Field(default=1, gt=0)
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    orthogonality: float = Field(default=0.1, ge=0.0)


@procedures.register("grow_ranks")
class GrowRanks(Procedure[GrowRanksArguments]):
    """IncreLoRA: every site starts with one rank; the most important sites gain more.

    ``W' = W + alpha / ranks * L diag(v) R``. A site scores ``sum |dW * G| / sqrt(n)`` with ``G``
    the gradient of the loss by ``dW``, smoothed as in AdaLoRA. ``gain`` ranks of each site train
    ahead with a fixed value of 1e-5 (advance learning). Tensors are as large as they can become,
    so shapes never change. Zhang et al. 2023, https://arxiv.org/abs/2308.12043
    """

    name = "grow_ranks"
    Arguments = GrowRanksArguments

    def __init__(self, arguments: GrowRanksArguments) -> None:
        super().__init__(arguments)
        self._mean: dict[str, float] = {}
        self._deviation: dict[str, float] = {}
        self._ranks: dict[str, int] = {}
        self._gradients: dict[str, Tensor] = {}
        self._parts: tuple[Triplet, ...] = ()
        self._handles: list[Any] = []

    def check_tensors(self, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        check_ranks(self.name, self.arguments.members, tensors)

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        self._parts = triplets(adapter, self.name, self.arguments.members)
        for part in self._parts:
            if "active" not in part.others:
                raise CompositionError(f"{self.name}: {part.name} has no frozen vector 'active'")
            self._ranks.setdefault(part.name, 1)
        self._open()
        self._gradients = {}
        self._watch(adapter)

    def _reserve(self, part: Triplet) -> int:
        """Ranks that train ahead: none once the budget is spent."""
        if sum(self._ranks.values()) >= round(self.arguments.target * len(self._ranks)):
            return 0
        return min(self.arguments.gain, len(part.values) - self._ranks[part.name])

    def _open(self) -> None:
        import torch

        with torch.no_grad():
            for part in self._parts:
                ranks = self._ranks[part.name]
                reserve = self._reserve(part)
                number = torch.arange(len(part.values), device=part.values.device)
                open_ = number < ranks + reserve
                part.others["active"].copy_(open_.to(part.values.dtype) / (ranks + 1e-5))
                ahead = open_ & (number >= ranks)
                part.values.masked_fill_(ahead, RESERVE)
                part.values.masked_fill_(~open_, 0.0)

    def _watch(self, adapter: Adapter) -> None:
        """Gather the gradient by each site's weight: outputs' gradients times inputs."""
        owners = {part.name: adapter.planned[f"{part.name}values"].owner for part in self._parts}

        def hook(name: str) -> Any:  # noqa: ANN401 - a hook of torch
            def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
                x = args[0].detach().flatten(0, -2)

                def keep(gradient: Tensor) -> None:
                    found = gradient.flatten(0, -2).t() @ x
                    self._gradients[name] = self._gradients.get(name, 0) + found

                if y.requires_grad:
                    y.register_hook(keep)

            return after

        self._handles = [adapter.model.get_submodule(path).register_forward_hook(hook(name))
                         for name, path in owners.items()]

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        if not self.arguments.orthogonality:
            return None
        extra = orthogonality(self._parts)
        return None if extra is None else self.arguments.orthogonality * extra

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        a = self.arguments
        for part in self._parts:
            gradient = self._gradients.get(part.name)
            if gradient is None:
                continue
            if gradient.shape != (len(part.left), part.right.shape[1]):
                raise CompositionError(
                    f"{self.name}: {part.name} edits a part of a fused projection, whose gradient "
                    "has no place of its own; choose sites that are whole modules"
                )
            scaled = part.values.detach() * part.others["active"]
            change = (part.left.detach() * scaled) @ part.right.detach()
            now = float((change * gradient).abs().sum()) / math.sqrt(change.numel())
            mean = a.beta1 * self._mean.get(part.name, 0.0) + (1 - a.beta1) * now
            old = self._deviation.get(part.name, 0.0)
            self._mean[part.name] = mean
            self._deviation[part.name] = a.beta2 * old + (1 - a.beta2) * abs(now - mean)
        self._gradients = {}

    def after_step(self, adapter: Adapter, step: int, total: int) -> None:
        a, done = self.arguments, step + 1
        if done > round(a.warmup * total) and done % a.every == 0:
            self._give(round(a.target * len(self._parts)))
        self._open()

    def _give(self, budget: int) -> None:
        """The ``sites`` that score highest gain ranks, while the budget lasts."""
        def score(part: Triplet) -> float:
            return self._mean.get(part.name, 0.0) * self._deviation.get(part.name, 0.0)

        room = [p for p in self._parts if self._ranks[p.name] < len(p.values)]
        for part in sorted(room, key=score, reverse=True)[: self.arguments.sites]:
            left = budget - sum(self._ranks.values())
            own = len(part.values) - self._ranks[part.name]
            self._ranks[part.name] += max(0, min(self.arguments.gain, left, own))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean, "deviation": self._deviation, "ranks": self._ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean = dict(state.get("mean", {}))
        self._deviation = dict(state.get("deviation", {}))
        self._ranks = {name: int(rank) for name, rank in state.get("ranks", {}).items()}
