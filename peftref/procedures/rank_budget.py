"""Ranks compete for a budget that shrinks while training runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from peftref.errors import TrainingError
from peftref.ir.primitive import TensorSpec
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.procedures.triplets import Triplet, check_ranks, orthogonality, triplets
from peftref.registry import procedures

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["RankBudget", "RankBudgetArguments", "budget_at"]


class RankBudgetArguments(ProcedureArguments):
    """The schedule and the score.

    ``target``: mean rank at the end. ``warmup`` and ``final``: shares of the steps before the
    budget shrinks and after it is reached. ``every``: steps between choices. ``orthogonality``:
    weight of the loss that keeps the factors orthonormal.
    """

    members: str = ""
    target: float = Field(gt=0.0)
    warmup: float = Field(default=0.1, ge=0.0, lt=1.0)
    final: float = Field(default=0.2, ge=0.0, lt=1.0)
    every: int = Field(default=1, gt=0)
    beta1: float = Field(default=0.85, gt=0.0, lt=1.0)
    beta2: float = Field(default=0.85, gt=0.0, lt=1.0)
    orthogonality: float = Field(default=0.5, ge=0.0)


def budget_at(step: int, total: int, first: int, last: int, warmup: int, final: int) -> int:
    """Return the number of ranks that may be in use at ``step`` of ``total``.

    ``first`` up to step ``warmup``, ``last`` in the final steps, between them
    ``last + (first - last) (1 - (t - warmup) / (total - final - warmup))^3``.
    """
    if step <= warmup:
        return first
    if step > total - final:
        return last
    left = 1 - (step - warmup) / (total - final - warmup)
    return int((first - last) * left**3 + last)


@procedures.register("rank_budget")
class RankBudget(Procedure[RankBudgetArguments]):
    """AdaLoRA: of ``L diag(v) R`` at all sites the least important ``v`` become zero.

    The importance of an entry is ``I U``, the smoothed ``|w g|`` and its smoothed deviation; of
    a rank it is that of its value plus the means over its row of ``R`` and its column of ``L``.
    A value that was set to zero may come back until the final steps. Zhang et al. 2023,
    https://arxiv.org/abs/2303.10512
    """

    name = "rank_budget"
    Arguments = RankBudgetArguments

    def __init__(self, arguments: RankBudgetArguments) -> None:
        super().__init__(arguments)
        self._smooth: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._parts: tuple[Triplet, ...] = ()

    def check_tensors(self, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        check_ranks(self.name, self.arguments.members, tensors)

    def before_step(self, adapter: Adapter, step: int, total: int) -> None:
        self._parts = triplets(adapter, self.name, self.arguments.members)

    def loss(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor | None:  # noqa: ANN401
        if not self.arguments.orthogonality:
            return None
        extra = orthogonality(self._parts)
        return None if extra is None else self.arguments.orthogonality * extra

    def after_step(self, adapter: Adapter, step: int, total: int) -> None:
        import torch

        a, done = self.arguments, step + 1
        parts = triplets(adapter, self.name, self.arguments.members)
        first = sum(part.values.numel() for part in parts)
        last = round(a.target * len(parts))
        if last > first:
            raise TrainingError(
                f"{self.name}: the target of {a.target:g} ranks a site is above the "
                f"{first / len(parts):g} that there are"
            )
        warmup, final = round(a.warmup * total), round(a.final * total)
        with torch.no_grad():
            if done <= total - final or not self._kept:
                self._score(parts)
            in_final = done > total - final
            if not (in_final and self._kept) and (
                in_final or (done > warmup and done % a.every == 0)
            ):
                budget = budget_at(done, total, first, last, warmup, final)
                self._choose(parts, first - budget)
            if in_final:
                for part in parts:
                    part.values.mul_(self._kept[part.name].to(part.values.dtype))

    def _score(self, parts: tuple[Triplet, ...]) -> None:
        a = self.arguments
        for part in parts:
            for kind, tensor in (("right", part.right), ("values", part.values),
                                 ("left", part.left)):
                if tensor.grad is None:
                    continue
                now = (tensor * tensor.grad).abs()
                mean, deviation = f"mean.{part.name}{kind}", f"deviation.{part.name}{kind}"
                old = self._smooth.get(mean, now.new_zeros(now.shape))
                self._smooth[mean] = a.beta1 * old + (1 - a.beta1) * now
                old = self._smooth.get(deviation, now.new_zeros(now.shape))
                away = (now - self._smooth[mean]).abs()
                self._smooth[deviation] = a.beta2 * old + (1 - a.beta2) * away

    def _importance(self, part: Triplet) -> Tensor:
        score = {kind: self._smooth[f"mean.{part.name}{kind}"]
                 * self._smooth[f"deviation.{part.name}{kind}"]
                 for kind in ("right", "values", "left")}
        return score["values"] + score["right"].mean(1) + score["left"].mean(0)

    def _choose(self, parts: tuple[Triplet, ...], cut: int) -> None:
        """Set the ``cut`` least important values to zero."""
        import torch

        scores = torch.cat([self._importance(part) for part in parts])
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[torch.argsort(scores, stable=True)[:cut]] = False
        sizes = [part.values.numel() for part in parts]
        for part, mask in zip(parts, kept.split(sizes), strict=True):
            self._kept[part.name] = mask
            part.values.mul_(mask.to(part.values.dtype))

    def state_dict(self) -> dict[str, Any]:
        return {**self._smooth, **{f"kept.{name}": mask for name, mask in self._kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = {n.removeprefix("kept."): t for n, t in state.items()
                      if n.startswith("kept.")}
        self._smooth = {n: t for n, t in state.items() if not n.startswith("kept.")}
