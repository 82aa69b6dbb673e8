"""Tensors are kept near zero."""

from __future__ import annotations

from fnmatch import fnmatchcase

from pydantic import Field

from peftref.errors import TrainingError
from peftref.procedures.base import Adapter, Procedure, ProcedureArguments
from peftref.registry import procedures

__all__ = ["NormBall", "NormBallArguments"]


class NormBallArguments(ProcedureArguments):
    """``tensors``: ending (glob) of the names; ``radius``: of all rows of a tensor together."""

    members: str = ""
    tensors: str
    radius: float = Field(gt=0.0)


@procedures.register("norm_ball")
class NormBall(Procedure[NormBallArguments]):
    """After every step each row longer than ``radius / sqrt(rows)`` is cut to that length.

    COFT, Qiu et al. 2023, https://arxiv.org/abs/2306.07280
    """

    name = "norm_ball"
    Arguments = NormBallArguments

    def after_step(self, adapter: Adapter, step: int, total: int) -> None:
        import torch

        found = [t for n, t in adapter.trainable.items()
                 if fnmatchcase(n, f"*{self.arguments.tensors}")
                 and self.concerns(adapter.planned[n])]
        if not found:
            raise TrainingError(f"norm_ball: {self.arguments.tensors!r} ends no tensor's name")
        with torch.no_grad():
            for tensor in found:
                limit = self.arguments.radius / tensor.shape[0] ** 0.5
                norms = tensor.norm(dim=1, keepdim=True)
                tensor.mul_((limit / norms).clamp(max=1.0))
