"""Only a random part of the gradient is used in each step."""

from __future__ import annotations

from pydantic import Field

from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

__all__ = ["GradientDropout", "GradientDropoutArguments"]


class GradientDropoutArguments(ProcedureArguments):
    """``keep``: share of the entries whose gradient is used."""

    members: str = ""
    keep: float = Field(default=0.3, gt=0.0, le=1.0)


@procedures.register("gradient_dropout")
class GradientDropout(Procedure[GradientDropoutArguments]):
    """``g <- g m / keep`` with ``m ~ Bernoulli(keep)`` for each entry and step.

    Before the optimiser's moments see it; the task head keeps its gradient. Child-Tuning F,
    Xu et al. 2021, https://arxiv.org/abs/2109.05687
    """

    name = "gradient_dropout"
    Arguments = GradientDropoutArguments

    def after_backward(self, adapter: Adapter, step: int, total: int) -> None:
        import torch

        keep = self.arguments.keep
        for name, parameter in adapter.trainable.items():
            if parameter.grad is not None and self.concerns(adapter.planned[name]):
                mask = torch.rand_like(parameter.grad) < keep
                parameter.grad.mul_(mask).div_(keep)
